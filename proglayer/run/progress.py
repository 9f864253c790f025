"""Progress of a run, and its plan as a table.

Lines are printed and go into the log: one an epoch, and one every half a minute of a long one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import rich.table
from rich.text import Text

from proglayer.console import tell
from proglayer.errors import printable
from proglayer.training.cost import evaluation_flops, memory, parameter_counts, training_flops
from proglayer.training.growth import layer_sources
from proglayer.training.plan import Phase, TrainSpec, schedule_warning
from proglayer.training.stopping import perplexity

if TYPE_CHECKING:
    from proglayer.run.record import EpochRow
    from proglayer.training.trainer import Progress

STEP_EVERY_S = 30.0


class RunDisplay:
    """Progress of one run in plain lines, on the console and in the log."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def phase(self, phase: Phase, of: int) -> None:
        """Show that a phase begins, of so many."""
        counts = parameter_counts(phase.train)
        tell(
            f"phase {phase.index + 1}/{of} {phase.name}: {phase.train.layers} layers, "
            f"{counts.trainable:,} of {counts.total:,} parameters train"
        )
        if warning := schedule_warning(phase):
            tell(f"  {warning}")

    def step(self, progress: Progress) -> None:
        """Show how far an epoch is, from time to time."""
        if progress.loss is not None and time.monotonic() - self._said > STEP_EVERY_S:
            self._said = time.monotonic()
            tell(
                f"  epoch {progress.epoch} step {progress.step}/{progress.steps}  "
                f"loss {progress.loss:.4f}  {progress.tokens_per_second:,.0f} tokens/s"
            )

    def epoch(self, row: EpochRow) -> None:
        """Show an epoch that was trained or read from the store."""
        self._said = time.monotonic()
        seconds = f"{row.train_seconds + row.evaluation_seconds:.1f} s"
        trained = "not trained" if row.train_loss is None else f"train loss {row.train_loss:.4f}"
        tell(
            f"  epoch {row.epoch:>2}  {trained}  validation loss {row.validation.loss:.4f}  "
            f"perplexity {perplexity(row.validation.loss):.2f}  "
            f"accuracy {100 * row.validation.accuracy:.2f} %  "
            f"({'stored' if row.reused else seconds}){' *' if row.best else ''}"
        )


def plan_table(
    phases: Sequence[Phase],
    seq_len: int,
    train_windows: int,
    validation_windows: int,
    title: str,
    stored: Sequence[str] = (),
) -> rich.table.Table:
    """Return a run's phases before anything is trained: what each trains and what it costs.

    stored: for each phase, what the store has of it.
    """
    shown = rich.table.Table(title=Text(printable(title)), title_justify="left")
    for label in "phase", "layers", "frozen", "rate: new, existing, embedding, head":
        shown.add_column(label, overflow="fold")
    for label in "trainable / total parameters", "batches":
        shown.add_column(label, no_wrap=True, justify="right")
    for part in "head", "body", "evaluation":
        shown.add_column(f"{part} GFLOP", no_wrap=True, justify="right")
    if stored:
        shown.add_column("stored", no_wrap=True)
    for phase in phases:
        counts = parameter_counts(phase.train)
        training = training_flops(phase.train, seq_len, train_windows)
        evaluation = evaluation_flops(phase.train, seq_len, validation_windows)
        shown.add_row(
            f"{phase.index + 1} {phase.name}",
            str(phase.train.layers),
            ", ".join(frozen_ranges(phase.train)) or "nothing",
            _rates(phase),
            f"{counts.trainable:,} / {counts.total:,} ({counts.trainable / counts.total:.1%})",
            str(phase.train.steps_per_epoch(train_windows)),
            *(f"{flops / 1e9:,.1f}" for flops in (training.head, training.body)),
            f"{(evaluation.head + evaluation.body) / 1e9:,.1f}",
            *stored[phase.index : phase.index + 1],
        )
    lines = [text for phase in phases if (text := schedule_warning(phase))]
    shown.caption, shown.caption_justify = Text(printable("\n".join(lines))), "left"
    return shown


def plan_lines(phases: Sequence[Phase], seq_len: int, processes: int) -> Iterator[str]:
    """Yield a line for each phase: where its layers come from, its schedule, when it stops, its
    loss, what its optimizer takes over, and what each of so many devices holds. Layers count from
    1; a star marks a new one, an equals sign one that has the tensors of another.
    """
    before = 0
    for phase in phases:
        train, stop, schedule = phase.train, phase.stop, phase.train.schedule
        said = [f"{'post' if not train.architecture.final_norm else 'pre'}-norm"]
        if train.growth is not None:
            sources = layer_sources(before, train.growth)
            names = ["fresh" if old.layer is None else str(old.layer + 1) for old in sources]
            new = ["*" if source.new else "" for source in sources]
            stars = ["=" if tie != i else new[i] for i, tie in enumerate(train.ties)]
            said = ["layers from " + " ".join(map("".join, zip(names, stars, strict=True)))]
        before = train.layers
        over = f" over {schedule.total_epochs} epochs" if schedule.total_epochs else ""
        warm = f", warm-up {schedule.warmup_steps} steps" if schedule.warmup_steps else ""
        said.append(f"rate {schedule.shape}{over}{warm}")
        patience = "all of them" if stop.whole else f"patience {stop.patience}"
        said.append(f"at most {stop.max_epochs} epochs, {patience}")
        weights = " ".join(f"{weight:.2g}" for weight in train.exit_weights)
        said.append(f"exit weights {weights}, {train.curriculum.kind} read")
        if train.layer_drop:
            said.append("layers dropped " + " ".join(f"{often:.2g}" for often in train.layer_drop))
        said.append(f"carry {train.optimizer.carry}")
        held = memory(train, seq_len, processes)
        each = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in held.items())
        said.append(f"{-(-train.batch_size // processes)} windows a batch on each device, {each}")
        yield f"{phase.index + 1} {phase.name}: {'; '.join(said)}"


def _rates(phase: Phase) -> str:
    rates = phase.train.rates
    if not phase.index:
        return f"{rates.new:g}"
    each = (rates.new, rates.existing, rates.embedding, rates.head)
    return ", ".join("-" if rate is None else f"{rate:g}" for rate in each)


def frozen_ranges(spec: TrainSpec) -> list[str]:
    """Return the frozen parts for people: layers from 1, neighbours joined (`layers 1-3`)."""
    words = []
    layers = [layer for layer in range(spec.layers) if layer not in spec.trained_layers]
    if spec.rates.embedding is None:
        words.append("embedding")
    for _, group in itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0]):
        first, *others = [layer + 1 for _, layer in group]
        words.append(f"layers {first}-{others[-1]}" if others else f"layer {first}")
    words += spec.frozen_kinds
    if spec.rates.head is None:
        words.append("head")
    return words
