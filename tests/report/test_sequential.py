"""Looking again and again is paid for: errors and coverage of studies that stop when they can."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from proglayer.report import stats
from proglayer.report.sequential import Design

from . import settling

STUDIES = 2_000
# Four standard errors of a share of 5 % in so many studies.
TOLERANCE = 4 * (0.05 * 0.95 / STUDIES) ** 0.5


def design(first: int, step: int, most: int) -> Design:
    return Design(first=first, step=step, most=most)


@pytest.mark.parametrize("design", [design(5, 3, 20), design(2, 1, 7), design(8, 3, 8)])
def test_all_looks_of_all_comparisons_spend_what_one_test_may(design: Design):
    levels = [design.levels(look, 7) for look in range(len(design.at))]
    assert 7 * sum(own.each for own in levels) == pytest.approx(stats.ALPHA)
    assert sum(own.alone for own in levels) == pytest.approx(stats.ALPHA)


def test_one_look_is_a_plain_test():
    own = [stats.paired(pd.Series([0.4, 0.5, 0.7, 0.6]), pd.Series(np.zeros(4)))] * 3
    plain = stats.judge(own)
    assert plain == stats.judge(own, levels=design(4, 1, 4).levels(0, 3))


@pytest.mark.parametrize("distribution", ["normal", "heavy tails"])
@pytest.mark.parametrize("method", ["looks that pay", "plain looks"])
def test_false_differences(method: str, distribution: str):
    found = settling.simulate(
        method, design(5, 3, 20), settling.NOTHING, distribution=distribution, studies=STUDIES
    )
    if method == "plain looks":
        assert found["false difference"] > 0.05 + TOLERANCE
    else:
        assert found["false difference"] < 0.05
        assert found["alone"] > 0.95
        assert found["all together"] > 0.95


@pytest.mark.parametrize(
    ("comparisons", "damage", "holds"),
    [
        (7, {"collapse": (0.05, 0.5)}, True),
        (7, {"failing": 0.1}, True),
        (1, {"failing": 0.3}, True),
        (1, {"failing": 0.3, "most_lost": 1.0}, False),
    ],
)
def test_false_differences_where_runs_collapse_or_fail(
    comparisons: int, damage: dict[str, Any], holds: bool
):
    """Where three in ten fail a single comparison errs too often, but for what is not judged."""
    true = settling.NOTHING[:comparisons]
    found = settling.simulate("fixed", design(20, 1, 20), true, studies=STUDIES, **damage)
    assert (found["false difference"] < 0.05 + TOLERANCE) == holds


@pytest.mark.parametrize("distribution", ["normal", "heavy tails"])
def test_false_equivalence_and_what_is_saved(distribution: str):
    found = settling.simulate(
        "looks that pay", design(5, 3, 20), settling.MARGINAL,
        sd=0.05, distribution=distribution, studies=STUDIES,
    )  # fmt: skip
    assert found["false same"] < 0.05
    assert found["all together"] > 0.95
    assert found["right"] > 0.95
    assert found["runs"] < 0.7


def test_the_simulation_judges_as_the_report_does():
    looks = design(4, 3, 10)
    draw = np.random.default_rng(0)
    values = settling.differences(draw, 20, looks.most, settling.MIXED, 0.1, "normal")
    found = settling.settled("looks that pay", looks, values)
    for study, differences in enumerate(values):
        for look, seeds in enumerate(looks.at):
            compared = [
                stats.paired(pd.Series(d[:seeds]), pd.Series(np.zeros(seeds))) for d in differences
            ]
            judged = stats.judge(compared, levels=looks.levels(look, len(differences)))
            here = found["seeds"][study] == seeds
            verdicts = np.array([own.verdict for own in judged])
            assert verdicts[here].tolist() == found["verdict"][study][here].tolist()
            ends = np.array([own.interval[:2] for own in judged])[here].T
            for name, values in zip(("low", "high"), ends, strict=True):
                np.testing.assert_allclose(values, found[name][study][here])
    assert {"better", "inconclusive"} <= set(found["verdict"].ravel())
