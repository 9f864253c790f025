"""The permanent evidence of a run: `result.json` and `metrics.csv` in its folder.

`result.json` is written last and atomically: it being there means that the run ended, and it says
how. `metrics.csv` grows by a row an epoch, so it can be read while the run goes on.
"""

from __future__ import annotations

import csv
import io
import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from proglayer.stages import write_atomically

RESULT = "result.json"
METRICS = "metrics.csv"
WEIGHTS = "weights.safetensors"
# Raise by hand when a reader of older records would misread a newer one.
RECORD_FORMAT = 1

METRICS_COLUMNS: tuple[str, ...] = (
    "phase",
    "layers",
    "epoch",
    "train_loss",
    "validation_loss",
    "validation_perplexity",
    "validation_accuracy_percent",
    "train_tokens",
    "train_seconds",
    "evaluation_seconds",
    "best",
    "reused",
)


class Status(StrEnum):
    """How a run ended."""

    completed = "completed"
    failed = "failed"
    interrupted = "interrupted"


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json`, whole or not at all. Not-finite numbers become null."""
    text = json.dumps(_finite(result), indent=2, allow_nan=False)
    write_atomically(folder / RESULT, text.encode() + b"\n", "hydra.run.dir or hydra.sweep.dir")


def remove_result(folder: Path) -> None:
    """Take away the record of an earlier try, so that this one counts as running."""
    (folder / RESULT).unlink(missing_ok=True)


def read_result(folder: Path) -> dict[str, Any] | None:
    """The record of an ended run; None if there is none. Raises ValueError for one cut short."""
    path = folder / RESULT
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write every epoch so far; a reader sees the old rows or the new ones, never half a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    write_atomically(folder / METRICS, content, "hydra.run.dir or hydra.sweep.dir")


def changes(phases: list[dict[str, Any]]) -> dict[str, float]:
    """What changed from the first phase to the last: a plus is an improvement in each but the loss,
    which is given as after - before.
    """
    before, after = phases[0]["best"], phases[-1]["best"]
    old, new = before["validation_perplexity"], after["validation_perplexity"]
    return {
        "accuracy_points": after["validation_accuracy_percent"]
        - before["validation_accuracy_percent"],
        "perplexity_percent": (old - new) / old * 100,
        "loss_nats": after["validation_loss"] - before["validation_loss"],
    }


def _finite(value: Any) -> Any:
    """`value` with numbers that JSON cannot hold as None."""
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
