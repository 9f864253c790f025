"""The record of a run and of a sweep: one file of state each, which says all that others may know.

A run's folder holds `run.json`. It is written whole when the job is submitted, when it starts,
after each epoch and at its end, and touched every few seconds in between: its age is the sign of
life. `metrics.csv` is a view of its epochs for people. A sweep's folder holds `sweep.json`, which
lists its jobs and is touched as long as the command works. `docs/job.md` draws the states.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from proglayer import files
from proglayer.config import Config, Objective
from proglayer.errors import ConfigError, UserError, raised_as
from proglayer.files import RUN_FILE, SWEEP_FILE
from proglayer.store.entries import Machine
from proglayer.training.cost import parameter_counts, training_flops
from proglayer.training.plan import Rates
from proglayer.training.stopping import StopReason, perplexity

if TYPE_CHECKING:
    from proglayer.data.corpus import Corpus
    from proglayer.store.trajectory import Trajectory
    from proglayer.training.stopping import EpochMetrics, Stopped
    from proglayer.training.trainer import ExitMetrics

METRICS = "metrics.csv"
WEIGHTS = "weights.safetensors"
HEARTBEAT_EVERY_S = 10.0
# A shared file system may show a change of time a minute late.
LOST_AFTER_S = 120.0
# Raise by hand when a reader of older records would misread a newer one.
FORMAT = 5


T = TypeVar("T", bound=BaseModel)


class RunState(StrEnum):
    """Where a job stands. The first five are ends."""

    completed = "completed"
    failed = "failed"
    interrupted = "interrupted"
    # Stopped by its scheduler, which will start it again.
    preempted = "preempted"
    # Stopped by its search, as it promised less than other trials.
    pruned = "pruned"
    running = "running"
    # Held by a scheduler, which may take days.
    pending = "pending"
    # Submitted by its sweep and not begun; not started: its sweep shows no sign of life either.
    waiting = "waiting"
    not_started = "not started"
    # Nobody is at work on it, and it did not say how it ended.
    lost = "lost"


ENDS = tuple(RunState)[:5]


class RecordError(UserError, ValueError):
    """A file that is no record of this version."""


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Score(Part):
    """What an evaluation gives: the loss in nats per token, and the share of tokens, from 0 to 1,
    that were predicted.
    """

    loss: float
    accuracy: float


class GitState(Part):
    """A checkout: its commit, whether files differ from it, and a hash of that difference."""

    commit: str
    changed: bool
    difference: str | None = None


class Environment(Part):
    """Versions and place of a run, and who started it. Several nodes may have one host's name."""

    proglayer: str
    python: str
    platform: str
    host: str
    process: int
    cores: int | None = None
    scheduler: str | None = None
    scheduler_job: str | None = None
    node: str | None = None


class CorpusRecord(Part):
    """What was trained and validated on. `seq_len` in tokens.

    The bytes are those of the text that the targets of the windows stand for, in UTF-8;
    `validation_unknown` counts the targets that are `<unk>`, of words. `test_fingerprint` hashes a
    data set's own test split; without it the test windows are what follows the validation windows.
    `tokenizer_revision` is the commit of a tokenizer from the hub.
    """

    name: str
    fingerprint: str
    vocab_size: int
    seq_len: int
    train_windows: int
    validation_windows: int
    test_windows: int | None = None
    tokenizer: str | None = None
    validation_bytes: int | None = None
    test_bytes: int | None = None
    validation_unknown: int | None = None
    test_fingerprint: str | None = None
    tokenizer_revision: str | None = None

    def figures(
        self, score: Score, on: Literal["validation", "test"] = "validation"
    ) -> dict[str, float | None]:
        """Return what a score means on this text, by the names of the frames' columns.

        Bits per byte are loss x tokens / (bytes x ln 2): unlike a loss per token they do not depend
        on how long tokens are. None of unknown bytes; perplexity is None where it overflows.
        """
        windows, size = getattr(self, f"{on}_windows"), getattr(self, f"{on}_bytes")
        known = windows and size
        bits = score.loss * windows * self.seq_len / (size * math.log(2)) if known else None
        base = perplexity(score.loss)
        return {
            f"{on}_loss": score.loss,
            f"{on}_perplexity": None if math.isinf(base) else base,
            f"{on}_accuracy_percent": 100 * score.accuracy,
            f"{on}_bits_per_byte": bits,
        }


class CheckpointRecord(Part):
    """The weights of others that a run began with: where they were, and their first so many layers.

    revision: the commit, of a name of the hub. sha256: of their settings and their files.
    """

    path: str
    revision: str | None
    sha256: str | None
    layers: int


class GrowthRecord(Part):
    """What happened at the moment of a phase's growth. Losses in nats per token, validation.

    exit_losses_after: at each evaluated exit of the grown model before its first step, bottom
        first.
    gradient_share_new: over the first steps, the norm of the new layers' gradient over that of all
        that trains.
    """

    exit_losses_after: list[float]
    gradient_share_new: list[float] | None


class PhaseRecord(Part):
    """One phase of a run. What it cost is in its epochs.

    `trajectory` is its key in the store. `validation`, `test` and `exits` are of the selected
    epoch, `best_epoch`; the exits by their layer, from 1.
    """

    name: str
    layers: int
    new_layers: list[int]
    parameters_total: int
    parameters_trainable: int
    frozen: list[str]
    rates: Rates
    exit_weights: list[float]
    trajectory: str
    best_epoch: int
    stopped: StopReason
    validation: Score
    exits: dict[int, Score]
    growth: GrowthRecord | None = None
    test: Score | None = None


class EpochRow(Part):
    """One epoch. Phases, layers and epochs count from 1.

    Tokens, FLOPs and seconds are those of its training, also where it was read from the store
    (`reused`).

    Epoch 0 is the model right after a growth, before its first step: it is never the best, unless
    the phase has no other epoch. `best` says whether it is the best epoch of its phase so far. An
    epoch of a lower loss than all before it has been evaluated on the test text, too: a budget may
    end there.
    """

    phase: int
    layers: int
    epoch: int
    train_loss: float | None
    validation: Score
    train_tokens: int
    train_flops_head: float
    train_flops_body: float
    train_seconds: float
    evaluation_seconds: float
    best: bool
    reused: bool
    test: Score | None = None

    def columns(self, corpus: CorpusRecord) -> dict[str, Any]:
        """Return the row as `metrics.csv` and the frames have it."""
        on_test = corpus.figures(self.test or self.validation, "test")
        test = on_test if self.test else dict.fromkeys(on_test)
        figures = corpus.figures(self.validation) | test
        return self.model_dump(exclude={"validation", "test"}) | figures


class RunRecord(Part):
    """`run.json`. A job that waits has its settings alone.

    `config` and `choices` are the settings and the group options it was composed from; `objective`
    is the figure that the setting of this name asks for. `weights_sha256` is the hash of WEIGHTS.
    `seconds` are those of the clock, from its start to its end.
    """

    format: Literal[5] = FORMAT
    state: RunState
    reason: str | None = None
    started: datetime | None = None
    ended: datetime | None = None
    seconds: float | None = None
    overrides: list[str] = []
    choices: dict[str, str] = {}
    config: dict[str, Any] | None = None
    environment: Environment | None = None
    machine: Machine | None = None
    gpu: str | None = None
    git: GitState | None = None
    corpus: CorpusRecord | None = None
    checkpoint: CheckpointRecord | None = None
    phases: list[PhaseRecord] = []
    epochs: list[EpochRow] = []
    objective: float | None = None
    weights_sha256: str | None = None
    traceback: str | None = None

    @property
    def settings(self) -> Config:
        """The settings, checked. Raises RecordError where it has none of this version."""
        with raised_as(RecordError, "the record has no settings of this version", ValidationError):
            return Config.model_validate(self.config)


class SweepJob(Part):
    """A job of a sweep: the name of its folder there, and its overrides."""

    folder: str
    overrides: list[str]


class SweepRecord(Part):
    """`sweep.json`: which jobs there are, and what asked for them.

    about: what a sweep that goes on by looking at its results is about, which has to stay the same;
        empty for a plain one.
    """

    format: Literal[5] = FORMAT
    jobs: list[SweepJob]
    command: list[str] = []
    git: GitState | None = None
    about: dict[str, Any] = {}


# --- what is recorded ----------------------------------------------------------------------------


def corpus_record(corpus: Corpus) -> CorpusRecord:
    """Return what the record says of a corpus."""
    same = {
        name: getattr(corpus, name) for name in CorpusRecord.model_fields if name in vars(corpus)
    }
    return CorpusRecord(
        **same,
        seq_len=corpus.train.shape[1] - 1,
        train_windows=len(corpus.train),
        validation_windows=len(corpus.validation),
        test_windows=None if corpus.test is None else len(corpus.test),
    )


def epoch_row(
    trajectory: Trajectory, metrics: EpochMetrics, best: bool, test: ExitMetrics | None
) -> EpochRow:
    """Return what the record says of an epoch."""
    phase, windows = trajectory.phase, trajectory.corpus.train
    figures = asdict(metrics)
    loss, accuracy = figures.pop("validation_loss"), figures.pop("validation_accuracy")
    flops = training_flops(phase.train, windows.shape[1] - 1, len(windows), metrics.epoch)
    return EpochRow(
        **figures,
        phase=phase.index + 1,
        layers=phase.train.layers,
        validation=Score(loss=loss, accuracy=accuracy),
        train_flops_head=flops.head if metrics.epoch else 0,
        train_flops_body=flops.body if metrics.epoch else 0,
        best=best,
        reused=metrics.epoch not in (0, *trajectory.trained),
        test=test and _score(test),
    )


def phase_record(
    trajectory: Trajectory, stopped: Stopped, exits: list[ExitMetrics], test: ExitMetrics | None
) -> PhaseRecord:
    """Return what the record says of a phase."""
    phase, spec, best = trajectory.phase, trajectory.phase.train, stopped.best
    parameters = parameter_counts(spec)
    growth = None
    if spec.growth:
        growth = GrowthRecord(
            exit_losses_after=[exit.loss for exit in trajectory.start_exits()],
            gradient_share_new=trajectory.gradient_shares(),
        )
    return PhaseRecord(
        name=phase.name,
        layers=spec.layers,
        new_layers=list(spec.new_layers) if phase.index else [],
        parameters_total=parameters.total,
        parameters_trainable=parameters.trainable,
        frozen=list(spec.frozen),
        rates=spec.rates,
        exit_weights=list(spec.exit_weights),
        trajectory=trajectory.key,
        best_epoch=best.epoch,
        stopped=stopped.reason,
        validation=Score(loss=best.validation_loss, accuracy=best.validation_accuracy),
        exits={each.exit + 1 if spec.layers else 0: _score(each) for each in exits},
        growth=growth,
        test=test and _score(test),
    )


def _score(metrics: ExitMetrics) -> Score:
    return Score(loss=metrics.loss, accuracy=metrics.accuracy)


# --- reading and writing --------------------------------------------------------------------------


def read_record(folder: Path) -> RunRecord:
    """Read `run.json`. Raises RecordError."""
    return _read(RunRecord, folder / RUN_FILE)


def record_of(folder: Path) -> RunRecord | None:
    """Return the record of a job, None if it has none that can be read."""
    with contextlib.suppress(RecordError):
        return read_record(folder)
    return None


def same_settings(record: RunRecord, config: Config) -> bool:
    """Whether a record is of these settings: of `precision=auto`, whatever that picked."""
    auto = {"precision": "auto"} if config.precision == "auto" else {}
    return (record.config or {}) | auto == config.model_dump(mode="json")


def read_sweep(folder: Path) -> SweepRecord:
    """Read `sweep.json`. Raises RecordError."""
    return _read(SweepRecord, folder / SWEEP_FILE)


def write_record(folder: Path, record: RunRecord | SweepRecord) -> None:
    """Write `run.json` or `sweep.json`, whole or not at all. Raises StoreError."""
    path = folder / (RUN_FILE if isinstance(record, RunRecord) else SWEEP_FILE)
    files.write_atomically(path, record.model_dump_json(indent=1).encode() + b"\n")


def change_state(
    folder: Path, state: RunState, reason: str | None, of: tuple[RunState, ...] = tuple(RunState)
) -> None:
    """Say of a job from outside where it stands and why, if its record says one of the states `of`.

    A record that cannot be read stays as it is. Raises StoreError.
    """
    with contextlib.suppress(RecordError):
        record = read_record(folder)
        if record.state in of:
            words = "; ".join(filter(None, (record.reason, reason))) or None
            write_record(folder, record.model_copy(update={"state": state, "reason": words}))


def write_metrics(folder: Path, record: RunRecord) -> None:
    """Write `metrics.csv`, every epoch so far, whole or not at all. Raises StoreError."""
    assert record.corpus is not None, "epochs are of a text"
    rows = [row.columns(record.corpus) for row in record.epochs]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_atomically(folder / METRICS, text.getvalue().encode())


def has_whole_weights(folder: Path, record: RunRecord) -> bool:
    """Whether a run's weights are still what it left."""
    try:
        return hash_weights(folder) == record.weights_sha256
    except OSError:
        return False


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 of a run's weights. Raises OSError."""
    with open(folder / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> datetime:
    """Return the time as records hold it."""
    return datetime.now(UTC).replace(microsecond=0)


def _read(kind: type[T], path: Path) -> T:
    with raised_as(RecordError, f"{path} cannot be read", OSError):
        content = path.read_bytes()
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"{path}: {f'{place}: ' if place else ''}{first['msg']}") from error


# --- signs of life --------------------------------------------------------------------------------


@contextlib.contextmanager
def sign_of_life(path: Path, every_s: float = HEARTBEAT_EVERY_S) -> Iterator[None]:
    """Touch a file while the block lasts, in a thread of its own: a long step is no silence."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="sign-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class JobState(NamedTuple):
    """Where a job stands, why if that is known, and when it last showed life."""

    state: RunState
    reason: str | None = None
    last_sign: datetime | None = None


def state_of(folder: Path, record: RunRecord | None = None) -> JobState:
    """Return where the job of a folder stands, by what its record says and how old that is.

    record: its record, where it was read already. A job without one is listed by its sweep and
        waits. Raises RecordError for a record that cannot be read.
    """
    own = folder / RUN_FILE
    last_sign = _changed(own)
    if record is None:
        record = RunRecord(state=RunState.waiting) if last_sign is None else read_record(folder)
    state, reason = record.state, record.reason
    if state is RunState.running and _is_old(last_sign):
        where = f" (it ran on {record.environment.host})" if record.environment else ""
        state, reason = RunState.lost, f"no sign of life since {_words(last_sign)}{where}"
    elif state is RunState.waiting:
        signs = last_sign, _changed(folder.parent / SWEEP_FILE)
        last_sign = max(filter(None, signs), default=None)
        if _is_old(last_sign):
            reason = f"its sweep shows no sign of life since {_words(last_sign)}"
            state = RunState.not_started
    moment = None if last_sign is None else datetime.fromtimestamp(last_sign, UTC)
    return JobState(state, reason, moment)


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _is_old(moment: float | None) -> bool:
    return moment is not None and time.time() - moment > LOST_AFTER_S


def _words(moment: float | None) -> str:
    return f"{datetime.fromtimestamp(moment or 0, UTC):%Y-%m-%d %H:%M} UTC"


# --- what a search goes by ------------------------------------------------------------------------


def check_objective(objective: Objective, corpus: CorpusRecord) -> None:
    """Raise ConfigError for an objective that no run on this text has."""
    if objective.startswith("test") and not corpus.test_windows:
        raise ConfigError(f"objective={objective}: this text has no test windows")
    if objective.endswith("per_byte") and not corpus.validation_bytes:
        raise ConfigError(f"objective={objective}: the bytes of this text are not known")


def objective_of(objective: Objective, record: RunRecord) -> float | None:
    """Return the figure of the last phase that a search goes by."""
    assert record.corpus is not None, "it was opened"
    last = record.phases[-1]
    figures = record.corpus.figures(last.validation)
    if last.test is not None:
        figures |= record.corpus.figures(last.test, "test")
    return figures.get(objective)
