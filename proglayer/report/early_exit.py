"""What exits are worth, as `python -m proglayer.exits` measured it: its file, and frames of many.

The command leaves `exits.json` in each run's folder; a report reads it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from proglayer import files
from proglayer.report.arms import Frame

EXITS = "exits.json"
# An early exit counts as good as the last where its accuracy is at most so many points lower.
WITHIN_POINTS = 0.1


class _Row(BaseModel):
    """Validation figures; loss in nats per token. Layers count from 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    loss: FiniteFloat
    accuracy_percent: float = Field(ge=0, le=100)


class ExitWorth(_Row):
    """One exit: its layer, whether its loss was trained, and its guesses.

    accepted_percent: of tokens, where its guess is the last exit's.
    """

    layer: int = Field(ge=0)
    trained: bool
    accepted_percent: float = Field(ge=0, le=100)


class EarlyExit(_Row):
    """Predicting each token at the first exit whose confidence reaches `threshold`.

    layers: used, the mean over tokens.
    """

    threshold: float = Field(ge=0, le=1)
    layers: float = Field(ge=0, allow_inf_nan=False)


class ChangedLayers(_Row):
    """The last exit where one layer is left out, or swapped with the next."""

    change: str
    layer: int = Field(ge=1)


class Measured(BaseModel):
    """What was measured of one model on the validation text: `exits.json`, with its weights."""

    model_config = ConfigDict(extra="forbid")
    weights_sha256: str | None = None
    exits: list[ExitWorth] = []
    early_exit: list[EarlyExit] = []
    changed_layers: list[ChangedLayers] = []


def keep(folder: Path, weights_sha256: str | None, measured: Measured) -> None:
    """Write `exits.json` into a run's folder."""
    kept = measured.model_copy(update={"weights_sha256": weights_sha256})
    data = kept.model_dump_json(indent=1).encode() + b"\n"
    files.write_atomically(folder / EXITS, data)


def kept(folder: Path, weights_sha256: str | None) -> Measured | None:
    """Return what was measured of the run in this folder with these weights; None for nothing."""
    try:
        found = Measured.model_validate_json((folder / EXITS).read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.weights_sha256 == weights_sha256 else None


@dataclass(frozen=True, eq=False)
class Worth:
    """What was measured of many runs: a row each, with `variant`, `model`, `seed`, `run`.

    exits, early_exit: the fields of ExitWorth and EarlyExit. changed_layers: those of
    ChangedLayers, and `loss_rise`, against the model as it was.
    """

    exits: Frame
    early_exit: Frame
    changed_layers: Frame


def worth(runs: Frame, measured: Mapping[str, Measured] | None = None) -> Worth:
    """Return what was measured of these runs (of `Arms`); empty frames where nothing was.

    Args:
        measured: by run; by default what is kept in the folder of each.
    """
    rows: dict[str, list[dict[str, object]]] = {"exits": [], "early_exit": [], "changed_layers": []}
    own = runs[["variant", "model", "seed", "run", "folder", "weights_sha256"]]
    own = own.dropna(subset="folder")
    for row in own.astype(object).where(own.notna(), None).to_dict("records"):
        folder, sha = row.pop("folder"), row.pop("weights_sha256")
        of_run = measured.get(row["run"]) if measured is not None else kept(Path(folder), sha)
        for name, frame in rows.items() if of_run else ():
            frame += [row | each.model_dump() for each in getattr(of_run, name)]
    frames: dict[str, Frame] = {name: pd.DataFrame(frame) for name, frame in rows.items()}
    if len(changed := frames["changed_layers"]):
        last = frames["exits"].groupby("run")["loss"].last()
        changed["loss_rise"] = changed["loss"] - changed["run"].map(last)
    return Worth(**frames)


def needed(found: Worth) -> Frame:
    """Return with how few layers each arm loses at most WITHIN_POINTS against all of them.

    Returns:
        `variant`, `model`, `seeds`, `layers` (used, the mean over tokens and seeds), `threshold`
        (the confidence from which on a guess is taken), `early_percent` (the accuracy then),
        `of_layers`, `accuracy_percent` (with all of them), `accepted_percent` (of the first exit's
        guesses, by the last).
    """
    rows = []
    for (variant, model), arm in found.early_exit.groupby(["variant", "model"], sort=False):
        exits = found.exits[found.exits["run"].isin(arm["run"])]
        whole = float(exits.groupby("run")["accuracy_percent"].last().mean())
        means = arm.groupby("threshold")[["layers", "accuracy_percent"]].mean()
        enough = means[means["accuracy_percent"] >= whole - WITHIN_POINTS]
        at = enough["layers"].idxmin()
        first = exits.loc[exits["layer"] == exits["layer"].min(), "accepted_percent"].mean()
        uses = {"layers": enough["layers"][at], "threshold": at}
        uses["early_percent"] = enough["accuracy_percent"][at]
        of = {"of_layers": exits["layer"].max(), "accuracy_percent": whole}
        arms = {"variant": variant, "model": model, "seeds": arm["seed"].nunique()}
        rows.append(arms | uses | of | {"accepted_percent": first})
    return pd.DataFrame(rows)
