"""Which runs repeat each other: what was set differently between runs, and a name for each way.

A **variant** is an experiment and whatever else was set differently. The table of a sweep, the
frames and the report all name runs by this.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from proglayer.results.columns import GROUPS, NOT_THE_EXPERIMENT, PLACE_OF_TEXT
from proglayer.results.reader import keys_and_values

# What makes no other variant: where and how a run works, its seed, and what its corpus's
# fingerprint covers.
_ASIDE = {f"config.{name}" for name in (*NOT_THE_EXPERIMENT, *PLACE_OF_TEXT, "seed")}
# These have columns of their own.
_NAMED = {"seed", "model", "experiment", "data"}


def swept(runs: Any) -> list[str]:
    """Return the columns of settings that differ between these runs, those of place and text apart.

    Lists of exit weights make the model, which is no variant.
    """
    return [
        column
        for column in runs.columns
        if column.startswith("config.")
        and column not in _ASIDE
        and not column.startswith("config.data.")
        and runs[column].nunique(dropna=False) > 1
    ]


def asked_of(overrides: Any) -> str:
    """Return what was asked of a run, whatever its seed, and where and how it was to run."""
    given = keys_and_values([] if pd.isna(overrides) else shlex.split(overrides))
    aside = {"seed", *NOT_THE_EXPERIMENT}
    return shlex.join(sorted(f"{k}={v}" for k, v in given if k not in aside))


def name_variants(runs: Any, columns: Sequence[str], within: Sequence[str] = ()) -> tuple[Any, Any]:
    """Name each run's variant: its experiment, and the settings that set it apart within that.

    The variant of an experiment with the fewest overrides carries its plain name.

    Args:
        columns: the settings that count, of `swept`.
        within: further columns whose groups are named apart.

    Returns:
        the names, and whether a run is the experiment as it is.
    """
    names = pd.Series("", runs.index, dtype=object)
    plain = pd.Series(False, runs.index)
    groups = {name: column for name, column in GROUPS.items() if name not in _NAMED}
    kinds = runs.groupby([*within, "experiment", "model"], sort=False, dropna=False, observed=True)
    for _, kind in kinds:
        experiment = kind["experiment"].iloc[0]
        experiment = "" if pd.isna(experiment) else str(experiment)
        differ = kind[[*columns, *groups.values()]].nunique(dropna=False) > 1
        varying = [column for column in columns if differ[column]]
        if not varying:
            names[kind.index], plain[kind.index] = experiment or "as configured", True
            continue
        choices = {name: column for name, column in groups.items() if differ[column]}
        arm = kind.groupby(varying, dropna=False, sort=False).ngroup()
        fewest = kind["overrides"].map(_extras).groupby(arm).min()
        fewest = fewest.index[fewest == fewest.min()]
        base = fewest[0] if len(fewest) == 1 else None
        first = {number: kind.loc[index] for index, number in arm.drop_duplicates().items()}
        named: dict[Any, str] = {}
        for number, row in first.items():
            name = experiment or "base"
            if number != base:
                parts = _apart(row, first.get(base), choices, varying)
                name = " ".join(filter(None, [experiment, *parts]))
            named[number] = f"{name} ({number + 1})" if name in named.values() else name
        names[kind.index], plain[kind.index] = arm.map(named), arm == base
    return names, plain


def _extras(overrides: Any) -> int:
    """Count the overrides that say something else than which seed, model, experiment and text."""
    given = keys_and_values([] if pd.isna(overrides) else shlex.split(overrides))
    return sum(key.split(".")[0] not in _NAMED for key, _ in given)


def _apart(
    row: Any, base: Any | None, choices: dict[str, str], settings: Sequence[str]
) -> list[str]:
    """Return what sets a run apart, by its groups' choices first, then by settings."""

    def differs(column: str) -> bool:
        return base is None or value_text(row[column]) != value_text(base[column])

    chosen = [group for group, column in choices.items() if differs(column)]
    rest = [c for c in settings if c.split(".")[1] not in chosen and differs(c)]
    return [f"{g}={value_text(row[choices[g]])}" for g in chosen] + settings_text(row, rest)


def settings_text(row: Any, columns: Iterable[str]) -> list[str]:
    """Return settings of a run as text, `growth.init=stack`; `columns` are those of `runs`."""
    return [f"{c.removeprefix('config.')}={value_text(row[c])}" for c in columns]


def value_text(value: Any) -> str:
    """Return a setting's value as an override has it."""
    if pd.isna(value):
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)
