"""A pipeline as small as the contract allows."""
