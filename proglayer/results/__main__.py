"""The command `python -m proglayer.results FOLDER...`: print, follow and export records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from proglayer.console import console
from proglayer.errors import UserError, run_command
from proglayer.results.difference import difference, difference_table
from proglayer.results.frames import load
from proglayer.results.summary import print_results, watch

NOT_DONE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        its exit status: 1 if any run failed, 2 for a folder that is not there or holds no run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.results",
        description="Print the table of every run in sweeps or single runs, finished or not.",
        epilog="Exit status: 0; 1 if a run failed, was lost or left a record that cannot be read; "
        "2 if a folder is not there, holds no run or cannot be written.",
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="a sweep, a run, or a pile")
    parser.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="compare two runs: settings, code, figures"
    )
    parser.add_argument("--csv", metavar="DIR", help="also write the tables as CSV into DIR")
    parser.add_argument("--parquet", metavar="DIR", help="also write them as Parquet into DIR")
    parser.add_argument("--watch", action="store_true", help="follow until all runs have ended")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=5.0, help="how often --watch looks (5)"
    )
    options = parser.parse_args(arguments)
    if options.diff:
        if options.folders or options.watch or options.csv or options.parquet:
            parser.error("--diff takes two runs and nothing else")
        return run_command(lambda: _diff(*options.diff), failed=NOT_DONE)
    if not options.folders:
        parser.error("name a FOLDER, or two runs with --diff")
    if not options.every > 0:
        parser.error("--every must be more than 0 seconds")
    for form in ("csv", "parquet"):
        folder = Path(getattr(options, form) or "tables")
        if folder.suffix == f".{form}" and not folder.is_dir():
            parser.error(
                f"--{form} takes a folder, for there are several tables, and {folder} looks like "
                f"a file: write --{form} {folder.with_suffix('')}"
            )
    return run_command(lambda: _run(options), failed=NOT_DONE)


def _diff(a: str, b: str) -> int:
    console().print(difference_table(difference(a, b), a, b))
    return 0


def _run(options: argparse.Namespace) -> int:
    out = console()
    if options.watch:
        results = watch(options.folders, options.every, out)
    else:
        results = load(*options.folders)
    print_results(results, out)
    if results.runs.empty and not results.failures:
        raise UserError(f"no run in {', '.join(options.folders)}")
    if options.csv:
        results.to_csv(options.csv)
    if options.parquet:
        results.to_parquet(options.parquet)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
