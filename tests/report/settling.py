"""How often a study that stops when it has its answer is wrong, and what it saves.

`python -m tests.report.settling` prints a row per cell. A study is of `original` and two controls
in both models: seven comparisons of six arms, of which two are nearly copies of two others, as the
comparisons at equal tokens and at equal compute are. Its claims are judged at every look, and an
arm that no open claim needs gets no more seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats as sps

from proglayer.report import stats
from proglayer.report.arms import MARGIN
from proglayer.report.sequential import Design

from .simulated import DISTRIBUTIONS, print_cells

ARMS = 6
# The arms that each comparison is of: the models in the original; original and unfrozen, original
# and from scratch at equal tokens and at equal compute, each in both models.
PAIRS = ((1, 0), (0, 2), (1, 3), (0, 4), (1, 5), (0, 4), (1, 5))
# What sets the epochs of the two budgets apart, as a share of what sets runs apart.
EPOCHS_APART = 0.3
METHODS = ("looks that pay", "plain looks", "fixed")
SAME, BETTER = str(stats.Verdict.same), str(stats.Verdict.better)
WORSE, UNCLEAR = str(stats.Verdict.worse), str(stats.Verdict.unclear)


def noise(draw: np.random.Generator, distribution: str, size: Any, sd: float) -> np.ndarray:
    """What sets runs apart, in points of accuracy, with a standard deviation of `sd`."""
    if distribution == "heavy tails":
        return sd / np.sqrt(3) * draw.standard_t(3, size)
    return sd * draw.normal(size=size)


def differences(
    draw: np.random.Generator,
    studies: int,
    seeds: int,
    true: tuple[float, ...],
    sd: float,
    distribution: str,
) -> np.ndarray:
    """Differences within seeds, (studies, comparisons, seeds), in points of accuracy."""
    runs = noise(draw, distribution, (studies, ARMS, seeds), sd)
    other_epoch = noise(draw, distribution, (studies, 2, seeds), EPOCHS_APART * sd)
    found = np.stack([runs[:, a] - runs[:, b] for a, b in PAIRS], axis=1)
    found[:, 5:] += other_epoch
    return found + np.array(true)[:, None]


def settled(method: str, design: Design, values: np.ndarray) -> dict[str, np.ndarray]:
    """Judge many studies as they go; see `stats.judge` and `Design.levels`.

    Returns:
        (studies, comparisons): `verdict`, `mean`, `low`, `high`, `low_alone`, `high_alone`, all of
        the look that settled it, else the last; and the `seeds` at that look.
    """
    shape, family = values.shape[:2], values.shape[1]
    names = ("mean", "low", "high", "low_alone", "high_alone")
    found: dict[str, np.ndarray] = {name: np.zeros(shape) for name in names}
    found["verdict"] = np.full(shape, UNCLEAR, dtype=object)
    found["seeds"] = np.zeros(shape, int)
    looks = list(enumerate(design.at)) if method != "fixed" else [(0, design.most)]
    for look, seeds in looks:
        level = stats.ALPHA / family
        levels = stats.Levels(family, level)
        if method == "looks that pay":
            levels = design.levels(look, family)
        here = values[:, :, :seeds]
        mean, error = here.mean(axis=2), here.std(axis=2, ddof=1) / np.sqrt(seeds)

        def interval(level: float) -> tuple[np.ndarray, np.ndarray]:
            half = sps.t.isf(level / 2, seeds - 1) * error  # noqa: B023
            return mean - half, mean + half  # noqa: B023

        low, high = interval(levels.each)
        inner = interval(2 * levels.each)
        same = (inner[0] >= -MARGIN) & (inner[1] <= MARGIN)
        verdict = np.select([same, low > 0, high < 0], [SAME, BETTER, WORSE], UNCLEAR)
        now = {
            "mean": mean,
            "low": np.where(same, inner[0], low),
            "high": np.where(same, inner[1], high),
            **dict(zip(("low_alone", "high_alone"), interval(levels.alone), strict=True)),
            "verdict": verdict,
            "seeds": np.full(shape, seeds),
        }
        still_open = found["verdict"] == UNCLEAR
        for name, value in now.items():
            found[name][still_open] = value[still_open]
    return found


def simulate(
    method: str,
    design: Design,
    true: tuple[float, ...],
    *,
    sd: float = 0.2,
    distribution: str = "normal",
    studies: int = 20_000,
) -> dict[str, float]:
    """Simulate studies whose comparisons truly differ by `true` points.

    Args:
        sd: of the runs of an arm, in points of accuracy.

    Returns:
        the shares of studies with a false difference and with a false "same"; the share of
        intervals of a comparison alone that hold, and of studies in which all intervals of the
        verdicts do; the share of claims rightly settled; the mean seeds of a comparison, and runs
        of a study as a share of those of `most` seeds in all arms.
    """
    draw = np.random.default_rng([DISTRIBUTIONS.index(distribution), int(1000 * sd)])
    truths = np.array(true)
    values = differences(draw, studies, design.most, true, sd, distribution)
    found = settled(method, design, values)
    verdict, seeds = found["verdict"], found["seeds"]
    wrong = ((verdict == BETTER) & (truths <= 0)) | ((verdict == WORSE) & (truths >= 0))
    false_same = (verdict == SAME) & (np.abs(truths) >= MARGIN)
    rightly = [verdict == BETTER, verdict == WORSE]
    right = np.select([truths > 0, truths < 0], rightly, verdict == SAME)
    runs = sum(seeds[:, [arm in pair for pair in PAIRS]].max(axis=1).mean() for arm in range(ARMS))

    def holds(low: str, high: str) -> np.ndarray:
        return (found[low] <= truths) & (truths <= found[high])

    return {
        "false difference": wrong.any(axis=1).mean(),
        "false same": false_same.any(axis=1).mean(),
        "alone": holds("low_alone", "high_alone").mean(),
        "all together": holds("low", "high").all(axis=1).mean(),
        "right": right.mean(),
        "seeds": seeds.mean(),
        "runs": runs / (ARMS * design.most),
    }


DESIGN = Design(first=5, step=3, most=20)
NOTHING, MARGINAL, LARGE = (0.0,) * 7, (MARGIN,) * 7, (0.4,) * 7
MIXED = (0.4, 0.6, 0.6, 0.0, 0.0, 0.0, 0.0)
CELLS: list[dict[str, Any]] = [
    {"method": method, "design": DESIGN, "true": true, "sd": sd, "distribution": distribution}
    for true, sd in ((NOTHING, 0.2), (NOTHING, 0.05), (MARGINAL, 0.05), (LARGE, 0.2), (MIXED, 0.2))
    for distribution in DISTRIBUTIONS[:2]
    for method in METHODS
]
CELLS += [
    {"method": "looks that pay", "design": design, "true": true, "sd": sd}
    for design in (Design(first=3, step=1, most=12), Design(first=5, step=5, most=40))
    for true, sd in ((NOTHING, 0.2), (MARGINAL, 0.05), (LARGE, 0.2))
]


if __name__ == "__main__":
    print_cells(__doc__, simulate, CELLS, studies=20_000)
