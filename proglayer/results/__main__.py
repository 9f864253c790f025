"""The command `python -m proglayer.results FOLDER...`: print and export records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from proglayer.console import console
from proglayer.errors import UserError, run_command
from proglayer.results.read import load
from proglayer.results.show import print_results

NOT_DONE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        its exit status: 1 if any run failed, 2 for a folder that is not there or holds no run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.results",
        description="Print the table of every run in sweeps or single runs, finished or not.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a sweep, a run, or a pile")
    parser.add_argument("--csv", metavar="DIR", help="also write the tables as CSV into DIR")
    parser.add_argument("--parquet", metavar="DIR", help="also write them as Parquet into DIR")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options), failed=NOT_DONE)


def _run(options: argparse.Namespace) -> int:
    results = load(*options.folders)
    print_results(results, console())
    if results.runs.empty and not results.failures:
        raise UserError(f"no run in {', '.join(options.folders)}")
    if options.csv:
        results.to_csv(options.csv)
    if options.parquet:
        results.to_parquet(options.parquet)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
