"""The settings of a run: one typed schema, checked once at the entrance.

Settings travel schema (types) -> YAML (values) -> command line (overrides) and are merged there
by Hydra. `to_config` turns the result into the frozen dataclasses below, and checks every rule
that needs no corpus. This is the only module of the package that sees OmegaConf; past it,
settings are plain data.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from proglayer.versions import install_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line per problem and names the setting."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type's name where it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def with_type(error: BaseException) -> str:
    """An error that nobody foresaw, in one line: its type and all that it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class DataSource(Enum):
    """Where the text comes from."""

    pydocs = "pydocs"
    wikitext2 = "wikitext2"
    text = "text"
    hub = "hub"


class PhaseSchedule(Enum):
    """Which phases a run has."""

    grow_once = "grow_once"
    one_at_a_time = "one_at_a_time"
    from_scratch = "from_scratch"
    keep_training = "keep_training"


class GrowthInit(Enum):
    """What the weights of a new layer start from."""

    random = "random"
    copy = "copy"


class GrowthPosition(Enum):
    """Where new layers go."""

    top = "top"
    bottom = "bottom"
    interleave = "interleave"


class ScheduleShape(Enum):
    """How the learning rate moves within a phase, after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class ExitWeights(Enum):
    """Named weights of the loss over the exits (a list of numbers is the other possibility)."""

    uniform = "uniform"
    linear = "linear"
    last = "last"


class Precision(Enum):
    """What the matrix products are computed in. Weights and optimizer state stay float32.

    `tf32`, of NVIDIA GPUs, rounds the factors of a product to 10 bits and sums in float32.
    """

    float32 = "float32"
    tf32 = "tf32"
    bfloat16 = "bfloat16"


class Device(Enum):
    """Where a run trains; `auto` takes cuda, then mps, then cpu."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class OnError(Enum):
    """What a sweep does when one of its jobs fails."""

    go_on = "go_on"
    stop = "stop"


@dataclass(frozen=True)
class ModelConfig:
    """The transformer. `exit_weights` is a name of `ExitWeights` or a list, bottom layer first."""

    dim: int
    num_heads: int
    ffn_multiple: int
    rotary_base: float
    norm_eps: float
    vocab_size: int | None
    exit_weights: Any


@dataclass(frozen=True)
class DataConfig:
    """The corpus: its source, how it is cut into words and windows, and how much is used."""

    source: DataSource
    seq_len: int
    samples: int | None
    validation_samples: int | None
    lowercase: bool
    min_count: int
    max_vocab: int | None
    path: str | None
    files: list[str]
    held_out: float
    repository: str | None
    configuration: str | None
    revision: str | None
    train_split: str
    validation_split: str
    text_column: str
    cache_dir: str | None


@dataclass(frozen=True)
class BudgetOverrides:
    """A phase's own budget; null keeps what the phase group says for all."""

    batch_size: int | None
    max_epochs: int | None
    patience: int | None
    min_delta: float | None
    samples: int | None


@dataclass(frozen=True)
class PhaseConfig:
    """Which phases there are, and what each may spend."""

    schedule: PhaseSchedule
    batch_size: int
    max_epochs: int
    patience: int
    min_delta: float
    samples: int | None
    initial: BudgetOverrides
    grown: BudgetOverrides


@dataclass(frozen=True)
class GrowthConfig:
    """How layers are added."""

    init: GrowthInit
    position: GrowthPosition


@dataclass(frozen=True)
class FreezeStep:
    """One phase after a growth. `existing` counts trained old layers from the top, or is `all`."""

    existing: int | str
    embedding: bool
    head: bool


@dataclass(frozen=True)
class FreezeConfig:
    """The steps after each growth, one phase each."""

    steps: list[FreezeStep]


@dataclass(frozen=True)
class RoleFactors:
    """What the base rate is multiplied by after the initial phase, per role."""

    new: float
    existing: float
    embedding: float
    head: float


@dataclass(frozen=True)
class LrConfig:
    """Learning rates. Warm-up in optimizer steps; `final_factor` is where a decay ends."""

    base: float
    factor: RoleFactors
    schedule: ScheduleShape
    warmup_steps: int
    final_factor: float


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and the norm that gradients are clipped to (null: not clipped)."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float | None


@dataclass(frozen=True)
class LoggerConfig:
    """Who else is told of a run's figures as they come."""

    tensorboard: bool
    mlflow: bool


@dataclass(frozen=True)
class StagesConfig:
    """The store of trained phases. `dir` null: PROGLAYER_STAGES, else multirun/.stages."""

    dir: str | None


@dataclass(frozen=True)
class Config:
    """Every setting of one run."""

    seed: int
    initial_layers: int
    added_layers: int
    model: ModelConfig
    data: DataConfig
    phase: PhaseConfig
    growth: GrowthConfig
    freeze: FreezeConfig
    lr: LrConfig
    optimizer: OptimizerConfig
    device: Device
    precision: Precision
    compile: bool
    threads: int | None
    jobs_per_gpu: int
    plan: bool
    on_error: OnError
    objective: str
    reuse: bool
    report: bool
    checkpoint_every_s: float
    logger: LoggerConfig
    stages: StagesConfig


# ---------------------------------------------------------------------------------------------
# Hydra's side


def register() -> None:
    """Give Hydra the schema (as `schema`) and the resolvers that `conf/` uses. Safe to repeat."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=_SCHEMA)
    # Hydra copies its sources, with every schema in this store, for each group that --help lists
    # and each job that it composes, only to put together a list of its own: half the time of
    # --help. What it loads from the store it copies once more.
    ConfigStore.__deepcopy__ = _itself  # pyright: ignore[reportAttributeAccessIssue]
    # Cached, so that every job of a sweep sees the token that the sweep was given.
    OmegaConf.register_new_resolver(
        "unique_token", lambda: secrets.token_hex(3), replace=True, use_cache=True
    )
    OmegaConf.register_new_resolver("short_hash", short_hash, replace=True)


def _itself(store: Any, _: dict[int, Any]) -> Any:
    """A deep copy that is none."""
    return store


def short_hash(text: str) -> str:
    """Six hexadecimal digits that stand for `text` in the name of a folder."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def to_config(settings: DictConfig) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Raises ConfigError with one line for each setting that cannot work.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    # Hydra's own part holds values that only a running job knows.
    own = OmegaConf.masked_copy(settings, [str(key) for key in settings if key != "hydra"])
    try:
        plain = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        if isinstance(error, MissingMandatoryValue) and key:
            raise ConfigError(f"{key} has no value: give it one") from error
        raise ConfigError(f"{key}: {first_line(error)}" if key else first_line(error)) from error
    assert isinstance(plain, dict)
    config = _frozen(Config, plain)
    problems = list(_problems(config))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def to_plain(settings: Any) -> Any:
    """A dataclass of settings as what JSON can hold: enums by name, tuples as lists."""
    if is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: to_plain(getattr(settings, f.name)) for f in fields(settings)}
    if isinstance(settings, Enum):
        return settings.name
    if isinstance(settings, (list, tuple)):
        return [to_plain(item) for item in settings]
    if isinstance(settings, dict):
        return {key: to_plain(value) for key, value in settings.items()}
    return settings


def from_plain(plain: dict[str, Any]) -> Config:
    """The `Config` that `to_plain` wrote, unchecked. Raises KeyError where a setting is missing."""
    return _frozen(Config, plain)


def setting_names(schema: type = Config, prefix: str = "") -> list[str]:
    """Every setting as it is written on the command line, such as `lr.factor.head`."""
    names = []
    for name, kind in get_type_hints(schema).items():
        names.append(prefix + name)
        if is_dataclass(kind):
            assert isinstance(kind, type)
            names += setting_names(kind, f"{prefix}{name}.")
    return names


def nearest_setting(name: str) -> str | None:
    """The setting that a misspelt `name` most likely meant."""
    known = setting_names()
    by_leaf = {known_name.rsplit(".", 1)[-1]: known_name for known_name in reversed(known)}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.6)
    return by_leaf[close[0]] if close else None


def stages_dir(config: Config) -> str:
    """The folder of the store: the setting, else PROGLAYER_STAGES, else multirun/.stages."""
    chosen = config.stages.dir or os.environ.get("PROGLAYER_STAGES") or "multirun/.stages"
    return os.path.expanduser(chosen)


def _writable(schema: type) -> type:
    """A twin of a frozen dataclass that OmegaConf can merge values into.

    It is put into this module under a name of its own, so that a launcher that pickles the schema
    for its workers finds it there by name.
    """
    name = f"Writable{schema.__name__}"
    if name not in globals():
        hints = get_type_hints(schema)
        members = [(f.name, _writable_type(hints[f.name])) for f in fields(schema)]
        twin = make_dataclass(name, members)
        twin.__module__ = __name__
        globals()[name] = twin
    return globals()[name]


def _writable_type(kind: Any) -> Any:
    if is_dataclass(kind) and isinstance(kind, type):
        return _writable(kind)
    if get_origin(kind) is list:
        return list[_writable_type(get_args(kind)[0])]
    return kind


def _frozen(kind: Any, value: Any) -> Any:
    """`value`, plain data, as an instance of the type `kind`; lists become tuples."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{f.name: _frozen(hints[f.name], value[f.name]) for f in fields(kind)})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value if isinstance(value, kind) else kind[value]
    if get_origin(kind) in (Union, UnionType) and value is not None:
        options = [option for option in get_args(kind) if option is not NoneType]
        return _frozen(options[0], value) if len(options) == 1 else value
    if isinstance(value, (list, tuple)):
        item = get_args(kind)[0] if get_args(kind) else Any
        return tuple(_frozen(item, v) for v in value)
    return value


# ---------------------------------------------------------------------------------------------
# The rules


def _problems(config: Config) -> Iterator[str]:
    """One line for each setting that cannot work, named as on the command line."""
    yield from _layer_problems(config)
    yield from _model_problems(config.model)
    yield from _data_problems(config.data)
    yield from _budget_problems(config)
    yield from _rate_problems(config)
    yield from _logger_problems(config.logger)
    if config.threads is not None and config.threads < 1:
        yield f"threads={config.threads} must be at least 1, or null for all cores"
    if config.jobs_per_gpu < 1:
        yield f"jobs_per_gpu={config.jobs_per_gpu} must be at least 1"
    if not config.checkpoint_every_s > 0:
        yield f"checkpoint_every_s={config.checkpoint_every_s} must be more than 0 seconds"
    if not 0 <= config.seed < 2**63:
        yield f"seed={config.seed} must be between 0 and 2^63 - 1"


def _layer_problems(config: Config) -> Iterator[str]:
    schedule = config.phase.schedule
    if config.initial_layers < 1:
        yield f"initial_layers={config.initial_layers} must be at least 1"
    if config.added_layers < 0:
        yield f"added_layers={config.added_layers} must not be negative"
    grows = schedule in (PhaseSchedule.grow_once, PhaseSchedule.one_at_a_time)
    if grows and config.added_layers == 0:
        yield (
            f"added_layers=0 adds nothing: phase={schedule.name} needs at least 1 "
            "(or phase=keep_training)"
        )
    if schedule is PhaseSchedule.from_scratch or config.initial_layers < 1:
        return
    if not config.freeze.steps:
        yield "freeze.steps=[] leaves no phase after a growth: give at least one step"
    for number, step in enumerate(config.freeze.steps):
        setting = f"freeze.steps[{number}].existing={step.existing}"
        if step.existing == "all":
            continue
        if not isinstance(step.existing, int) or step.existing < 0:
            yield f"{setting} must be a number of layers from 0 up, or all"
        elif step.existing >= config.initial_layers:
            yield (
                f"{setting} leaves none of {config.initial_layers} existing layer(s) frozen: "
                f"the schedule needs initial_layers={step.existing + 1} or more, or existing: all"
            )
        elif not grows and step.existing == 0 and not step.embedding and not step.head:
            yield f"freeze.steps[{number}] freezes everything: nothing would train"


def _model_problems(model: ModelConfig) -> Iterator[str]:
    for name in ("dim", "num_heads", "ffn_multiple"):
        if getattr(model, name) < 1:
            yield f"model.{name}={getattr(model, name)} must be at least 1"
    if model.num_heads >= 1 and model.dim >= 1:
        if model.dim % model.num_heads:
            yield f"model.num_heads={model.num_heads} does not divide model.dim={model.dim}"
        elif (model.dim // model.num_heads) % 2:
            yield (
                f"model.dim={model.dim} over model.num_heads={model.num_heads} gives heads of "
                f"{model.dim // model.num_heads}: rotary embedding needs an even number"
            )
    if not model.rotary_base > 0:
        yield f"model.rotary_base={model.rotary_base} must be more than 0"
    if not model.norm_eps > 0:
        yield f"model.norm_eps={model.norm_eps} must be more than 0"
    if model.vocab_size is not None and model.vocab_size < 3:
        yield f"model.vocab_size={model.vocab_size} must be at least 3, or null: the corpus's own"
    weights = model.exit_weights
    if isinstance(weights, (list, tuple)):
        numbers = [w for w in weights if isinstance(w, (int, float)) and not isinstance(w, bool)]
        if len(numbers) != len(weights) or not weights:
            yield f"model.exit_weights={list(weights)} must be numbers, one for each layer"
        elif not all(map(math.isfinite, numbers)):
            yield f"model.exit_weights={list(weights)} must be finite numbers"
        elif any(w < 0 for w in numbers):
            yield f"model.exit_weights={list(weights)} must not be negative"
    elif not (isinstance(weights, str) and weights in ExitWeights.__members__):
        names = ", ".join(ExitWeights.__members__)
        yield f"model.exit_weights={weights} is none of {names}, nor a list of numbers"


def _data_problems(data: DataConfig) -> Iterator[str]:
    for name in ("seq_len", "min_count"):
        if getattr(data, name) < 1:
            yield f"data.{name}={getattr(data, name)} must be at least 1"
    for name in ("samples", "validation_samples"):
        value = getattr(data, name)
        if value is not None and value < 1:
            yield f"data.{name}={value} must be at least 1, or null"
    if data.max_vocab is not None and data.max_vocab < 3:
        yield f"data.max_vocab={data.max_vocab} must be at least 3, or null for every word"
    if not 0 < data.held_out < 1:
        yield f"data.held_out={data.held_out} must be a share between 0 and 1"
    if data.source is DataSource.text and not data.files:
        yield "data.files is empty: name text files, for example 'data.files=[notes/*.txt]'"
    if data.source is DataSource.hub and not data.repository and not data.path:
        yield "data.repository is empty: name a data set, for example data.repository=owner/name"


def _budget_problems(config: Config) -> Iterator[str]:
    for part, budget in (
        ("phase", config.phase),
        ("phase.initial", config.phase.initial),
        ("phase.grown", config.phase.grown),
    ):
        for name in ("batch_size", "max_epochs", "patience", "samples"):
            value = getattr(budget, name)
            if value is not None and value < 1:
                yield f"{part}.{name}={value} must be at least 1"
        if budget.min_delta is not None and not 0 <= budget.min_delta < math.inf:
            yield f"{part}.min_delta={budget.min_delta} must not be negative"


def _rate_problems(config: Config) -> Iterator[str]:
    lr, optimizer = config.lr, config.optimizer
    if not 0 < lr.base < math.inf:
        yield f"lr.base={lr.base} must be more than 0"
    for role in fields(lr.factor):
        factor = getattr(lr.factor, role.name)
        if not 0 < factor < math.inf:
            yield f"lr.factor.{role.name}={factor} must be above 0 (to hold it still, use freeze)"
    if lr.warmup_steps < 0:
        yield f"lr.warmup_steps={lr.warmup_steps} must not be negative"
    if not 0 <= lr.final_factor <= 1:
        yield f"lr.final_factor={lr.final_factor} must be between 0 and 1"
    elif lr.final_factor and lr.schedule is ScheduleShape.constant:
        yield (
            f"lr.final_factor={lr.final_factor} changes nothing with lr.schedule=constant: take "
            "lr.schedule=cosine or linear"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"optimizer.{name}={getattr(optimizer, name)} must be from 0 to below 1"
    if not optimizer.eps > 0:
        yield f"optimizer.eps={optimizer.eps} must be more than 0"
    if not 0 <= optimizer.weight_decay < math.inf:
        yield f"optimizer.weight_decay={optimizer.weight_decay} must not be negative"
    if optimizer.clip_norm is not None and not optimizer.clip_norm > 0:
        yield f"optimizer.clip_norm={optimizer.clip_norm} must be more than 0, or null"


def _logger_problems(logger: LoggerConfig) -> Iterator[str]:
    # The extra of each logger has its name, and so has the module that it brings.
    for name in (field.name for field in fields(logger)):
        if getattr(logger, name) and importlib.util.find_spec(name) is None:
            yield f"logger.{name}=true needs the extra {name}: {install_command(name)}"


# Made when this module is imported, also where only a pickle of it is read.
_SCHEMA = _writable(Config)
