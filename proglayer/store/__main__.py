"""`python -m proglayer.store list | prune`: see what is stored, make room."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from proglayer.config import store_dir
from proglayer.console import console
from proglayer.errors import ConfigError, run_command
from proglayer.files import FolderKind
from proglayer.store.entries import Entry, entries_of, is_store
from proglayer.table import Column, Table


class Listed(NamedTuple):
    """An entry, its size in MB, and the days since a run last wrote or read it."""

    entry: Entry
    size: float
    age: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m proglayer.store", description=__doc__)
    parser.add_argument("action", choices=("list", "prune"))
    parser.add_argument(
        "--dir",
        type=Path,
        default=store_dir(None),
        help="the store (default: $PROGLAYER_STORE, else multirun/.store)",
    )
    for limit, kept in ("--max-gb", "so many GB"), ("--max-days", "what runs used in so many days"):
        parser.add_argument(limit, type=float, default=math.inf, help=f"prune: keep {kept}")
    parser.add_argument("--dry-run", action="store_true", help="prune: say what would go")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options), failed=2)


def _run(options: argparse.Namespace) -> None:
    if not is_store(options.dir):
        raise ConfigError(f"--dir={options.dir} is no store: it has no {FolderKind.store.mark}")
    listed = sorted(map(_listed, entries_of(options.dir)), key=lambda each: each.age)
    if options.action == "list":
        _print(listed)
    else:
        _prune(listed, options.max_gb * 1000, options.max_days, options.dry_run)


def _prune(listed: Sequence[Listed], max_size: float, max_age: float, dry_run: bool) -> None:
    """Delete the oldest until the rest keep to both limits; what an unfinished run needs stays."""
    total, freed = sum(each.size for each in listed), 0.0
    for each in reversed(listed):
        wanted = each.age <= max_age and total - freed <= max_size
        if not wanted and not each.entry.is_needed():
            title = _title(each.entry)
            if dry_run or each.entry.delete():
                freed += each.size
                print(f"{'would delete' if dry_run else 'deleted'} {each.entry.key}: {title}")
    print(f"{freed:,.1f} MB {'would be freed' if dry_run else 'freed'}")


def _listed(entry: Entry) -> Listed:
    # A run may be at work here, and take files away.
    paths = (*entry.files(), *entry.folder.glob("used/*"))
    stats = [path.stat() for path in paths if path.exists()]
    newest = max((stat.st_mtime for stat in stats), default=0.0)
    size = sum(stat.st_size for stat in stats)
    return Listed(entry, size / 1e6, (time.time() - newest) / 86_400)


def _print(listed: Sequence[Listed]) -> None:
    columns = (
        Column("entry", "trajectory", lambda entry: entry.key[:12]),
        Column("entry", "what", _title, kind="prose"),
        Column("entry", "epochs", _epochs, kind="figure"),
        Column("size", "MB", ",.1f"),
        Column("age", "days old", ",.1f"),
        Column("entry", "used by", _users, kind="prose"),
    )
    note = f"{len(listed)} trajectories, {sum(each.size for each in listed):,.1f} MB"
    console().print(Table([each._asdict() for each in listed], columns, note=note).rich())


def _title(entry: Entry) -> str:
    if (about := entry.read_json("trajectory")) is None:
        return "not described"
    phase = about["phase"]
    return f"phase {phase['index'] + 1}, {phase['layers']} layers, seed {phase['seed']}"


def _epochs(entry: Entry) -> str:
    return str(len({*entry.names("epoch-")} - {"epoch-0000"}))


def _users(entry: Entry) -> str:
    return ", ".join("/".join(run.parts[-2:]) for run in entry.users())


if __name__ == "__main__":
    sys.exit(main())
