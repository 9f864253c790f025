"""Settings that a run was given and that nothing in it reads."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

from proglayer.config import (
    BPE,
    WORDS,
    BudgetOverrides,
    Config,
    DataConfig,
    FreezeStep,
    ModelConfig,
    Settings,
    shortened,
)
from proglayer.training.growth import OPERATORS
from proglayer.training.plan import Phase, Role


def unused_settings(config: Config, phases: Sequence[Phase]) -> str | None:
    """Name in one line what was asked for and has no effect in a run; None where all has.

    phases: what `plan` makes of the settings.
    """
    named = []
    for is_read, settings in _readers(config, phases):
        for name, default in settings.items() if not is_read else ():
            value = operator.attrgetter(name)(config)
            if value != default:
                named.append(f"{name}={shortened(value)}")
    named += _idle_factors(config, phases[1:])
    return f"without effect in this run: {', '.join(named)}" if named else None


def _readers(config: Config, phases: Sequence[Phase]) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yield whether settings are read in this run, and their values where nothing is asked for."""
    loss, data = config.loss, config.data
    growths = [phase.train.growth for phase in phases if phase.train.growth is not None]
    grows, reads = bool(growths), {name for each in growths for name in OPERATORS[each.init].reads}
    later = len(phases) > 1
    yield grows, {"growth.init": "random", "growth.share": False}
    unasked = {"position": "top", "noise": 0.0, "block": 1, "gate_steps": 40}
    for name, value in unasked.items():
        yield name in reads, {f"growth.{name}": value}
    sizes = [own.get("added_layers", own.get("growth", {}).get("layers")) for own in config.growths]
    sized = config.growth.layers is not None or (None not in sizes and len(sizes) > 0)
    keeps = config.phase.schedule == "keep_training"
    yield not sized and not keeps, {"added_layers": 1}
    steps = (FreezeStep(existing=0, embedding=False, head=True),)
    yield later, {"freeze.steps": steps, "optimizer.carry": "none"}
    yield later, {f"phase.grown.{name}": None for name in BudgetOverrides.model_fields}
    apart = config.lr.span == "phase"
    yield later, {"lr.grown.warmup_steps": None}
    yield later and apart, {"lr.grown.schedule": None}
    yield later, {f"lr.factor.{role.name}": 0.1 for role in Role}
    shapes = {phase.train.schedule.shape for phase in phases}
    yield "wsd" in shapes, {"lr.decay_share": 0.2}
    decaying = [phase.train.schedule.shape != "constant" for phase in phases]
    yield any(decaying), {"lr.final_factor": 0.0}
    yield any(decaying[1:]) and apart, {"lr.grown.final_factor": None}
    yield loss.curriculum == "rotate", {"loss.rotate_every": None, "loss.normalize": False}
    yield loss.curriculum == "gradual", {"loss.gradual_steps": None}
    several = any(sum(weight > 0 for weight in phase.train.exit_weights) > 1 for phase in phases)
    yield several, {"loss.curriculum": "all", "loss.detach": False}
    decays = config.optimizer.weight_decay > 0
    yield decays, {"optimizer.decay_norms": True, "optimizer.decay_embedding": True}
    yield any(phase.train.cache_frozen for phase in phases), {"cache_frozen": False}
    yield any(phase.train.layer_drop for phase in phases), {"phase.layer_drop": 0.0}
    yield data.tokenizer in (WORDS, BPE), {"data.max_vocab": None}
    yield data.tokenizer == WORDS, {"data.lowercase": True, "data.min_count": 1}
    # Others have no such key in `conf/`, and still `+model.path=...` adds one.
    sets = data.source in ("hub", "wikitext2")
    files = {"files": data.source == "text", "text_column": data.source != "pydocs"}
    for name, value in _optional("data", DataConfig).items():
        yield files.get(name.removeprefix("data."), sets), {name: value}
    yield config.model.kind == "causal_lm", _optional("model", ModelConfig)


def _optional(part: str, schema: type[Settings]) -> dict[str, Any]:
    """Return the settings of a part that only some choices of its group have."""
    fields = schema.model_fields.items()
    return {f"{part}.{name}": each.default for name, each in fields if not each.is_required()}


def _idle_factors(config: Config, later: Sequence[Phase]) -> Iterator[str]:
    """Name the factor of a role that no later phase trains, where it is not that of one it does."""
    rates = [phase.train.rates for phase in later]
    idle = [role for role in Role if all(getattr(each, role) is None for each in rates)]
    trained = [getattr(config.lr.factor, role) for role in Role if role not in idle]
    for role in idle if later else ():
        if (factor := getattr(config.lr.factor, role)) not in trained:
            yield f"lr.factor.{role}={factor:g} (no phase after the first trains it)"
