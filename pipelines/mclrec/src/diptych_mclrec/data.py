"""The names under which the data rooms are known to other programs."""

from diptych_mclrec.check import check_events
from diptych_mclrec.prepare import prepare
from diptych_mclrec.read import read_events
from diptych_mclrec.sequences import Catalogue, EventTable, Sequences
from diptych_mclrec.split import Split, split_sequences

__all__ = [
    "Catalogue",
    "EventTable",
    "Sequences",
    "Split",
    "check_events",
    "prepare",
    "read_events",
    "split_sequences",
]
