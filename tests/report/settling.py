"""How often a study that stops when it has its answer is wrong, and what it saves.

A study is of `original` and two controls in both models: seven comparisons of six arms, of which
two are nearly copies of two others, as the comparisons at equal tokens and at equal compute are.
Its claims are judged at every look, and an arm that no open claim needs gets no more seeds. Runs
may fail or collapse. `python -m tests.report.simulated` prints a row per cell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as sps

from proglayer.report import stats
from proglayer.report.arms import MARGIN
from proglayer.report.comparisons import MOST_LOST
from proglayer.report.sequential import Design, corrected_for_stopping

DISTRIBUTIONS = ("normal", "heavy tails", "collapsing", "controls collapse")
ARMS, FIRST_CONTROL = 6, 2
# The arms that each comparison is of: the models in the original; original and unfrozen, original
# and from scratch at equal tokens and at equal compute, each in both models.
PAIRS = ((1, 0), (0, 2), (1, 3), (0, 4), (1, 5), (0, 4), (1, 5))
# What sets the epochs of the two budgets apart, as a share of what sets runs apart.
EPOCHS_APART = 0.3
METHODS = ("looks that pay", "plain looks", "fixed")
# Also "trimmed looks": looks that pay, of means trimmed by so much at each end (Yuen 1974).
TRIMMED = 0.2
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
    *,
    collapse: tuple[float, float] = (0.0, 0.0),
    failing: float = 0.0,
) -> np.ndarray:
    """Differences within seeds, (studies, comparisons, seeds), in points of accuracy; nan of runs
    that failed.

    Args:
        true: of the first comparisons of PAIRS, those that are made.
        collapse: the share of the controls' runs that collapse, and what that costs in points.
        failing: the share of the first arm's runs that fail, its worst ones.
    """
    runs = noise(draw, distribution, (studies, ARMS, seeds), sd)
    other_epoch = noise(draw, distribution, (studies, 2, seeds), EPOCHS_APART * sd)
    share, points = collapse
    if share:
        controls = runs[:, FIRST_CONTROL:]
        controls -= points * (draw.random(controls.shape) < share)
    if failing:
        runs[:, 0][runs[:, 0] < np.quantile(runs[:, 0], failing)] = np.nan
    found = np.stack([runs[:, a] - runs[:, b] for a, b in PAIRS], axis=1)
    found[:, 5:] += other_epoch
    return found[:, : len(true)] + np.array(true)[:, None]


def averaged(values: np.ndarray, method: str) -> tuple[np.ndarray, ...]:
    """Means over the last axis without what is nan, their standard errors, and degrees of
    freedom.
    """
    n = np.isfinite(values).sum(axis=-1)
    if method == "trimmed looks":
        cut = int(TRIMMED * values.shape[-1])
        ordered = np.sort(values, axis=-1)
        mean = ordered[..., cut:-cut].mean(axis=-1)
        ordered = np.clip(ordered, ordered[..., [cut]], ordered[..., [-cut - 1]])
        error = ordered.std(axis=-1, ddof=1) / (1 - 2 * TRIMMED) / np.sqrt(n)
        return mean, error, n - 2 * cut - 1
    with np.errstate(divide="ignore", invalid="ignore"):  # where all failed
        mean = np.nansum(values, axis=-1) / n
        away = np.nansum((values - mean[..., None]) ** 2, axis=-1)
        return mean, np.sqrt(away / (n - 1) / n), n - 1


def settled(
    method: str,
    design: Design,
    values: np.ndarray,
    *,
    family: int = 0,
    most_lost: float = MOST_LOST,
) -> dict[str, np.ndarray]:
    """Judge many studies as they go; see `stats.judge` and `Design.levels`.

    Args:
        values: of `differences`.
        family: how many comparisons share the level, if not these alone.
        most_lost: where a larger share of runs failed, nothing is judged.

    Returns:
        (studies, comparisons): `verdict`, `mean`, `error`, `low`, `high`, `low_alone`,
        `high_alone`, all of the look that settled it, else the last; and the `seeds` at that look.
    """
    shape, family = values.shape[:2], family or values.shape[1]
    names = ("mean", "error", "low", "high", "low_alone", "high_alone")
    found: dict[str, np.ndarray] = {name: np.zeros(shape) for name in names}
    found["verdict"] = np.full(shape, UNCLEAR, dtype=object)
    found["seeds"] = np.zeros(shape, int)
    looks = list(enumerate(design.at)) if method != "fixed" else [(0, design.most)]
    for look, seeds in looks:
        level = stats.ALPHA / family
        levels = stats.Levels(family, level)
        if method in ("looks that pay", "trimmed looks"):
            levels = design.levels(look, family)
        here = values[:, :, :seeds]
        mean, error, freedom = averaged(here, method)
        judged = np.isnan(here).sum(axis=2) <= most_lost * seeds

        def interval(level: float) -> tuple[np.ndarray, np.ndarray]:
            quantiles = sps.t.isf(level / 2, np.arange(seeds))  # noqa: B023
            half = quantiles[freedom] * error  # noqa: B023
            return mean - half, mean + half  # noqa: B023

        low, high = interval(levels.each)
        inner = interval(2 * levels.each)
        same = (inner[0] >= -MARGIN) & (inner[1] <= MARGIN)
        verdict = np.select(
            [~judged, same, low > 0, high < 0], [UNCLEAR, SAME, BETTER, WORSE], UNCLEAR
        )
        now = {
            "mean": mean,
            "error": error,
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
    most_lost: float = MOST_LOST,
    studies: int = 20_000,
    **damage: Any,
) -> dict[str, float]:
    """Simulate studies whose comparisons truly differ by `true` points, but for collapses.

    Args:
        sd: of the runs of an arm, in points of accuracy.
        damage: `collapse` and `failing` of `differences`.

    Returns:
        the shares of studies with a false difference and with a false "same"; the share of
        intervals of a comparison alone that hold, and of studies in which all intervals of the
        verdicts do; the shares of claims rightly settled, and settled as "same", and of studies
        with one of these with a control; the mean seeds of a comparison, and runs of a study as a
        share of those of `most` seeds in all arms.
    """
    draw = np.random.default_rng([DISTRIBUTIONS.index(distribution), int(1000 * sd)])
    truths = np.array(true)
    values = differences(draw, studies, design.most, true, sd, distribution, **damage)
    found = settled(method, design, values, most_lost=most_lost)
    verdict, seeds = found["verdict"], found["seeds"]
    wrong = ((verdict == BETTER) & (truths <= 0)) | ((verdict == WORSE) & (truths >= 0))
    false_same = (verdict == SAME) & (np.abs(truths) >= MARGIN)
    rightly = [verdict == BETTER, verdict == WORSE]
    right = np.select([truths > 0, truths < 0], rightly, verdict == SAME)
    pairs = PAIRS[: len(true)]
    arms = [[arm in pair for pair in pairs] for arm in range(ARMS)]
    runs = sum(seeds[:, own].max(axis=1).mean() for own in arms if any(own))

    def holds(low: str, high: str) -> np.ndarray:
        return (found[low] <= truths) & (truths <= found[high])

    return {
        "false difference": wrong.any(axis=1).mean(),
        "false same": false_same.any(axis=1).mean(),
        "alone": holds("low_alone", "high_alone").mean(),
        "all together": holds("low", "high").all(axis=1).mean(),
        "right": right.mean(),
        "same": (verdict == SAME).mean(),
        "same as a control": (verdict == SAME)[:, 1:].any(axis=1).mean(),
        "seeds": seeds.mean(),
        "runs": runs / (ARMS * design.most),
    }


def estimates(
    true: float, *, design: Design, sd: float = 0.28, family: int = 7, studies: int = 20_000
) -> dict[str, float]:
    """What a difference of `true` points is estimated to be by studies that stop when it is shown.

    Args:
        sd: of a difference within a seed, in points.
        family: how many comparisons share the level.

    Returns:
        the share of studies that show it, and what those show on average, plain and corrected
        (`sequential.corrected_for_stopping`, between values of t at each look); the same of those
        that stop at the first look; and the share of all studies, stopped or not, that come out
        too large.
    """
    draw = np.random.default_rng(int(1000 * true))
    values = true + sd * draw.normal(size=(studies, 1, design.most))
    own = settled("looks that pay", design, values, family=family)
    found = {name: own[name][:, 0] for name in ("verdict", "mean", "error", "seeds")}
    corrected = np.zeros(studies)
    for look, seeds in enumerate(design.at):
        last = look == len(design.at) - 1
        least = 0.1 if last else sps.t.isf(design.levels(look, family).each / 2, seeds - 1)
        t = np.geomspace(least, 60, 30)
        spread = np.linspace(-1, 1, seeds)
        spread /= spread.std(ddof=1)
        pairs = [pd.Series(spread + one / np.sqrt(seeds)) for one in t]
        zero = pd.Series(np.zeros(seeds))
        known = [corrected_for_stopping(stats.paired(d, zero), design, look, family) for d in pairs]
        here = found["seeds"] == seeds
        error = found["error"][here]
        size = np.interp(np.abs(found["mean"][here]) / error, [0, *t], [0, *known])
        corrected[here] = np.sign(found["mean"][here]) * size * error * np.sqrt(seeds)
    shown = np.isin(found["verdict"], (BETTER, WORSE))
    first = shown & (found["seeds"] == design.first)
    shares = {"shown": shown.mean(), "at the first look": first.mean()}
    for name, value in (("plain", found["mean"]), ("corrected", corrected)):
        shares |= {name: value[shown].mean(), f"{name}, first look": value[first].mean()}
        shares |= {f"{name} too large": (value > true).mean()}
    return shares


DESIGN = Design(first=5, step=3, most=20)
NOTHING, MARGINAL, LARGE = (0.0,) * 7, (MARGIN,) * 7, (0.4,) * 7
MIXED = (0.4, 0.6, 0.6, 0.0, 0.0, 0.0, 0.0)
Cells = list[dict[str, Any]]
CELLS: Cells = [
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
CELLS += [
    {"method": "fixed", "design": Design(first=most, step=1, most=most), "true": true, "sd": sd}
    for most in (16, 17)
    for true, sd in ((NOTHING, 0.05), (MARGINAL, 0.05), (LARGE, 0.2))
]
COLLAPSES: Cells = [
    {"method": method, "design": DESIGN, "true": NOTHING, "sd": sd, "collapse": (share, points)}
    for sd in (0.2, 0.05)
    for points in (0.5, 4.0)
    for share in (0.01, 0.05, 0.2)
    for method in ("looks that pay", "trimmed looks", "plain looks")
]
FAILURES: Cells = [
    {"method": method, "design": DESIGN, "true": true, "failing": share, "most_lost": most_lost}
    for method, true in (("looks that pay", NOTHING), ("looks that pay", (0.0,)), ("fixed", (0.0,)))
    for most_lost in (1.0, MOST_LOST)
    for share in (0.1, 0.2, 0.3)
]
ESTIMATES: Cells = [{"true": true, "design": DESIGN} for true in (0.15, 0.3, 0.6)]
