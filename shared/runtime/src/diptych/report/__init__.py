"""The report of a run: one HTML file that needs no network and no script."""

from diptych.report.page import render
from diptych.report.pictures import save_pictures

__all__ = ["render", "save_pictures"]
