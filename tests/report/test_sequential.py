"""Looking again and again is paid for: errors and coverage of studies that stop when they can."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from proglayer.report import stats
from proglayer.report.sequential import Design

from . import settling

STUDIES = 2_000
# Four standard errors of a share of 5 % in so many studies.
TOLERANCE = 4 * (0.05 * 0.95 / STUDIES) ** 0.5


def test_the_looks_of_a_design():
    assert Design(first=5, step=3, most=20).at == (5, 8, 11, 14, 17, 20)
    assert Design(first=5, step=4, most=12).at == (5, 9, 12)
    assert Design(first=8, step=3, most=8).at == (8,)


@pytest.mark.parametrize(
    "design",
    [
        Design(first=5, step=3, most=20),
        Design(first=2, step=1, most=7),
        Design(first=8, step=3, most=8),
    ],
)
def test_all_looks_of_all_comparisons_spend_what_one_test_may(design: Design):
    levels = [design.levels(look, 7) for look in range(len(design.at))]
    assert 7 * sum(own.each for own in levels) == pytest.approx(stats.ALPHA)
    assert sum(own.alone for own in levels) == pytest.approx(stats.ALPHA)


def test_one_look_is_a_plain_test():
    own = [stats.paired(pd.Series([0.4, 0.5, 0.7, 0.6]), pd.Series(np.zeros(4)))] * 3
    plain = stats.judge(own)
    assert plain == stats.judge(own, levels=Design(first=4, step=1, most=4).levels(0, 3))


@pytest.mark.parametrize("distribution", ["normal", "heavy tails"])
@pytest.mark.parametrize("method", ["looks that pay", "plain looks"])
def test_false_differences(method: str, distribution: str):
    found = settling.simulate(
        method,
        Design(first=5, step=3, most=20),
        settling.NOTHING,
        distribution=distribution,
        studies=STUDIES,
    )
    if method == "plain looks":
        assert found["false difference"] > 0.05 + TOLERANCE
    else:
        assert found["false difference"] < 0.05
        assert found["alone"] > 0.95
        assert found["all together"] > 0.95


@pytest.mark.parametrize("distribution", ["normal", "heavy tails"])
def test_false_equivalence_and_what_is_saved(distribution: str):
    found = settling.simulate(
        "looks that pay", Design(first=5, step=3, most=20), settling.MARGINAL,
        sd=0.05, distribution=distribution, studies=STUDIES,
    )  # fmt: skip
    assert found["false same"] < 0.05
    assert found["all together"] > 0.95
    assert found["right"] > 0.95
    assert found["runs"] < 0.7


def test_the_simulation_judges_as_the_report_does():
    design = Design(first=4, step=3, most=10)
    draw = np.random.default_rng(0)
    values = settling.differences(draw, 20, design.most, settling.MIXED, 0.1, "normal")
    found = settling.settled("looks that pay", design, values)
    for study, differences in enumerate(values):
        for look, seeds in enumerate(design.at):
            compared = [
                stats.paired(pd.Series(d[:seeds]), pd.Series(np.zeros(seeds))) for d in differences
            ]
            judged = stats.judge(compared, levels=design.levels(look, len(differences)))
            here = found["seeds"][study] == seeds
            verdicts = np.array([own.verdict for own in judged])
            assert verdicts[here].tolist() == found["verdict"][study][here].tolist()
            ends = np.array([own.interval[:2] for own in judged])[here].T
            for name, values in zip(("low", "high"), ends, strict=True):
                np.testing.assert_allclose(values, found[name][study][here])
    assert {"better", "unclear"} <= set(found["verdict"].ravel())
