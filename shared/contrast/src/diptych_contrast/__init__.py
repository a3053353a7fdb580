"""Contrastive losses, exact and tiled: memory grows with N x D, never with N x N."""

from diptych_contrast.errors import ContrastInputError, ContrastWarning

__all__ = ["ContrastInputError", "ContrastWarning"]
