"""`python -m proglayer.store list | prune`: see what is stored, make room."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from proglayer.console import console
from proglayer.errors import ConfigError, run_command
from proglayer.files import FolderKind
from proglayer.store.entries import Entry, entries_of, is_store
from proglayer.table import Column, Table

SIZES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
SIZES |= {unit[0]: size for unit, size in SIZES.items()}
AGES = {"d": 86_400.0, "h": 3_600.0, "m": 60.0}


class Listed(NamedTuple):
    """An entry, its size in bytes, and the seconds since a run last wrote or read it."""

    entry: Entry
    size: int
    age: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.store", description="Trained phases."
    )
    parser.add_argument("action", choices=("list", "prune"))
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(os.environ.get("PROGLAYER_STORE") or "multirun/.store"),
        help="the store (default: $PROGLAYER_STORE, else multirun/.store)",
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


def _run(options: argparse.Namespace) -> None:
    if not is_store(options.dir):
        raise ConfigError(
            f"--dir={options.dir} is no store (it has no {FolderKind.store.mark}): name one; a run "
            "makes it"
        )
    listed = sorted(map(_listed, entries_of(options.dir)), key=lambda each: each.age)
    if options.action == "list":
        _print(listed)
        return
    freed = 0
    for each in prunable(listed, options.max_size, options.max_age):
        if options.dry_run or each.entry.delete():
            freed += each.size
            said = "would delete" if options.dry_run else "deleted"
            print(f"{said} {each.entry.key}: {_title(each.entry)}")
    print(f"{freed / 1e6:,.1f} MB {'would be freed' if options.dry_run else 'freed'}")


def prunable(
    listed: Sequence[Listed], max_bytes: int | None, max_age_s: float | None
) -> list[Listed]:
    """Choose what to delete, oldest first, so that the rest keep to both limits.

    What an unfinished run needs stays.
    """
    total = sum(each.size for each in listed)
    chosen = []
    for each in sorted(listed, key=lambda each: -each.age):
        too_old = max_age_s is not None and each.age > max_age_s
        too_much = max_bytes is not None and total > max_bytes
        if (too_old or too_much) and not each.entry.is_needed():
            chosen.append(each)
            total -= each.size
    return chosen


def _listed(entry: Entry) -> Listed:
    stats = []
    for path in (*entry.files(), *entry.folder.glob("used/*")):
        with contextlib.suppress(FileNotFoundError):  # a run may be at work here
            stats.append(path.stat())
    size = sum(stat.st_size for stat in stats)
    return Listed(entry, size, time.time() - max((stat.st_mtime for stat in stats), default=0.0))


def _print(listed: Sequence[Listed]) -> None:
    rows = [
        {
            "key": each.entry.key[:12],
            "what": _title(each.entry),
            "epochs": len(set(each.entry.names("epoch-")) - {"epoch-0000"}),
            "size": each.size / 1e6,
            "age": each.age / 86_400,
            "users": ", ".join("/".join(run.parts[-2:]) for run in each.entry.users()),
        }
        for each in listed
    ]
    columns = (
        Column("key", "trajectory"),
        Column("what", "what", kind="prose"),
        Column("epochs", "epochs", "d"),
        Column("size", "MB", ",.1f"),
        Column("age", "days old", ",.1f"),
        Column("users", "used by", kind="prose"),
    )
    total = sum(each.size for each in listed) / 1e6
    note = f"{len(listed)} trajectories, {total:,.1f} MB"
    console().print(Table(rows, columns, note=note).rich())


def _title(entry: Entry) -> str:
    try:
        path = entry.path("trajectory")
        phase = json.loads(path.read_bytes())["phase"] if path else {}
    except (OSError, ValueError):
        phase = {}
    if not phase:
        return "not described"
    return f"phase {phase['index'] + 1}, {phase['layers']} layers, seed {phase['seed']}"


def _quantity(units: dict[str, float], examples: str) -> Callable[[str], float]:
    """Read a number with one of these units: 20 alone might mean 20 bytes, or 20 GB."""

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
