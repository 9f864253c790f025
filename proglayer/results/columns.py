"""The columns of the study's tables: what each holds, and where it stands in a record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from datetime import UTC, datetime
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa

from proglayer.config import Config
from proglayer.store.record import METRICS_COLUMNS, RunState

RUNNING = RunState.running.value
PENDING = RunState.pending.value
WAITING = RunState.waiting.value
NOT_STARTED = RunState.not_started.value
LOST = RunState.lost.value
COMPLETED = RunState.completed.value
# Two runs that differ in these alone are the same experiment with the same seed: they say where
# and how a run works, not what it trains. Device, threads, compiler change the rounding, no more.
NOT_THE_EXPERIMENT = (
    "plan",
    "on_error",
    "objective",
    "reuse",
    "report",
    "checkpoint_every_s",
    "logger.tensorboard",
    "logger.mlflow",
    "stages.dir",
    "threads",
    "device",
    "compile",
    "jobs_per_gpu",
    "data.cache_dir",
)
# Where the text lies; the corpus's fingerprint, where it is known, says what it is.
PLACE_OF_TEXT = ("data.path", "data.files")
GROUPS = ("model", "experiment", "data", "phase", "growth", "freeze", "lr")
# Columns: what they hold (text, a whole number, a number, yes or no, a time; with ! never missing)
# and, where it is taken from a record as it is, where it stands there.
IDENTITY_COLUMNS = {
    "run": "text",
    "sweep": "text",
    "status": "text",
    "reason": "text reason",
    **dict.fromkeys(GROUPS, "text"),
    "seed": "whole",
    "duplicate_of": "text",
}
FIGURE_COLUMNS = {
    "accuracy_points": "number changes.accuracy_points",
    "perplexity_percent": "number changes.perplexity_percent",
    "loss_nats": "number changes.loss_nats",
    "first_layers": "whole",
    "first_loss": "number",
    "first_perplexity": "number",
    "first_accuracy_percent": "number",
    "last_layers": "whole",
    "last_loss": "number",
    "last_perplexity": "number",
    "last_accuracy_percent": "number",
    "phases": "whole",
    "epochs": "whole",
    "epochs_reused": "whole",
    "seconds": "number",
    "seconds_saved": "number",
    "wall_seconds": "number seconds",
    "tokens": "whole",
    "flops": "number",
    "flops_without_head": "number",
    "peak_memory_mb": "number",
}
PLACE_COLUMNS = {
    "overrides": "text",
    "started": "time",
    "ended": "time ended",
    "last_sign": "time",
    "corpus": "text corpus.name",
    "corpus_fingerprint": "text corpus.fingerprint",
    "vocab_size": "whole corpus.vocab_size",
    "validation_tokens": "whole",
    "device": "text machine.device",
    "device_name": "text machine.device_name",
    "threads": "whole machine.threads",
    "torch": "text machine.torch",
    "python": "text environment.python",
    "proglayer": "text environment.proglayer",
    "platform": "text environment.platform",
    "host": "text environment.host",
    "scheduler": "text environment.scheduler.name",
    "scheduler_job": "text environment.scheduler.job",
    "node": "text environment.scheduler.node",
    "gpu": "text gpu.name",
    "seconds_waited_for_gpu": "number gpu.seconds_waited",
    "git_commit": "text git.commit",
    "git_changed": "flag git.changed",
    "traceback": "text traceback",
    "folder": "text",
}
PHASE_COLUMNS = {
    "run": "text",
    "phase": "whole!",
    "name": "text name",
    "layers": "whole! layers",
    "new_layers": "text new_layers",
    "parameters_total": "whole parameters_total",
    "parameters_trainable": "whole parameters_trainable",
    "frozen": "text frozen",
    "rate_new": "number rates.new",
    "rate_existing": "number rates.existing",
    "rate_embedding": "number rates.embedding",
    "rate_head": "number rates.head",
    "exit_weights": "text exit_weights",
    "epochs": "whole! epochs",
    "best_epoch": "whole! best_epoch",
    "stopped": "text stopped",
    "train_loss": "number best.train_loss",
    "validation_loss": "number best.validation_loss",
    "validation_perplexity": "number best.validation_perplexity",
    "validation_accuracy_percent": "number best.validation_accuracy_percent",
    "train_tokens": "whole train_tokens",
    "train_flops_head": "number train_flops_head",
    "train_flops_body": "number train_flops_body",
    "train_seconds": "number train_seconds",
    "evaluation_seconds": "number evaluation_seconds",
    "tokens_per_second": "number tokens_per_second",
    "epochs_trained": "whole work.epochs_trained",
    "epochs_replayed": "whole work.epochs_replayed",
    "epochs_reused": "whole work.epochs_reused",
    "seconds_saved": "number work.seconds_saved",
    "seconds_waited": "number work.seconds_waited",
    "peak_memory_mb": "number work.peak_memory_mb.process",
    "peak_device_memory_mb": "number work.peak_memory_mb.device",
    "stage": "text stage",
}
EPOCH_COLUMNS = {
    "run": "text",
    **dict.fromkeys(METRICS_COLUMNS, "number"),
    "phase": "whole!",
    "layers": "whole!",
    "epoch": "whole!",
    "train_tokens": "whole",
    "best": "flag",
    "reused": "flag",
}
EXIT_COLUMNS = {
    "run": "text",
    "phase": "whole!",
    "layer": "whole! layer",
    "validation_loss": "number validation_loss",
    "validation_perplexity": "number validation_perplexity",
    "validation_accuracy_percent": "number validation_accuracy_percent",
}
LEFT_OUT_COLUMNS = {"folder": "text", "kind": "text", "reason": "text"}
Rows = list[dict[str, Any]]
# What becomes the frames: Arrow tables whose rows name their run by a number, `code`.
Piece = dict[str, pa.Table]
ARROW = {
    "text": pa.string(),
    "whole": pa.int64(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "time": pa.timestamp("us", "UTC"),
}


class _Column(NamedTuple):
    """What a column holds, whether it must, and its place in the record (empty: computed)."""

    kind: str
    required: bool
    place: tuple[str, ...]


def _columns(specification: dict[str, str]) -> dict[str, _Column]:
    columns = {}
    for name, text in specification.items():
        kind, _, place = text.partition(" ")
        columns[name] = _Column(
            kind.rstrip("!"), kind.endswith("!"), tuple(place.split(".")) if place else ()
        )
    return columns


def _setting_kinds(schema: type = Config, prefix: str = "") -> dict[str, str]:
    """Every setting that holds a value -> what its column holds; lists and enums are text."""
    kinds: dict[str, str] = {}
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint) and isinstance(hint, type):
            kinds |= _setting_kinds(hint, f"{prefix}{name}.")
            continue
        if get_origin(hint) in (Union, UnionType):
            options = [option for option in get_args(hint) if option is not NoneType]
            hint = options[0] if len(options) == 1 else str
        kinds[prefix + name] = {bool: "flag", int: "whole", float: "number"}.get(hint, "text")
    return kinds


SETTINGS = _setting_kinds()
COLUMNS = {
    "runs": _columns(
        {
            **IDENTITY_COLUMNS,
            **FIGURE_COLUMNS,
            **PLACE_COLUMNS,
            "experiment_key": "text",
            **{f"config.{name}": kind for name, kind in SETTINGS.items()},
        }
    ),
    "phases": _columns(PHASE_COLUMNS),
    "epochs": _columns(EPOCH_COLUMNS),
    "exits": _columns(EXIT_COLUMNS),
}
# Known only once all runs are: these are not in the tables that are read and cached.
NAMED_LATER = ("run", "sweep", "duplicate_of", "last_sign", "folder")
SCHEMAS = {
    table: pa.schema(
        [
            ("code", pa.int64()),
            *((n, ARROW[column.kind]) for n, column in columns.items() if n not in NAMED_LATER),
        ]
    )
    for table, columns in COLUMNS.items()
}
RECORDED = {
    table: {name: column for name, column in columns.items() if column.place}
    for table, columns in COLUMNS.items()
}


def empty_piece() -> Piece:
    return {name: schema.empty_table() for name, schema in SCHEMAS.items()}


def concatenated(pieces: Sequence[Piece]) -> Piece:
    if not pieces:
        return empty_piece()
    return {
        name: pa.concat_tables([piece[name] for piece in pieces], promote_options="default")
        for name in SCHEMAS
    }


def recoded(piece: Piece, new_codes: np.ndarray) -> Piece:
    """`piece` with `new_codes[code]` for each code; rows for which that is negative are dropped."""
    recoded = {}
    for name, table in piece.items():
        codes = new_codes[table["code"].to_numpy()]
        table = table.set_column(0, SCHEMAS[name].field("code"), pa.array(codes, pa.int64()))
        recoded[name] = table if (codes >= 0).all() else table.filter(pa.array(codes >= 0))
    return recoded


def inside(value: Any, place: Iterable[str]) -> Any:
    """What lies in nested objects under these names; None where the way ends."""
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def as_number(value: Any) -> float | None:
    if isinstance(value, float):
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def as_whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        return None
    return value


def as_flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def as_text(value: Any) -> str | None:
    """Text that every file format can hold; other values as JSON writes them."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def as_moment(value: Any) -> datetime | None:
    """A time as the record writes it."""
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return None


CLEAN: dict[str, Callable[[Any], Any]] = {
    "text": as_text,
    "whole": as_whole,
    "number": as_number,
    "flag": as_flag,
    "time": as_moment,
}
