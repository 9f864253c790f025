"""The command `python -m proglayer.results FOLDER...`: print, follow and export records."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from proglayer.console import console
from proglayer.results.frames import load
from proglayer.results.summary import MOST_ROWS, print_results, watch


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives its exit status: 1 if any run failed, 2 for a folder that is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.results",
        description="Print the table of every run in sweeps or single runs, finished or not.",
        epilog="Exit status: 0; 1 if a run failed, was lost or left a record that cannot be read; "
        "2 if a folder is not there or cannot be written.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a sweep, a run, or a pile")
    parser.add_argument(
        "--all", action="store_true", help=f"show every run, also of more than {MOST_ROWS}"
    )
    parser.add_argument("--csv", metavar="DIR", help="also write the tables as CSV into DIR")
    parser.add_argument("--parquet", metavar="DIR", help="also write them as Parquet into DIR")
    parser.add_argument("--watch", action="store_true", help="follow until all runs have ended")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=5.0, help="how often --watch looks (5)"
    )
    options = parser.parse_args(arguments)
    if not options.every > 0:
        parser.error("--every must be more than 0 seconds")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Better a question mark for an arrow than no table where the locale knows only ASCII.
            stream.reconfigure(errors="replace")
    out = console()
    try:
        if options.watch:
            results = watch(options.folders, options.every, out)
        else:
            results = load(*options.folders)
        print_results(results, out, whole=options.all)
        if options.csv:
            results.to_csv(options.csv)
        if options.parquet:
            results.to_parquet(options.parquet)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
        print(f"error: {where}", file=sys.stderr)
        return 2
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
