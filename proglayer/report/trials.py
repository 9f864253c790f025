"""The trials of a search by Optuna in the report: their history, and what the objective hangs on.

A search leaves them in `study.json` beside its jobs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proglayer.report.page import Block, Paragraph, Pictures
from proglayer.report.pictures import BLUE, MUTED, ORANGE, VERMILLION, Gallery
from proglayer.store.record import STUDY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from proglayer.report.page import Picture

# More settings than these would be a long picture of short bars.
MOST_BARS = 12


def study_files(runs: Iterable[str]) -> list[Path]:
    """The files `study.json` of the sweeps that the folders of these runs lie in."""
    files = {Path(run).parent / STUDY for run in runs}
    return sorted(file for file in files if file.is_file())


def trials_section(files: Iterable[Path], gallery: Gallery) -> list[Block]:
    """Pictures of each study, those of a study that several sweeps brought on in one."""
    studies: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            study = json.loads(file.read_text(encoding="utf-8"))
            name, trials = study["study"], study["trials"]
            if name not in studies or len(trials) >= len(studies[name]["trials"]):
                studies[name] = study
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half a file tells nothing
    blocks: list[Block] = []
    for number, (name, study) in enumerate(studies.items(), 1):
        suffix = f"-{number}" if number > 1 else ""
        pictures = []
        if any(trial["value"] is not None for trial in study["trials"]):
            pictures.append(_history(gallery, f"search-history{suffix}", study))
        if study["importances"]:
            pictures.append(_importances(gallery, f"search-importance{suffix}", study))
        counts = Counter(trial["state"] for trial in study["trials"])
        how = ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items()))
        text = f"Study {name}: {study['objective']}, to {study['direction']}; trials: {how}."
        blocks += [Paragraph(text), *([Pictures(pictures)] if pictures else [])]
    return blocks


def _history(gallery: Gallery, name: str, study: dict[str, Any]) -> Picture:
    """The objective of each trial in their order, and the best so far."""
    done = [trial for trial in study["trials"] if trial["value"] is not None]
    numbers = np.array([trial["number"] for trial in done])
    values = np.array([trial["value"] for trial in done], dtype=float)
    keep = np.minimum if study["direction"] == "minimize" else np.maximum
    best = keep.accumulate(values)
    others = {
        state: [trial["number"] for trial in study["trials"] if trial["state"] == state]
        for state in ("pruned", "fail")
    }

    def paint(axes: Axes) -> None:
        axes.step(numbers, best, where="post", color=VERMILLION, linewidth=1.3, label="best so far")
        axes.plot(numbers, values, "o", color=BLUE, markersize=4, label="completed")
        # Those without a value stand below all others.
        spread = float(values.max() - values.min()) or abs(float(values[0])) or 1.0
        for state, marker, colour in (("pruned", "|", MUTED), ("fail", "x", ORANGE)):
            if others[state]:
                low = np.full(len(others[state]), float(values.min()) - 0.08 * spread)
                label = "failed" if state == "fail" else state
                axes.plot(others[state], low, marker, color=colour, markersize=6, label=label)
        axes.set_xlabel("trial")
        axes.set_ylabel(study["objective"].rpartition(".")[2].replace("_", " "))
        axes.legend(loc="best")

    found = f"best {best[-1]:.6g} in trial {numbers[int(np.argmax(values == best[-1]))]}"
    alt = f"Objective of {len(done)} completed trials in their order: {found}"
    return gallery.draw(name, "The search's history", alt, 3.0, paint)


def _importances(gallery: Gallery, name: str, study: dict[str, Any]) -> Picture:
    """How much of the objective's variation each setting explains (PED-ANOVA)."""
    shares = sorted(study["importances"].items(), key=lambda item: item[1])[-MOST_BARS:]

    def paint(axes: Axes) -> None:
        axes.barh([key for key, _ in shares], [share for _, share in shares], color=BLUE)
        axes.grid(False, axis="y")
        axes.set_xlabel("importance (share of the variation)")

    listed = "; ".join(f"{key} {share:.2f}" for key, share in reversed(shares))
    height = 0.9 + 0.3 * len(shares)
    title = "What the objective hangs on"
    return gallery.draw(name, title, f"{title}: {listed}", height, paint)
