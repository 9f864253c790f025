"""What was set differently between runs: which repeat each other, and a name for each way.

A **variant** is an experiment and whatever else was set differently. The table of a sweep, the
frames and the report all name runs by this.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from proglayer.config import flat_settings
from proglayer.results.columns import SETTINGS

# Two runs that differ in these alone are the same experiment with the same seed: they say where
# and how a run works, not what it trains. Devices, threads, compiler change the rounding, no more.
NOT_THE_EXPERIMENT = (
    *("plan", "on_error", "objective", "report", "checkpoint_every_s", "store.dir"),
    *("logger.tensorboard", "logger.mlflow", "threads", "device", "compile", "cache_frozen"),
    *("jobs_per_gpu", "data.cache_dir", "devices", "join_timeout_s"),
)
# Where the text lies; the corpus's fingerprint, where it is known, says what it is.
PLACE_OF_TEXT = ("data.path", "data.files")
# Each group of the configuration -> the column of `runs` that holds which option was chosen.
GROUPS = {
    **{group: group for group in ("model", "experiment", "data")},
    **{group: f"choice.{group}" for group in ("phase", "growth", "freeze", "lr")},
}
# What makes no other variant: where and how a run works, its seed, and what its corpus's
# fingerprint covers.
_ASIDE = {f"config.{name}" for name in (*NOT_THE_EXPERIMENT, *PLACE_OF_TEXT, "seed")}
# These have columns of their own.
_NAMED = {"seed", "model", "experiment", "data"}


def identity(settings: Mapping[str, Any], aside: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings that make an experiment, by dotted names: where and how is left out."""
    flat = flat_settings(settings, whole=SETTINGS)
    return {name: v for name, v in flat if name not in (*NOT_THE_EXPERIMENT, *aside)}


def experiment_key(settings: dict[str, Any], fingerprint: str | None) -> str:
    """Return what is the same for two runs of one experiment, on the same text, with one seed."""
    known = [identity(settings, PLACE_OF_TEXT if fingerprint else ()), fingerprint]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def keys_and_values(overrides: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield overrides as key and value, without those of Hydra itself."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key and not key.startswith("hydra"):
            yield key, value


def what_varied(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Return what differs between the command lines of runs: its shortest title -> the values."""
    given = [dict(keys_and_values(shlex.split(overrides))) for overrides in runs["overrides"]]
    keys = dict.fromkeys(key for each in given for key in each)
    values = {key: [each.get(key, "") for each in given] for key in keys}
    varied = [key for key, each in values.items() if len(set(each)) > 1]
    short = {key: key.rsplit(".", 1)[-1] for key in varied}
    count = Counter(short.values())
    return {short[key] if count[short[key]] == 1 else key: values[key] for key in varied}


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


def asked_of(overrides: str) -> str:
    """Return what was asked of a run, whatever its seed, and where and how it was to run."""
    given = keys_and_values(shlex.split(overrides))
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
    given = keys_and_values(shlex.split(overrides))
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
