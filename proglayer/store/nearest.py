"""Why a phase is trained afresh: the stored stage that is nearest to it, and where they differ."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proglayer.config import flat_settings
from proglayer.store.stages import KEY_FORM, Stage

# The stages written last that are looked at: reading their descriptions takes about 0.1 s.
MOST_STAGES = 500
# Further apart than this, the nearest stage says nothing about why.
MOST_DIFFERENCES = 4
# The parts of a stage's description by the settings that they come from, the first that fits.
SETTINGS = (
    ("phase.architecture.", "model."),
    ("phase.curriculum.", "loss."),
    ("phase.detached", "loss.detach"),
    ("phase.exit_weights", "model.exit_weights"),
    ("phase.growth.init", "growth.init"),
    ("phase.growth.layers", "added_layers"),
    ("phase.growth", "growth"),
    ("phase.trained_layers", "freeze"),
    ("phase.rates", "lr"),
    ("phase.schedule.shape", "lr.schedule"),
    ("phase.schedule.total_epochs", "phase.max_epochs"),
    ("phase.schedule.", "lr."),
    ("phase.optimizer.", "optimizer."),
    ("phase.batch_size", "phase.batch_size"),
    ("phase.samples", "phase.samples"),
    ("phase.layers", "layers"),
    ("phase.", ""),
    ("machine.", ""),
    ("parent", "the phase before"),
    ("format", "the version of proglayer"),
    ("arithmetic", "the version of proglayer"),
    ("corpus", "data"),
)
# Stands for a field that a description leaves out.
DEFAULT = "the default"
# What follows from another difference, always or from this one, and what people cannot read.
FOLLOWS = ("phase.index", "phase.new_layers")
FOLLOWS_FROM = {
    "arithmetic": "phase.precision",
    "phase.trained_layers": "phase.layers",
    "phase.exit_weights": "phase.layers",
}
UNREADABLE = ("corpus", "parent", "format", "arithmetic")


class Nearest:
    """What the stages of a store are, as far as their descriptions are whole; read once."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._known: list[dict[str, Any]] | None = None

    def why_afresh(self, description: Mapping[str, Any]) -> str | None:
        """In what a phase differs from the stage that is nearest to it, which settings name.

        description: see `trajectory.describe`.

        Returns:
            `seed=1 there, 2 here`; None where nothing alike is stored.
        """
        asked = dict(flat_settings(dict(description)))
        if self._known is None:
            self._known = [dict(flat_settings(each)) for each in _descriptions(self._store)]
        apart = (_differences(known, asked) for known in self._known)
        nearest = min(apart, key=len, default={})
        if not 0 < len(nearest) <= MOST_DIFFERENCES:
            return None
        return "; ".join(nearest.values())


def _descriptions(store: Path) -> Iterator[dict[str, Any]]:
    """The descriptions of the stages that were written last. What cannot be read is left out."""
    try:
        with os.scandir(store) as entries:
            stages = [
                (entry.stat(follow_symlinks=False).st_mtime, entry.name)
                for entry in entries
                if re.fullmatch(KEY_FORM, entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return
    for _, key in heapq.nlargest(MOST_STAGES, stages):
        if description := Stage(store, key).description:
            yield description


def _differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """The settings in which a stage differs from a phase -> its value there and here."""
    found: dict[str, str] = {}
    names = [n for n in here | there if there.get(n, DEFAULT) != here.get(n, DEFAULT)]
    for name in names:
        if name in FOLLOWS or FOLLOWS_FROM.get(name) in names:
            continue
        part, title = next((p, t) for p, t in (*SETTINGS, (name, name)) if name.startswith(p))
        title = title + name.removeprefix(part) if part.endswith(".") else title
        a, b = (_text(name, values.get(name, DEFAULT)) for values in (there, here))
        text = f"{title} is another" if part in UNREADABLE else f"{title}={a} there, {b} here"
        found.setdefault(title, text)
    return found


def _text(name: str, value: Any) -> str:
    if value is None:
        return "frozen" if name.startswith("phase.rates") else "null"
    if name == "phase.trained_layers" and isinstance(value, list):
        return f"layers {', '.join(str(layer + 1) for layer in value)}" if value else "no layer"
    return str(value)
