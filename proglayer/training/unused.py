"""Settings that a run was given and that none of its phases depends on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_type_hints

from proglayer.config import Config, ConfigError, GrowthInit, GrowthPosition
from proglayer.training.plan import Phase, Role, plan

# The parts of the settings that go into phases alone.
PARTS = ("phase", "growth", "freeze", "lr", "optimizer", "loss")
# What is done where nothing else is asked for; of the rest, the schema's default, or null.
DEFAULTS = {"init": GrowthInit.random, "position": GrowthPosition.top}


def unused_settings(config: Config, phases: Sequence[Phase], vocab_size: int) -> str | None:
    """In one line, what was asked for and changes no phase of a run; None where all does.

    A setting counts as asked for where it is not at its default, and the factor of a role that
    nothing trains where it is not that of a role that trains.

    phases: what `plan` makes of the settings and the vocabulary.
    """
    found = [
        f"{name}={value.name if isinstance(value, Enum) else value}"
        for name, value, other in _others(config)
        if value != _general(config, name) and _plans(other, vocab_size, phases)
    ]
    later = phases[1:]
    factors = {role.name: getattr(config.lr.factor, role.name) for role in Role}
    trained = {
        role: factor
        for role, factor in factors.items()
        if any(getattr(phase.rates, role) is not None for phase in later)
    }
    idle = [
        f"lr.factor.{role}={factor:g} (no phase after the first trains it)"
        for role, factor in factors.items()
        if later and role not in trained and factor not in trained.values()
    ]
    return f"without effect in this run: {', '.join([*found, *idle])}" if found or idle else None


def _others(config: Config) -> Iterator[tuple[str, Any, Config]]:
    """Each setting that is not at its default, its value, and the settings with the default."""
    for part in PARTS:
        for name, value, changed in _with_default(getattr(config, part)):
            yield f"{part}.{name}", value, replace(config, **{part: changed})
    if config.cache_frozen:
        yield "cache_frozen", True, replace(config, cache_frozen=False)


def _with_default(settings: Any) -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(settings))
    for each in fields(settings):
        value = getattr(settings, each.name)
        if is_dataclass(value):
            for name, inner, changed in _with_default(value):
                yield f"{each.name}.{name}", inner, replace(settings, **{each.name: changed})
            continue
        default = DEFAULTS.get(each.name, each.default)
        if default is MISSING and NoneType in get_args(hints[each.name]):
            default = None
        if default is not MISSING and value != default:
            yield each.name, value, replace(settings, **{each.name: default})


def _general(config: Config, name: str) -> Any:
    """What holds for all phases, of a setting such as `lr.grown.schedule`; None for another."""
    part, _, rest = name.partition(".")
    leaf = rest.rpartition(".")[2]
    if leaf == "exit_weights":
        return config.model.exit_weights
    return getattr(getattr(config, part), leaf, None) if "." in rest else None


def _plans(config: Config, vocab_size: int, phases: Sequence[Phase]) -> bool:
    """Whether these settings give the same phases."""
    try:
        return plan(config, vocab_size) == tuple(phases)
    except (ConfigError, ArithmeticError):
        return False
