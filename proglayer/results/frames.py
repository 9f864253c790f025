"""The study's tables: the records of any number of runs and sweeps, read together.

`load` finds every run below the folders it is given, finished or not, and lays out what they
recorded as tidy pandas frames.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from proglayer import files
from proglayer.results.columns import (
    GROUPS,
    IDENTITY_COLUMNS,
    METRIC_COLUMNS,
    PLACE_COLUMNS,
    WHICH_RUN,
    plain_values,
    to_frame,
    without_gaps,
)
from proglayer.results.reader import keys_and_values, read_runs
from proglayer.results.scan import scan
from proglayer.results.variants import asked_of, name_variants, swept
from proglayer.run.record import RunState
from proglayer.table import csv_of


@dataclass(frozen=True)
class Results:
    """What `load` found. One row each: a run; a phase of a run; an epoch of a phase; an exit.

    `runs.status` is how a run ended (completed, failed, interrupted, preempted, pruned), or running
    (no record of its end yet), lost (the same without a sign of life for LOST_AFTER_S: killed, or
    its machine died), pending (a scheduler holds it), waiting (listed by its sweep, not begun) or
    not started (the same of a sweep that shows no life either). What shows life again runs again.
    Seconds are what training and evaluation took originally, reused or not; what reuse saved is in
    `seconds_saved`, what the run itself took in `wall_seconds`. Changes and metrics of the last
    phase are given for completed runs only, changes for those of several phases. Settings are
    columns `config.<setting>`: those that vary stand in front, the constant ones at the end. What
    is missing is NaN or NA.

    `phases` and `exits` hold finished phases; `epochs` also those of a phase under way. Phases,
    epochs and layers count from 1; epoch 0 is the model right after a growth. Every frame has
    `run`, `variant` (the experiment, and what else was set differently between the runs, but for
    the seed and the model), `model` and `seed`. `epochs` and `exits` have `step` (epochs trained so
    far, in all phases of the run), `tokens` and `flops` (trained on so far, and spent on that); in
    `exits` up to the phase's selected epoch. `train_tokens`, `train_flops_head` and
    `train_flops_body` are those of the row's own phase or epoch.

    `left_out` names what could not be read: of kind damaged (a run whose record is cut short or
    unreadable), newer (a record of a later format) or foreign (no run of this tool).
    """

    runs: pd.DataFrame
    phases: pd.DataFrame
    epochs: pd.DataFrame
    exits: pd.DataFrame
    left_out: pd.DataFrame

    @property
    def varied(self) -> list[str]:
        """The columns `config.<setting>` of `runs` that differ between runs."""
        return _varied(self.runs)

    @property
    def failures(self) -> int:
        """How many runs failed, were lost, or left a record that cannot be read."""
        statuses = self.runs["status"].tolist()
        failed = statuses.count(RunState.failed) + statuses.count(RunState.lost)
        return failed + self.left_out["kind"].tolist().count("damaged")

    def distinct(self) -> Results:
        """Each experiment and seed once: without the runs that `duplicate_of` marks."""
        again = self.runs.loc[self.runs["duplicate_of"].notna(), "run"].tolist()
        frames = {
            name: frame[~frame["run"].isin(again)].reset_index(drop=True)
            for name, frame in self._frames().items()
            if name != "left_out"
        }
        return replace(self, **frames)

    def to_csv(self, folder: str | Path) -> None:
        """Write each frame as `<name>.csv` into `folder`, as `write_csv` does it."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, frame in self._frames().items():
            write_csv(frame, Path(folder) / f"{name}.csv")

    def to_parquet(self, folder: str | Path) -> None:
        """Write each frame as `<name>.parquet` into `folder`, with its types."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, frame in self._frames().items():
            content = frame.to_parquet(None, engine="pyarrow", index=False)
            files.write_atomically(Path(folder) / f"{name}.parquet", content)

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def load(*folders: str | Path | Iterable[str | Path]) -> Results:
    """Read every run in and below `folders`, each of them a sweep, a run or a pile of both.

    Runs are named by their folder relative to the folder given (to the one that holds all those
    given, if several). Folders that are links, hidden, or a store are not entered. A run
    that cannot be read is named in `left_out`.

    Args:
        folders: paths, or lists of paths.

    Raises:
        FileNotFoundError, NotADirectoryError: for a folder that is not there, in one line.
    """
    paths: list[str | Path] = []
    for folder in folders:
        paths += [folder] if isinstance(folder, (str, Path)) else folder
    found, others = scan(*paths)
    frames = read_runs(found)
    left_out = pd.concat([to_frame("left_out", others), frames["left_out"]])
    frames["left_out"] = left_out.sort_values("folder", kind="stable", ignore_index=True)
    frames["runs"] = _arranged(_with_variants(frames["runs"]))
    return Results(**_with_sums(frames))


def _with_variants(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with `variant`; it and the model as categories in the order of the first runs.

    A run whose settings are not known yet is named as those of which the same was asked.
    """
    known: Any = runs[runs["config.seed"].notna()]
    names, _ = name_variants(known, swept(known))
    asked = runs["overrides"].map(asked_of)
    alike = dict(zip(asked[known.index], names, strict=True))
    otherwise = runs["experiment"].astype(object).where(runs["experiment"].notna(), "as configured")
    labels = names.reindex(runs.index).fillna(asked.map(alike)).fillna(otherwise).tolist()
    columns = {}
    for name, values in (("variant", labels), ("model", plain_values(runs["model"]))):
        known = list(dict.fromkeys(value for value in values if value is not None))
        columns[name] = pd.Categorical(values, categories=known, ordered=True)
    return runs.assign(**columns)


def what_varied(
    runs: pd.DataFrame, aside: Collection[str] = (), as_given: bool = True
) -> dict[str, list[str]]:
    """What differs between the runs of what was given on their command lines.

    Args:
        aside: settings and groups that do not count.
        as_given: values as the overrides have them; otherwise as the records do, where they do.

    Returns:
        the shortest title that tells each setting or group -> each run's value.
    """
    given = [
        dict(keys_and_values(shlex.split(overrides or "")))
        for overrides in plain_values(runs["overrides"])
    ]
    varied: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for overrides in given for key in overrides if key not in aside):
        column = GROUPS.get(key, f"config.{key}")
        recorded = plain_values(runs[column]) if column in runs else [None] * len(runs)
        values = []
        for overrides, value in zip(given, recorded, strict=True):
            known = (overrides.get(key), value) if as_given else (value, overrides.get(key))
            values.append(next((str(one) for one in known if one is not None), ""))
        if len(set(values)) > 1:
            varied[key] = values
    short = {key: key.rsplit(".", 1)[-1] for key in varied}
    count = Counter(short.values())
    return {short[k] if count[short[k]] == 1 else k: values for k, values in varied.items()}


def _with_sums(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The frames with what each run is, and with what it had trained by each epoch and exit."""
    phases, epochs = frames["phases"], frames["epochs"]
    cost = phases[["run", "phase"]].assign(
        flops=(phases["train_flops_head"] + phases["train_flops_body"]) / phases["epochs"]
    )
    epochs = epochs.merge(cost, on=["run", "phase"], how="left")
    # Epoch 0 is the model right after a growth: it was only evaluated.
    trained = epochs["epoch"] > 0
    epochs["step"] = trained.groupby(epochs["run"], sort=False).cumsum().astype("int64")
    epochs["tokens"] = sum_so_far(epochs["train_tokens"], epochs["run"])
    epochs["flops"] = sum_so_far(epochs["flops"] * trained, epochs["run"])
    keys = ["run", "phase", "best_epoch"]
    at = epochs.rename(columns={"epoch": "best_epoch"}).drop_duplicates(keys)
    at = phases[keys].merge(at[[*keys, "step", "tokens", "flops"]], on=keys, how="left")
    exits = frames["exits"].merge(at.drop(columns="best_epoch"), on=["run", "phase"], how="left")
    which = frames["runs"][list(WHICH_RUN)]
    return frames | {
        name: without_gaps(which.merge(frame, on="run", how="right"))
        for name, frame in (("phases", phases), ("epochs", epochs), ("exits", exits))
    }


def sum_so_far(values: Any, runs: Any) -> Any:
    """The sum of each run's values up to each row; missing from the first one that is missing."""
    gaps = values.isna().groupby(runs, sort=False).cummax()
    return values.groupby(runs, sort=False).cumsum().mask(gaps)


def _varied(runs: pd.DataFrame) -> list[str]:
    known: Any = runs[runs["config.seed"].notna()]
    settings = [column for column in runs.columns if column.startswith("config.")]
    return [column for column in settings if len(known[column].unique()) > 1]


def _arranged(runs: pd.DataFrame) -> pd.DataFrame:
    """Who and how, what varies, the metrics, where; then what is the same everywhere."""
    varied = _varied(runs)
    others = {c for c in runs.columns if c.startswith("choice.")} - {*IDENTITY_COLUMNS}
    settings = [column for column in runs.columns if column.startswith("config.")]
    constant = [column for column in settings if column not in varied]
    front = [*IDENTITY_COLUMNS, *sorted(others), *varied, *METRIC_COLUMNS, *PLACE_COLUMNS]
    return runs.reindex(columns=front + constant).copy()


# What names the folder of exported tables.
OUTPUT = "--csv, --parquet or -o"


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame for spreadsheets and for programs.

    No text in it is a formula; see `proglayer.table.csv_of`. Raises StoreError.
    """
    files.write_atomically(path, csv_of(frame).encode())
