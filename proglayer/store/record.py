"""The files of a job's folder: the record of a run, its metrics, and what says how it stands.

`result.json` is written last and atomically: it being there means that the run ended, and it says
how. `metrics.csv` grows by a row an epoch, so it can be read while the run goes on. Until the end
`heartbeat.json` shows that somebody is at work. `docs/job.md` draws all files and states.

Each file has one dataclass here, with the fields in the order in which they are written. A field
whose type has no None is required: reading a file without it raises RecordError. Any other value
that is missing, or of another type than the field, is read as None.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import socket
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from proglayer import files
from proglayer.config import to_plain
from proglayer.errors import UserError
from proglayer.store.reading import read_json
from proglayer.training.plan import Rates
from proglayer.training.stopping import perplexity

RESULT = "result.json"
METRICS = "metrics.csv"
WEIGHTS = "weights.safetensors"
JOBS = "jobs.json"
STUDY = "study.json"
SUBMITTED = ".submitted"
FAILED_JOB = ".failed"
HEARTBEAT = "heartbeat.json"
HEARTBEAT_EVERY_S = 10.0
# A shared file system may show a change of time a minute late.
LOST_AFTER_S = 120.0
# Raise by hand when a reader of older records would misread a newer one.
RECORD_FORMAT = 2

FOLDER_SETTINGS = "hydra.run.dir or hydra.sweep.dir"
SWEEP = "hydra.sweep.dir"
DIFFERENCE = "code.diff"

# How the files begin that a run or a sweep leaves: what begins otherwise is not ours.
is_result = files.begins_with(b'{"format":')
is_heartbeat = files.begins_with(b'{"sign":', b'{"host":')
is_job_list = files.begins_with(b'[{"folder":', b"[]")
is_submission = files.begins_with(b'{"config":')
is_difference = files.begins_with(b"diff --git")
_are_metrics = files.begins_with(b"phase,layers,epoch,")
WEIGHTS_START = b'{"__metadata__":{"proglayer":'

# A field that is written only where it has a value; others are written as null.
OMITTED_IF_NONE: Mapping[str, bool] = {"omitted_if_none": True}

T = TypeVar("T")


class RunState(StrEnum):
    """Where a job stands. The first five are ends, and stand in its record: see ENDS."""

    completed = "completed"
    failed = "failed"
    interrupted = "interrupted"
    # Stopped by its scheduler, which will start it again.
    preempted = "preempted"
    # Stopped by its search, as it promised less than other trials.
    pruned = "pruned"
    running = "running"
    # Held by a scheduler: nothing is written until it starts.
    pending = "pending"
    # Listed by its sweep and not begun; not started: its sweep shows no sign of life either.
    waiting = "waiting"
    not_started = "not started"
    # Without a record, and nobody is at work on it.
    lost = "lost"


# Those that a record can say.
ENDS = tuple(RunState)[:5]


class RecordError(UserError, ValueError):
    """A file that is no record this version can read.

    kind: "damaged" (cut short, or values are missing), "newer" (of a later format) or "foreign"
        (of another tool).
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


# -- result.json ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the bits of a result depend on besides the phase and the corpus."""

    device: str | None
    device_name: str | None
    threads: int | None
    torch: str | None


@dataclass(frozen=True)
class Gpu:
    """The GPU that a job holds: its index in this process, its name on this machine, the seconds
    until it was free.
    """

    index: int | None
    name: str | None
    seconds_waited: float | None


@dataclass(frozen=True, kw_only=True)
class GitState:
    """A checkout: its commit, whether files differ from it, and a hash of that difference."""

    commit: str | None
    changed: bool | None
    difference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Who started a job and on which of its nodes: several may have the name of one host."""

    name: str | None
    job: str | None
    node: str | None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions and place of a run."""

    proglayer: str | None
    python: str | None
    platform: str | None
    host: str | None
    cores: int | None = None
    scheduler: Scheduler | None = None


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """What was trained and validated on. `seq_len` in tokens.

    The bytes are those of the text that the targets of the windows stand for, in UTF-8;
    `validation_unknown` counts the targets that are `<unk>`, of words. Records without `tokenizer`
    are of words. `test_fingerprint` hashes a data set's own test split; without it the test windows
    are what follows the validation windows.
    """

    name: str | None
    fingerprint: str | None
    vocab_size: int | None
    seq_len: int | None
    train_windows: int | None
    validation_windows: int | None
    test_windows: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    tokenizer: str | None = field(default=None, metadata=OMITTED_IF_NONE)
    validation_bytes: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    test_bytes: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    validation_unknown: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    test_fingerprint: str | None = field(default=None, metadata=OMITTED_IF_NONE)

    def metrics(
        self, loss: float, accuracy: float, on: Literal["validation", "test"] = "validation"
    ) -> dict[str, float | None]:
        """What records hold of a loss, in nats per token, and an accuracy, from 0 to 1, on this
        text, by the names of their fields.

        Bits per byte are loss x tokens / (bytes x ln 2): unlike a loss per token they do not depend
        on how long tokens are. None of unknown bytes.
        """
        windows, size = getattr(self, f"{on}_windows"), getattr(self, f"{on}_bytes")
        known = windows and self.seq_len and size
        return {
            f"{on}_loss": loss,
            f"{on}_perplexity": perplexity(loss),
            f"{on}_accuracy_percent": 100 * accuracy,
            f"{on}_bits_per_byte": loss * windows * self.seq_len / (size * math.log(2))
            if known
            else None,
        }


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The weights of others that a run began with: where they were, and their first so many layers.

    revision: the commit, of a name of the hub. sha256: of their settings and their files.
    """

    path: str | None
    revision: str | None
    sha256: str | None
    layers: int | None


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """Metrics of a phase's selected epoch. Losses in nats per token."""

    train_loss: float | None
    validation_loss: float | None
    validation_perplexity: float | None
    validation_accuracy_percent: float | None
    validation_bits_per_byte: float | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class EpochOnTest:
    """Metrics of a phase's selected epoch on the test text, which no epoch is selected by."""

    test_loss: float | None
    test_perplexity: float | None
    test_accuracy_percent: float | None
    test_bits_per_byte: float | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class ExitRecord:
    """Metrics of the selected epoch, read at one exit: the layers below it, counted from 1."""

    layer: int
    validation_loss: float | None
    validation_perplexity: float | None
    validation_accuracy_percent: float | None
    validation_bits_per_byte: float | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Peak resident memory of the process and of its GPU in MB (10^6 bytes)."""

    process: float | None
    device: float | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class GrowthRecord:
    """What happened at the moment of a phase's growth. Losses in nats per token, validation.

    loss_before, loss_after: at the last exit of the old model's selected epoch, and of the grown
        model before its first step.
    exit_losses_after: at each evaluated exit of the grown model before its first step, bottom
        first.
    tokens_to_recovery: trained until the end of the first epoch below `loss_before`; None if never.
    gradient_share_new: over the first steps, the norm of the new layers' gradient over that of all
        that trains.
    """

    loss_before: float | None
    loss_after: float | None
    exit_losses_after: list[float] | None
    tokens_to_recovery: int | None
    gradient_share_new: list[float] | None


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """What a phase cost the run itself, and what it saved by reading epochs from the store."""

    epochs_trained: int | None
    epochs_replayed: int | None
    epochs_reused: int | None
    seconds_saved: float | None
    seconds_waited: float | None
    peak_memory_mb: PeakMemory


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """One phase of a run.

    Tokens, FLOPs and seconds are those of all its epochs as they were first trained, whether this
    run trained them or read them from the store. `stage` is its key in the store.
    """

    index: int | None
    name: str | None
    layers: int
    new_layers: list[int] | None
    parameters_total: int | None
    parameters_trainable: int | None
    frozen: list[str] | None
    rates: Rates
    exit_weights: list[float] | None
    stage: str | None
    epochs: int
    best_epoch: int
    stopped: str | None
    best: BestEpoch
    exits: list[ExitRecord]
    train_tokens: int | None
    train_flops_head: float | None
    train_flops_body: float | None
    train_seconds: float | None
    evaluation_seconds: float | None
    tokens_per_second: float | None
    work: PhaseWork
    growth: GrowthRecord | None = field(default=None, metadata=OMITTED_IF_NONE)
    test: EpochOnTest | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What changed from the first phase to the last: plus is an improvement in each. Accuracy in
    percentage points, perplexity in percent of the first, loss in nats per token. None where a
    metric of either phase is not finite.
    """

    accuracy_points: float | None
    perplexity_percent: float | None
    loss_nats: float | None


def changes_of(phases: Sequence[PhaseRecord]) -> Changes | None:
    """What changed from the first of these phases to the last; None unless there are several."""
    if len(phases) < 2:
        return None
    first, last = phases[0].best, phases[-1].best
    base = first.validation_perplexity
    fell = _difference(last.validation_perplexity, base)
    return Changes(
        accuracy_points=_difference(
            first.validation_accuracy_percent, last.validation_accuracy_percent
        ),
        perplexity_percent=fell / base * 100 if fell is not None and base else None,
        loss_nats=_difference(last.validation_loss, first.validation_loss),
    )


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


@dataclass(kw_only=True)
class RunRecord:
    """`result.json`. What a run that never started leaves is in its first fields alone.

    `config` and `choices` are the settings and the group options it was composed from; `objective`
    is the metric that the setting of this name points to. `changes` are those of a completed run of
    several phases. `weights_sha256` is the hash of WEIGHTS. Times are ISO 8601 in UTC.
    """

    format: int = RECORD_FORMAT
    status: RunState | None = None
    reason: str | None = None
    started: str | None = None
    overrides: list[str] | None = None
    choices: dict[str, str] | None = None
    seed: int | None = None
    config: dict[str, Any] | None = None
    environment: Environment | None = None
    machine: Machine | None = None
    gpu: Gpu | None = None
    git: GitState | None = None
    corpus: CorpusRecord | None = None
    checkpoint: CheckpointRecord | None = field(default=None, metadata=OMITTED_IF_NONE)
    phases: list[PhaseRecord] = field(default_factory=list)
    changes: Changes | None = field(default=None, metadata=OMITTED_IF_NONE)
    weights_sha256: str | None = field(default=None, metadata=OMITTED_IF_NONE)
    traceback: str | None = field(default=None, metadata=OMITTED_IF_NONE)
    ended: str | None = None
    seconds: float | None = None
    objective: float | None = None


# What a job leaves that ended before its first phase.
UNSTARTED_FIELDS = ("format", "status", "reason", "ended", "phases")


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `result.json`, whole or not at all. Numbers that are not finite become null."""
    plain = to_dict(record)
    if record.started is None:
        plain = {name: plain[name] for name in UNSTARTED_FIELDS}
    _write_result(folder, plain)


def read_record(folder: Path) -> RunRecord | None:
    """The record of an ended run; None if there is none. Raises RecordError or OSError."""
    try:
        plain = read_json(folder / RESULT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise RecordError("damaged", f"{RESULT} is cut short or damaged ({error})") from error
    form = typed(int, plain.get("format")) if isinstance(plain, dict) else None
    if form is None:
        raise RecordError("foreign", f"{RESULT} is no record of this tool")
    if form > RECORD_FORMAT:
        reason = f"{RESULT} has format {form}, newer than {RECORD_FORMAT}: update to read it"
        raise RecordError("newer", reason)
    if plain.get("status") not in list(ENDS) or not isinstance(plain.get("phases"), list):
        raise RecordError("damaged", f"{RESULT} does not say how the run ended")
    try:
        record = from_dict(RunRecord, plain)
    except RecordError as error:
        raise RecordError("damaged", f"{RESULT} holds {error}") from error
    # Format 1 gave the change of the loss the other sign, and runs of one phase changes of 0.
    record.changes = record.changes and changes_of(record.phases)
    return record


def has_whole_weights(folder: Path, record: RunRecord) -> bool:
    """Whether a run's weights are still what it left. Older records have no hash to tell by."""
    try:
        with open(folder / WEIGHTS, "rb") as file:
            if record.weights_sha256 is None:
                return True
            return hashlib.file_digest(file, "sha256").hexdigest() == record.weights_sha256
    except OSError:
        return False


def amend_record(folder: Path, was: RunState, state: RunState, why: str) -> None:
    """Correct how a record says that its run ended, and add to its reason.

    Nothing is done where it does not say `was`, or cannot be read. Raises StoreError.
    """
    with contextlib.suppress(OSError, ValueError):
        plain = read_json(folder / RESULT)
        if isinstance(plain, dict) and plain.get("status") == was:
            plain |= {"status": state.value, "reason": f"{plain.get('reason')}; {why}"}
            _write_result(folder, plain)


def check_folder(folder: Path) -> None:
    """Raise NotOursError for a file of a user's in the place of one that a run will write."""
    files.check_ours(folder / RESULT, is_result, FOLDER_SETTINGS)
    for name in (METRICS, WEIGHTS):
        files.check_ours(folder / name, is_of_run, FOLDER_SETTINGS)


def remove_record(folder: Path) -> None:
    """Remove the record of an earlier try and what belongs to it: the job counts as running.

    The record goes first, so that no run counts as ended whose weights are gone.
    """
    ours = [name for name in (METRICS, WEIGHTS) if files.is_ours(folder / name, is_of_run)]
    files.delete(folder / RESULT, is_result)
    for name in ours:
        files.delete(folder / name, files.everything)


def is_of_run(path: Path) -> bool:
    """Whether metrics or weights are a run's: they begin so, or a record of ours lies beside."""
    begins = _are_metrics if path.name == METRICS else _are_weights
    return begins(path) or files.is_ours(path.parent / RESULT, is_result)


def _are_weights(path: Path) -> bool:
    """A safetensors file begins with the length of its header in 8 bytes, and that in JSON."""
    with open(path, "rb") as file:
        return file.read(8 + len(WEIGHTS_START))[8:] in (b"", WEIGHTS_START)


def metric(record: RunRecord, path: str) -> float:
    """The number of a record at a path such as `phases.-1.best.validation_loss`.

    Raises ValueError, with the names that there are, where no number stands.
    """
    at: Any = to_dict(record)
    for name in path.split("."):
        try:
            at = at[int(name)] if isinstance(at, list) else at[name]
        except (KeyError, IndexError, TypeError, ValueError):
            there = list(at) if isinstance(at, Mapping) else range(len(at)) if at else ()
            names = ", ".join(map(str, there)) or "nothing"
            raise ValueError(f"a record has no {path}: at {name} there is {names}") from None
    if isinstance(at, bool) or not isinstance(at, (int, float)):
        raise ValueError(f"{path} of a record is not a number")
    return float(at)


def _write_result(folder: Path, plain: dict[str, Any]) -> None:
    text = json.dumps(plain, indent=2, allow_nan=False)
    files.write_atomically(folder / RESULT, text.encode() + b"\n", FOLDER_SETTINGS, is_result)


# -- metrics.csv ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """One epoch. Phases, layers and epochs count from 1; `reused` epochs were read from the store.
    Epoch 0 is the model right after a growth, before its first step: it is never the best, unless
    the phase has no other epoch.

    `best` is whether it is the best epoch of its phase so far.
    """

    phase: int
    layers: int
    epoch: int
    train_loss: float | None
    validation_loss: float | None
    validation_perplexity: float | None
    validation_accuracy_percent: float | None
    train_tokens: int | None
    train_seconds: float | None
    evaluation_seconds: float | None
    best: bool | None
    reused: bool | None
    validation_bits_per_byte: float | None = None


METRICS_COLUMNS = tuple(column.name for column in fields(MetricsRow))


def write_metrics(folder: Path, rows: Iterable[MetricsRow]) -> None:
    """Write every epoch so far; a reader sees the old rows or the new ones, never half a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(vars, rows))
    data = text.getvalue().encode()
    files.write_atomically(folder / METRICS, data, FOLDER_SETTINGS, is_of_run)


# -- the files of a sweep -------------------------------------------------------------------------


@dataclass(frozen=True)
class ListedJob:
    """A job in the `jobs.json` of its sweep: the name of its folder there, and its overrides."""

    folder: str
    overrides: tuple[str, ...]


def write_jobs(sweep: Path, jobs: Iterable[ListedJob]) -> None:
    """Write `jobs.json`: which jobs a sweep has. Raises StoreError."""
    text = json.dumps([to_dict(job) for job in jobs], indent=1)
    files.write_atomically(sweep / JOBS, text.encode(), SWEEP, is_job_list)


def read_jobs(sweep: Path) -> list[ListedJob]:
    """The jobs that `jobs.json` lists. Raises OSError, or RecordError for no list of jobs."""
    try:
        listed = read_json(sweep / JOBS)
        return [ListedJob(str(job["folder"]), tuple(map(str, job["overrides"]))) for job in listed]
    except (ValueError, RecursionError) as error:
        raise RecordError("damaged", str(error)) from error
    except (KeyError, TypeError) as error:
        raise RecordError("foreign", "no list of jobs") from error


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a job of a sweep was submitted with: its settings, and the state of the code."""

    config: dict[str, Any]
    git: GitState | None


def write_submissions(
    sweep: Path, jobs: Mapping[str, Mapping[str, Any]], git: GitState | None, difference: str
) -> None:
    """Keep what is submitted in the folder of a sweep: each job's settings, and the code.

    `difference` is that of the code to its commit, as `git apply` takes it. Raises StoreError.
    """
    folder = sweep / SUBMITTED
    files.delete(sweep / FAILED_JOB, _is_in_sweep)
    for job, config in jobs.items():
        content = to_dict(Submission(config=dict(config), git=git))
        data = json.dumps(content, indent=1).encode()
        files.write_atomically(folder / f"{job}.json", data, SWEEP, is_submission)
    if difference:
        files.write_atomically(folder / DIFFERENCE, difference.encode(), SWEEP, is_difference)
    else:
        files.delete(folder / DIFFERENCE, is_difference)


def _is_in_sweep(path: Path) -> bool:
    return files.is_ours(path.parent / JOBS, is_job_list)


def read_submission(job: Path) -> Submission | None:
    """What the job in this folder was submitted with; None if it was not.

    Raises RecordError for a damaged file.
    """
    path = job.parent / SUBMITTED / f"{job.name}.json"
    if not path.exists():
        return None
    try:
        return from_dict(Submission, read_json(path))
    except (ValueError, RecursionError) as error:
        raise RecordError("damaged", str(error)) from error


def note_failed_job(job: Path) -> None:
    """Leave word in the sweep's folder that the job in this one failed, if that is possible.

    Jobs that are not to start after a failure look for it, and need not read every record.
    """
    with contextlib.suppress(OSError):
        files.write_over(job.parent / FAILED_JOB, job.name.encode(), _is_in_sweep, SWEEP)


def failed_job(sweep: Path) -> str | None:
    """The name of a job that failed since the sweep began, if one did."""
    with contextlib.suppress(OSError):
        return (sweep / FAILED_JOB).read_text(encoding="utf-8")
    return None


# -- heartbeat.json -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HeartbeatContent:
    """What a job without a record says of itself, and which process wrote it.

    sign: running (the file is touched again and again), pending (nothing touches it until the job
        starts), or lost, with the reason. None where the file says nothing.
    """

    sign: RunState | None = None
    host: str | None = None
    process: int | None = None
    reason: str | None = field(default=None, metadata=OMITTED_IF_NONE)


class Heartbeat(contextlib.AbstractContextManager["Heartbeat"]):
    """Shows that the run in `folder` is alive: a file that is touched while the block lasts.

    A thread of its own does it, so that a long step or a wait for another job is no silence. A run
    that is killed leaves the file behind, and its time tells when. That a file cannot be written
    is no reason to end a run: it then shows no sign.
    """

    def __init__(self, folder: Path, every_s: float = HEARTBEAT_EVERY_S) -> None:
        self._folder = folder
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._sign = write_heartbeat(self._folder, RunState.running)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        # Whatever else was written since is no sign of this block's.
        if read_heartbeat(self._folder) in (HeartbeatContent(), self._sign):
            remove_heartbeat(self._folder)

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                os.utime(self._folder / HEARTBEAT)
            except FileNotFoundError:
                write_heartbeat(self._folder, RunState.running)
            except OSError:
                continue


def write_heartbeat(folder: Path, sign: RunState) -> HeartbeatContent:
    """Write `heartbeat.json` with this process's host and number, if that is possible."""
    own = HeartbeatContent(sign=sign, host=socket.gethostname(), process=os.getpid())
    _write_heartbeat(folder, own)
    return own


def remove_heartbeat(folder: Path) -> None:
    """Take `heartbeat.json` away, if that is possible."""
    with contextlib.suppress(OSError):
        files.delete(folder / HEARTBEAT, is_heartbeat)


def mark_lost(folder: Path, reason: str) -> None:
    """Say of a run without a record that nobody is at work on it, nor will be, and why."""
    lost = replace(read_heartbeat(folder), sign=RunState.lost, reason=reason)
    _write_heartbeat(folder, lost)


def read_heartbeat(folder: Path) -> HeartbeatContent:
    """What `heartbeat.json` holds; nothing where it is not there or cannot be read."""
    try:
        plain = read_json(folder / HEARTBEAT)
    except (OSError, ValueError, RecursionError):
        plain = {}
    return from_dict(HeartbeatContent, plain)


def _write_heartbeat(folder: Path, content: HeartbeatContent) -> None:
    # A reader that comes in between may find it empty.
    with contextlib.suppress(OSError):
        data = json.dumps(to_dict(content)).encode() + b"\n"
        files.write_over(folder / HEARTBEAT, data, is_heartbeat, FOLDER_SETTINGS)


# -- the state of a job ---------------------------------------------------------------------------


class JobState(NamedTuple):
    """Where a job stands, why if that is known, and the host that it runs or ran on."""

    state: RunState
    reason: str | None = None
    host: str | None = None


def job_state(
    folder: Path,
    record: RunRecord | None = None,
    last_sign: datetime | None = None,
    sweep_sign: datetime | None = None,
) -> JobState:
    """Where the job of this folder stands, by its files.

    record: its record, where it has one.
    last_sign, sweep_sign: when files of the job, or of its sweep, last changed. None: not known,
        and taken for just now.
    """
    if record is not None and record.status is not None:
        host = record.environment.host if record.environment else None
        return JobState(record.status, record.reason, host)
    if not folder.exists():
        if since := _lost_since(sweep_sign, folder.parent):
            return JobState(RunState.not_started, f"its sweep shows no sign of life since {since}")
        return JobState(RunState.waiting)
    heartbeat = read_heartbeat(folder)
    host = heartbeat.host
    if heartbeat.sign is RunState.lost:
        reason = heartbeat.reason or "it was ended from outside and left no record"
        return JobState(RunState.lost, reason, host)
    if heartbeat.sign is RunState.pending:
        return JobState(RunState.pending, None, host)
    if since := _lost_since(last_sign, folder):
        where = f" (it ran on {host})" if host else ""
        return JobState(RunState.lost, f"no sign of life since {since}{where}", host)
    return JobState(RunState.running, None, host)


def _lost_since(sign: datetime | None, folder: Path) -> str | None:
    """When a job without a record, or its sweep, last showed life, if that is too long ago."""
    now = datetime.now(UTC)
    if sign is None or (now - sign).total_seconds() <= LOST_AFTER_S:
        return None
    if (_clock_of(folder) or now) - sign <= timedelta(seconds=LOST_AFTER_S):
        return None
    return f"{sign:%Y-%m-%d %H:%M} UTC"


def _clock_of(folder: Path) -> datetime | None:
    """The time by the clock that dates the files of a folder, which on a network file system is
    another machine's; None where no file can be made there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as unnamed:
            return datetime.fromtimestamp(os.fstat(unnamed.fileno()).st_mtime, UTC)
    except (OSError, ValueError, OverflowError):
        return None


# -- between dataclasses and plain data -----------------------------------------------------------


def to_dict(value: Any) -> Any:
    """A dataclass of this module as plain data that JSON can hold: what is not finite is null."""

    def written(each: Field[Any], item: Any) -> bool:
        return item is not None or not each.metadata.get("omitted_if_none")

    def finite(item: Any) -> Any:
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return to_plain(value, written, finite)


def from_dict(kind: type[T], plain: Any) -> T:
    """An object of the dataclass `kind` from plain data; see the module's beginning.

    Raises RecordError where a required value is missing.
    """
    source = plain if isinstance(plain, dict) else {}
    values = {}
    for name, hint, required in _hints(kind):
        value = values[name] = _read(hint, source.get(name), required)
        if value is None and required:
            what = kind.__name__.removesuffix("Record").lower()
            raise RecordError("damaged", f"a {what} without {name}")
    return kind(**values)


@functools.cache
def _hints(kind: type) -> list[tuple[str, Any, bool]]:
    """For each field of a dataclass its name, its type without None, and whether that is all."""
    found = []
    for name, hint in get_type_hints(kind).items():
        options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        (known,) = (option for option in options if option is not NoneType)
        found.append((name, known, NoneType not in options))
    return found


def _read(hint: Any, value: Any, required: bool) -> Any:
    """A value of this type from plain data; None for anything else."""
    if is_dataclass(hint):
        kind: Any = hint
        return from_dict(kind, value) if isinstance(value, dict) or required else None
    if get_origin(hint) is dict:
        return value if isinstance(value, dict) else None
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        if isinstance(value, list):
            return [_read(item, each, required=True) for each in value]
        return [] if required else None
    return typed(hint, value)


def typed(kind: Any, value: Any) -> Any:
    """`value` as a float, an int of 64 bits, a bool, text or a RunState; None for anything else."""
    if kind is str:
        return as_text(value)
    if kind is RunState:
        return RunState(value) if value in list(RunState) else None
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**1023 else None
    if type(value) is not kind or (kind is int and not -(2**63) <= value < 2**63):
        return None
    return value


def as_text(value: Any) -> str | None:
    """Text that every file format can hold; other values as JSON writes them."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
