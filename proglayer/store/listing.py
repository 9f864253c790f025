"""A store as its command sees it: which stages there are, whether they are whole, which may go."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proglayer import files
from proglayer.store.marker import foreign_in
from proglayer.store.stages import KEY_FORM, Stage


@dataclass(frozen=True)
class StageInfo:
    """A stage as the store lists it: `size` in bytes, `age` in seconds since its last writing.

    `description` is empty where the key is not its hash: then nothing of the stage is deleted.
    """

    stage: Stage
    description: dict[str, Any]
    epochs: int
    size: int
    age: float
    users: tuple[Path, ...]

    @property
    def title(self) -> str:
        """What it is, for people."""
        if not self.description:
            return "(not described)"
        try:
            phase = self.description["phase"]
            exits = sum(weight > 0 for weight in phase["exit_weights"])
            return (
                f"phase {phase['index'] + 1}, {phase['layers']} layers, seed {phase['seed']}, "
                f"dim {phase['architecture']['dim']}, {exits} exit{'s' if exits > 1 else ''}"
            )
        except (KeyError, TypeError):
            return "(not a phase of this version)"


def contents_of(store: Path) -> tuple[list[StageInfo], list[Path]]:
    """Every stage of a store, in no order, and everything foreign in it."""
    foreign = foreign_in(store)
    folders = [path for path in store.iterdir() if re.fullmatch(KEY_FORM, path.name)]
    stages = [_info(Stage(store, path.name)) for path in folders if path not in foreign]
    return [info for info in stages if info], foreign


def _info(stage: Stage) -> StageInfo | None:
    """A stage as the store lists it; None for what is left of a deleted one."""
    own, notes = stage._files(""), stage.notes._files("")
    stats = []
    for path in (*own, *notes):
        with contextlib.suppress(FileNotFoundError):  # a sweep may be at work here
            stats.append(path.stat())
    if not own or not stats:
        return None
    return StageInfo(
        stage,
        stage.description or {},
        len(stage.names("epoch-")),
        sum(stat.st_size for stat in stats),
        time.time() - max(stat.st_mtime for stat in stats),
        tuple(run for run, _ in stage.readers() if run.is_dir()),
    )


def prunable(
    stages: Sequence[StageInfo], max_bytes: int | None, max_age_s: float | None
) -> list[StageInfo]:
    """The stages to delete, oldest first, so that the rest keep to both limits.

    What an unfinished run reads stays, and so does every stage that it grew from.
    """
    by_key = {info.stage.key: info for info in stages}
    needed: set[str] = set()
    for info in stages:
        key: str | None = info.stage.key if info.stage.needed else None
        while key in by_key and key not in needed:
            needed.add(key)
            parent = by_key[key].description.get("parent")
            key = parent.get("key") if isinstance(parent, dict) else None
            key = key if isinstance(key, str) else None
    total = sum(info.size for info in stages)
    chosen = []
    for info in sorted(stages, key=lambda info: -info.age):
        too_old = max_age_s is not None and info.age > max_age_s
        too_much = max_bytes is not None and total > max_bytes
        if info.description and info.stage.key not in needed and (too_old or too_much):
            chosen.append(info)
            total -= info.size
    return chosen


def verify(stage: Stage) -> list[str]:
    """Read every file of a stage; the names of those that were damaged, now set aside.

    A job at work may take files away meanwhile: they are no damage.
    """
    parts = (stage, stage.notes)
    for part in parts:
        for name in part.names(""):
            part.read(name)
    return [name for part in parts for name in part.damaged]


def delete(stage: Stage) -> bool:
    """Delete a stage's files, unless a process is writing it right now or a run came to need it.

    The lock's file stays: others may be waiting at it, and must meet at the same one. So does what
    is not ours.
    """
    if stage.description is None or not stage.lock(0):
        return False
    try:
        if stage.needed:
            return False
        for part in (stage, stage.notes):
            for path in part._files(""):
                files.delete(path, part._is_ours)
    finally:
        stage.unlock()
    return True
