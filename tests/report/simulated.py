"""How often the claims of a report are wrong, in simulated studies of known truth.

`python -m tests.report.simulated` prints a row per cell. The runs, phases and epochs are those that
`synthetic` makes, read and sorted into arms as for a report. Each study draws their accuracies and
losses afresh. The first of each cell go the way of a report from there, to the verdicts on the
claims; all are judged by a vectorised twin, which must agree with those.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as sps

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
    studies: int = 10_000,
    checked: int = 20,
    true: float = 0.0,
    epochs: int = 1,
    tested: bool = False,
) -> dict[str, float]:
    """Simulate studies in which `original` is better than both controls by `true` points.

    Args:
        studies, checked: how many in all, and how many of them go through the report itself.
        epochs: how many epochs, all equally good, the controls have for each of the original's to
            choose from. Each is evaluated with an error of EPOCH_SD, which the choice falls for.
        tested: all is judged on a test text, where the chosen epoch has an error of its own.

    Returns:
        the share of plain 95 % intervals that hold the true difference; and the shares of studies
        in which all intervals of the verdicts do, with a false difference in what does not differ,
        and with a false "same" in what differs by `true`; and the mean error of a difference.
    """
    draw = np.random.default_rng([seeds, DISTRIBUTIONS.index(distribution), epochs, tested])
    runs, curves, choices = _frames(seeds, epochs, tested)
    original = (runs["variant"] == "original").to_numpy()
    of_seed = SEED_SD * draw.normal(size=(studies, seeds))[:, runs["seed"]]
    truth = 16 + of_seed + noise(draw, distribution, (studies, len(runs))) + true * original
    accuracies = [
        truth[:, [run]] + EPOCH_SD * draw.normal(size=(studies, len(own))) * (epochs > 1 or tested)
        for run, own in enumerate(choices)
    ]
    ends = np.stack([own.max(axis=1) for own in accuracies], axis=1)
    if tested:
        ends = truth + EPOCH_SD * draw.normal(size=truth.shape)

    place = runs.reset_index(drop=True).groupby(["variant", "model"])
    arms = {arm: ends[:, own.sort_values("seed").index] for arm, own in place}
    pairs = [(("original", study.DEEP), ("original", study.STANDARD), 0.0)]
    for control in ("control_unfrozen", "control_from_scratch"):
        both = (study.STANDARD, study.DEEP)
        pairs += [(("original", model), (control, model), true) for model in both]
    differences = np.stack([arms[a] - arms[b] for a, b, _ in pairs], axis=1)
    found = _judged(differences)
    for number in range(checked):
        _set(runs, curves, choices, [own[number] for own in accuracies], ends[number])
        claims = comparisons.claimed(runs, curves, study.Margins())
        judged = comparisons.judge(claims)
        for name, values in found.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(judged[name], values[number], atol=1e-9)
            else:
                assert judged[name].tolist() == values[number].tolist()

    truths = np.array([t for _, _, t in pairs])

    def holds(low: str, high: str) -> np.ndarray:
        return (found[low] <= truths) & (truths <= found[high])

    differ = np.isin(found["verdict"], [str(stats.Verdict.better), str(stats.Verdict.worse)])
    same = (found["verdict"] == str(stats.Verdict.same)) & (truths >= study.Margins().points)
    return {
        "plain 95 %": holds("low_95", "high_95").mean(),
        "all together": holds("low", "high").all(axis=1).mean(),
        "false difference": (differ & (truths == 0)).any(axis=1).mean(),
        "false same": same.any(axis=1).mean(),
        "mean error": (found["mean"] - truths)[:, 1:].mean(),
    }


def _judged(differences: np.ndarray) -> dict[str, np.ndarray]:
    """The twin of `stats.judge` for many studies: (studies, comparisons, seeds) differences."""
    family, seeds = differences.shape[1:]
    margin, alpha = study.Margins().points, stats.ALPHA / family
    mean = differences.mean(axis=2)
    error = differences.std(axis=2, ddof=1) / np.sqrt(seeds)

    def interval(level: float) -> tuple[np.ndarray, np.ndarray]:
        half = sps.t.isf(level / 2, seeds - 1) * error
        return mean - half, mean + half

    low, high = interval(alpha)
    inner_low, inner_high = interval(2 * alpha)
    same = (inner_low >= -margin) & (inner_high <= margin)
    verdict = np.where(low > 0, "better", np.where(high < 0, "worse", "unclear"))
    low_95, high_95 = interval(0.05)
    return {
        "verdict": np.where(same, str(stats.Verdict.same), verdict),
        "mean": mean,
        "low": np.where(same, inner_low, low),
        "high": np.where(same, inner_high, high),
        "low_95": low_95,
        "high_95": high_95,
    }


def _frames(seeds: int, epochs: int, tested: bool) -> tuple[Any, Any, list[np.ndarray]]:
    """The runs, their learning curves, and the rows of the epochs that each run can choose."""
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
    last = curves["layers"] == curves["run"].map(runs.set_index("run")["last_layers"])
    open_to = last & (curves["loss"] < 5.85)
    return runs, curves, [np.flatnonzero(open_to & (curves["run"] == run)) for run in runs["run"]]


def _set(
    runs: Any, curves: Any, choices: list[np.ndarray], accuracies: list[np.ndarray], ends: Any
) -> None:
    """Put the accuracies of one study, and losses that go with them, into the frames."""
    accuracy, best = np.zeros(len(curves)), np.zeros(len(curves), bool)
    for own, values in zip(choices, accuracies, strict=True):
        accuracy[own] = values
        best[own[values.argmax()]] = True
    curves["accuracy_percent"], curves["best"] = accuracy, best
    curves["loss"] = 10 + NATS_PER_POINT * accuracy
    runs["validation_accuracy"] = [values.max() for values in accuracies]
    runs["end_accuracy"] = ends
    for text in ("validation", "end"):
        runs[f"{text}_loss"] = 10 + NATS_PER_POINT * runs[f"{text}_accuracy"]
    # The first phase is the same in both models, so that changes differ as ends do.
    runs[study.ACCURACY.change] = runs["end_accuracy"] - 15


CELLS: list[dict[str, Any]] = [
    *({"seeds": seeds, "distribution": d} for d in DISTRIBUTIONS for seeds in (3, 5, 8, 20)),
    *({"seeds": seeds, "true": 0.1} for seeds in (3, 5, 8, 20)),
    *({"seeds": 8, "true": 0.1, "distribution": d} for d in DISTRIBUTIONS[1:]),
    *({"seeds": 20, "epochs": e, "tested": t} for t in (False, True) for e in (3, 10)),
]


def print_cells(
    description: str | None,
    simulate: Callable[..., Any],
    cells: list[dict[str, Any]],
    studies: int,
) -> None:
    """A row for each cell of as many studies as the command line asks for, else `studies`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--studies", type=int, default=studies)
    studies = parser.parse_args().studies
    for cell in cells:
        found = simulate(**cell, studies=studies)
        print(cell, {name: round(float(value), 4) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    print_cells(__doc__, simulate, CELLS, studies=10_000)
