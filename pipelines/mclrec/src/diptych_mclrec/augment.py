"""The names under which the views are known to other programs."""

from diptych_mclrec.views import crop, mask, reorder, two_views

__all__ = ["crop", "mask", "reorder", "two_views"]
