"""The statistics against SciPy, statsmodels, closed forms and simulated studies of known truth."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy import stats as sps
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from proglayer.report.stats import (
    LeftOut,
    Verdict,
    binomial_error,
    judge,
    paired,
    seeds_for_margin,
    smallest_difference,
    summary,
)

STUDIES = 2_000

# On a busy machine an example may take longer than Hypothesis would wait.
unhurried = settings(deadline=None, max_examples=40)

# Values with three decimals: as fine as an accuracy is reported, and apart by more than rounding.
values = st.integers(-50_000, 50_000).map(lambda thousandths: thousandths / 1000)
pairs_of_values = st.lists(st.tuples(values, values), min_size=2, max_size=8)


def by_seed(numbers, first_seed=42):
    return pd.Series(list(numbers), index=range(first_seed, first_seed + len(numbers)), dtype=float)


def differing(differences, **settings_of_test):
    """A comparison whose differences are these."""
    differences = np.asarray(differences, dtype=float)
    return paired(by_seed(differences), by_seed(np.zeros(len(differences))), **settings_of_test)


def verdict(*comparisons):
    """The verdict on the first of a family."""
    return judge(comparisons)[0].verdict


def test_the_binomial_error_of_the_founding_accuracy_is_as_large_as_its_changes():
    assert binomial_error(0.1635, 64_000) == pytest.approx(0.15, abs=0.005)
    assert binomial_error(0.0, 100) == 0


# --- one arm --------------------------------------------------------------------------------------


def test_the_interval_is_that_of_statsmodels():
    numbers = [-0.15, 0.21, -0.02, 0.08, 0.11]
    found = summary(numbers, confidence=0.9)
    assert (found.n, found.dropped) == (5, 0)
    assert found.mean == pytest.approx(0.046)
    assert found.sd == pytest.approx(pd.Series(numbers).std())
    assert (found.low, found.high) == pytest.approx(DescrStatsW(numbers).tconfint_mean(0.1))


def test_one_seed_concludes_nothing():
    found = summary([0.3])
    assert (found.n, found.mean) == (1, 0.3)
    assert all(math.isnan(number) for number in (found.sd, found.low, found.high))


def test_values_that_are_not_finite_are_left_out_and_counted():
    found = summary([1.0, math.nan, 3.0, math.inf])
    assert (found.n, found.dropped, found.mean) == (2, 2, 2.0)
    empty = summary([math.nan, math.nan])
    assert (empty.n, empty.dropped, math.isnan(empty.mean)) == (0, 2, True)


# --- two arms, paired by seed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def arms():
    draw = np.random.default_rng(5)
    shared = draw.normal(16, 0.2, size=9)
    return by_seed(shared + draw.normal(0.1, 0.1, 9)), by_seed(shared + draw.normal(0, 0.1, 9))


def test_a_comparison_agrees_with_scipy_and_statsmodels(arms):
    a, b = arms
    found = paired(a, b, margin=0.15)
    assert found.n == 9
    assert found.mean == pytest.approx((a - b).mean())
    assert found.sd == pytest.approx((a - b).std())
    assert found.p == pytest.approx(sps.ttest_rel(a, b).pvalue)
    interval = sps.ttest_rel(a, b).confidence_interval(0.95)
    assert found.interval(0.95)[:2] == pytest.approx((interval.low, interval.high))
    assert found.equivalence_p == pytest.approx(ttost_paired(a, b, -0.15, 0.15)[0])
    assert smallest_difference(found.sd, 9)[0] == pytest.approx(
        TTestPower().solve_power(nobs=9, alpha=0.05, power=0.8) * found.sd, rel=1e-5
    )


def test_seeds_are_paired_by_name_and_those_without_a_partner_are_counted():
    a = pd.Series({42: 1.0, 43: 2.0, 44: 4.0, 45: math.nan, 47: 9.0})
    b = pd.Series({44: 1.0, 43: 1.0, 42: 1.0, 45: 3.0, 46: 8.0})
    found = paired(a, b)
    assert (found.n, found.dropped) == (3, 3)
    assert (found.mean, found.sd) == pytest.approx((4 / 3, math.sqrt(7 / 3)))
    # 45 has no figure in one arm, 46 and 47 were never run in the other
    assert found.left_out == {LeftOut.no_value: 1, LeftOut.no_partner: 2}
    reasoned = paired(a, b, reasons={45: "failed", 43: "no matter"})
    assert reasoned.left_out == {"failed": 1, LeftOut.no_partner: 2}


@pytest.mark.parametrize("seeds", [0, 1])
def test_without_two_pairs_there_is_no_test(seeds):
    found = differing([0.4] * seeds)
    assert found.n == seeds
    numbers = [found.sd, *found.interval(0.95)[:2], found.p, found.equivalence_p]
    numbers += seeds_for_margin(found.sd, seeds, 0.1)
    assert all(math.isnan(number) for number in numbers)
    assert verdict(found) == Verdict.untested


def test_a_constant_difference_is_judged_by_sign_tests():
    # 16.35 - 16.2 and its like differ in the last bits; the t-test would give p = 1e-60.
    b = by_seed([16.2, 15.9, 16.4, 16.0, 16.11, 15.3])
    found = paired(b + 0.15, b)
    assert found.constant
    assert found.sd == 0
    assert found.mean == pytest.approx(0.15)
    # of equal differences the spread is not known, and no interval is given
    assert all(math.isnan(end) for end in found.interval(0.95)[:2])
    assert found.p == 2 / 2**6
    assert found.equivalence_p == 1
    assert verdict(found) == Verdict.better
    assert paired(b + 0.15, b, margin=0.2).equivalence_p == 1 / 2**6
    assert verdict(paired(b[:4] + 0.15, b[:4])) == Verdict.unclear

    many = by_seed(np.linspace(15, 16, 40))
    assert paired(many + 0.15, many).p == paired(many, many + 0.15).p == 2 / 2**40


@pytest.mark.parametrize("level", [15.9, 16.2])
def test_a_constant_difference_of_just_the_margin_is_not_within_it(level):
    # 16.0 - 15.9 is rounded to below 0.1, 16.3 - 16.2 to above.
    arm = by_seed([level] * 5)
    assert paired(arm + 0.1, arm, margin=0.1).equivalence_p == 1
    assert paired(arm + 0.1, arm, margin=0.101).equivalence_p == 1 / 2**5


def test_a_seed_that_stands_apart_is_named():
    assert differing([0.1, 0.12, 0.09, 0.11, -4.0, 0.1]).outlying == [46]
    assert differing(np.random.default_rng(0).normal(size=8)).outlying == []
    assert differing([0.1, 0.1, 0.1, 5.0]).outlying == []  # without a spread nothing stands apart


# --- how many seeds, how small a difference -------------------------------------------------------


def exact_power(seeds, passes):
    """Chance of passing, given the sample's sd, integrated over that sd; the true one is 1."""
    spread = sps.chi(seeds - 1, scale=1 / math.sqrt(seeds - 1))
    steps = np.linspace(spread.ppf(1e-9), spread.isf(1e-9), 20_001)
    return integrate.simpson(np.maximum(0, passes(steps)) * spread.pdf(steps), x=steps)


def difference_power(seeds, difference, alpha):
    critical, shift = sps.t.isf(alpha / 2, seeds - 1), difference * math.sqrt(seeds)
    return exact_power(seeds, lambda sd: sps.norm.sf(critical * sd - shift))


def equivalence_power(seeds, difference, margin, alpha):
    critical, root = sps.t.isf(alpha, seeds - 1), math.sqrt(seeds)
    return exact_power(
        seeds,
        lambda sd: (
            sps.norm.cdf((margin - difference) * root - critical * sd)
            - sps.norm.cdf((-margin - difference) * root + critical * sd)
        ),
    )


@pytest.mark.parametrize("alpha", [0.05, 0.005, 0.0005])
@pytest.mark.parametrize("margin", [0.01, 0.1, 0.3, 0.8, 1.85, 3.0, 6.7, 30.0, 1000.0])
def test_the_seeds_to_plan_are_enough_and_at_most_one_too_many(margin, alpha):
    seeds = int(seeds_for_margin(1, 5, margin, alpha=alpha)[0])

    def power(seeds):
        found = difference_power(seeds, margin, alpha)
        return min(found, equivalence_power(seeds, 0, margin, alpha))

    assert power(seeds) >= 0.8 - 1e-6
    if seeds > 3:
        assert power(seeds - 2) < 0.8


def test_what_no_number_of_seeds_can_show_is_infinite():
    assert seeds_for_margin(0.2, 5, 1e-6) == (math.inf, math.inf, math.inf)
    assert math.isnan(smallest_difference(0.0, 5)[0])


# --- families of comparisons ----------------------------------------------------------------------

NEGLIGIBLE = [0.021, 0.019, 0.022, 0.018, 0.020, 0.021]
NOISE = [0.3, -0.2, 0.1, 0.4, -0.3, 0.2]


def test_a_real_but_negligible_difference_is_the_same_within_the_margin():
    found = differing(NEGLIGIBLE, margin=0.1)
    assert found.p < 0.001
    assert verdict(found) == Verdict.same
    assert verdict(differing(NEGLIGIBLE, margin=0.01)) == Verdict.better


def test_a_family_is_judged_at_its_level_and_what_was_not_tested_is_no_member():
    up = differing([0.1, 0.3, 0.25, 0.05, 0.2, 0.3])
    assert 0.05 / 10 < up.p <= 0.05 / 5
    assert verdict(up, *[differing(NOISE)] * 4) == Verdict.better
    assert verdict(up, *[differing(NOISE)] * 9) == Verdict.unclear
    assert verdict(up, *[differing([0.4])] * 9) == Verdict.better
    judged = judge([up, differing(NOISE), differing([])])
    assert [own.levels.family for own in judged] == [2] * 3
    assert [own.p_adjusted for own in judged[:2]] == [2 * up.p, min(1, 2 * differing(NOISE).p)]
    assert judged[2].verdict == Verdict.untested
    assert judge([]) == []


@unhurried
@given(pairs_of_values, st.integers(1, 12), st.sampled_from([0.1, 3.0, 40.0]))
def test_the_interval_of_a_verdict_never_contradicts_it(rows, family, margin):
    a, b = (by_seed(arm) for arm in zip(*rows, strict=True))
    own = paired(a, b, margin=margin)
    found = judge([own] * family)[0]
    if own.constant:
        return
    low, high, confidence = found.interval
    inside = -margin < low and high < margin
    assert (found.verdict == Verdict.same) == (
        confidence == pytest.approx(1 - 0.1 / family) and inside
    )
    if found.verdict != Verdict.same:
        assert (found.verdict == Verdict.better) == (low > 0)
        assert (found.verdict == Verdict.worse) == (high < 0)
