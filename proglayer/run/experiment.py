"""A run, from its settings to its record: the only module that knows all the others."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from proglayer import files
from proglayer.config import Config, ConfigError, stages_dir, to_plain
from proglayer.console import tell
from proglayer.data.corpus import Corpus, open_corpus
from proglayer.errors import StoreError
from proglayer.files import NotOursError
from proglayer.run import gpu_slots as slots
from proglayer.run import machine
from proglayer.run.code import git_state
from proglayer.run.loggers import Loggers
from proglayer.run.progress import RunDisplay
from proglayer.store.record import (
    FOLDER_SETTINGS,
    WEIGHTS,
    BestEpoch,
    Changes,
    CorpusRecord,
    EpochOnTest,
    ExitRecord,
    GrowthRecord,
    Heartbeat,
    Machine,
    MetricsRow,
    PeakMemory,
    PhaseRecord,
    PhaseWork,
    RunRecord,
    RunState,
    check_folder,
    is_of_run,
    metric,
    remove_record,
    write_heartbeat,
    write_metrics,
    write_record,
)
from proglayer.store.stages import PrivateStore, open_store
from proglayer.store.trajectory import ABOUT, Interrupted, NotMoved, Trajectory, Watch, Work
from proglayer.training.growth import build, grow
from proglayer.training.model import Transformer, restored
from proglayer.training.optim import carried_tensors
from proglayer.training.plan import Flops, Phase, parameter_counts, plan, training_flops
from proglayer.training.stopping import EpochMetrics, Stopped, follow, perplexity
from proglayer.training.trainer import Diverged, ExitMetrics, NotCompiled

log = logging.getLogger(__name__)

# What a user can cure, too little memory included, is told in one line; anything else is a fault of
# ours, with its traceback.
EXPECTED = (ConfigError, StoreError, Diverged, NotCompiled, NotMoved)


class Deferred(Exception):
    """The run needs a phase that another job is training, and was told not to wait for it."""


class Pruned(Exception):
    """The search that the run belongs to gave it up. The message says why."""


# Called with each row of `metrics.csv` once it is written. Returns why the run is to end early, or
# None for it to go on.
Prune = Callable[[MetricsRow], str | None]


def run(
    config: Config,
    folder: Path,
    overrides: Sequence[str] = (),
    choices: dict[str, str] | None = None,
    may_wait: bool = True,
    prune: Prune | None = None,
) -> RunRecord:
    """Walk the plan of `config`, phase by phase, and leave its record in `folder`.

    `overrides` and `choices` (the group options) are recorded as given. What goes wrong is in the
    record, not raised, but for a ConfigError or StoreError before the first phase: then nothing is
    written. Unless it `may_wait`, Deferred is raised where another job is training what this one
    needs next; there is no record then, and the same call goes on from there. A search ends the
    run early by `prune`.
    """
    started = time.perf_counter()
    record = RunRecord(
        started=_now(),
        overrides=list(overrides),
        choices=choices or {},
        seed=config.seed,
        config=to_plain(config),
        environment=machine.environment(),
        git=git_state(),
    )

    def ended(status: RunState) -> RunRecord:
        record.status = status
        record.ended = _now()
        record.seconds = time.perf_counter() - started
        write_record(folder, record)
        return record

    try:
        check_folder(folder)
    except NotOursError as error:
        raise ConfigError(str(error)) from error
    with (
        Heartbeat(folder),
        machine.switches(config.threads, config.precision),
        contextlib.ExitStack() as until_recorded,
    ):
        try:
            ready = prepare(config, record)
        except (ConfigError, StoreError):
            raise
        except Exception as error:
            remove_record(folder)
            _tell_fault(record, error)
            return ended(RunState.failed)
        remove_record(folder)
        loggers = Loggers(config.logger, folder, to_plain(config), choices or {})
        private: PrivateStore | None = None
        status = RunState.completed
        with (
            machine.StopSignals() as signals,
            RunDisplay(len(ready.phases)) as display,
            contextlib.ExitStack() as held,
        ):
            try:
                gpu = held.enter_context(
                    slots.hold(ready.device, config.jobs_per_gpu, signals.received, display.note)
                )
                record.gpu = gpu
                if config.reuse:
                    store = Path(stages_dir(config))
                    open_store(store)
                else:
                    private = until_recorded.enter_context(PrivateStore(folder))
                    store = private.folder
                walk = Walk(
                    config, ready, store, folder, signals, display, loggers, may_wait, prune
                )
                walk.through(record.phases)
                record.changes = Changes.between(record.phases[0].best, record.phases[-1].best)
                record.objective = _objective(record, config.objective)
            except Deferred as reason:
                display.note(f"{reason}: this one comes back later")
                loggers.discard()
                write_heartbeat(folder, RunState.deferred)
                raise
            except Pruned as reason:
                status, record.reason = RunState.pruned, str(reason)
                display.note(str(reason))
            except Interrupted as stop:
                status, record.reason = RunState.interrupted, str(stop)
                again = "the same command goes on from here"
                if signals.scheduler is not None:
                    status, again = (
                        RunState.preempted,
                        "it goes on when its scheduler starts it again",
                    )
                display.note(f"{stop}; {again}")
            except Exception as error:
                status = RunState.failed
                expected = isinstance(error, EXPECTED)
                curable = str(error) if expected else machine.out_of_memory(error)
                if curable is None:
                    _tell_fault(record, error)
                else:
                    record.reason = curable
                    log.error("%s", curable)
        ended(status)
        loggers.end(record)
        if private is not None and status in (RunState.completed, RunState.pruned):
            private.delete()
    if signals.scheduler is not None:
        signals.scheduler()
    return record


@dataclass(frozen=True, eq=False)
class Ready:
    """What a run needs besides its settings."""

    device: torch.device
    here: Machine
    corpus: Corpus
    phases: tuple[Phase, ...]


def prepare(config: Config, record: RunRecord) -> Ready:
    """Open the corpus, plan, and look at the machine; adds to `record` what that gives.

    Raises ConfigError where settings, corpus and machine do not fit together.
    """
    device = machine.pick_device(config.device, config.precision)
    if warning := machine.precision_warning(device, config.precision):
        tell(warning)
    corpus = open_corpus(config.data, tell)
    phases = plan(config, corpus.vocab_size)
    for phase in phases:
        phase.windows(len(corpus.train))
    here = machine.describe_machine(device)
    record.machine = here
    record.corpus = corpus_record(config, corpus)
    check_objective(config, record, phases, machine.peak_memory_mb(device))
    return Ready(device, here, corpus, phases)


def corpus_record(config: Config, corpus: Corpus) -> CorpusRecord:
    """What the record says of a corpus."""
    return CorpusRecord(
        name=corpus.name,
        fingerprint=corpus.fingerprint,
        vocab_size=corpus.vocab_size,
        seq_len=config.data.seq_len,
        train_windows=len(corpus.train),
        validation_windows=len(corpus.validation),
        test_windows=None if corpus.test is None else len(corpus.test),
    )


class Walk:
    """One walk through a plan: each phase starts from the selected epoch of the one before."""

    def __init__(
        self,
        config: Config,
        ready: Ready,
        store: Path,
        folder: Path,
        signals: machine.StopSignals,
        display: RunDisplay,
        loggers: Loggers,
        may_wait: bool,
        prune: Prune | None = None,
    ) -> None:
        self.config = config
        self.ready = ready
        self.store = store
        self.folder = folder
        self.display = display
        self.loggers = loggers
        self.may_wait = may_wait
        self.prune = prune
        self.watch = Watch(signals.received, display.step, self._wait)
        self.metrics_rows: list[MetricsRow] = []

    def through(self, records: list[PhaseRecord]) -> None:
        """Train or read every phase, adding to `records`."""
        previous: tuple[Trajectory, int] | None = None
        loss_before: float | None = None
        for phase, following in itertools.zip_longest(self.ready.phases, self.ready.phases[1:]):
            trajectory = Trajectory(
                store=self.store,
                parent=(previous[0].key, previous[1]) if previous else None,
                start=functools.partial(starting_model, phase, previous),
                phase=phase,
                corpus=self.ready.corpus,
                device=self.ready.device,
                machine=self.ready.here,
                checkpoint_every_s=self.config.checkpoint_every_s,
                watch=self.watch,
                carried=functools.partial(carried_moments, phase, previous),
                keep_optimizer=following is not None and following.optimizer.carry != "none",
            )
            machine.reset_peak_memory(self.ready.device)
            self.display.phase(phase)
            with trajectory:
                trajectory.stage.mark_used(self.folder)
                start = trajectory.start_exits() if phase.growth is not None else None
                if start is not None:
                    self._show_start(phase, start[-1])
                try:
                    stopped = follow(
                        phase.stop,
                        trajectory.epochs(),
                        functools.partial(self._show, phase, trajectory),
                    )
                    assert stopped is not None, "a trajectory has no end of its own"
                    exits = trajectory.finish(stopped.best.epoch)
                    test = trajectory.test(stopped.best.epoch)
                except Diverged:
                    self._keep_last_good(trajectory, previous)
                    raise
                memory = machine.peak_memory_mb(self.ready.device)
                growth = None
                if start is not None:
                    growth = _growth_record(
                        loss_before, start, stopped, trajectory.gradient_shares()
                    )
                windows = len(self.ready.corpus.train)
                flops = [
                    training_flops(phase, self.config.data.seq_len, windows, epoch.epoch)
                    for epoch in stopped.epochs
                ]
                records.append(
                    _phase_record(
                        phase,
                        flops,
                        trajectory.key,
                        trajectory.work,
                        stopped,
                        exits,
                        test,
                        memory,
                        growth,
                    )
                )
            loss_before = stopped.best.validation_loss
            previous = (trajectory, stopped.best.epoch)
        assert previous is not None
        self._keep_weights(*previous)

    def _wait(self, reason: str) -> None:
        if not self.may_wait:
            raise Deferred(reason)
        self.display.note(reason)

    def _show(
        self, phase: Phase, trajectory: Trajectory, metrics: EpochMetrics, best: EpochMetrics
    ) -> None:
        reused = metrics.epoch not in trajectory.work.trained
        self.display.epoch(metrics, best, reused)
        if best.epoch == metrics.epoch:
            self.metrics_rows = [
                replace(row, best=False) if row.phase == phase.index + 1 else row
                for row in self.metrics_rows
            ]
        self.metrics_rows.append(
            MetricsRow(
                phase=phase.index + 1,
                layers=phase.layers,
                epoch=metrics.epoch,
                train_loss=metrics.train_loss,
                validation_loss=metrics.validation_loss,
                validation_perplexity=metrics.validation_perplexity,
                validation_accuracy_percent=100 * metrics.validation_accuracy,
                train_tokens=metrics.train_tokens,
                train_seconds=round(metrics.train_seconds, 3),
                evaluation_seconds=round(metrics.evaluation_seconds, 3),
                best=best.epoch == metrics.epoch,
                reused=reused,
            )
        )
        write_metrics(self.folder, self.metrics_rows)
        self.loggers.epoch(self.metrics_rows[-1])
        if self.prune is not None and (reason := self.prune(self.metrics_rows[-1])) is not None:
            raise Pruned(reason)

    def _show_start(self, phase: Phase, last: ExitMetrics) -> None:
        """Show the model right after a growth as epoch 0 of its phase."""
        self.metrics_rows.append(
            MetricsRow(
                phase=phase.index + 1,
                layers=phase.layers,
                epoch=0,
                train_loss=None,
                validation_loss=last.loss,
                validation_perplexity=perplexity(last.loss),
                validation_accuracy_percent=100 * last.accuracy,
                train_tokens=0,
                train_seconds=0.0,
                evaluation_seconds=0.0,
                best=False,
                reused=False,
            )
        )
        write_metrics(self.folder, self.metrics_rows)
        self.display.note(
            f"  epoch  0  before its first step: validation loss {last.loss:.4f}  "
            f"perplexity {perplexity(last.loss):.2f}"
        )

    def _keep_weights(self, trajectory: Trajectory, epoch: int) -> None:
        """Put the model after `epoch` into the run's folder: a hard link where that can be had."""
        with trajectory:
            stored = trajectory.weights_file(epoch)
        files.link_or_copy(stored, self.folder / WEIGHTS, FOLDER_SETTINGS, is_of_run)

    def _keep_last_good(
        self, trajectory: Trajectory, previous: tuple[Trajectory, int] | None
    ) -> None:
        """After a divergence: the best epoch so far of this phase, else what it started from."""
        best = trajectory.best_recorded()
        if best is not None:
            self._keep_weights(trajectory, best)
        elif previous is not None:
            self._keep_weights(*previous)


def _phase_record(
    phase: Phase,
    flops: Sequence[Flops],
    stage: str,
    work: Work,
    stopped: Stopped,
    exits: list[ExitMetrics],
    test: ExitMetrics | None,
    peak_memory_mb: PeakMemory,
    growth: GrowthRecord | None = None,
) -> PhaseRecord:
    """What the record says of a phase; `flops` are those of each epoch."""
    counts = parameter_counts(phase)
    train_seconds = sum(epoch.train_seconds for epoch in stopped.epochs)
    tokens = sum(epoch.train_tokens for epoch in stopped.epochs)
    reused = [epoch for epoch in stopped.epochs if epoch.epoch not in work.trained]
    return PhaseRecord(
        index=phase.index,
        name=phase.name,
        layers=phase.layers,
        new_layers=list(phase.new_layers) if phase.index else [],
        parameters_total=counts.total,
        parameters_trainable=counts.trainable,
        frozen=list(phase.frozen),
        rates=phase.rates,
        exit_weights=list(phase.exit_weights),
        stage=stage,
        epochs=len(stopped.epochs),
        best_epoch=stopped.best.epoch,
        stopped=stopped.reason,
        best=BestEpoch(
            train_loss=stopped.best.train_loss,
            validation_loss=stopped.best.validation_loss,
            validation_perplexity=stopped.best.validation_perplexity,
            validation_accuracy_percent=100 * stopped.best.validation_accuracy,
        ),
        exits=[
            ExitRecord(
                layer=exit.exit + 1 if phase.layers else 0,
                validation_loss=exit.loss,
                validation_perplexity=perplexity(exit.loss),
                validation_accuracy_percent=100 * exit.accuracy,
            )
            for exit in exits
        ],
        train_tokens=tokens,
        train_flops_head=sum(epoch.head for epoch in flops),
        train_flops_body=sum(epoch.body for epoch in flops),
        train_seconds=train_seconds,
        evaluation_seconds=sum(epoch.evaluation_seconds for epoch in stopped.epochs),
        tokens_per_second=tokens / train_seconds if train_seconds else None,
        work=PhaseWork(
            epochs_trained=len(work.trained),
            epochs_replayed=work.epochs_replayed,
            epochs_reused=len(reused),
            seconds_saved=sum(e.train_seconds + e.evaluation_seconds for e in reused),
            seconds_waited=work.waited_seconds,
            peak_memory_mb=peak_memory_mb,
        ),
        growth=growth,
        test=test
        and EpochOnTest(
            test_loss=test.loss,
            test_perplexity=perplexity(test.loss),
            test_accuracy_percent=100 * test.accuracy,
        ),
    )


def _growth_record(
    loss_before: float | None,
    start: list[ExitMetrics],
    stopped: Stopped,
    gradient_shares: list[float] | None,
) -> GrowthRecord:
    """What a growth did: `start` are the exits before the first step after it."""
    tokens: int | None = 0
    for epoch in stopped.epochs:
        tokens += epoch.train_tokens
        if loss_before is not None and epoch.validation_loss < loss_before:
            break
    else:
        tokens = None
    return GrowthRecord(
        loss_before=loss_before,
        loss_after=start[-1].loss,
        exit_losses_after=[exit.loss for exit in start],
        tokens_to_recovery=tokens,
        gradient_share_new=gradient_shares,
    )


def check_objective(
    config: Config, record: RunRecord, phases: Sequence[Phase], peak_memory_mb: PeakMemory
) -> None:
    """Look the objective up in a record with made-up metrics. Raises ConfigError.

    `record` is what is known before the first phase, the corpus at least.
    """
    assert record.corpus is not None
    assert record.corpus.train_windows is not None
    epoch = EpochMetrics(1, 1.0, 1.0, 1.0, 1, 1.0, 1.0)
    stopped = Stopped(epoch, (epoch,), "")
    records = []
    for phase in phases:
        exits = [ExitMetrics(exit, 1.0, 1.0) for exit in range(phase.exits)]
        flops = [training_flops(phase, config.data.seq_len, record.corpus.train_windows)]
        growth = None
        if phase.growth is not None:
            growth = _growth_record(2.0, exits, stopped, [1.0])
        test = exits[-1] if record.corpus.test_windows else None
        records.append(
            _phase_record(phase, flops, "", Work(), stopped, exits, test, peak_memory_mb, growth)
        )
    changes = Changes.between(records[0].best, records[-1].best)
    try:
        metric(replace(record, phases=records, changes=changes), config.objective)
    except ValueError as error:
        raise ConfigError(f"objective={config.objective}: {error}") from error


def _objective(record: RunRecord, path: str) -> float | None:
    """The metric that a search goes by; a run whose work is done does not fail for want of it."""
    try:
        return metric(record, path)
    except ValueError as error:
        log.warning("objective=%s: %s; the run is complete without it", path, error)
        return None


def _tell_fault(record: RunRecord, error: Exception) -> None:
    """Put an error that is a fault of ours into the record, and into the log."""
    record.reason = f"{type(error).__name__}: {error}".splitlines()[0]
    record.traceback = traceback.format_exc()
    log.exception("the run failed")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def starting_model(phase: Phase, previous: tuple[Trajectory, int] | None) -> Transformer:
    """The model that `phase` begins with: untrained, or the last one's selected epoch, grown."""
    if previous is None:
        return build(phase)
    trajectory, epoch = previous
    before = trajectory.phase
    with trajectory:
        weights = trajectory.weights(epoch)
    return grow(restored(before.layers, asdict(before.architecture), weights), phase)


def carried_moments(phase: Phase, previous: tuple[Trajectory, int] | None) -> dict[str, Tensor]:
    """What the optimizer of `phase` takes over from the selected epoch of the phase before."""
    if previous is None or phase.optimizer.carry == "none":
        return {}
    trajectory, epoch = previous
    with trajectory:
        state = trajectory.optimizer_state(epoch)
    return carried_tensors(state, phase, trajectory.phase.layers)


def load_run(folder: str | Path) -> Transformer:
    """The model that a run left in its folder, on the CPU, ready to evaluate.

    Raises FileNotFoundError where the run left none.
    """
    path = Path(folder) / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}: did the run complete?")
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[ABOUT])
    weights = safetensors.torch.load_file(path)
    return restored(about["layers"], about["architecture"], weights).eval()
