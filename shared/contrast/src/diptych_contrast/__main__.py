"""``python -m diptych_contrast list | explain NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.registry import explain, losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of losses, or all about one."""
    parser = argparse.ArgumentParser(prog="python -m diptych_contrast", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="all losses, one a line")
    one = verbs.add_parser("explain", help="formula, paper, arguments and reference of a loss")
    one.add_argument("name", metavar="NAME")
    given = parser.parse_args(arguments)
    if given.verb == "list":
        for spec in losses().values():
            print(f"{spec.name:15} {spec.paper}")
        return 0
    try:
        print(explain(given.name))
    except ContrastInputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
