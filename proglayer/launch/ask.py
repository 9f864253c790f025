"""What a user asks for: the command line, the values of a sweep, and errors on the way to settings.

Hydra reads the grammar and composes. Here is what is checked before it does, how several values of
a setting are read, and how what it raises becomes one line. Nothing heavy is imported, so that
`train.py --help` is quick.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import itertools
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError
from yaml import MarkedYAMLError

from proglayer.errors import ConfigError, UserError, first_line

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# The groups of `conf/` whose choices are files.
GROUPS = ("model", "data", "phase", "growth", "freeze", "lr", "logger", "experiment")
# Checked in a quarter of an hour.
MOST_JOBS = 10_000


def register() -> None:
    """Give Hydra the resolvers that `conf/` uses. Safe to repeat."""
    # Cached, so that every job of a sweep sees the token that the sweep was given.
    OmegaConf.register_new_resolver(
        "unique_token", lambda: secrets.token_hex(3), replace=True, use_cache=True
    )
    OmegaConf.register_new_resolver("short_hash", short_hash, replace=True)


def short_hash(text: str) -> str:
    """Return six hexadecimal digits that stand for `text` in the name of a folder."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


# --- the command line -----------------------------------------------------------------------------


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line with its options first, as Hydra reads no override after one.

    Raises ConfigError for what Hydra would take for something else, or answers with a traceback.
    """
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        # Hydra would take -plan=true for -p lan=true, and train.
        if argument.startswith("-") and not any(
            flag == name or (name.startswith("--") and flag.startswith(name)) for flag in flags
        ):
            setting = f"{name.lstrip('-')}={value if equals else '...'}"
            raise ConfigError(f"there is no option {argument}: a setting has no dashes: {setting}")
    options = parser.parse_intermixed_args(list(arguments))
    if options.experimental_rerun:
        # Hydra would unpickle the file, which may run any code.
        raise ConfigError("--experimental-rerun is not taken: give the command of the run again")
    if lines := [line for override in parse(options.overrides) for line in _problems(override)]:
        raise ConfigError("\n".join(lines))
    others = list(arguments)
    for override in options.overrides:
        others.remove(override)
    return [*others, *options.overrides]


def _problems(override: Override) -> Iterator[str]:
    from proglayer.config import SYNONYMS

    key, text, value = override.key_or_group, override.input_line, override.value()
    if key in ("hydra.launcher", "hydra.sweeper"):
        yield f"{text}: it is chosen with a slash: {key.replace('.', '/')}={plain(value)}"
    elif key in GROUPS and (value is None or isinstance(value, (int, float))):
        near = f"; did you mean {SYNONYMS[key]}={value}?" if key in SYNONYMS else ""
        yield f"{text}: {key} takes one of its choices, which are the files of conf/{key}{near}"


def parse(given: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Return overrides as Hydra's grammar reads them, `glob` by a loader of configurations.

    Raises ConfigError.
    """
    try:
        return OverridesParser.create(config_loader=loader).parse_overrides(list(given))
    except OverrideParseException as error:
        raise ConfigError(_unreadable(error.override)) from None


def _unreadable(override: str) -> str:
    return (
        f"{override}: Hydra cannot read this: a setting is name=value, and a text that holds more "
        "than letters, digits and / . - _ is quoted, as in 'data.path=\"~/a text\"'"
    )


def plain(value: Any) -> Any:
    """Return a value of an override as Python has it: text without its quotes."""
    return value.text if isinstance(value, QuotedString) else value


def in_one_line(error: BaseException) -> str:
    """Say what went wrong while Hydra composed settings: its first line, and the nearest name."""
    from proglayer.config import SYNONYMS, unknown_setting

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
            return unknown_setting(cause.full_key)
        if isinstance(cause, OverrideParseException):
            return _unreadable(cause.override)
        if isinstance(cause, MarkedYAMLError) and cause.problem_mark:
            return f"{cause.problem_mark.name}, line {cause.problem_mark.line + 1}: {cause.problem}"
        if isinstance(cause, MissingConfigException) and cause.options:
            group, _, choice = str(cause.missing_cfg_file).rpartition("/")
            close = difflib.get_close_matches(SYNONYMS.get(choice, choice), cause.options, 1)
            near = f"; did you mean {group}={close[0]}?" if close else ""
            if group == "experiment" and not close:
                near = "; did you mean experiment=recipe/...?"
            return f"{group} has no choice {choice}{near} (choices: {', '.join(cause.options)})"
        cause = cause.__cause__ or cause.__context__
    return f"the settings cannot be composed: {first_line(error)}"


# --- several values -------------------------------------------------------------------------------


def values_of(override: Override, loader: ConfigLoader | None = None) -> list[str]:
    """Return each value of a setting as Hydra's grammar writes it.

    Raises ConfigError for no value, more than can be run, one given twice, or an interval.
    """
    text = override.input_line
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{text}: it takes hydra/sweeper=optuna to search an interval; this sweeper takes "
            "lists, range and glob"
        )
    values = list(itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1))
    if len(values) > MOST_JOBS:
        raise ConfigError(f"{text} gives more than {MOST_JOBS:,} values")
    if not values:
        choices = loader.get_group_options(override.key_or_group) if loader else []
        known = f" (choices: {', '.join(choices)})" if choices else ""
        raise ConfigError(f"{text} gives no value{known}")
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise ConfigError(f"{text} gives {', '.join(twice)} more than once")
    return values


@dataclass(frozen=True)
class Space:
    """What a search draws from: the overrides of its command, what is said last of a setting.

    distributions: for each override that has several values, what Optuna draws its value from.
    values: the same as lists, for those that can be counted.
    """

    overrides: tuple[Override, ...]
    distributions: Mapping[str, Any]
    values: Mapping[str, Sequence[Any]]

    @property
    def given(self) -> list[str]:
        """The overrides as they were written."""
        return [override.input_line or "" for override in self.overrides]

    def drawn(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the overrides with `values` in the place of what they were drawn from."""
        left = dict(values)
        texts = []
        for override in self.overrides:
            key = override.get_key_element()
            if key in left:
                texts.append(f"{key}={left.pop(key)}")
            elif not override.is_sweep_override():
                texts.append(override.input_line or "")
        return (*texts, *(f"{key}={value}" for key, value in left.items()))

    def first(self) -> tuple[str, ...]:
        """Return the overrides with the first of all values."""
        return self.drawn(
            {
                key: self.values[key][0] if key in self.values else distribution.low
                for key, distribution in self.distributions.items()
            }
        )

    def grid(self) -> dict[str, list[Any]]:
        """Return all values of each. Raises ConfigError for one whose values cannot be counted."""
        if endless := self.distributions.keys() - self.values.keys():
            raise ConfigError(
                f"hydra.sweeper.sampler=grid: {endless.pop()} has no end of values: give it a "
                "choice or a range"
            )
        return {key: list(values) for key, values in self.values.items()}


def read_space(given: Sequence[str], loader: ConfigLoader | None) -> Space:
    """Read overrides by Hydra's grammar.

    `choice`, `a,b`, `glob` and what is shuffled are drawn as categories; `range` by its steps, its
    end left out; `interval` as real numbers, `int(interval(...))` as whole ones; within
    `tag(log, ...)` on a logarithmic scale.

    Raises ConfigError for values that cannot be drawn from.
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
            distributions[key], counted = _distribution(override, loader)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{override.input_line}: {first_line(error)}") from error
        if counted is not None:
            values[key] = counted
    return Space(tuple(overrides.values()), distributions, values)


def _distribution(
    override: Override, loader: ConfigLoader | None
) -> tuple[BaseDistribution, Sequence[Any] | None]:
    """Return what Optuna is to draw from, and all there is of it where that can be counted."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log), range(low, high + 1)
        assert low is not None
        assert high is not None
        return FloatDistribution(low, high, log=log), None
    values_of(override, loader)  # refuses what cannot be drawn from
    elements: list[Any] = list(override.sweep_iterator(transformer=_element))
    if not isinstance(value, RangeSweep) or value.shuffle or len(elements) < 2:
        return CategoricalDistribution(elements), elements
    low, high, log = min(elements), max(elements), "log" in value.tags
    step: Any = abs(value.step or 1)
    if all(isinstance(element, int) for element in elements):
        return IntDistribution(low, high, log=log, step=step), elements
    return FloatDistribution(low, high, log=log, step=step), elements


def _element(value: Any) -> Any:
    """Return a number as it is, anything else as Hydra's grammar reads it back."""
    return value if isinstance(value, (int, float)) else Transformer.str(value)


# --- the filter -----------------------------------------------------------------------------------

# No arithmetic: a few characters of it keep a processor busy for hours, or take all memory.
ALLOWED = (
    *(ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop, ast.UnaryOp, ast.Not, ast.USub),
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load),
)
# As YAML and as Hydra's grammar write them.
WORDS = {"null": None, "true": True, "false": False}


class _Dotted(ast.NodeTransformer):
    """Makes one name of `lr.base`."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.Name:
        return ast.Name(ast.unparse(node), ast.Load())


def is_kept(expression: str, jobs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return for each job, given by its settings, whether `hydra.sweeper.filter` holds for it.

    It is Python's grammar, of which comparisons, `and`, `or`, `not`, `in`, numbers, texts, names
    and lists are taken. A setting that another job gives and this one does not is null.

    Raises ConfigError for an expression that cannot be read, names what no job gives, compares what
    cannot be compared, or holds for none.
    """
    said = f"hydra.sweeper.filter={expression}:"
    try:
        tree = _Dotted().visit(ast.parse(expression.strip(), mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f"{said} this is no expression such as 'added_layers < 3'") from None
    if not all(isinstance(node, ALLOWED) for node in ast.walk(tree)):
        raise ConfigError(f"{said} it takes comparisons, and, or, not, in and lists alone")
    code = compile(ast.fix_missing_locations(tree), "<filter>", "eval")
    known = {name for job in jobs for name in job}
    for name in sorted({*code.co_names} - WORDS.keys() - known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{said} {name} has no value here{hint} (text is written in quotes)")
    try:
        kept = [
            bool(eval(code, {"__builtins__": {}, **WORDS}, {**dict.fromkeys(known), **job}))
            for job in jobs
        ]
    except TypeError as error:
        raise ConfigError(f"{said} {error}") from None
    if not any(kept):
        raise ConfigError(f"{said} it keeps none of {len(jobs)} jobs")
    return kept
