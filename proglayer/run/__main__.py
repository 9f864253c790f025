"""`python -m proglayer.run RUN -o FOLDER`: the model of a run, for `transformers`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from proglayer.console import say
from proglayer.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.run",
        description="Write the model of a run of model=causal_lm as a folder of transformers.",
    )
    parser.add_argument("run", type=Path, help="the folder of a completed run")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder to be made")
    options = parser.parse_args(arguments)
    from proglayer.run.export import export_run

    folder = export_run(options.run, options.output)
    say(f"model: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
