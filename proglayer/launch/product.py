"""A sweep of all values of a command, with what a product of values does not say."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override

from proglayer.config import Settings
from proglayer.errors import ConfigError
from proglayer.launch.ask import keyed, parse
from proglayer.launch.compose import Command
from proglayer.launch.sweep import Sweep

# Checked in a quarter of an hour.
MOST_JOBS = 10_000
# Of a filter, no arithmetic: a few characters of it keep a processor busy for hours, or take all
# memory.
ALLOWED = (
    *(ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop, ast.UnaryOp, ast.Not, ast.USub),
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load),
)
# As YAML and as Hydra's grammar write them.
WORDS = {"null": None, "true": True, "false": False}


class ProductSettings(Settings):
    """The settings of conf/hydra/sweeper/proglayer.yaml.

    params: overrides as on the command line, in a file.
    pairs: keys whose values go together.
    blocks: several sweeps in one, each with settings of its own, written as `params` are.
    filter: an expression; combinations for which it does not hold are left out.
    """

    design: str = ""
    params: dict[str, Any] | None = None
    pairs: tuple[tuple[str, ...], ...] = ()
    blocks: tuple[dict[str, Any], ...] = ()
    filter: str | None = None


def run(command: Command) -> int:
    """Run the product of all values, or plan it, and return the exit status.

    Raises ConfigError with every problem of every job before anything is launched.
    """
    settings = command.settings("sweeper", ProductSettings)
    sweep = Sweep(command)
    jobs = sweep.jobs(enumerate(expand(settings, command.arguments, command.loader)))
    if jobs[0].job.config.plan:
        sweep.show_plans(jobs)
        return 0
    return sweep.run(iter([jobs]))


def expand(
    settings: ProductSettings, arguments: Sequence[str], loader: ConfigLoader | None
) -> list[tuple[str, ...]]:
    """Return the overrides of each job: the product of all values, paired keys moving together.

    With blocks it is the union of a product for each, which have the other overrides in common.
    What the filter does not hold for is left out.

    Raises ConfigError for pairs, blocks or a filter that do not fit what is given.
    """
    asked = keyed(arguments, loader)
    # Of each block: one setting, or the first of several that go together -> their values.
    all_axes: list[dict[str, list[tuple[str, ...]]]] = []
    for params in settings.blocks or [{}]:
        block = keyed(params_as_overrides(params), loader)
        if twice := sorted(asked.keys() & block.keys()):
            raise ConfigError(
                f"hydra.sweeper.blocks gives {twice[0]}, and so does the command line: keep one"
            )
        given = keyed(params_as_overrides(settings.params), loader) | block | asked
        all_axes.append(
            {
                key: [(f"{each.get_key_element()}={value}",) for value in values_of(each)]
                for key, each in given.items()
            }
        )
    for group in settings.pairs:
        having = [axes for axes in all_axes if axes.keys() & {*group}] or all_axes[:1]
        for axes in having:  # another block may have none of them
            _pair(axes, group)
    if sum(math.prod(map(len, axes.values())) for axes in all_axes) > MOST_JOBS:
        raise ConfigError(f"these are more than {MOST_JOBS:,} jobs: give them as several sweeps")
    distinct: dict[frozenset[str], tuple[str, ...]] = {}
    for choice in itertools.chain(*(itertools.product(*axes.values()) for axes in all_axes)):
        overrides = tuple(itertools.chain(*choice))
        distinct.setdefault(frozenset(overrides), overrides)
    jobs = list(distinct.values())
    if settings.filter is None:
        return jobs
    read = {each.input_line: each for each in parse(dict.fromkeys(itertools.chain(*jobs)))}
    values = [{read[text].key_or_group: read[text].value() for text in job} for job in jobs]
    return list(itertools.compress(jobs, is_kept(settings.filter, values)))


def params_as_overrides(params: Mapping[str, Any] | None) -> list[str]:
    """Return `hydra.sweeper.params`, or a block, as on the command line."""
    return [f"{k}={'null' if v is None else v}" for k, v in (params or {}).items()]


def _pair(axes: dict[str, list[tuple[str, ...]]], group: Sequence[str]) -> None:
    """Let the values of several settings go together, in the place of the first.

    Raises ConfigError where there are not as many of each.
    """
    sizes = {key: len(axes.get(key, ())) for key in group}
    if len(sizes) < max(2, len(group)) or len({*sizes.values()}) > 1 or not all(sizes.values()):
        said = ", ".join(f"{key} has {size} values" for key, size in sizes.items())
        raise ConfigError(
            f"hydra.sweeper.pairs take several settings with as many values each, and here {said}"
        )
    first, *others = group
    rows = zip(axes[first], *(axes.pop(key) for key in others), strict=True)
    axes[first] = [tuple(itertools.chain(*row)) for row in rows]


def values_of(override: Override) -> list[str]:
    """Return each value of a setting as Hydra's grammar writes it.

    Raises ConfigError for no value, more than can be run, or an interval.
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
    if not 0 < len(values) <= MOST_JOBS:
        much = f"more than {MOST_JOBS:,} values" if values else "no value"
        raise ConfigError(f"{text} gives {much}")
    return values


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
    known = {name: None for job in jobs for name in job}
    if unknown := sorted({*code.co_names} - WORDS.keys() - known.keys()):
        raise ConfigError(f"{said} {unknown[0]} has no value here (text is written in quotes)")
    try:
        kept = [bool(eval(code, {"__builtins__": {}, **WORDS}, {**known, **job})) for job in jobs]
    except TypeError as error:
        raise ConfigError(f"{said} {error}") from None
    if not any(kept):
        raise ConfigError(f"{said} it keeps none of {len(jobs)} jobs")
    return kept
