"""`python -m proglayer.store list | verify | prune`: what is there, is it whole, make room."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from proglayer.console import Columns, console, one_line, table
from proglayer.errors import run_command
from proglayer.store.listing import StageInfo, contents_of, delete, prunable, verify
from proglayer.store.marker import MARKER, NotAStoreError, read_marker
from proglayer.store.stages import FORMAT

# So many names of what is not ours are printed.
MOST_NAMED = 20
SIZES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
SIZES |= {unit[0]: size for unit, size in SIZES.items()}
AGES = {"d": 86_400.0, "h": 3_600.0, "m": 60.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1 if files were damaged, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.store", description="Trained phases."
    )
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(os.environ.get("PROGLAYER_STAGES") or "multirun/.stages"),
        help="the store (default: $PROGLAYER_STAGES, else multirun/.stages)",
    )
    size, age = _quantity(SIZES, "500MB, 20GB"), _quantity(AGES, "30d, 12h, 5m")
    parser.add_argument("--max-size", type=size, help="prune: keep at most this much, as in 20GB")
    parser.add_argument("--max-age", type=age, help="prune: keep nothing older, as in 30d, 12h")
    parser.add_argument("--dry-run", action="store_true", help="prune: say what would go")
    options = parser.parse_args(arguments)
    if options.action == "prune" and options.max_size is None and options.max_age is None:
        parser.error("prune needs --max-size or --max-age")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    return run_command(lambda: _run(options), failed=2)


def _run(options: argparse.Namespace) -> int:
    if not options.dir.is_dir():
        raise NotAStoreError(f"no store at {options.dir}: name one with --dir")
    if options.action != "list" and read_marker(options.dir) is None:
        raise NotAStoreError(
            f"{options.dir} does not say that it is a store (it has no {MARKER}), so nothing in it "
            "is changed: name a store with --dir; a run marks the one that it uses, if nothing "
            "else is in it"
        )
    stages, foreign = contents_of(options.dir)
    stages = sorted(stages, key=lambda info: info.age)
    damaged = 0
    if options.action == "list":
        _list(stages)
    elif options.action == "verify":
        damaged = _verify(stages)
    else:
        _prune(prunable(stages, options.max_size, options.max_age), options.dry_run)
    _print_foreign(foreign)
    return int(damaged > 0)


def _list(stages: Sequence[StageInfo]) -> None:
    columns: Columns = (
        ("stage", "text", lambda info: info.stage.key[:12]),
        ("what", "long", lambda info: info.title),
        ("epochs", "number", lambda info: str(info.epochs)),
        ("MB", "number", lambda info: f"{info.size / 1e6:,.1f}"),
        ("age", "number", lambda info: _age(info.age)),
        ("used by", "long", lambda info: _users(info.users)),
    )
    out = console()
    out.print(table(stages, columns))
    out.print(f"{len(stages)} stages, {sum(info.size for info in stages) / 1e6:,.1f} MB")


def _age(seconds: float) -> str:
    days, left = divmod(int(seconds), 86_400)
    return f"{days} d" if days else f"{left // 3600} h {left % 3600 // 60} min"


def _users(runs: Sequence[Path]) -> str:
    return ", ".join(sorted("/".join(run.parts[-2:]) for run in runs)) or "nothing"


def _verify(stages: Sequence[StageInfo]) -> int:
    """Read what this version can read. Returns how many files were damaged."""
    ours = [info for info in stages if info.description.get("format", FORMAT) == FORMAT]
    damaged = sum(len(verify(info.stage)) for info in ours)
    print(f"{len(ours)} stages read, {damaged} damaged files set aside")
    if len(ours) < len(stages):
        print(f"{len(stages) - len(ours)} stages of another version left unread")
    return damaged


def _prune(stages: Sequence[StageInfo], dry_run: bool) -> None:
    freed = 0
    for info in stages:
        if dry_run or delete(info.stage):
            freed += info.size
            print(f"{'would delete' if dry_run else 'deleted'} {info.stage.key}: {info.title}")
    print(f"{freed / 1e6:,.1f} MB {'would be freed' if dry_run else 'freed'}")


def _print_foreign(foreign: Sequence[Path]) -> None:
    if foreign:
        print(f"{len(foreign)} foreign files and folders, left as they are:")
    for path in foreign[:MOST_NAMED]:
        print(f"  {one_line(str(path))}")
    if len(foreign) > MOST_NAMED:
        print(f"  and {len(foreign) - MOST_NAMED} more")


def _quantity(units: dict[str, float], examples: str) -> Callable[[str], float]:
    """What reads a number with one of these units: 20 alone might mean 20 bytes, or 20 GB."""

    def read(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", text.strip().lower())
        if match and float(match[1]) == 0:
            return 0.0
        if not match or match[2] not in units:
            raise argparse.ArgumentTypeError(f"{text} says no size or age: write {examples}")
        return float(match[1]) * units[match[2]]

    return read


if __name__ == "__main__":
    sys.exit(main())
