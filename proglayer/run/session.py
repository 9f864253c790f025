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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from proglayer.config import Config, store_dir
from proglayer.data.corpus import Corpus
from proglayer.data.pretrained import Pretrained
from proglayer.errors import UserError
from proglayer.run import gpu_slots, machine
from proglayer.run.loggers import Loggers
from proglayer.run.progress import RunDisplay
from proglayer.run.record import (
    METRICS,
    RUN_FILE,
    WEIGHTS,
    EpochRow,
    Heartbeat,
    RecordError,
    RunRecord,
    RunState,
    Score,
    now,
    read_record,
    write_metrics,
    write_record,
)
from proglayer.store.entries import Machine, open_store
from proglayer.store.trajectory import Counts, Hooks, Interrupted
from proglayer.training.plan import Phase
from proglayer.training.stopping import EpochMetrics, perplexity
from proglayer.training.trainer import ExitMetrics

log = logging.getLogger(__name__)

# Called with each row of `metrics.csv` once it is written. Returns why the run is to end early, or
# None for it to go on.
Prune = Callable[[dict[str, Any]], str | None]


class Pruned(Exception):
    """The search that the run belongs to gave it up. The message says why."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What a run needs besides its settings."""

    device: torch.device
    machine: Machine
    corpus: Corpus
    checkpoint: Pretrained | None
    phases: tuple[Phase, ...]


@dataclass(eq=False)
class Session:
    """The surroundings of one run; `record` is what it leaves."""

    config: Config
    folder: Path
    record: RunRecord
    prune: Prune | None
    signals: machine.StopSignals
    loggers: Loggers
    display: RunDisplay
    hooks: Hooks
    store: Path

    def epoch(
        self, phase: Phase, counts: Counts, metrics: EpochMetrics, best: EpochMetrics
    ) -> None:
        """Record and show an epoch that was trained or read. Raises Pruned."""
        reused = metrics.epoch not in (0, *counts.trained)
        is_best = best.epoch == metrics.epoch
        self.display.epoch(metrics, best, reused)
        if is_best:
            self.record.epochs = [
                row.model_copy(update={"best": row.best and row.phase != phase.index + 1})
                for row in self.record.epochs
            ]
        row = self._add(phase, metrics, is_best, reused)
        self.loggers.epoch(row)
        if self.prune is not None and (reason := self.prune(row)) is not None:
            raise Pruned(reason)

    def start(self, phase: Phase, last: ExitMetrics) -> None:
        """Record and show the model right after a growth as epoch 0 of its phase."""
        at_once = EpochMetrics(0, None, last.loss, last.accuracy, 0, 0.0, 0.0)
        self._add(phase, at_once, is_best=False, reused=False)
        self.display.note(
            f"  epoch  0  before its first step: validation loss {last.loss:.4f}  "
            f"perplexity {perplexity(last.loss):.2f}"
        )

    def _add(
        self, phase: Phase, metrics: EpochMetrics, is_best: bool, reused: bool
    ) -> dict[str, Any]:
        """Write an epoch down. Returns its row of `metrics.csv`."""
        row = EpochRow(
            phase=phase.index + 1,
            layers=phase.train.layers,
            epoch=metrics.epoch,
            train_loss=metrics.train_loss,
            validation=Score(loss=metrics.validation_loss, accuracy=metrics.validation_accuracy),
            train_tokens=metrics.train_tokens,
            train_seconds=round(metrics.train_seconds, 3),
            evaluation_seconds=round(metrics.evaluation_seconds, 3),
            best=is_best,
            reused=reused,
        )
        self.record.epochs.append(row)
        write_record(self.folder, self.record)
        write_metrics(self.folder, self.record)
        assert self.record.corpus is not None, "it was opened"
        return row.columns(self.record.corpus)

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
        explain_failure(self.record, error)
        return RunState.failed


def explain_failure(record: RunRecord, error: Exception) -> None:
    """Put into the record why the run failed, and say it: a fault of ours with its traceback."""
    reason = str(error) if isinstance(error, UserError) else machine.out_of_memory(error)
    if reason is None:
        record.reason = f"{type(error).__name__}: {error}".splitlines()[0]
        record.traceback = traceback.format_exc()
        log.exception("the run failed")
    else:
        record.reason = reason
        log.error("%s", reason)


def give_up(folder: Path, record: RunRecord, error: Exception) -> None:
    """Leave the record of a run that failed before its first phase."""
    explain_failure(record, error)
    record.state, record.ended = RunState.failed, now()
    write_record(folder, record)


@contextlib.contextmanager
def session(
    config: Config, folder: Path, record: RunRecord, setup: Setup, prune: Prune | None
) -> Iterator[Session]:
    """Surround the walk through a run's phases. What the block raises is in the record and goes no
    further.
    """
    began = time.perf_counter()
    signals = machine.StopSignals()
    with contextlib.suppress(RecordError):
        before = read_record(folder)
        record.submitted, record.mlflow_run = before.submitted, before.mlflow_run
    store = Path(store_dir(config))
    open_store(store)
    write_record(folder, record)
    for name in (METRICS, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    loggers = Loggers(config.logger, folder, record)
    with contextlib.ExitStack() as during:
        during.enter_context(Heartbeat(folder / RUN_FILE))
        during.enter_context(signals.noted())
        display = during.enter_context(RunDisplay(len(setup.phases), len(setup.corpus.train)))
        hooks = Hooks(lambda: signals.received, display.step, display.note)
        current = Session(config, folder, record, prune, signals, loggers, display, hooks, store)
        try:
            slot = gpu_slots.hold(setup.device, config.jobs_per_gpu, hooks)
            record.gpu = during.enter_context(slot)
            yield current
            record.state = RunState.completed
        except Exception as error:
            record.state = current.explain(error)
    record.ended = now()
    record.seconds = time.perf_counter() - began
    write_record(folder, record)
    loggers.end(record)
    if signals.scheduler is not None:
        signals.scheduler()
