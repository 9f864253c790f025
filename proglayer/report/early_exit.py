"""What exits are worth, as `python -m proglayer.exits` measured it: files, frames and pictures.

The command leaves `exits.json` in each run's folder; a report reads it there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from proglayer import files
from proglayer.console import counted
from proglayer.report.page import Picture
from proglayer.report.pictures import Gallery, over_seeds
from proglayer.report.study import Frame, model_name, variant_name
from proglayer.store.reading import read_json
from proglayer.store.record import RecordError, from_dict, to_dict

EXITS = "exits.json"
is_exits = files.begins_with(b'{"weights_sha256":')
# Of the files that the command writes, without their endings.
NAMES = (
    *("exits", "early_exit", "changed_layers"),
    *("early-exit-accuracy", "early-exit-loss", "acceptance"),
    *("layer-left-out", "layer-swapped-with-the-next"),
)
# An early exit counts as good as the last where its accuracy is at most so many points lower.
WITHIN_POINTS = 0.1


@dataclass(frozen=True, kw_only=True)
class ExitWorth:
    """One exit: its layer (from 1), whether its loss was trained, and its guesses.

    accepted_percent: of tokens, where its guess is the last exit's.
    """

    layer: int
    trained: bool
    loss: float
    accuracy_percent: float
    accepted_percent: float


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """Predicting each token at the first exit whose confidence reaches `threshold`.

    layers: used, the mean over tokens.
    """

    threshold: float
    layers: float
    loss: float
    accuracy_percent: float


@dataclass(frozen=True, kw_only=True)
class ChangedLayers:
    """The last exit where one layer (from 1) is left out, or swapped with the next."""

    change: str
    layer: int
    loss: float
    accuracy_percent: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one model on the validation text. Losses in nats per token."""

    exits: list[ExitWorth] = field(default_factory=list)
    early_exit: list[EarlyExit] = field(default_factory=list)
    changed_layers: list[ChangedLayers] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """`exits.json`: what was measured, and of which weights."""

    weights_sha256: str | None
    measured: Measured


def keep(folder: Path, weights_sha256: str | None, measured: Measured) -> None:
    """Write `exits.json` into a run's folder. Raises StoreError."""
    plain = to_dict(Kept(weights_sha256=weights_sha256, measured=measured))
    data = json.dumps(plain, indent=1).encode() + b"\n"
    files.write_atomically(folder / EXITS, data, "RUN", is_exits)


def kept(folder: Path, weights_sha256: str | None) -> Measured | None:
    """What was measured of the run in this folder with these weights; None where nothing was."""
    try:
        found = from_dict(Kept, read_json(folder / EXITS))
    except (OSError, ValueError, RecordError):
        return None
    return found.measured if found.weights_sha256 == weights_sha256 else None


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
    """What was measured of these runs (of `study.Arms`); empty frames where nothing was.

    Args:
        measured: by run; by default what is kept in the folder of each.
    """
    rows: dict[str, list[dict[str, object]]] = {"exits": [], "early_exit": [], "changed_layers": []}
    own = runs[["variant", "model", "seed", "run", "folder", "weights_sha256"]]
    for row in own.to_dict("records"):
        if measured is None:
            sha = None if pd.isna(row["weights_sha256"]) else str(row["weights_sha256"])
            found = kept(Path(row["folder"]), sha)
        else:
            found = measured.get(row["run"])
        if found is None:
            continue
        which = {name: row[name] for name in ("variant", "model", "seed", "run")}
        for name, frame in rows.items():
            frame += [which | to_dict(each) for each in getattr(found, name)]
    frames: dict[str, Frame] = {name: pd.DataFrame(frame) for name, frame in rows.items()}
    if len(frames["changed_layers"]):
        last = frames["exits"].groupby("run")["loss"].last()
        changed = frames["changed_layers"]
        rise = changed["loss"] - changed["run"].map(last)
        frames["changed_layers"] = changed.assign(loss_rise=rise)
    return Worth(**frames)


def sentences(found: Worth) -> list[str]:
    """How many layers each arm needs to predict as well as with all of them."""
    texts = []
    for (variant, model), arm in found.early_exit.groupby(["variant", "model"], sort=False):
        exits = found.exits[found.exits["run"].isin(arm["run"])]
        whole = exits.groupby("run")["accuracy_percent"].last().mean()
        means = arm.groupby("threshold")[["layers", "accuracy_percent"]].mean()
        good = means[means["accuracy_percent"] >= whole - WITHIN_POINTS]
        least = good.loc[good["layers"].idxmin()]
        first = exits.loc[exits["layer"] == exits["layer"].min(), "accepted_percent"].mean()
        texts.append(
            f"{variant_name(str(variant))}, {model_name(str(model))}: within {WITHIN_POINTS:g} "
            f"points of all {exits['layer'].max()} layers' {whole:.2f} % with "
            f"{least['layers']:.2f} layers a token (from a confidence of {least.name:g} on; mean "
            f"over {counted(arm['seed'].nunique(), 'seed')}); the last exit accepts {first:.0f} % "
            "of the first one's guesses."
        )
    return texts


def pictures(gallery: Gallery, found: Worth, slug: str = "") -> list[Picture]:
    """Early exit, acceptance, and what layers are worth: an arm a line, over seeds."""
    used, accuracy = "layers used, mean over tokens", "validation accuracy (%)"
    shown = {
        "early-exit-accuracy": (
            ("Early exit: accuracy against layers", used, accuracy),
            found.early_exit.rename(columns={"layers": "x", "accuracy_percent": "y"}),
        ),
        "early-exit-loss": (
            ("Early exit: loss against layers", used, "validation loss (nats)"),
            found.early_exit.rename(columns={"layers": "x", "loss": "y"}),
        ),
        "acceptance": (
            ("Early guesses that the last exit accepts", "exit after layer", "accepted (%)"),
            found.exits.rename(columns={"layer": "x", "accepted_percent": "y"}),
        ),
    }
    changed = found.changed_layers
    for change, own in changed.groupby("change", sort=False) if len(changed) else ():
        title = f"A layer {change}: what the loss rises by"
        shown["layer-" + str(change).replace(" ", "-")] = (
            (title, f"layer {change}", "rise of the loss (nats)"),
            own.rename(columns={"layer": "x", "loss_rise": "y"}),
        )
    drawn = []
    for name, ((title, *labels), values) in shown.items():
        values = values.rename(columns={"threshold": "at"})
        arms = {"variant": variant_name, "model": model_name}
        varied = [values[c].map(called) for c, called in arms.items() if values[c].nunique() > 1]
        if varied:
            values["arm"] = [", ".join(arm) for arm in zip(*varied, strict=True)]
        drawn.append(over_seeds(gallery, f"{name}{slug}", title, values, *labels))
    return drawn
