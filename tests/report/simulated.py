"""How often the claims of a report are wrong, in simulated studies of known truth.

`python -m tests.report.simulated` prints a row per cell, of these and of `settling`: every figure
of docs/report.md that was simulated. Studies are judged as arrays. The first CHECKED of a cell also
go the way of a report, and must be judged alike: `synthetic` writes their records, which are read
and go from there into arms, courses, comparisons and verdicts. No picture is drawn and no page
written.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proglayer.report import comparisons, measures
from proglayer.report.arms import DEEP, MARGIN, STANDARD
from proglayer.report.arms import arms as arms_of
from proglayer.report.comparisons import Comparison
from proglayer.report.sequential import Design
from proglayer.results import load

from .. import synthetic
from . import settling
from .settling import BETTER, DISTRIBUTIONS, SAME, WORSE, Cells

EXPERIMENTS = ("original", "control_from_scratch", "control_unfrozen")
# Standard deviations in points of accuracy: of a seed in all its runs, of a run, and of the
# evaluation of one epoch.
SEED_SD, RUN_SD, EPOCH_SD = 0.3, 0.2, 0.08
COLLAPSE_SHARE, COLLAPSE_POINTS = 0.1, -4.0
# The accuracy that the initial phase ends with; where growth opens a gate, more than what follows.
INITIAL, BEFORE_GATE = 15.0, 18.0
# How many studies of a cell are written and read.
CHECKED = 3


class Numbers(NamedTuple):
    """What the runs of many studies come to, in points of accuracy.

    choices: for each run, (studies, epochs): of the epochs that it can choose from.
    test: (studies, runs), of the chosen epoch on the test text; None without one.
    """

    choices: list[np.ndarray]
    test: np.ndarray | None


def drawn(
    seeds: int,
    distribution: str = "normal",
    *,
    studies: int,
    true: float = 0.0,
    epochs: int = 1,
    tested: bool = False,
) -> Numbers:
    """Draw studies in which `original` is better than both controls by `true` points.

    Args:
        epochs: how many epochs, all equally good, the controls have for each of the original's to
            choose from. Each is evaluated with an error of EPOCH_SD, which the choice falls for.
        tested: all is judged on a test text, where the chosen epoch has an error of its own.
    """
    draw = np.random.default_rng([seeds, DISTRIBUTIONS.index(distribution), epochs, tested])
    original = np.arange(settling.ARMS * seeds) < settling.FIRST_CONTROL * seeds
    of_seed = np.tile(SEED_SD * draw.normal(size=(studies, seeds)), settling.ARMS)
    apart = settling.noise(draw, distribution, (studies, len(original)), RUN_SD)
    truth = 16 + of_seed + apart + true * original
    if "collaps" in distribution:
        collapsed = draw.random(truth.shape) < COLLAPSE_SHARE
        truth += COLLAPSE_POINTS * (collapsed & ~(original & (distribution != "collapsing")))
    unsure = EPOCH_SD * (epochs > 1 or tested)
    choices = [
        truth[:, [run]] + unsure * draw.normal(size=(studies, 1 if own else epochs))
        for run, own in enumerate(original)
    ]
    test = truth + EPOCH_SD * draw.normal(size=truth.shape) if tested else None
    return Numbers(choices, test)


def loss_of(accuracy: Any) -> Any:
    """The loss that `synthetic` has beside an accuracy in percent."""
    return 6.9 - (accuracy - 16) / 5


def losses(experiment: str, choices: Sequence[float], before: float) -> list[list[float]]:
    """Each phase's validation losses where a run has these accuracies to choose from.

    Epochs that it does not choose are far worse. The original has so many that its budget holds
    whatever a control chooses from.
    """
    bad = loss_of(6.0)
    last = [*map(loss_of, choices), bad]
    if "scratch" in experiment:
        return [last]
    if experiment == "original":
        last += 30 * [bad]
    return [[loss_of(before), bad], last]


def judged(numbers: Numbers, study: int, seeds: int, gated: bool = False) -> list[Comparison]:
    """Write the records of one of the studies, read them, and judge their claims.

    Args:
        gated: a growth leaves the model as it was, and what is trained then never gets back there.
    """
    before = BEFORE_GATE if gated else INITIAL
    names = itertools.product(EXPERIMENTS, (STANDARD, DEEP), range(seeds))
    with tempfile.TemporaryDirectory() as folder:
        for number, (experiment, model, seed) in enumerate(names):
            own = losses(experiment, numbers.choices[number][study], before)
            how: dict[str, Any] = {"losses": own, "shock": 0.0 if gated else None}
            if numbers.test is not None:
                on_test = [loss_of(before), loss_of(numbers.test[study, number])]
                how["test_losses"] = on_test[-len(own) :]
            synthetic.run(Path(folder, f"{number:03d}"), experiment, model, seed, **how)
        results = load(folder)
    runs = arms_of(results).runs
    claims = comparisons.claimed(runs, measures.curves(results, runs), MARGIN)
    return comparisons.judge(claims)


def differences(numbers: Numbers, seeds: int) -> np.ndarray:
    """What a report compares: (studies, 5, seeds), the models in the original, then the original
    with each control in each model.
    """
    ends = numbers.test
    if ends is None:
        ends = np.stack([own.max(axis=1) for own in numbers.choices], axis=1)
    (standard, deep), scratch, unfrozen = (
        own.swapaxes(0, 1) for own in ends.reshape(-1, 3, 2, seeds).swapaxes(0, 1)
    )
    made = [deep - standard, standard - unfrozen[0], deep - unfrozen[1]]
    return np.stack([*made, standard - scratch[0], deep - scratch[1]], axis=1)


def simulate(
    seeds: int,
    distribution: str = "normal",
    *,
    studies: int = 20_000,
    true: float = 0.0,
    epochs: int = 1,
    tested: bool = False,
    gated: bool = False,
) -> dict[str, float]:
    """Judge simulated studies; the arguments are those of `drawn` and `judged`.

    Returns:
        the share of plain 95 % intervals that hold the true difference; and the shares of studies
        in which all intervals of the verdicts do, with a false difference (one in what does not
        differ, or of the wrong sign), and with a false "same" in what differs by the margin or
        more; and the mean error of a difference between experiments.
    """
    numbers = drawn(seeds, distribution, studies=studies, true=true, epochs=epochs, tested=tested)
    design = Design(first=seeds, step=1, most=seeds)
    found = settling.settled("fixed", design, differences(numbers, seeds))
    for study in range(CHECKED):
        family = judged(numbers, study, seeds, gated)
        assert [own.verdict for own in family] == found["verdict"][study].tolist()
        ends = np.array([own.judged.interval[:2] for own in family]).T
        np.testing.assert_allclose(ends, [found["low"][study], found["high"][study]], atol=1e-9)
    if distribution == "controls collapse":
        true -= COLLAPSE_SHARE * COLLAPSE_POINTS
    truths = np.array([0.0, true, true, true, true])

    def holds(low: str, high: str) -> np.ndarray:
        return (found[low] <= truths) & (truths <= found[high])

    verdict, alone = found["verdict"], holds("low_alone", "high_alone")
    wrong = ((verdict == BETTER) & (truths <= 0)) | ((verdict == WORSE) & (truths >= 0))
    return {
        "plain 95 %": alone.mean(),
        "plain 95 %, controls": alone[:, 1:].mean(),
        "all together": holds("low", "high").all(axis=1).mean(),
        "false difference": wrong.any(axis=1).mean(),
        "false same": ((verdict == SAME) & (truths >= MARGIN)).any(axis=1).mean(),
        "mean error": (found["mean"] - truths)[:, 1:].mean(),
    }


CELLS: Cells = [
    *({"seeds": seeds, "distribution": d} for d in DISTRIBUTIONS for seeds in (3, 5, 8, 20)),
    *({"seeds": seeds, "true": 0.1} for seeds in (3, 8)),
    *({"seeds": 20, "epochs": e, "tested": t} for e, t in ((3, False), (10, False), (10, True))),
    *({"seeds": seeds, "gated": True} for seeds in (5, 20)),
]


def main() -> None:
    """Print a row for each cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=20_000)
    studies = parser.parse_args().studies
    for title, simulated, cells in (
        ("Sequential studies", settling.simulate, settling.CELLS),
        ("Collapses of the controls", settling.simulate, settling.COLLAPSES),
        ("Failures of the worst runs of one arm", settling.simulate, settling.FAILURES),
        ("Estimates at a stop", settling.estimates, settling.ESTIMATES),
        ("Studies looked at once", simulate, CELLS),
    ):
        print(f"{title}, {studies:,} studies a cell")
        for cell in cells:
            found = simulated(**cell, studies=studies)
            print(cell, {name: round(float(own), 4) for name, own in found.items()}, flush=True)


if __name__ == "__main__":
    main()
