"""What surrounds a run while its phases are walked through, and how it ends.

A session shows that the run is alive, holds what is process-wide, listens to signals, writes and
shows each epoch, and turns whatever ends the walk into the run's record.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from proglayer import files
from proglayer.config import Config, stages_dir
from proglayer.errors import ConfigError, UserError
from proglayer.files import NotOursError
from proglayer.run import gpu_slots, machine
from proglayer.run.loggers import Loggers
from proglayer.run.progress import RunDisplay
from proglayer.store.marker import delete_private, open_store, private_store
from proglayer.store.record import (
    Heartbeat,
    MetricsRow,
    RunRecord,
    RunState,
    check_folder,
    remove_record,
    write_metrics,
    write_record,
)
from proglayer.store.trajectory import Counts, Hooks, Interrupted
from proglayer.training.plan import Phase
from proglayer.training.stopping import EpochMetrics, perplexity
from proglayer.training.trainer import ExitMetrics

log = logging.getLogger(__name__)

# Called with each row of `metrics.csv` once it is written. Returns why the run is to end early, or
# None for it to go on.
Prune = Callable[[MetricsRow], str | None]


class Pruned(Exception):
    """The search that the run belongs to gave it up. The message says why."""


@dataclass(eq=False)
class Session:
    """The surroundings of one run; `record` is what it will leave."""

    config: Config
    folder: Path
    record: RunRecord
    prune: Prune | None

    def __post_init__(self) -> None:
        self.begun = False
        self.signals = machine.StopSignals()
        self._rows: list[MetricsRow] = []
        # What is held while the phases are walked through.
        self._during_walk = contextlib.ExitStack()

    def begin(self, phases: int, device: torch.device) -> None:
        """Open everything that the walk needs. From here on every end is recorded.

        Raises Interrupted, ConfigError or StoreError.
        """
        remove_record(self.folder)
        self.begun = True
        plain = self.config.model_dump(mode="json")
        choices = self.record.choices or {}
        self._loggers = Loggers(self.config.logger, self.folder, plain, choices)
        self._during_walk.enter_context(self.signals.noted())
        corpus = self.record.corpus
        assert corpus is not None, "it was opened"
        display = RunDisplay(phases, corpus.train_windows or 0)
        self.display = self._during_walk.enter_context(display)
        self.hooks = Hooks(lambda: self.signals.received, display.step, display.note)
        slot = gpu_slots.hold(device, self.config.jobs_per_gpu, self.hooks)
        self.record.gpu = self._during_walk.enter_context(slot)
        if self.config.reuse:
            self.store = Path(stages_dir(self.config))
            open_store(self.store)
        else:
            self.store = private_store(self.folder)

    # -- while the phases are walked through ----------------------------------------------------

    def epoch(
        self, phase: Phase, counts: Counts, metrics: EpochMetrics, best: EpochMetrics
    ) -> None:
        """Write and show an epoch that was trained or read. Raises Pruned."""
        reused = metrics.epoch not in (0, *counts.trained)
        is_best = best.epoch == metrics.epoch
        self.display.epoch(metrics, best, reused)
        if is_best:
            self._rows = [
                replace(row, best=False) if row.phase == phase.index + 1 else row
                for row in self._rows
            ]
        row = self._row(phase, metrics, is_best, reused)
        self._rows.append(row)
        write_metrics(self.folder, self._rows)
        self._loggers.epoch(row)
        if self.prune is not None and (reason := self.prune(row)) is not None:
            raise Pruned(reason)

    def start(self, phase: Phase, last: ExitMetrics) -> None:
        """Write and show the model right after a growth as epoch 0 of its phase."""
        at_once = EpochMetrics(0, None, last.loss, last.accuracy, 0, 0.0, 0.0)
        self._rows.append(self._row(phase, at_once, is_best=False, reused=False))
        write_metrics(self.folder, self._rows)
        self.display.note(
            f"  epoch  0  before its first step: validation loss {last.loss:.4f}  "
            f"perplexity {perplexity(last.loss):.2f}"
        )

    def _row(self, phase: Phase, metrics: EpochMetrics, is_best: bool, reused: bool) -> MetricsRow:
        corpus = self.record.corpus
        assert corpus is not None, "it was opened"
        return MetricsRow(
            phase=phase.index + 1,
            layers=phase.layers,
            epoch=metrics.epoch,
            train_loss=metrics.train_loss,
            **corpus.metrics(metrics.validation_loss, metrics.validation_accuracy),
            train_tokens=metrics.train_tokens,
            train_seconds=round(metrics.train_seconds, 3),
            evaluation_seconds=round(metrics.evaluation_seconds, 3),
            best=is_best,
            reused=reused,
        )

    # -- how it ends ----------------------------------------------------------------------------

    def explain(self, error: Exception) -> RunState:
        """Put into the record why the run ends so, and say it. Returns the state it ends in."""
        self.record.reason = str(error)
        if isinstance(error, Pruned):
            self.display.note(str(error))
            return RunState.pruned
        if isinstance(error, Interrupted):
            if self.signals.scheduler is None:
                self.display.note(f"{error}; the same command goes on from here")
                return RunState.interrupted
            self.display.note(f"{error}; it goes on when its scheduler starts it again")
            return RunState.preempted
        if not isinstance(error, UserError):
            memory = machine.out_of_memory(error) if self.begun else None
            if memory is None:
                self.record.reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self.record.traceback = traceback.format_exc()
                log.exception("the run failed")
                return RunState.failed
            self.record.reason = memory
        log.error("%s", self.record.reason)
        return RunState.failed

    def end(self, state: RunState, seconds: float) -> None:
        """Leave the record."""
        self.record.status = state
        self.record.ended = now()
        self.record.seconds = seconds
        write_record(self.folder, self.record)
        if self.begun:
            self._loggers.end(self.record)
        if not self.config.reuse and state in (RunState.completed, RunState.pruned):
            delete_private(self.store)


@contextlib.contextmanager
def session(
    config: Config, folder: Path, record: RunRecord, prune: Prune | None
) -> Iterator[Session]:
    """Surround the walk through a run's phases.

    What the block raises is in the record and goes no further, but for a UserError before
    `Session.begin`, which leaves no record. Raises ConfigError where a user's file lies in the
    place of one that the run would write.
    """
    started = time.perf_counter()
    try:
        check_folder(folder)
    except NotOursError as error:
        raise ConfigError(str(error)) from error
    files.delete_left_over(folder)
    current = Session(config, folder, record, prune)
    with Heartbeat(folder), machine.switches(config.threads, config.precision):
        with current._during_walk:
            try:
                yield current
                state = RunState.completed
            except Exception as error:
                if not current.begun:
                    if isinstance(error, UserError):
                        raise
                    remove_record(folder)
                state = current.explain(error)
        current.end(state, time.perf_counter() - started)
    if current.signals.scheduler is not None:
        current.signals.scheduler()


def now() -> str:
    """The time as a record writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
