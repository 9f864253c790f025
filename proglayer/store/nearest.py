"""Why a phase is trained afresh: the stored stage that is nearest to it, and where they differ."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proglayer.config import flat_settings
from proglayer.store.stages import Stage

# The stages written last that are looked at: reading their descriptions takes about 0.1 s.
MOST_STAGES = 500
# Further apart than this, the nearest stage says nothing about why.
MOST_DIFFERENCES = 4
# The parts of a stage's description by the settings that they come from, the first that fits.
SETTINGS = {
    "phase.architecture.": "model.",
    "phase.curriculum.": "loss.",
    "phase.detached": "loss.detach",
    "phase.exit_weights": "model.exit_weights",
    "phase.growth.layers": "added_layers",
    "phase.trained_layers": "freeze",
    "phase.rates": "lr",
    "phase.schedule.shape": "lr.schedule",
    "phase.schedule.total_epochs": "phase.max_epochs",
    "phase.schedule.": "lr.",
    "phase.batch_size": "phase.batch_size",
    "phase.samples": "phase.samples",
    "phase.": "",
    "machine.": "",
    "parent": "the phase before",
    "corpus": "data",
    "": "",
}
# What nobody can read, and what follows from other differences.
UNREADABLE = ("parent", "corpus")
FOLLOWS = ("phase.index", "phase.new_layers", "arithmetic")
FOLLOWS_FROM_LAYERS = ("phase.trained_layers", "phase.exit_weights")


class Nearest:
    """What the stages of a store are, as far as their descriptions are whole; read once."""

    def __init__(self, store: Path) -> None:
        self._store = store

    @functools.cached_property
    def _known(self) -> list[dict[str, Any]]:
        return [dict(flat_settings(each)) for each in _descriptions(self._store)]

    def why_afresh(self, description: Mapping[str, Any]) -> str | None:
        """In what a phase differs from the stage that is nearest to it, which settings name.

        description: see `trajectory.describe`.

        Returns:
            `seed=1 there, 2 here`; None where nothing alike is stored.
        """
        asked = dict(flat_settings(dict(description)))
        apart = (_differences(known, asked) for known in self._known)
        nearest = min(apart, key=len, default={})
        return "; ".join(nearest.values()) if 0 < len(nearest) <= MOST_DIFFERENCES else None


def _descriptions(store: Path) -> Iterator[dict[str, Any]]:
    """The descriptions of the stages that were written last. What cannot be read is left out."""
    try:
        folders = sorted(store.glob("[0-9a-f]" * 32), key=lambda path: -path.lstat().st_mtime)
    except OSError:  # one was taken away meanwhile
        return
    for folder in folders[:MOST_STAGES]:
        if description := Stage(store, folder.name).description:
            yield description


def _differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """The settings in which a stage differs from a phase -> its value there and here."""
    found: dict[str, str] = {}
    names = [n for n in here | there if there.get(n, "the default") != here.get(n, "the default")]
    follows = FOLLOWS + (FOLLOWS_FROM_LAYERS if "phase.layers" in names else ())
    for name in names:
        if name not in follows:
            part = next(part for part in SETTINGS if name.startswith(part))
            title = SETTINGS[part] + (name.removeprefix(part) if part[-1:] in ("", ".") else "")
            a, b = (_text(name, values.get(name, "the default")) for values in (there, here))
            text = f"{title}={a} there, {b} here"
            found.setdefault(title, f"{title} is another" if part in UNREADABLE else text)
    return found


def _text(name: str, value: Any) -> str:
    if value is None:
        return "frozen" if name.startswith("phase.rates") else "null"
    if name == "phase.trained_layers" and isinstance(value, list):
        return f"layers {', '.join(str(layer + 1) for layer in value)}" if value else "no layer"
    return str(value)
