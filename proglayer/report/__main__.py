"""`python -m proglayer.report FOLDER... -o report/`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from proglayer.errors import run_command
from proglayer.report.arms import MARGIN
from proglayer.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives its exit status: 2 for folders that cannot be read or written."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.report",
        description="Write the report of sweeps and runs: a page, figures and tables.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a sweep, a run, or a pile")
    parser.add_argument(
        "-o", "--out", metavar="DIR", default="report", help="where the report goes (report)"
    )
    parser.add_argument(
        "--margin",
        metavar="POINTS",
        type=_positive,
        help="a difference in accuracy within this many points counts as none "
        f"({MARGIN:g}, or what the study was settled with)",
    )
    options = parser.parse_args(arguments)
    folders, out, margin = options.folders, options.out, options.margin
    return run_command(lambda: print(write_report(folders, out, margin)), failed=2)


def _positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError(text)
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
