"""Folders to records to tidy frames: every run and sweep below a folder, finished or not."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from proglayer import files
from proglayer.config import flat_settings
from proglayer.console import one_line
from proglayer.errors import UserError
from proglayer.files import RUN_FILE, SWEEP_FILE
from proglayer.results import columns
from proglayer.results.columns import SETTINGS, WHICH_RUN
from proglayer.results.variants import GROUPS, experiment_key, name_variants, swept
from proglayer.run.record import ENDS, RecordError, RunRecord, RunState, read_record, state_of
from proglayer.table import csv_of

# What phases are the sums of their epochs of.
SUMS = (
    *("train_tokens", "train_flops_head", "train_flops_body"),
    *("train_seconds", "evaluation_seconds"),
)
# The texts that a model is evaluated on.
TEXTS = ("test", "validation")
# Which of the runs of one experiment and seed stands for the others: a failed one comes last.
UNFINISHED = (RunState.interrupted, RunState.preempted, RunState.pruned, RunState.lost)
RANK = {RunState.completed: 3, RunState.running: 2, **dict.fromkeys(UNFINISHED, 1)}
NUMBER = re.compile(r"([0-9]{1,18})")
Rows = list[dict[str, Any]]


class NoFolder(UserError, FileNotFoundError):
    """There is no folder where runs were to be read."""


@dataclass(frozen=True)
class Results:
    """What `load` found. One row each: a run; a phase of a run; an epoch of a phase; an exit.

    `runs.status` is how a run ended (completed, failed, interrupted, preempted, pruned), or running
    (no record of its end yet), lost (the same without a sign of life for LOST_AFTER_S: killed, or
    its machine died), pending (a scheduler holds it), waiting (submitted by its sweep, not begun)
    or not started (the same of a sweep that shows no life either). What shows life again runs
    again. Seconds are what training and evaluation took originally, reused or not; what reuse saved
    is in `seconds_saved`, what the run itself took in `wall_seconds`. Changes (the
    last phase's figure - the first one's) and metrics of the last phase are given for completed
    runs only, changes for those of several phases. Settings are
    columns `config.<setting>`: those that vary stand in front, the constant ones at the end. What
    is missing is NaN or NA.

    `phases` and `exits` hold finished phases; `epochs` also those of a phase under way. Phases,
    epochs and layers count from 1; epoch 0 is the model right after a growth. Every frame has
    `run`, `variant` (the experiment, and what else was set differently between the runs, but for
    the seed and the model), `model` and `seed`. `epochs` and `exits` have
    `cumulative_epochs` (trained so far, in all phases of the run), `tokens` and `flops` (trained on
    so far, and spent on that); in `exits` up to the phase's selected epoch.
    `train_tokens`, `train_flops_head` and `train_flops_body` are those of the row's own phase or
    epoch.

    `left_out` names the runs whose record is cut short, unreadable or of another version.
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
        return failed + len(self.left_out)

    def distinct(self) -> Results:
        """Return each experiment and seed once: without the runs that `duplicate_of` marks."""
        again = self.runs.loc[self.runs["duplicate_of"].notna(), "run"].tolist()
        frames = {
            name: frame[~frame["run"].isin(again)].reset_index(drop=True)
            for name, frame in self.frames().items()
            if name != "left_out"
        }
        return replace(self, **frames)

    def to_csv(self, folder: str | Path) -> None:
        """Write each frame as `<name>.csv` into `folder`. Raises StoreError."""
        for name, frame in self.frames().items():
            write_csv(frame, Path(folder) / f"{name}.csv")

    def to_parquet(self, folder: str | Path) -> None:
        """Write each frame as `<name>.parquet` into `folder`, with its types. Raises StoreError."""
        for name, frame in self.frames().items():
            content = frame.to_parquet(None, engine="pyarrow", index=False)
            files.write_atomically(Path(folder) / f"{name}.parquet", content)

    def frames(self) -> dict[str, pd.DataFrame]:
        """Return the frames by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame as CSV, see `proglayer.table.csv_of`. Raises StoreError."""
    files.write_atomically(path, csv_of(frame).encode())


def load(*folders: str | Path | Iterable[str | Path]) -> Results:
    """Read every run in and below `folders`, each of them a sweep, a run or a pile of both.

    Runs are named by their folder relative to the folder given (to the one that holds all those
    given, if several), and come by their names, numbers in them as numbers. Folders that are links
    or hidden are not entered. A run that cannot be read is named in `left_out`.

    Args:
        folders: paths, or lists of paths.

    Raises:
        FileNotFoundError: for a folder that is not there, in one line.
    """
    paths: list[str | Path] = []
    for folder in folders:
        paths += [folder] if isinstance(folder, (str, Path)) else folder
    rows: dict[str, Rows] = {name: [] for name in ("runs", "phases", "exits", "epochs", "left_out")}
    for name, sweep, folder in _find(paths):
        try:
            _add(rows, name, sweep, folder, read_record(folder))
        except RecordError as error:
            reason = _text(one_line(str(error))[:120])
            rows["left_out"].append({"folder": _text(name), "kind": "damaged", "reason": reason})
    frames = {name: columns.to_frame(name, each) for name, each in rows.items()}
    runs = _with_changes(_with_variants(_with_duplicates(frames["runs"])))
    return Results(**_with_sums(frames | {"runs": columns.arranged(runs, _varied(runs))}))


# --- folders --------------------------------------------------------------------------------------


def _find(folders: Sequence[str | Path]) -> list[tuple[str, str | None, Path]]:
    """Return name, name of the sweep and folder of each run in and below these folders."""
    given: dict[Path, str] = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise NoFolder(f"there is no folder {folder}")
        given.setdefault(Path(folder).resolve(), str(Path(folder)))
    roots = [path for real, path in given.items() if given.keys().isdisjoint(real.parents)]
    above = os.path.commonpath(map(os.path.abspath, roots)) if roots else ""

    def named(path: str) -> str:
        name = os.path.relpath(path, above)
        return Path(path).resolve().name if name == "." else name

    runs = []
    for root in roots:
        sweeps = set()
        for path, names in _walk(root):
            if SWEEP_FILE in names:
                sweeps.add(path)
            if RUN_FILE in names:
                parent = os.path.dirname(path)
                runs.append((named(path), named(parent) if parent in sweeps else None, Path(path)))
    return sorted(runs, key=lambda run: natural_order(run[0]))


def _walk(root: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder that is neither hidden nor a link, and the files in it."""
    for path, below, names in os.walk(root):
        below[:] = [each for each in below if not each.startswith(".")]
        yield path, names


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts 2_x before 10_x."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in NUMBER.split(name)]


def _text(value: Any) -> str | None:
    """Return text that every file format can hold; other values as JSON writes them."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


# --- records --------------------------------------------------------------------------------------


def _add(
    rows: dict[str, Rows], name: str, sweep: str | None, folder: Path, record: RunRecord
) -> None:
    """Add one run's rows: its own, its phases', exits' and epochs'."""
    state = state_of(folder, record)
    run: dict[str, Any] = {
        "run": _text(name),
        "sweep": _text(sweep),
        "folder": _text(str(folder)),
        "started": record.started,
        "ended": record.ended,
        "last_sign": record.ended or state.last_sign,
        "status": state.state.value,
        "reason": _text(state.reason),
        "overrides": _text(shlex.join(record.overrides)),
    }
    for group, choice in record.choices.items():
        run[GROUPS.get(group, f"choice.{_text(group)}")] = _text(choice)
    if settings := record.config:
        for setting, value in flat_settings(settings, whole=SETTINGS):
            is_text = SETTINGS.get(setting, "text") == "text"
            run[f"config.{setting}"] = _text(value) if is_text else value
        run["seed"] = settings.get("seed")
        if record.started is not None:
            text = record.corpus.fingerprint if record.corpus else None
            run["experiment_key"] = experiment_key(settings, text)
    phases: Rows = []
    epochs: Rows = []
    if corpus := record.corpus:
        epochs = [{"run": run["run"], **row.columns(corpus)} for row in record.epochs]
        for number, phase in enumerate(record.phases, start=1):
            place = {"run": run["run"], "phase": number}
            test = corpus.figures(phase.test, "test") if phase.test is not None else {}
            figures = corpus.figures(phase.validation) | test
            own = [row for row in epochs if row["phase"] == number]
            figures |= _sums(own) | _growth(record, number, own)
            phases.append(place | columns.recorded("phases", phase) | figures)
            after = phase.growth.exit_losses_after if phase.growth else [None] * len(phase.exits)
            for (layer, score), loss in zip(phase.exits.items(), after, strict=False):
                exit = place | {"layer": layer, "validation_loss_after_growth": loss}
                rows["exits"].append(exit | corpus.figures(score))
    rows["phases"] += phases
    rows["epochs"] += epochs
    rows["runs"].append(columns.recorded("runs", record) | run | _of_phases(record, phases, epochs))


def _sums(epochs: Rows) -> dict[str, Any]:
    """Return what training these epochs took, reused or not, and what reusing some saved."""
    trained = [row for row in epochs if row["epoch"]]
    seconds = [row["train_seconds"] + row["evaluation_seconds"] for row in trained]
    reused = [row["reused"] for row in trained]
    return {
        "epochs": len(trained),
        "epochs_reused": sum(reused),
        "seconds_saved": sum(itertools.compress(seconds, reused)),
        **{name: sum(row[name] for row in trained) for name in SUMS},
    }


def _growth(record: RunRecord, number: int, epochs: Rows) -> dict[str, Any]:
    """Return what a phase's growth did to the loss, and for how long; nothing if it has none."""
    growth = record.phases[number - 1].growth
    if growth is None:
        return {}
    trained = [row for row in epochs if row["epoch"]]
    before = record.phases[number - 2].validation.loss
    so_far = itertools.accumulate(row["train_tokens"] for row in trained)
    better = (row["validation_loss"] < before for row in trained)
    return {
        "validation_loss_before": before,
        "validation_loss_after": growth.exit_losses_after[-1],
        "tokens_to_recovery": next(itertools.compress(so_far, better), None),
    }


def _of_phases(record: RunRecord, phases: Rows, epochs: Rows) -> dict[str, Any]:
    """Return what a run's phases and epochs add up to."""
    completed = record.state is RunState.completed
    run: dict[str, Any] = {}
    if epochs:
        run = _sums(epochs)
        run["seconds"] = run["train_seconds"] + run["evaluation_seconds"]
        run["tokens"], run["flops_without_head"] = run["train_tokens"], run["train_flops_body"]
        run["flops"] = run["train_flops_head"] + run["train_flops_body"]
        run = {name: value for name, value in run.items() if name not in SUMS}
    if record.state in ENDS and record.started is not None:
        run["phases"] = len(phases)
    if record.corpus:
        run["validation_tokens"] = record.corpus.validation_windows * record.corpus.seq_len
    ends = [("first", phases[0])] if phases else []
    ends += [("last", phases[-1])] if phases and completed else []
    for which, phase in ends:
        run[f"{which}_layers"] = phase["layers"]
        run |= {f"{which}_{name}": phase[name] for name in phase if name.startswith(TEXTS)}
    return run


# --- frames ---------------------------------------------------------------------------------------


def _with_duplicates(runs: pd.DataFrame) -> pd.DataFrame:
    """Add `duplicate_of` to each run whose experiment and seed another one stands for.

    The newest completed one does; if none completed, one that is running, then the newest.
    """
    ranked = runs.assign(rank=[RANK.get(status, 0) for status in runs["status"]])
    ordered = ranked.sort_values(["rank", "last_sign"], kind="stable", na_position="first")
    chosen = ordered.groupby("experiment_key")["run"].transform("last")
    return runs.assign(duplicate_of=chosen.where(chosen != ordered["run"]))


def _with_variants(runs: pd.DataFrame) -> pd.DataFrame:
    """Add `variant`; it and the model are categories in the order of the first runs."""
    known: Any = runs[runs["config.seed"].notna()]
    names, _ = name_variants(known, swept(known))
    labels = names.reindex(runs.index, fill_value="as configured").tolist()
    named = {}
    for name, values in (("variant", labels), ("model", columns.plain_values(runs["model"]))):
        known = list(dict.fromkeys(value for value in values if value is not None))
        named[name] = pd.Categorical(values, categories=known, ordered=True)
    return runs.assign(**named)


def _with_changes(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs with the change of each figure from their first phase to their last."""
    several = (runs["phases"] > 1).fillna(False).astype(bool)
    for change, metric in (
        ("accuracy_change_points", "accuracy_percent"),
        ("loss_change_nats", "loss"),
    ):
        for text in TEXTS:
            ends = runs[f"last_{text}_{metric}"] - runs[f"first_{text}_{metric}"]
            runs[f"{text}_{change}"] = ends.where(several)
    return runs


def _varied(runs: pd.DataFrame) -> list[str]:
    known: Any = runs[runs["config.seed"].notna()]
    settings = [column for column in runs.columns if column.startswith("config.")]
    return [column for column in settings if len(known[column].unique()) > 1]


def _with_sums(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Add what each run is, and what it had trained by each epoch and exit."""
    phases, epochs = frames["phases"], frames["epochs"]
    # Epoch 0 is the model right after a growth: it was only evaluated.
    trained = epochs["epoch"] > 0
    epochs["cumulative_epochs"] = (
        trained.groupby(epochs["run"], sort=False).cumsum().astype("int64")
    )
    epochs["tokens"] = sum_so_far(epochs["train_tokens"], epochs["run"])
    flops = epochs["train_flops_head"] + epochs["train_flops_body"]
    epochs["flops"] = sum_so_far(flops, epochs["run"])
    keys = ["run", "phase", "best_epoch"]
    at = epochs.rename(columns={"epoch": "best_epoch"}).drop_duplicates(keys)
    at = phases[keys].merge(
        at[[*keys, "cumulative_epochs", "tokens", "flops"]], on=keys, how="left"
    )
    exits = frames["exits"].merge(at.drop(columns="best_epoch"), on=["run", "phase"], how="left")
    which = frames["runs"][list(WHICH_RUN)]
    return frames | {
        name: columns.without_gaps(which.merge(frame, on="run", how="right"))
        for name, frame in (("phases", phases), ("epochs", epochs), ("exits", exits))
    }


def sum_so_far(values: Any, runs: Any) -> Any:
    """Return the sum of each run's values up to each row; missing from the first missing one on."""
    gaps = values.isna().groupby(runs, sort=False).cummax()
    return values.groupby(runs, sort=False).cumsum().mask(gaps)
