"""The settings of a run: one typed schema, checked once where they come in.

Settings travel schema (types) -> YAML (values) -> command line (overrides) and are merged there
by Hydra. `to_config` turns the result into the frozen dataclasses below, and checks every rule
that needs no corpus. This is the only module of the package that sees OmegaConf; past it,
settings are plain data.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import math
import os
import re
import secrets
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, make_dataclass, replace
from enum import Enum
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

from proglayer.errors import ConfigError, first_line, install_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


# A whole number that a tensor's size, an epoch's number or a token's index may be.
INT32 = 2**31 - 1
# Far from what float32 can no longer hold, also as the product of a rate and its factors.
LARGE = 1e15


@dataclass(frozen=True)
class Bounds:
    """What a number must keep to: from `least` to `most`, or strictly `above` and `below`.

    `hint` follows the line of an error.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    hint: str = ""

    def hold(self, value: float) -> bool:
        """Whether `value` keeps to them; nan never does."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and value == value
        )

    def __str__(self) -> str:
        parts = (
            (self.least, "from {}"),
            (self.above, "above {}"),
            (self.most, "to {}" if self.least is not None else "up to {}"),
            (self.below, "below {}"),
        )
        return " ".join(word.format(_digits(end)) for end, word in parts if end is not None)


def _digits(end: float) -> str:
    return f"{end:,}" if isinstance(end, int) and end < 10**12 else f"{end:g}"


class DataSource(Enum):
    """Where the text comes from."""

    pydocs = "pydocs"
    wikitext2 = "wikitext2"
    text = "text"
    hub = "hub"


# Values of data.tokenizer that name no tokenizer of others.
WORDS, BPE, MODEL = "words", "bpe", "model"


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
    stack = "stack"
    middle = "middle"
    zero = "zero"
    gate = "gate"


class Norm(Enum):
    """Where a layer's norms stand: after each residual sum, or before each branch."""

    post = "post"
    pre = "pre"


class ModelKind(Enum):
    """The project's own transformer, or a causal language model of `transformers`."""

    transformer = "transformer"
    causal_lm = "causal_lm"


class Family(Enum):
    """Families of `transformers` that keep their layers in a list of equal blocks."""

    llama = "llama"
    mistral = "mistral"
    qwen2 = "qwen2"
    qwen3 = "qwen3"
    gpt2 = "gpt2"
    gpt_neox = "gpt_neox"


# Those that learn a vector for each position, and those whose keys may have fewer heads.
LEARNED_POSITIONS = (Family.gpt2,)
FEWER_KEYS = (Family.llama, Family.mistral, Family.qwen2, Family.qwen3)


class Weights(Enum):
    """What the weights of a model of `transformers`, and their optimizer's state, are kept in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class GrowthPosition(Enum):
    """Where new layers go. `stack` and `middle` have places of their own."""

    top = "top"
    bottom = "bottom"
    interleave = "interleave"


class ScheduleShape(Enum):
    """How the learning rate moves within a phase, after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


class Curriculum(Enum):
    """Which of the exits with a weight the loss reads at an optimizer step."""

    all = "all"
    rotate = "rotate"
    gradual = "gradual"


class Carry(Enum):
    """What the optimizer of a later phase takes over from the one before."""

    none = "none"
    existing = "existing"
    copy = "copy"


class ExitWeights(Enum):
    """Named weights of the loss over the exits (a list of numbers is the other possibility)."""

    uniform = "uniform"
    linear = "linear"
    last = "last"


class EvaluatedExits(Enum):
    """The exits that are evaluated where a phase starts and at its end.

    trained: those that its loss reads, and the last.
    """

    all = "all"
    trained = "trained"


class Precision(Enum):
    """What the matrix products are computed in. Weights and optimizer state stay float32.

    `auto` takes what the processor has units for: bfloat16 on a CPU, tf32 on an NVIDIA GPU, else
    float32. `tf32` rounds the factors of a float32 product and sums in float32: to 10 bits on an
    NVIDIA GPU, to 8 or 16 (bfloat16, once or twice) on a CPU with matrix units.
    """

    auto = "auto"
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
    """The model. `exit_weights` is a name of `ExitWeights` or a list, bottom layer first.

    Of a `causal_lm`, either `path` is given, a checkpoint that has sizes of its own, or `family`
    with sizes: an untrained one. A size that is null is the family's, or not asked for.
    """

    dim: Annotated[int | None, Bounds(least=1, most=65_536)]
    num_heads: Annotated[int | None, Bounds(least=1, most=65_536)]
    ffn_multiple: Annotated[int | None, Bounds(least=1, most=1_024)]
    rotary_base: Annotated[float | None, Bounds(above=0, most=LARGE)]
    norm_eps: Annotated[float | None, Bounds(above=0, most=1)]
    vocab_size: Annotated[int | None, Bounds(least=3, most=INT32)]
    exit_weights: Any
    norm: Norm = Norm.post
    checkpoint_activations: bool = False
    evaluated_exits: EvaluatedExits = EvaluatedExits.all
    kind: ModelKind = ModelKind.transformer
    path: str | None = None
    revision: str | None = None
    family: Family | None = None
    num_kv_heads: Annotated[int | None, Bounds(least=1, most=65_536)] = None
    max_positions: Annotated[int | None, Bounds(least=1, most=INT32)] = None
    untie: bool = False
    weights: Weights = Weights.float32


@dataclass(frozen=True)
class DataConfig:
    """The corpus: its source, how it is cut into tokens and windows, and how much is used.

    `tokenizer` is words, bpe, model, or a folder or a name on the hub.
    """

    source: DataSource
    seq_len: Annotated[int, Bounds(least=1, most=2**20)]
    samples: Annotated[int | None, Bounds(least=1, most=INT32)]
    validation_samples: Annotated[int | None, Bounds(least=1, most=INT32)]
    lowercase: bool
    min_count: Annotated[int, Bounds(least=1, most=INT32)]
    max_vocab: Annotated[int | None, Bounds(least=3, most=INT32)]
    path: str | None
    files: list[str]
    held_out: Annotated[float, Bounds(above=0, below=1)]
    repository: str | None
    configuration: str | None
    revision: str | None
    train_split: str
    validation_split: str
    text_column: str
    cache_dir: str | None
    tokenizer: str = WORDS
    tokenizer_revision: str | None = None


@dataclass(frozen=True)
class BudgetOverrides:
    """A phase's own budget and loss; null keeps what holds for all phases. With no epoch at all the
    phase ends with the model that it starts with.
    """

    batch_size: Annotated[int | None, Bounds(least=1, most=INT32)]
    max_epochs: Annotated[int | None, Bounds(least=0, most=INT32)]
    patience: Annotated[int | None, Bounds(least=1, most=INT32)]
    min_delta: Annotated[float | None, Bounds(least=0, most=LARGE)]
    samples: Annotated[int | None, Bounds(least=1, most=INT32)]
    exit_weights: Any = None


@dataclass(frozen=True)
class PhaseConfig:
    """Which phases there are, and what each may spend. A batch's gradient comes from `accumulate`
    parts of it, one after another.
    """

    schedule: PhaseSchedule
    batch_size: Annotated[int, Bounds(least=1, most=INT32)]
    max_epochs: Annotated[int, Bounds(least=1, most=INT32)]
    patience: Annotated[int, Bounds(least=1, most=INT32)]
    min_delta: Annotated[float, Bounds(least=0, most=LARGE)]
    samples: Annotated[int | None, Bounds(least=1, most=INT32)]
    initial: BudgetOverrides
    grown: BudgetOverrides
    accumulate: Annotated[int, Bounds(least=1, most=65_536)] = 1


@dataclass(frozen=True)
class GrowthConfig:
    """How layers are added: `noise` is the share of a copied tensor that is drawn afresh, `block`
    the layers that `middle` repeats, `gate_steps` the optimizer steps over which `gate` opens.
    """

    init: GrowthInit
    position: GrowthPosition
    noise: Annotated[float, Bounds(least=0, most=1)] = 0.0
    block: Annotated[int, Bounds(least=1, most=4_096)] = 1
    gate_steps: Annotated[int, Bounds(least=1, most=INT32)] = 40


@dataclass(frozen=True)
class FreezeStep:
    """One phase after a growth. `existing` counts trained old layers from the top, or is `all`."""

    existing: int | str
    embedding: bool
    head: bool


@dataclass(frozen=True)
class FreezeInitial:
    """Whether embedding and head train in the initial phase."""

    embedding: bool = True
    head: bool = True


@dataclass(frozen=True)
class FreezeConfig:
    """What trains in the initial phase, and the steps after each growth, one phase each."""

    steps: list[FreezeStep]
    initial: FreezeInitial = FreezeInitial()


@dataclass(frozen=True)
class RoleFactors:
    """What the base rate is multiplied by after the initial phase, per role."""

    new: Annotated[float, Bounds(above=0, most=LARGE, hint="to hold it still, use freeze")]
    existing: Annotated[float, Bounds(above=0, most=LARGE, hint="to hold it still, use freeze")]
    embedding: Annotated[float, Bounds(above=0, most=LARGE, hint="to hold it still, use freeze")]
    head: Annotated[float, Bounds(above=0, most=LARGE, hint="to hold it still, use freeze")]


@dataclass(frozen=True)
class ScheduleOverrides:
    """The schedule of the phases after the initial one; null keeps what holds for all."""

    schedule: ScheduleShape | None = None
    warmup_steps: Annotated[int | None, Bounds(least=0, most=INT32)] = None
    final_factor: Annotated[float | None, Bounds(least=0, most=1)] = None


@dataclass(frozen=True)
class LrConfig:
    """Learning rates. Warm-up in optimizer steps; `final_factor` is where a decay ends, and
    `decay_share` how much of a phase `wsd` decays for, at its end.
    """

    base: Annotated[float, Bounds(above=0, most=LARGE)]
    factor: RoleFactors
    schedule: ScheduleShape
    warmup_steps: Annotated[int, Bounds(least=0, most=INT32)]
    final_factor: Annotated[float, Bounds(least=0, most=1)]
    decay_share: Annotated[float, Bounds(above=0, most=1)] = 0.2
    grown: ScheduleOverrides = ScheduleOverrides()


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, the norm that gradients are clipped to (null: not clipped), what weight decay leaves
    out, and what is carried from phase to phase.
    """

    beta1: Annotated[float, Bounds(least=0, below=1)]
    beta2: Annotated[float, Bounds(least=0, below=1)]
    eps: Annotated[float, Bounds(above=0, most=1)]
    weight_decay: Annotated[float, Bounds(least=0, most=LARGE)]
    clip_norm: Annotated[float | None, Bounds(above=0, most=math.inf)]
    carry: Carry = Carry.none
    decay_norms: bool = True
    decay_embedding: bool = True


@dataclass(frozen=True)
class LossConfig:
    """The exits that the loss reads, step by step. Where exits are detached, all but the last train
    the head alone.
    """

    curriculum: Curriculum = Curriculum.all
    rotate_every: Annotated[int | None, Bounds(least=1, most=4_096)] = None
    gradual_steps: Annotated[int, Bounds(least=1, most=INT32)] = 1_000
    detach: bool = False


@dataclass(frozen=True)
class LoggerConfig:
    """Who else gets a run's metrics as they come."""

    tensorboard: bool
    mlflow: bool


@dataclass(frozen=True)
class StagesConfig:
    """The store of trained phases. `dir` null: PROGLAYER_STAGES, else multirun/.stages."""

    dir: str | None


@dataclass(frozen=True)
class Config:
    """Every setting of one run.

    A setting with a default here is younger than records without it: what they did is the default.
    """

    seed: Annotated[int, Bounds(least=0, most=2**63 - 1)]
    initial_layers: Annotated[int | None, Bounds(least=0, most=4_096)]
    added_layers: Annotated[int, Bounds(least=0, most=4_096)]
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
    threads: Annotated[int | None, Bounds(least=1, most=1_024)]
    jobs_per_gpu: Annotated[int, Bounds(least=1, most=1_024)]
    plan: bool
    on_error: OnError
    objective: str
    reuse: bool
    report: bool
    checkpoint_every_s: Annotated[float, Bounds(above=0, most=LARGE)]
    logger: LoggerConfig
    stages: StagesConfig
    loss: LossConfig = LossConfig()
    cache_frozen: bool = False


# ---------------------------------------------------------------------------------------------
# Hydra's side


def register() -> None:
    """Give Hydra the schema (as `schema`) and the resolvers that `conf/` uses. Safe to repeat."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=_SCHEMA)
    # Cached, so that every job of a sweep sees the token that the sweep was given.
    OmegaConf.register_new_resolver(
        "unique_token", lambda: secrets.token_hex(3), replace=True, use_cache=True
    )
    OmegaConf.register_new_resolver("short_hash", short_hash, replace=True)


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
        # What an interpolation gave, such as an environment variable's text, has the type of its
        # setting only once the schema has seen it.
        typed = OmegaConf.merge(OmegaConf.structured(_SCHEMA), plain)
        plain = OmegaConf.to_container(typed)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        if isinstance(error, MissingMandatoryValue) and key:
            raise ConfigError(f"{key} has no value: give it one") from error
        said = value_problem(error) or (f"{key}: {first_line(error)}" if key else first_line(error))
        raise ConfigError(said) from error
    assert isinstance(plain, dict)
    config = _frozen(Config, plain)
    if config.optimizer.clip_norm == math.inf:
        # PyTorch's "no clipping", which has a value of its own here; JSON has none for infinity.
        config = replace(config, optimizer=replace(config.optimizer, clip_norm=None))
    if config.data.tokenizer == MODEL and config.model.path is not None:
        own = {"tokenizer": config.model.path, "tokenizer_revision": config.model.revision}
        config = replace(config, data=replace(config.data, **own))
    problems = list(_problems(config))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def to_plain(
    value: Any,
    written: Callable[[Field[Any], Any], bool] = lambda *_: True,
    leaf: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """A dataclass as plain data: enums by their value, tuples as lists.

    written: whether a field with this value is part of it.
    leaf: what becomes of a value that holds no others.
    """
    if is_dataclass(value) and not isinstance(value, type):
        items = [(f, getattr(value, f.name)) for f in fields(value)]
        return {f.name: to_plain(item, written, leaf) for f, item in items if written(f, item)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_plain(item, written, leaf) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item, written, leaf) for key, item in value.items()}
    return leaf(value)


def from_plain(plain: dict[str, Any]) -> Config:
    """The `Config` that `to_plain` wrote, in this version or an earlier one, unchecked.

    Raises KeyError where a setting is missing that every version has.
    """
    return _frozen(Config, plain)


def with_defaults(plain: dict[str, Any], schema: type = Config) -> dict[str, Any]:
    """Settings of an earlier version, with those that it did not have at what it did."""
    filled = dict(plain)
    hints = _hints(schema)
    for each in fields(schema):
        value = filled.get(each.name)
        if each.name not in filled and each.default is not MISSING:
            filled[each.name] = to_plain(each.default)
        elif isinstance(value, dict) and is_dataclass(hints[each.name]):
            filled[each.name] = with_defaults(value, hints[each.name])
    return filled


# Resolving them takes longer than reading a record.
_hints = functools.cache(get_type_hints)


def setting_names(schema: type = Config, prefix: str = "") -> list[str]:
    """Every setting as it is written on the command line, such as `lr.factor.head`."""
    names = []
    for name, kind in get_type_hints(schema).items():
        names.append(prefix + name)
        if is_dataclass(kind):
            assert isinstance(kind, type)
            names += setting_names(kind, f"{prefix}{name}.")
    return names


def flat_settings(
    settings: dict[str, Any], prefix: str = "", whole: Container[str] = ()
) -> Iterator[tuple[str, Any]]:
    """The dotted name and the value of each setting; those in `whole` may hold a mapping."""
    for part, value in settings.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and name not in whole:
            yield from flat_settings(value, f"{name}.", whole)
        else:
            yield name, value


def nearest_setting(name: str) -> str | None:
    """The setting that a misspelt `name` most likely meant."""
    known = setting_names()
    by_leaf = {known_name.rsplit(".", 1)[-1]: known_name for known_name in reversed(known)}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.6)
    return by_leaf[close[0]] if close else None


def value_problem(error: BaseException) -> str | None:
    """Say what a setting takes that was given something of another type.

    Returns None where `error` is about something else.
    """
    from omegaconf.errors import MissingMandatoryValue, ValidationError

    # An OverflowError has the name in its text alone.
    said = re.search(r"full_key: (\S+)", str(error))
    key = getattr(error, "full_key", None) or (said[1] if said else "")
    name = re.sub(r"\[(\d+)\]", r".\1", key)
    wrong_type = isinstance(error, (ValidationError, OverflowError))
    if not wrong_type or isinstance(error, MissingMandatoryValue):
        return None
    found = re.search(
        r"alue '(.*?)'( of type|, expected| is not| is incompat)|value: (.*)", str(error)
    )
    return misfit(name, (found[1] or found[3]) if found else None)


def misfit(name: str, given: str | None) -> str | None:
    """What a setting takes that was given something else; None where there is no such setting."""
    schema: Any = Config
    bounds = None
    for part in name.split("."):
        options = [kind for kind in get_args(schema) if kind is not NoneType]
        if get_origin(schema) is list and part.isdigit():
            schema = options[0]
            continue
        hints = get_type_hints(schema, include_extras=True) if is_dataclass(schema) else {}
        if part not in hints:
            return None
        schema = hints[part]
        bounds = bounds_of(schema)
        if bounds is not None:
            schema = get_args(schema)[0]
    setting = name if given is None else f"{name}={shortened(given)}"
    return f"{setting} does not fit: it takes {expected(name, schema, bounds)}"


def expected(name: str, kind: Any, bounds: Bounds | None) -> str:
    """What a setting of this type takes, with an example."""
    options = [option for option in get_args(kind) if option is not NoneType]
    if get_origin(kind) in (Union, UnionType):
        null = ", or null" if NoneType in get_args(kind) else ""
        return " or ".join(expected(name, option, bounds) for option in options) + null
    if is_dataclass(kind):
        return "settings of its own: " + ", ".join(f"{name}.{f.name}" for f in fields(kind))
    if get_origin(kind) is list and options[0] is str:
        return f"a list of texts, as in '{name}=[one,two]'"
    if get_origin(kind) is list:
        members = ", ".join(f"{f.name}: ..." for f in fields(options[0]))
        return f"a list, as in '{name}=[{{{members}}}]'"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(kind, "another value") + (f" {bounds}" if bounds else "")


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
        return kind(
            **{
                f.name: _frozen(hints[f.name], value[f.name])
                for f in fields(kind)
                if f.name in value or f.default is MISSING
            }
        )
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
    beyond = list(_bound_problems(config))
    yield from beyond
    # Rules that weigh numbers against each other make no sense of one beyond its bounds.
    if not any("layers" in line for line in beyond):
        yield from depth_problems(config)
    if not any(line.startswith("model.") for line in beyond):
        yield from _model_problems(config)
    for part in ("initial", "grown"):
        own = getattr(config.phase, part).exit_weights
        if own is not None:
            yield from _exit_weight_problems(f"phase.{part}", own)
    yield from _batch_problems(config.phase)
    yield from _data_problems(config.data)
    yield from _rate_problems(config.lr)
    yield from _logger_problems(config.logger)


def _bound_problems(settings: Any, prefix: str = "") -> Iterator[str]:
    """The numbers that do not keep to the bounds of the schema."""
    for part, kind in get_type_hints(type(settings), include_extras=True).items():
        name, value, bounds = prefix + part, getattr(settings, part), bounds_of(kind)
        if is_dataclass(value):
            yield from _bound_problems(value, f"{name}.")
        elif kind == (str | None) and str(value).lower() == "none" and value is not None:
            yield f"{name}={value} is a text like any other: write {name}=null for none"
        elif bounds is not None and value is not None and not bounds.hold(value):
            null = ", or null" if NoneType in get_args(get_args(kind)[0]) else ""
            hint = f" ({bounds.hint})" if bounds.hint else ""
            yield f"{name}={shortened(value)} must be {bounds}{null}{hint}"


def bounds_of(kind: Any) -> Bounds | None:
    """The bounds with which a type is annotated, if it is."""
    return next((each for each in get_args(kind) if isinstance(each, Bounds)), None)


def shortened(value: Any) -> str:
    """A value as an error shows it."""
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def depth_problems(config: Config) -> Iterator[str]:
    """One line for each setting that cannot work with so many layers. Where a checkpoint says how
    many there are, they are as many as any setting asks for until it has said so.
    """
    layers = math.inf if config.initial_layers is None else config.initial_layers
    yield from _layer_problems(config, layers)
    yield from _growth_problems(config, layers)


def _layer_problems(config: Config, layers: float) -> Iterator[str]:
    schedule = config.phase.schedule
    initial = config.freeze.initial
    if not initial.embedding and not initial.head and layers == 0:
        yield "freeze.initial freezes everything of a model of initial_layers=0"
    grows = schedule in (PhaseSchedule.grow_once, PhaseSchedule.one_at_a_time)
    if grows and config.added_layers == 0:
        yield (
            f"added_layers=0 adds nothing: phase={schedule.name} needs at least 1 "
            "(or phase=keep_training)"
        )
    if schedule is PhaseSchedule.from_scratch:
        return
    if not config.freeze.steps:
        yield "freeze.steps=[] leaves no phase after a growth: give at least one step"
    for number, step in enumerate(config.freeze.steps):
        setting = f"freeze.steps[{number}].existing={step.existing}"
        if step.existing == "all":
            continue
        if not isinstance(step.existing, int) or step.existing < 0:
            yield f"{setting} must be a number of layers from 0 up, or all"
        elif step.existing >= max(1, layers):
            yield (
                f"{setting} leaves none of {layers} existing layer(s) frozen: "
                f"the schedule needs initial_layers={step.existing + 1} or more, or existing: all"
            )
        elif not grows and step.existing == 0 and not step.embedding and not step.head:
            yield f"freeze.steps[{number}] freezes everything: nothing would train"


def _batch_problems(phase: PhaseConfig) -> Iterator[str]:
    parts = max(1, phase.accumulate)
    sizes = {"": phase, "initial.": phase.initial, "grown.": phase.grown}
    for part, size in ((part, own.batch_size) for part, own in sizes.items()):
        if size is not None and size % parts:
            number = shortened(parts)
            yield f"phase.accumulate={number} does not divide phase.{part}batch_size={size}"


def _growth_problems(config: Config, layers: float) -> Iterator[str]:
    growth = config.growth
    grows = config.phase.schedule in (PhaseSchedule.grow_once, PhaseSchedule.one_at_a_time)
    copies = growth.init is not GrowthInit.random
    if grows and layers == 0 and copies:
        yield (
            f"growth.init={growth.init.name} has no layer to copy with initial_layers=0: "
            "take growth.init=random"
        )
    placed = growth.init in (GrowthInit.stack, GrowthInit.middle)
    if placed and growth.position is not GrowthPosition.top:
        yield (
            f"growth.position={growth.position.name} does not go with growth.init="
            f"{growth.init.name}, which has a place of its own: leave growth.position=top"
        )
    if 0 < growth.noise <= 1 and not copies:
        yield (
            f"growth.noise={growth.noise} changes nothing with growth.init={growth.init.name}, "
            "which copies no layer"
        )
    if growth.init is GrowthInit.middle and growth.block > max(1, layers):
        yield (
            f"growth.block={growth.block} is more than the initial_layers={layers} "
            "that there are to repeat"
        )


# What says how large an untrained model is; a checkpoint has sizes of its own.
SIZES = ("dim", "num_heads", "ffn_multiple", "rotary_base", "norm_eps")
# What only a model of `transformers` has.
OF_CAUSAL_LM = ("path", "revision", "family", "num_kv_heads", "max_positions", "untie", "weights")


def _model_problems(config: Config) -> Iterator[str]:
    model = config.model
    if model.kind is ModelKind.causal_lm:
        yield from _causal_lm_problems(config)
    else:
        for name in SIZES:
            if getattr(model, name) is None:
                yield f"model.{name} has no value: give it one"
        defaults = {each.name: each.default for each in fields(ModelConfig)}
        for name in OF_CAUSAL_LM:
            if getattr(model, name) != defaults[name]:
                yield f"model.{name} is of model=causal_lm, and changes nothing of this model"
        if config.initial_layers is None:
            yield "initial_layers=null takes all that model.path has: give a number, or a path"
    yield from _head_problems(model)
    yield from _exit_weight_problems("model", model.exit_weights)


def _causal_lm_problems(config: Config) -> Iterator[str]:
    model = config.model
    if importlib.util.find_spec("transformers") is None:
        yield f"model=causal_lm needs the extra hf: {install_command('hf')}"
    if (model.path is None) is (model.family is None):
        yield (
            "model=causal_lm takes either model.path, a folder or a name of the hub, or "
            "model.family, one of " + ", ".join(Family.__members__)
        )
        return
    if model.norm is not Norm.pre:
        yield f"model.norm={model.norm.name} does not go with model=causal_lm: leave it pre"
    if model.path is not None:
        if config.data.tokenizer == WORDS:
            yield (
                f"data.tokenizer={WORDS} does not go with model.path, which knows tokens of its "
                "own: take data.tokenizer=model"
            )
        for name in (*SIZES, "vocab_size", "num_kv_heads", "max_positions"):
            if getattr(model, name) is not None:
                yield (
                    f"model.{name} does not go with model.path, which has sizes of its own: leave "
                    "it null"
                )
        return
    if model.revision is not None:
        yield "model.revision is of a model.path on the hub, and there is none"
    if config.initial_layers is None:
        yield "initial_layers=null takes all that model.path has, and there is none: give a number"
    assert model.family is not None
    for name in ("dim", "num_heads"):
        if getattr(model, name) is None:
            yield f"model.{name} has no value: model.family needs one"
    if model.num_kv_heads is not None and model.family not in FEWER_KEYS:
        yield f"model.num_kv_heads does not go with model.family={model.family.name}"
    elif model.num_kv_heads and model.num_heads and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads="
            f"{model.num_heads}"
        )
    if model.rotary_base is not None and model.family in LEARNED_POSITIONS:
        yield f"model.rotary_base does not go with model.family={model.family.name}"


def _head_problems(model: ModelConfig) -> Iterator[str]:
    if model.dim is None or model.num_heads is None:
        return
    if model.dim % model.num_heads:
        yield f"model.num_heads={model.num_heads} does not divide model.dim={model.dim}"
    elif (model.dim // model.num_heads) % 2:
        yield (
            f"model.dim={model.dim} over model.num_heads={model.num_heads} gives heads of "
            f"{model.dim // model.num_heads}: rotary embedding needs an even number"
        )


def _exit_weight_problems(part: str, weights: Any) -> Iterator[str]:
    given = weights if isinstance(weights, (list, tuple)) else []
    numbers = [w for w in given if isinstance(w, (int, float)) and not isinstance(w, bool)]
    weighs = bool(given) and len(numbers) == len(given) and all(0 <= w <= LARGE for w in numbers)
    if not weighs and not (isinstance(weights, str) and weights in ExitWeights.__members__):
        names = ", ".join(ExitWeights.__members__)
        yield (
            f"{part}.exit_weights={shortened(weights)} is none of {names}, nor a list of numbers "
            f"from 0 to {LARGE:g}, one for each layer"
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.source is DataSource.text and not data.files:
        yield "data.files is empty: name text files, for example 'data.files=[notes/*.txt]'"
    if data.source is DataSource.hub and not data.repository and not data.path:
        yield "data.repository is empty: name a data set, for example data.repository=owner/name"


def _rate_problems(lr: LrConfig) -> Iterator[str]:
    shape = lr.schedule if lr.grown.schedule is None else lr.grown.schedule
    grown = "lr.grown", shape, lr.grown.final_factor
    for part, shape, factor in (("lr", lr.schedule, lr.final_factor), grown):
        if shape is ScheduleShape.constant and 0 < (factor or 0) <= 1:
            yield (
                f"{part}.final_factor={factor} changes nothing with a constant schedule: take "
                f"{part}.schedule=cosine, linear or wsd"
            )


def _logger_problems(logger: LoggerConfig) -> Iterator[str]:
    # The extra of each logger has its name, and so has the module that it brings.
    for name in (each.name for each in fields(logger)):
        if getattr(logger, name) and importlib.util.find_spec(name) is None:
            yield f"logger.{name}=true needs the extra {name}: {install_command(name)}"


# Made when this module is imported, also where only a pickle of it is read.
_SCHEMA = _writable(Config)
