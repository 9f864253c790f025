"""Progress of a run, and its plan as a table.

On a terminal, bars that move; elsewhere, plain lines, one an epoch.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from proglayer.console import Columns, console, table
from proglayer.errors import printable
from proglayer.training.cost import (
    evaluation_flops,
    memory_bytes,
    parameter_counts,
    training_flops,
)
from proglayer.training.plan import Phase, TrainSpec, schedule_warnings

if TYPE_CHECKING:
    from rich.table import Table

    from proglayer.training.stopping import EpochMetrics
    from proglayer.training.trainer import Progress

log = logging.getLogger(__name__)

PLAIN_STEP_EVERY_S = 30.0


class RunDisplay(AbstractContextManager["RunDisplay"]):
    """Progress of one run: bars for phases, epochs and steps, or plain lines."""

    def __init__(self, phases: int, train_windows: int) -> None:
        from rich import progress as rich_progress

        self._console = console()
        self._phases = phases
        self._train_windows = train_windows
        # Without a terminal it shows nothing.
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description:<8}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        totals = {"phases": phases, "epochs": None, "steps": None}
        self._tasks = {n: self._bars.add_task(n, total=t, note="") for n, t in totals.items()}
        self._said = time.monotonic()

    def __enter__(self) -> RunDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bars.disable:  # rich 13 prints an empty line all the same
            self._bars.stop()

    def note(self, text: str) -> None:
        """One line that stays, here and in the log."""
        log.info("%s", text)
        self._console.print(printable(text), markup=False)

    def phase(self, phase: Phase) -> None:
        """A phase begins."""
        counts = parameter_counts(phase.train)
        self.note(
            f"phase {phase.index + 1}/{self._phases} {phase.name}: {phase.train.layers} layers, "
            f"{counts.trainable:,} of {counts.total:,} parameters train"
        )
        for warning in schedule_warnings(phase, self._train_windows):
            self.note(f"  {warning}")
        self._bars.update(self._tasks["phases"], completed=phase.index, note=phase.name)
        self._bars.reset(self._tasks["epochs"], total=phase.stop.max_epochs, note="")

    def step(self, progress: Progress) -> None:
        """An optimizer step is done."""
        fields: dict[str, Any] = {"completed": progress.step, "total": progress.steps}
        if progress.loss is not None:
            text = f"loss {progress.loss:.4f}  {progress.tokens_per_second:,.0f} tokens/s"
            fields["note"] = text
            is_due = time.monotonic() - self._said > PLAIN_STEP_EVERY_S
            if is_due and not self._console.is_terminal:
                self._said = time.monotonic()
                self.note(f"  epoch {progress.epoch} step {progress.step}/{progress.steps}  {text}")
        self._bars.update(self._tasks["steps"], **fields)

    def epoch(self, metrics: EpochMetrics, best: EpochMetrics, reused: bool) -> None:
        """An epoch is done or was read from the store."""
        self._said = time.monotonic()
        source = (
            "stored" if reused else f"{metrics.train_seconds + metrics.evaluation_seconds:.1f} s"
        )
        star = " *" if best.epoch == metrics.epoch else ""
        trained = metrics.train_loss is not None
        loss = f"train loss {metrics.train_loss:.4f}" if trained else "not trained"
        self.note(
            f"  epoch {metrics.epoch:>2}  {loss}  "
            f"validation loss {metrics.validation_loss:.4f}  "
            f"perplexity {metrics.validation_perplexity:.2f}  "
            f"accuracy {100 * metrics.validation_accuracy:.2f} %  ({source}){star}"
        )
        note = f"best {best.validation_perplexity:.2f} in epoch {best.epoch}"
        self._bars.update(self._tasks["epochs"], completed=metrics.epoch, note=note)


def plan_table(
    phases: Sequence[Phase],
    seq_len: int,
    train_windows: int,
    validation_windows: int,
    title: str,
    stored: Sequence[str] = (),
) -> Table:
    """A run's phases before anything is trained: what each trains and what it costs.

    stored: for each phase, what the store has of it.
    """
    costs = [
        (
            phase,
            parameter_counts(phase.train),
            training_flops(phase.train, seq_len, train_windows),
            evaluation_flops(phase.train, seq_len, validation_windows),
        )
        for phase in phases
    ]
    columns: Columns = (
        ("phase", "long", lambda row: f"{row[0].index + 1} {row[0].name}"),
        ("layers", "long", lambda row: str(row[0].train.layers)),
        ("frozen", "long", lambda row: ", ".join(frozen_ranges(row[0].train)) or "nothing"),
        (
            "trainable / total parameters",
            "text",
            lambda row: (
                f"{row[1].trainable:,} / {row[1].total:,} ({row[1].trainable / row[1].total:.1%})"
            ),
        ),
        ("rate: new, existing, embedding, head", "long", lambda row: _rates(row[0])),
        ("batches", "number", lambda row: str(row[0].train.steps_per_epoch(train_windows))),
        ("head GFLOP", "number", lambda row: f"{row[2].head / 1e9:,.1f}"),
        ("body GFLOP", "number", lambda row: f"{row[2].body / 1e9:,.1f}"),
        ("evaluation GFLOP", "number", lambda row: f"{(row[3].head + row[3].body) / 1e9:,.1f}"),
    )
    if stored:
        columns = (*columns, ("stored", "text", lambda row: stored[row[0].index]))
    shown = table(costs, columns, title)
    lines = [text for phase in phases for text in schedule_warnings(phase, train_windows)]
    most = max(memory_bytes(phase.train, seq_len) for phase in phases)
    lines.append(f"memory at the peak, by estimate: {most / 1e6:,.0f} MB beside the process itself")
    shown.caption = "\n".join(map(printable, lines))
    return shown


def _rates(phase: Phase) -> str:
    rates = phase.train.rates
    if not phase.index:
        return f"{rates.new:g}"
    each = (rates.new, rates.existing, rates.embedding, rates.head)
    return ", ".join("-" if rate is None else f"{rate:g}" for rate in each)


def frozen_ranges(spec: TrainSpec) -> list[str]:
    """The frozen parts for people: layers counted from 1, neighbours joined (`layers 1-3`)."""
    words = []
    layers = [layer for layer in range(spec.layers) if layer not in spec.trained_layers]
    if spec.rates.embedding is None:
        words.append("embedding")
    for _, group in itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0]):
        own = [layer + 1 for _, layer in group]
        words.append(f"layers {own[0]}-{own[-1]}" if own[1:] else f"layer {own[0]}")
    if spec.rates.head is None:
        words.append("head")
    return words
