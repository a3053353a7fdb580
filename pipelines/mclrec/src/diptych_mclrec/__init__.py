"""Sequential recommendation and clinical event sequences (MCLRec), from tables to rankings."""
