"""The settings of a run: one schema, checked once where they come in.

Hydra merges the files of `conf/` and the command line. `to_config` turns the result into the frozen
models below, and checks every rule that needs no corpus. Past it, settings are plain data.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
)

from proglayer.errors import ConfigError, first_line, install_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


# --- the choices of settings that have a few ------------------------------------------------------

# Where the text comes from.
DataSource = Literal["pydocs", "wikitext2", "text", "hub"]
# Values of data.tokenizer that name no tokenizer of others.
WORDS, BYTES, BPE, MODEL = "words", "bytes", "bpe", "model"
# Which phases a run has.
PhaseSchedule = Literal["grow_once", "one_at_a_time", "from_scratch", "keep_training"]
# Where new layers come from: see the operators of `training/growth.py`.
GrowthInit = Literal["random", "copy", "stack", "solar", "last", "middle", "lidas", "zero", "gate"]
# Those that are a list of their own, whatever the position.
PLACED: tuple[GrowthInit, ...] = ("stack", "solar", "last", "middle", "lidas")
# Where new layers go. Operators that repeat a part of the model have places of their own.
GrowthPosition = Literal["top", "bottom", "interleave", "groups"]
# Where a layer's norms stand: after each residual sum, or before each branch.
Norm = Literal["post", "pre"]
# What a layer's branches are scaled by: nothing; 1 / sqrt(2 L) of L layers; the norm before the
# l-th layer's by 1 / sqrt(l); a gain of each branch that trains.
ResidualScale = Literal["none", "depth", "layernorm", "layerscale"]
# The project's own transformer, or a causal language model of `transformers`.
ModelKind = Literal["transformer", "causal_lm"]
# Families of `transformers` that keep their layers in a list of equal blocks.
Family = Literal[
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "gpt2", "gpt_neox"
]
# Those that learn a vector for each position, and those whose keys have as many heads as queries.
LEARNED_POSITIONS: tuple[Family, ...] = ("gpt2",)
EQUAL_HEADS: tuple[Family, ...] = ("gpt2", "gpt_neox")
# What the weights of a model of `transformers`, and their optimizer's state, are kept in.
Weights = Literal["float32", "bfloat16"]
# How the learning rate moves within a phase, after the warm-up.
ScheduleShape = Literal["constant", "cosine", "linear", "wsd"]
# What a rate schedule goes over: each phase, or all phases of a run.
Span = Literal["phase", "run"]
# Which of the exits with a weight the loss reads at an optimizer step.
Curriculum = Literal["all", "rotate", "gradual"]
# Parts of a layer that can be frozen in all layers.
Kind = Literal["attention", "mlp", "norms"]
# What the optimizer of a later phase takes over from the one before.
Carry = Literal["none", "existing", "copy"]
# Named weights of the loss over the exits (a list of numbers is the other possibility).
ExitWeights = Literal["uniform", "linear", "cumulative", "last"]
# The exits that are evaluated where a phase starts and at its end. trained: those that its loss
# reads, and the last.
EvaluatedExits = Literal["all", "trained"]
# What the matrix products are computed in. Weights and optimizer state stay float32. `auto` takes
# what the processor has units for: bfloat16 on a CPU, tf32 on an NVIDIA GPU, else float32. `tf32`
# rounds the factors of a float32 product and sums in float32: to 10 bits on an NVIDIA GPU, to 8 or
# 16 (bfloat16, once or twice) on a CPU with matrix units.
Precision = Literal["auto", "float32", "tf32", "bfloat16"]
# Where a run trains; `auto` takes cuda, then mps, then cpu.
Device = Literal["auto", "cpu", "cuda", "mps"]
# What a sweep does when one of its jobs fails.
OnError = Literal["go_on", "stop"]
# What a search goes by: a figure of the last phase's selected epoch.
Objective = Literal[
    "validation_loss",
    "validation_perplexity",
    "validation_accuracy_percent",
    "validation_bits_per_byte",
    "test_loss",
    "test_perplexity",
    "test_accuracy_percent",
    "test_bits_per_byte",
]

# --- the settings ---------------------------------------------------------------------------------


class Settings(BaseModel):
    """Settings that belong together. Each has its value in `conf/`; one with a default here is of
    some choices of its group alone.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_other_word(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("should be neither true nor false")
        return value


def _listed(value: Any) -> Any:
    """Take a single text for a list of one."""
    return [value] if isinstance(value, str) else value


def _one_of(said: str) -> WrapValidator:
    """Say of a value that fits none of several types what it should be, in one sentence."""

    def judge(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"should be {said}") from None

    return WrapValidator(judge)


# The depth that a model begins with where neither a number nor a checkpoint says it.
FOUNDING_LAYERS = 3
# A whole number that a tensor's size, an epoch's number or a token's index may be.
INT32 = 2**31 - 1
# Far from what float32 can no longer hold, also as the product of a rate and its factors.
LARGE = 1e15

Count = Annotated[int, Field(ge=1, le=INT32)]
CountFrom0 = Annotated[int, Field(ge=0, le=INT32)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Layers = Annotated[int, Field(ge=0, le=4_096)]
Positive = Annotated[float, Field(gt=0, le=LARGE)]
Amount = Annotated[float, Field(ge=0, le=LARGE)]
Share = Annotated[float, Field(ge=0, le=1)]
Small = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
WeightsOfExits = Annotated[
    ExitWeights | tuple[Annotated[int | float, Field(ge=0, le=LARGE)], ...],
    _one_of("uniform, linear, cumulative, last, or a list of numbers from 0, one for each layer"),
]
LayerDrop = Annotated[
    Beta | tuple[Beta, ...], _one_of("a number from 0 to below 1, or a list of one for each layer")
]


class ModelConfig(Settings):
    """The model. `exit_weights` is a name of `ExitWeights` or a list, bottom layer first.

    Of a `causal_lm`, either `path` is given, a checkpoint that has sizes of its own, or `family`
    with sizes: an untrained one. A size that is null is the family's, or not asked for.
    """

    dim: Width | None
    num_heads: Width | None
    ffn_multiple: Annotated[int, Field(ge=1, le=1_024)] | None
    rotary_base: Positive | None
    norm_eps: Small | None
    vocab_size: Annotated[int, Field(ge=3, le=INT32)] | None
    exit_weights: WeightsOfExits
    norm: Norm
    checkpoint_activations: bool
    evaluated_exits: EvaluatedExits
    kind: ModelKind
    path: str | None = None
    revision: str | None = None
    family: Family | None = None
    num_kv_heads: Width | None = None
    max_positions: Count | None = None
    untie: bool = False
    weights: Weights = "float32"
    residual_scale: ResidualScale = "none"


class DataConfig(Settings):
    """The corpus: its source, how it is cut into tokens and windows, and how much is used.

    `tokenizer` is words, bytes, bpe, model, or a folder or a name on the hub.
    """

    source: DataSource
    seq_len: Annotated[int, Field(ge=1, le=2**20)]
    samples: Count | None
    validation_samples: Count | None
    lowercase: bool
    min_count: Count
    max_vocab: Annotated[int, Field(ge=3, le=INT32)] | None
    path: str | None = None
    files: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    held_out: Annotated[float, Field(gt=0, lt=1)]
    repository: str | None = None
    configuration: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    text_column: str = "text"
    cache_dir: str | None
    tokenizer: str
    tokenizer_revision: str | None


class BudgetOverrides(Settings):
    """A phase's own budget and loss; null keeps what holds for all phases. With no epoch at all the
    phase ends with the model that it starts with.
    """

    batch_size: Count | None
    max_epochs: CountFrom0 | None
    patience: Count | None
    min_delta: Amount | None
    samples: Count | None
    exit_weights: WeightsOfExits | None
    layer_drop: LayerDrop | None = None


class PhaseConfig(Settings):
    """Which phases there are, and what each may spend. A batch's gradient comes from `accumulate`
    parts of it, one after another. With `epoch_steps` an epoch is so many optimizer steps, and the
    windows go on from epoch to epoch and from phase to phase. `layer_drop` is how often a step
    leaves out the top layer, those below less often; or a list with a number for each layer.
    """

    schedule: PhaseSchedule
    batch_size: Count
    max_epochs: Count
    patience: Count
    min_delta: Amount
    samples: Count | None
    initial: BudgetOverrides
    grown: BudgetOverrides
    accumulate: Width
    epoch_steps: Count | None = None
    layer_drop: LayerDrop = 0.0


class GrowthConfig(Settings):
    """How layers are added: `noise` is the share of a copied tensor that is drawn afresh, `block`
    the layers that `last`, `middle` and `lidas` repeat, `gate_steps` the optimizer steps over which
    `gate` opens. `layers` gives the old layer of each layer of the grown model, null for a fresh
    one. With `share` a copy is its source once more, with the same tensors.
    """

    init: GrowthInit
    position: GrowthPosition
    noise: Share
    block: Annotated[int, Field(ge=1, le=4_096)]
    gate_steps: Count
    layers: tuple[Layers | None, ...] | None = None
    share: bool = False


class SomeLayers(Settings):
    """The lowest so many layers, and every so many-th from the bottom."""

    lowest: Layers = 0
    every: Annotated[int, Field(ge=1, le=4_096)] | None = None


class FreezeStep(Settings):
    """One phase after a growth. `existing` counts trained old layers from the top, or is `all`. Of
    what would train `frozen_layers`, new ones too, are frozen whole, and `frozen_kinds` in each.
    """

    existing: Annotated[Layers | Literal["all"], _one_of("a number of layers from 0, or all")]
    embedding: bool
    head: bool
    frozen_layers: Annotated[
        tuple[Layers, ...] | SomeLayers,
        _one_of("a list of layers from 0, or {lowest: a number, every: a number}"),
    ] = ()
    frozen_kinds: tuple[Kind, ...] = ()


class FreezeInitial(Settings):
    """Whether embedding and head train in the initial phase."""

    embedding: bool
    head: bool


class FreezeConfig(Settings):
    """What trains in the initial phase, and the steps after each growth, one phase each."""

    steps: tuple[FreezeStep, ...]
    initial: FreezeInitial


class RoleFactors(Settings):
    """What the base rate is multiplied by after the initial phase, per role. To hold a role still,
    use freeze.
    """

    new: Positive
    existing: Positive
    embedding: Positive
    head: Positive


class ScheduleOverrides(Settings):
    """The schedule of the phases after the initial one; null keeps what holds for all."""

    schedule: ScheduleShape | None
    warmup_steps: CountFrom0 | None
    final_factor: Share | None


class LrConfig(Settings):
    """Learning rates. Warm-up in optimizer steps; `final_factor` is where a decay ends, and
    `decay_share` how much of a phase `wsd` decays for, at its end. `span=run`: one schedule over
    all phases.
    """

    base: Positive
    factor: RoleFactors
    schedule: ScheduleShape
    warmup_steps: CountFrom0
    final_factor: Share
    decay_share: Small
    grown: ScheduleOverrides
    span: Span = "phase"


class OptimizerConfig(Settings):
    """AdamW, the norm that gradients are clipped to (null: not clipped), what weight decay leaves
    out, and what is carried from phase to phase.
    """

    beta1: Beta
    beta2: Beta
    eps: Small
    weight_decay: Amount
    clip_norm: Positive | None
    carry: Carry
    decay_norms: bool
    decay_embedding: bool


class LossConfig(Settings):
    """The exits that the loss reads, step by step. Where exits are detached, all but the last train
    the head alone. `normalize`: the weights that `rotate` reads add up to 1 in each step.
    """

    curriculum: Curriculum
    rotate_every: Annotated[int, Field(ge=1, le=4_096)] | None
    gradual_steps: Count | None
    detach: bool
    normalize: bool = False


class LoggerConfig(Settings):
    """Who else gets a run's metrics as they come."""

    tensorboard: bool
    mlflow: bool


class StoreConfig(Settings):
    """The store of trained phases. `dir` null: PROGLAYER_STORE, else multirun/.store."""

    dir: str | None


class Config(Settings):
    """Every setting of one run."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    initial_layers: Layers | None
    added_layers: Annotated[
        Layers | tuple[Layers, ...], _one_of("a number of layers, or a list of one for each growth")
    ]
    model: ModelConfig
    data: DataConfig
    phase: PhaseConfig
    growth: GrowthConfig
    freeze: FreezeConfig
    lr: LrConfig
    optimizer: OptimizerConfig
    device: Device
    devices: Annotated[Width | Literal["auto"], _one_of("a number of devices from 1, or auto")]
    join_timeout_s: Positive
    precision: Precision
    compile: bool
    threads: Annotated[int, Field(ge=1, le=1_024)] | None
    jobs_per_gpu: Annotated[int, Field(ge=1, le=1_024)]
    plan: bool
    on_error: OnError
    objective: Objective
    report: bool
    checkpoint_every_s: Positive
    logger: LoggerConfig
    store: StoreConfig
    loss: LossConfig
    cache_frozen: bool
    growths: tuple[dict[str, Any], ...] = ()

    @property
    def least_devices(self) -> int:
        """How many devices the settings alone ask for: with `auto` it may be more."""
        return 1 if self.devices == "auto" else self.devices


def to_config(settings: DictConfig) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Raises ConfigError with one line for each mistake.
    """
    plain = _resolved(settings)
    if plain.get("initial_layers") is None and not _has_path(plain.get("model")):
        plain["initial_layers"] = FOUNDING_LAYERS
    try:
        config = Config.model_validate(plain)
    except ValidationError as error:
        lines = problem_lines(error)
        parts = Config.model_construct(**_parts_that_fit(plain))
    else:
        lines, parts = [], config
    lines += _rule_problems(parts)
    if lines:
        raise ConfigError("\n".join(lines))
    if config.data.tokenizer in (MODEL, WORDS) and config.model.path is not None:
        same = {"tokenizer": config.model.path, "tokenizer_revision": config.model.revision}
        config = config.model_copy(update={"data": config.data.model_copy(update=same)})
    return config


def _has_path(model: Any) -> bool:
    """Return whether these settings of a model name a checkpoint."""
    given = isinstance(model, dict) and model.get("kind") == "causal_lm"
    return given and model.get("path") is not None


def _resolved(settings: DictConfig) -> dict[str, Any]:
    """Return what Hydra composed, without Hydra's own part, which `${hydra:...}` reads."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ours = OmegaConf.masked_copy(settings, [str(key) for key in settings if key != "hydra"])
    if "hydra" in settings:
        # set_config would forbid later changes of it
        HydraConfig.instance().cfg = cast(Any, settings)
    try:
        return cast(Any, OmegaConf.to_container(ours, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {first_line(error)}" if key else first_line(error)) from error


def problem_lines(error: ValidationError, prefix: str = "") -> list[str]:
    """Say each of pydantic's errors in a line: the setting, its value, what it should be.

    prefix: what the settings are below, such as `hydra.sweeper.`.
    """
    lines = []
    for each in error.errors(include_url=False):
        name = prefix.rstrip(".")
        for part in each["loc"]:
            name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
        if each["type"] == "missing":
            lines.append(f"{name} has no value: give it one")
        elif each["type"] == "extra_forbidden":
            inner = flat_settings({name: each["input"]})
            lines.append(unknown_setting(next(inner, (name, None))[0]))
        elif each["type"] == "model_type":
            lines.append(f"{name}={shortened(each['input'])} should be settings: {name}.(name)=...")
        else:
            said = each["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.append(f"{name}={shortened(each['input'])} {said}")
    return lines


def _parts_that_fit(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is right by itself on the first level, so that rules are checked."""
    fitting = {}
    for name, field in Config.model_fields.items():
        with contextlib.suppress(ValidationError, KeyError):
            fitting[name] = TypeAdapter(field.rebuild_annotation()).validate_python(plain[name])
    return fitting


def setting_types(schema: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name, such as `lr.factor.head`, and the type of every setting, without bounds."""
    hints = get_type_hints(schema)
    for name in schema.model_fields:
        kind = hints[name]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from setting_types(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def setting_names() -> list[str]:
    """Return every setting as it is written on the command line."""
    return [name for name, _ in setting_types()]


def flat_settings(
    settings: Mapping[str, Any], prefix: str = "", whole: Container[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting; those in `whole` may hold a mapping."""
    for part, value in settings.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and name not in whole:
            yield from flat_settings(value, f"{name}.", whole)
        else:
            yield name, value


# Words of other tools -> ours.
SYNONYMS = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr"), "lr.base"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "lr.schedule"),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "lr.warmup_steps"),
    **dict.fromkeys(("max_steps", "logging_steps", "log_every_n_steps"), "phase.epoch_steps"),
    **dict.fromkeys(("eval_steps", "eval_strategy", "val_check_interval"), "phase.epoch_steps"),
    **dict.fromkeys(("save_steps", "save_strategy", "every_n_train_steps"), "checkpoint_every_s"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "phase.max_epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "phase.batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches"), "phase.accumulate"),
    **dict.fromkeys(("early_stopping_patience", "early_stopping"), "phase.patience"),
    **dict.fromkeys(("max_grad_norm", "gradient_clip_val", "grad_clip"), "optimizer.clip_norm"),
    **dict.fromkeys(("fp16", "bf16", "torch_dtype", "mixed_precision"), "precision"),
    **dict.fromkeys(("gpu", "cuda", "accelerator"), "device"),
    **dict.fromkeys(("gpus", "num_gpus", "nproc_per_node", "strategy"), "devices"),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "width"), "model.dim"),
    **dict.fromkeys(("heads", "n_head", "n_heads", "num_attention_heads"), "model.num_heads"),
    **dict.fromkeys(("n_layer", "num_layers", "num_hidden_layers", "depth"), "initial_layers"),
    **dict.fromkeys(("block_size", "context_length", "max_seq_length"), "data.seq_len"),
    **dict.fromkeys(("dataset", "dataset_name", "datamodule"), "data"),
    **dict.fromkeys(("train_file", "data_files"), "data.files"),
    "dataset_config_name": "data.configuration",
    **dict.fromkeys(("limit_train_batches", "max_train_samples"), "data.samples"),
    **dict.fromkeys(("limit_val_batches", "max_eval_samples"), "data.validation_samples"),
    **dict.fromkeys(("model_name", "model_name_or_path"), "model.path"),
    **dict.fromkeys(get_args(Family), "causal_lm"),
    **dict.fromkeys(("report_to", "wandb"), "logger"),
    **dict.fromkeys(("trainer", "training", "training_args"), "phase"),
    **dict.fromkeys(("output_dir", "default_root_dir", "task_name"), "hydra.run.dir"),
    **dict.fromkeys(("resume_from_checkpoint", "ckpt_path"), "hydra.run.dir"),
    **dict.fromkeys(("fast_dev_run", "dry_run", "debug"), "plan"),
    "seed_everything": "seed",
    "gradient_checkpointing": "model.checkpoint_activations",
    "adam_beta1": "optimizer.beta1",
    "submitit_slurm": "slurm",
}


def nearest_setting(name: str) -> str | None:
    """Return the setting that an unknown `name` most likely meant; none for one of Hydra's."""
    if name.startswith("hydra"):
        return None
    plain = name.lower().replace("-", "_")
    leaf = plain.rpartition(".")[2]
    groups = sorted({each.rpartition(".")[0] for each in setting_names()} - {""})
    known = [*Config.model_fields, *setting_names(), *groups]
    by_leaf = {each.rpartition(".")[2]: each for each in reversed(known)} | SYNONYMS
    close = difflib.get_close_matches(plain, known, 1, 0.7) if leaf not in SYNONYMS else []
    close += [by_leaf[each] for each in difflib.get_close_matches(leaf, by_leaf, 1, 0.7)]
    return close[0] if close else None


def unknown_setting(name: str) -> str:
    """Say that there is no such setting, with the nearest that there is."""
    said = f"there is no setting {name}"
    if name.split(".")[0] in ("experiment", "local"):
        return f"{said}: such a file begins with the line '# @package _global_'"
    if name in setting_names():
        return f"{said} with this choice of {name.split('.')[0]}: another one has it"
    near = nearest_setting(name)
    return f"{said}; did you mean {near}?" if near else said


def shortened(value: Any) -> str:
    """Return a value as an error shows it, nearly as it is written on the command line."""
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def store_dir(chosen: str | None) -> Path:
    """Return the store: the folder that was chosen, else PROGLAYER_STORE, else multirun/.store."""
    return Path(chosen or os.environ.get("PROGLAYER_STORE") or "multirun/.store").expanduser()


# ---------------------------------------------------------------------------------------------
# The rules that weigh settings against each other


def _rule_problems(config: Config) -> list[str]:
    """Return a line for each rule that is broken, of those whose settings are there."""
    lines: list[str] = []
    for rule in depth_problems, _model_problems, _batch_problems, _data_problems, _logger_problems:
        try:
            lines += (line for line in rule(config) if line not in lines)
        except ConfigError as error:
            lines += str(error).splitlines()
        except AttributeError:
            if set(Config.model_fields) <= config.model_fields_set:
                raise
    return lines


# What each growth of a run may have of its own.
OF_A_GROWTH = ("added_layers", "growth", "freeze", "lr", "loss", "optimizer", "phase")


def growths_of(config: Config) -> list[Config]:
    """Return the settings of each growth of a run: the run's, with its own over them.

    Raises ConfigError for settings of a growth that do not fit.
    """
    sizes = config.added_layers
    sizes = sizes if isinstance(sizes, tuple) else (sizes,)
    if config.phase.schedule == "one_at_a_time":
        sizes = (1,) * sum(sizes)
    if not config.growths:
        return [config.model_copy(update={"added_layers": size}) for size in sizes]
    plain = config.model_dump(mode="json")
    parts: list[Config] = []
    for number, own in enumerate(config.growths):
        if wrong := sorted(own.keys() - {*OF_A_GROWTH}):
            raise ConfigError(
                f"growths[{number}].{wrong[0]} is one for all growths: {', '.join(OF_A_GROWTH)}"
            )
        try:
            parts.append(Config.model_validate(_over(plain, {"growths": (), **own})))
        except ValidationError as error:
            raise ConfigError("\n".join(problem_lines(error, f"growths[{number}]."))) from error
    return parts


def _over(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with others laid over them, part by part."""
    return {**settings} | {
        name: _over(settings[name], value) if isinstance(value, dict) else value
        for name, value in own.items()
    }


def depth_problems(config: Config) -> Iterator[str]:
    """Yield a line for each setting that cannot work with so many layers.

    Where a checkpoint says how many there are, they are enough for any setting until it has.
    """
    layers = math.inf if config.initial_layers is None else config.initial_layers
    schedule, initial = config.phase.schedule, config.freeze.initial
    grows = schedule in ("grow_once", "one_at_a_time")
    if not initial.embedding and not initial.head and layers == 0:
        yield "freeze.initial freezes everything of a model of initial_layers=0"
    for part in growths_of(config):
        yield from _growth_problems(part, layers, grows)


def _growth_problems(config: Config, layers: float, grows: bool) -> Iterator[str]:
    schedule = config.phase.schedule
    if grows and config.added_layers == 0 and config.growth.layers is None:
        yield f"added_layers=0 adds nothing: phase={schedule} needs at least 1"
    if schedule != "from_scratch":
        yield from _freeze_problems(config.freeze.steps, layers)
    growth, init = config.growth, f"growth.init={config.growth.init}"
    copies = growth.init != "random"
    if growth.layers is not None:
        if schedule == "one_at_a_time":
            yield "growth.layers is one growth: it does not go with phase=one_at_a_time"
        if growth.init in PLACED:
            yield f"growth.layers does not go with {init}, which is a list of its own"
    elif grows and layers == 0 and copies:
        yield f"{init} has no layer to copy with initial_layers=0: take growth.init=random"
    if growth.init in PLACED and growth.position != "top":
        yield f"growth.position={growth.position} does not go with {init}: leave it top"
    if growth.noise and not copies:
        yield f"growth.noise={growth.noise} changes nothing with {init}"
    wrong = {
        init: growth.init == "zero" or (not copies and growth.layers is None),
        f"growth.noise={growth.noise}": growth.noise > 0,
        "model.residual_scale=layernorm": config.model.residual_scale == "layernorm",
        f"model={config.model.kind}": config.model.kind != "transformer",
    }
    for name in (name for name, no in wrong.items() if no and growth.share):
        yield f"growth.share=true does not go with {name}"


def _freeze_problems(steps: Sequence[FreezeStep], layers: float) -> Iterator[str]:
    if not steps:
        yield "freeze.steps=[] leaves no phase after a growth: give at least one step"
    for number, step in enumerate(steps):
        if step.existing == "all":
            continue
        if step.existing >= max(1, layers):
            yield (
                f"freeze.steps[{number}].existing={step.existing} leaves none of {layers} existing "
                f"layer(s) frozen: take initial_layers={step.existing + 1} or more, or all"
            )


def _batch_problems(config: Config) -> Iterator[str]:
    phase, parts = config.phase, config.phase.accumulate
    sizes = {"": phase, "initial.": phase.initial, "grown.": phase.grown}
    for part, of in sizes.items():
        if of.batch_size is not None and of.batch_size % parts:
            yield f"phase.accumulate={parts} does not divide phase.{part}batch_size={of.batch_size}"


# What says how large an untrained model is; a checkpoint has sizes of its own.
SIZES = ("dim", "num_heads", "ffn_multiple", "rotary_base", "norm_eps")


def _model_problems(config: Config) -> Iterator[str]:
    model = config.model
    if model.kind == "causal_lm":
        yield from _causal_lm_problems(config)
    else:
        for name in SIZES:
            if getattr(model, name) is None:
                yield f"model.{name} has no value: give it one"
    if (scale := model.residual_scale) != "none" and model.norm != "pre":
        yield f"model.residual_scale={scale} needs norms that come first: take model.norm=pre"
    dim, heads = model.dim, model.num_heads
    if dim is not None and heads is not None:
        if dim % heads:
            yield f"model.num_heads={heads} does not divide model.dim={dim}"
        elif dim // heads % 2:
            yield f"model.dim={dim} over model.num_heads={heads}: rotary embedding takes even heads"


def _causal_lm_problems(config: Config) -> Iterator[str]:
    model, family = config.model, config.model.family
    if importlib.util.find_spec("transformers") is None:
        yield f"model=causal_lm needs the extra hf: {install_command('hf')}"
    if model.norm != "pre":
        yield f"model.norm={model.norm} does not go with model=causal_lm: leave it pre"
    if model.residual_scale != "none":
        yield "model.residual_scale does not go with model=causal_lm: leave it none"
    if (model.path is None) is (family is None):
        families = ", ".join(get_args(Family))
        yield f"model=causal_lm takes either model.path or model.family (one of {families})"
        return
    if model.path is not None:
        if config.data.tokenizer == BYTES:
            yield f"data.tokenizer={BYTES} does not go with model.path: take data.tokenizer=model"
        for name in (*SIZES, "vocab_size", "num_kv_heads", "max_positions"):
            if getattr(model, name) is not None:
                yield f"model.{name} does not go with model.path, which has its own: leave it null"
        return
    assert family is not None
    if model.revision is not None:
        yield "model.revision is of a model.path on the hub, and there is none"
    for name in ("dim", "num_heads"):
        if getattr(model, name) is None:
            yield f"model.{name} has no value: model.family needs one"
    kv_heads, heads = model.num_kv_heads, model.num_heads
    if kv_heads is not None and family in EQUAL_HEADS:
        yield f"model.num_kv_heads does not go with model.family={family}"
    elif kv_heads and heads and heads % kv_heads:
        yield f"model.num_kv_heads={kv_heads} does not divide model.num_heads={heads}"
    if model.rotary_base is not None and family in LEARNED_POSITIONS:
        yield f"model.rotary_base does not go with model.family={family}"


def _data_problems(config: Config) -> Iterator[str]:
    data = config.data
    if data.source == "text" and not data.files:
        yield "data.files is empty: name text files, for example 'data.files=[notes/*.txt]'"
    if data.source == "hub" and not data.repository and not data.path:
        yield "data.repository is empty: name a data set, for example data.repository=owner/name"


def _logger_problems(config: Config) -> Iterator[str]:
    logger = config.logger
    # The extra of each logger has its name, and so has the module that it brings.
    for name in LoggerConfig.model_fields:
        if getattr(logger, name) and importlib.util.find_spec(name) is None:
            yield f"logger.{name}=true needs the extra {name}: {install_command(name)}"
