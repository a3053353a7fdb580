"""Prostate zones on MRI: from series and partly labelled masks to checked, prepared studies."""
