"""How often the claims of a report are wrong, in simulated studies of known truth.

`python -m tests.report.simulated` prints a row per cell. The runs, phases and epochs are those that
`synthetic` makes, read and sorted into arms as for a report; each study then draws their accuracies
and losses anew and goes the way of a report from there, to the verdicts on the claims.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from proglayer.report import comparisons, ledger, stats, study
from proglayer.results import load

from .. import synthetic

EXPERIMENTS = ("original", "control_from_scratch", "control_unfrozen")
# Standard deviations in points of accuracy: of a seed in all its runs, of a run, and of the
# evaluation of one epoch.
SEED_SD, RUN_SD, EPOCH_SD = 0.3, 0.2, 0.08
COLLAPSE_SHARE, COLLAPSE_POINTS = 0.1, -4.0
NATS_PER_POINT = -0.05
DISTRIBUTIONS = ("normal", "heavy tails", "collapsing")


def noise(draw: np.random.Generator, distribution: str, size: Any) -> np.ndarray:
    """What sets runs apart, in points of accuracy, with a standard deviation of RUN_SD at most."""
    if distribution == "heavy tails":
        return RUN_SD / np.sqrt(3) * draw.standard_t(3, size)
    collapsed = draw.random(size) < COLLAPSE_SHARE if distribution == "collapsing" else 0
    return RUN_SD * draw.normal(size=size) + COLLAPSE_POINTS * collapsed


def simulate(
    seeds: int,
    distribution: str = "normal",
    *,
    studies: int = 2_000,
    true: float = 0.0,
    epochs: int = 1,
    tested: bool = False,
) -> dict[str, float]:
    """Simulate studies in which `original` is better than both controls by `true` points.

    Args:
        epochs: how many epochs, all equally good, the controls have for each of the original's to
            choose from. Each is evaluated with an error of EPOCH_SD, which the choice falls for.
        tested: all is judged on a test text, where the chosen epoch has an error of its own.

    Returns:
        the share of plain 95 % intervals that hold the true difference; and the shares of studies
        in which all intervals of the verdicts do, with a false difference in what does not differ,
        and with a false "same" in what differs by `true`; and the mean error of a difference.
    """
    draw = np.random.default_rng([seeds, DISTRIBUTIONS.index(distribution), epochs, tested])
    margins = study.Margins()
    held, together, different, same, errors = [], [], [], [], []
    for runs, curves in _studies(seeds, distribution, studies, true, epochs, tested, draw):
        judged = comparisons.judge(comparisons.claimed(runs, curves, margins))
        truth = np.where(judged["model"] == "", 0.0, true)
        held.append(((judged["low_95"] <= truth) & (truth <= judged["high_95"])).mean())
        together.append(((judged["low"] <= truth) & (truth <= judged["high"])).all())
        verdicts = judged["verdict"]
        differ = verdicts.isin([str(stats.Verdict.better), str(stats.Verdict.worse)])
        different.append((differ & (truth == 0)).any())
        away = np.abs(truth) >= margins.points
        same.append(((verdicts == str(stats.Verdict.same)) & away).any())
        errors.append((judged["mean"] - truth)[judged["model"] != ""].mean())
    found = {
        "plain 95 %": held, "all together": together, "false difference": different,
        "false same": same, "mean error": errors,
    }  # fmt: skip
    return {name: float(np.mean(values)) for name, values in found.items()}


def _studies(
    seeds: int,
    distribution: str,
    studies: int,
    true: float,
    epochs: int,
    tested: bool,
    draw: np.random.Generator,
) -> Iterator[tuple[Any, Any]]:
    """The runs and learning curves of one study after another."""
    with tempfile.TemporaryDirectory() as folder:
        for experiment in EXPERIMENTS:
            for model in (study.STANDARD, study.DEEP):
                for seed in range(seeds):
                    last = [5.8] * (epochs if experiment != "original" else 1) + [5.9]
                    losses = [last] if "scratch" in experiment else [[5.9, 6.0], last]
                    synthetic.run(
                        Path(folder) / f"{experiment}-{model}-{seed}", experiment, model, seed,
                        losses=losses,
                    )  # fmt: skip
        results = load(folder)
    arms = study.arms(results)
    runs = arms.of(0)[comparisons.COLUMNS].copy()
    curves = ledger.curves(results, arms.runs)
    # Whatever a run chooses from, the budget of the original's holds it.
    curves[["tokens", "flops"]] = 1.0
    runs[["tokens", "flops"]] = 1.0
    runs["judged_on"] = "test" if tested else "validation"
    place = curves["run"].map({run: number for number, run in enumerate(runs["run"])}).to_numpy()
    depth = runs["last_layers"].to_numpy(int)[place]
    choices = (curves["layers"].to_numpy(int) == depth) & (curves["loss"].to_numpy() < 5.85)
    original = (runs["variant"] == "original").to_numpy()
    for _ in range(studies):
        of_seed = SEED_SD * draw.normal(size=seeds)[runs["seed"]]
        truth = 16 + of_seed + noise(draw, distribution, len(runs)) + true * original
        errors = EPOCH_SD * draw.normal(size=len(curves)) * (epochs > 1 or tested)
        accuracy = np.where(choices, truth[place] + errors, 0.0)
        curves["accuracy_percent"] = accuracy
        curves["loss"] = 10 + NATS_PER_POINT * accuracy
        best = curves.loc[choices].groupby(place[choices])["loss"].idxmin().to_numpy()
        curves["best"] = False
        curves.loc[best, "best"] = True
        runs["validation_accuracy"] = curves.loc[best, "accuracy_percent"].to_numpy()
        on_test = truth + EPOCH_SD * draw.normal(size=len(runs))
        runs["end_accuracy"] = on_test if tested else runs["validation_accuracy"]
        for text in ("validation", "end"):
            runs[f"{text}_loss"] = 10 + NATS_PER_POINT * runs[f"{text}_accuracy"]
        # The first phase is the same in both models, so that changes differ as ends do.
        runs[study.ACCURACY.change] = runs["end_accuracy"] - 15
        yield runs, curves


CELLS: list[dict[str, Any]] = [
    *({"seeds": seeds, "distribution": d} for d in DISTRIBUTIONS for seeds in (3, 5, 8, 20)),
    *({"seeds": seeds, "true": 0.1} for seeds in (3, 5, 8, 20)),
    *({"seeds": 8, "true": 0.1, "distribution": d} for d in DISTRIBUTIONS[1:]),
    *({"seeds": 20, "epochs": e, "tested": t} for t in (False, True) for e in (3, 10)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2_000)
    studies = parser.parse_args().studies
    for cell in CELLS:
        found = simulate(**cell, studies=studies)
        print(cell, {name: round(value, 4) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
