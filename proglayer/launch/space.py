"""What a search draws from: the overrides of its command, those with several values as Optuna's
distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer

from proglayer.errors import ConfigError, first_line
from proglayer.launch.overrides import parse

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Space:
    """The overrides of a search in the order in which they hold, what is said last of a setting.

    distributions: for each override that has several values, what its value is drawn from.
    values: the same as lists, for those that can be counted.
    """

    overrides: tuple[Override, ...]
    distributions: Mapping[str, Any]
    values: Mapping[str, Sequence[Any]]

    @property
    def given(self) -> list[str]:
        """The overrides as they were written."""
        return [override.input_line or "" for override in self.overrides]

    @property
    def fixed(self) -> list[str]:
        """Those with one value."""
        return [o.input_line or "" for o in self.overrides if not o.is_sweep_override()]

    def drawn(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The overrides with `values` in the place of what they were drawn from, others after."""
        left = dict(values)
        texts = []
        for override in self.overrides:
            key = override.get_key_element()
            if key in left:
                # A value that a trial chose goes before one that was given.
                texts.append(f"{key}={left.pop(key)}")
            elif not override.is_sweep_override():
                texts.append(override.input_line or "")
        return (*texts, *(f"{key}={value}" for key, value in left.items()))

    def first(self) -> tuple[str, ...]:
        """The overrides with the first of all values."""
        return self.drawn(
            {
                key: self.values[key][0] if key in self.values else distribution.low
                for key, distribution in self.distributions.items()
            }
        )

    def grid(self) -> dict[str, list[Any]]:
        """All values of each. Raises ConfigError for one whose values cannot be counted."""
        if endless := self.distributions.keys() - self.values.keys():
            raise ConfigError(
                f"hydra/sweeper/sampler=grid: {endless.pop()} has no end of values: give it a "
                "choice or a range"
            )
        return {key: list(values) for key, values in self.values.items()}


def read_space(given: Sequence[str], loader: ConfigLoader) -> Space:
    """Read overrides by Hydra's grammar.

    `choice`, `a,b`, `glob` and what is shuffled are drawn as categories; `range` by its steps, its
    end left out; `interval` as real numbers, `int(interval(...))` as whole ones; within
    `tag(log, ...)` on a logarithmic scale.

    What is said last of a setting holds. Raises ConfigError for values that cannot be drawn from.
    """
    overrides: dict[str, Override] = {}
    for override in parse(given, loader):
        key = override.get_key_element().lstrip("+~")
        overrides.pop(key, None)
        overrides[key] = override
    distributions: dict[str, BaseDistribution] = {}
    values: dict[str, Sequence[Any]] = {}
    for override in overrides.values():
        if not override.is_sweep_override():
            continue
        key = override.get_key_element()
        try:
            distributions[key], counted = _distribution(override)
        except ValueError as error:
            raise ConfigError(f"{override.input_line}: {first_line(error)}") from error
        if counted is not None:
            values[key] = counted
    return Space(tuple(overrides.values()), distributions, values)


def _element(value: Any) -> Any:
    """A number as it is, anything else as Hydra's grammar reads it back."""
    return value if isinstance(value, (int, float)) else Transformer.str(value)


def _distribution(override: Override) -> tuple[BaseDistribution, Sequence[Any] | None]:
    """What Optuna is to draw from, and all there is of it where that can be counted."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log), range(low, high + 1)
        assert low is not None
        assert high is not None
        return FloatDistribution(low, high, log=log), None
    elements: list[Any] = list(override.sweep_iterator(transformer=_element))
    if not isinstance(value, RangeSweep) or value.shuffle or len(elements) < 2:
        return CategoricalDistribution(elements), elements
    low, high, log = min(elements), max(elements), "log" in value.tags
    step: Any = abs(value.step or 1)
    if all(isinstance(element, int) for element in elements):
        return IntDistribution(low, high, log=log, step=step), elements
    return FloatDistribution(low, high, log=log, step=step), elements
