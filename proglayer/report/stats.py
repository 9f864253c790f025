"""What a handful of seeds can and cannot say: summaries, paired comparisons, verdicts.

Pure functions on numpy arrays and pandas objects. Distributions and powers are SciPy's and
statsmodels'; written out here are the t-tests and the binomial error.

Three conventions hold throughout:

- A change is signed so that **plus is an improvement**: accuracy after - before, perplexity and
  loss before - after. A comparison of a with b is a - b, so plus means that a did better.
- Runs are **paired by seed**. Two arms that share a seed share their initial phase and their batch
  order; the difference within a seed is much less noisy than the two values.
- Values that are not finite (a failed or diverged run) are left out and **counted**; pairs also
  say why, for what is true of the seeds that came through need not be of all.

With the small numbers of seeds that a study can afford, the paired t-test decides. Where every
difference is the same, it has no spread to judge by, and exact sign tests decide instead. Of
several comparisons each is judged at the level 0.05 / their number (Bonferroni): then an interval
belongs to every verdict and cannot contradict it, and all of them hold together with 95 %. Holm's
procedure would find a little more and leaves no such intervals.

SciPy and statsmodels take a second to import, and of one seed nothing is tested: they are imported
where they are used.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

# Beyond this a number of seeds is no plan any more, and the answer is "infinitely many".
MOST_SEEDS = 1_000_000
# Differences that agree to this share of the values themselves differ by rounding only.
ROUNDING = 1e-12
ALPHA = 0.05
POWER = 0.8
# Beyond this modified z-score a value is an outlier: Iglewicz & Hoaglin (1993).
OUTLYING = 3.5


def binomial_error(accuracy: float, tokens: int) -> float:
    """Standard error, in percentage points, of an accuracy measured on `tokens` tokens.

    It is the noise of the text alone, as if tokens were independent; the spread between seeds comes
    on top. It is all that one seed can say about its own uncertainty.

    Args:
        accuracy: share of right predictions, 0 to 1.
    """
    return 100 * math.sqrt(accuracy * (1 - accuracy) / tokens)


# --- one arm --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one figure over seeds, in the unit of the values."""

    n: int  # finite values
    dropped: int  # values left out because they were not finite
    mean: float  # nan without a value
    sd: float  # sample standard deviation (n - 1); nan below two values
    low: float  # t-interval of the mean; nan below two values
    high: float


def summary(values: Any, confidence: float = 0.95) -> Summary:
    """Mean, standard deviation and Student's t-interval of the mean.

    Values that are all the same give an interval of width zero: no spread was seen, which for a
    few seeds does not say that there is none.
    """
    array = np.asarray(values, dtype=float).ravel()
    finite = array[np.isfinite(array)]
    n, sd, half = len(finite), math.nan, math.nan
    mean = float(np.mean(finite)) if n else math.nan
    if n >= 2 and np.ptp(finite) == 0:
        # Said exactly, for the sum of equal numbers is rounded.
        mean, sd, half = float(finite[0]), 0.0, 0.0
    elif n >= 2:
        from scipy.special import stdtrit

        sd = float(np.std(finite, ddof=1))
        half = float(stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)
    return Summary(n, array.size - n, mean, sd, mean - half, mean + half)


# --- two arms, paired by seed ---------------------------------------------------------------------


class LeftOut(StrEnum):
    """Why a seed has no difference, where no run of it ended otherwise than completed."""

    no_value = "no finite value"
    no_partner = "not in both arms"
    over_budget = "over the budget in its first epoch"
    cut_short = "cut by max_epochs"


class Interval(NamedTuple):
    """An interval of a mean difference; nan where it is not known."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True, eq=False)
class Pairs:
    """The differences a - b within seeds, in the unit of the values. See `paired`.

    Where every difference is the same (up to rounding), t-tests are undefined: exact sign tests
    decide, and there is no interval, since the spread is not known.
    """

    differences: pd.Series  # of the seeds with a finite value in both arms, indexed by seed
    left_out: Mapping[str, int]  # why seeds have none, LeftOut or a state of a run -> how many
    margin: float  # differences within +-margin count as none
    rounding: float  # what rounding alone can make of a difference

    @property
    def n(self) -> int:
        """The number of seeds compared."""
        return len(self.differences)

    @property
    def dropped(self) -> int:
        """The number of seeds left out."""
        return sum(self.left_out.values())

    @cached_property
    def mean(self) -> float:
        """The mean difference; nan without a pair."""
        return summary(self.differences).mean

    @cached_property
    def sd(self) -> float:
        """Sample standard deviation, exactly 0 if all are the same; nan below two pairs."""
        return summary(self.differences).sd

    @property
    def constant(self) -> bool:
        """Whether every seed shows the same difference, up to rounding."""
        return self.n >= 2 and self.sd == 0

    def interval(self, confidence: float) -> Interval:
        """Student's interval of the mean difference."""
        if self.constant:
            return Interval(math.nan, math.nan, confidence)
        found = summary(self.differences, confidence)
        return Interval(found.low, found.high, confidence)

    @cached_property
    def p(self) -> float:
        """The p-value of no difference, two-sided: the paired t-test's, or the exact sign test's;
        nan below two pairs.
        """
        if self.n < 2:
            return math.nan
        if self.constant:
            # Of equal differences a sum is as large as the one observed only with all its signs.
            return 2 * 0.5**self.n if self.mean else 1.0
        return 2 * self._tail(-abs(self.mean))

    def _tail(self, away: float) -> float:
        """The chance that Student's t lies below `away` standard errors (in the unit of values)."""
        from scipy.special import stdtr

        return float(stdtr(self.n - 1, away * math.sqrt(self.n) / self.sd))

    @cached_property
    def equivalence_p(self) -> float:
        """The p-value of a true difference outside +-margin; nan below two pairs."""
        if self.n < 2:
            return math.nan
        if self.constant:
            inside = self.margin - abs(self.mean) > max(self.rounding, ROUNDING * self.margin)
            return 0.5**self.n if inside else 1.0
        return max(self._tail(side * self.mean - self.margin) for side in (-1, 1))

    @property
    def outlying(self) -> list[Any]:
        """The seeds whose differences stand apart: a modified z-score above OUTLYING."""
        away = (self.differences - self.differences.median()).abs()
        typical = away.median() / 0.6745
        if self.n < 4 or not typical > 0:
            return []
        return list(self.differences.index[away / typical > OUTLYING])


def paired(
    a_by_seed: pd.Series,
    b_by_seed: pd.Series,
    *,
    margin: float = 0.1,
    reasons: Mapping[Any, str] | None = None,
) -> Pairs:
    """Pair two arms by seed.

    Args:
        a_by_seed, b_by_seed: one value per seed, indexed by seed.
        margin: a true difference within +-margin counts as none; in the unit of the values.
        reasons: seed -> why one of its arms has no finite value, for `left_out`.

    No difference is tested by the paired t-test, two-sided (Student's distribution is that of
    `scipy.special`); equivalence by two one-sided t-tests (Schuirmann 1987), whose p-value is the
    larger of the two.

    Raises:
        ValueError: for a seed that occurs twice in one arm.
    """
    both = pd.concat([a_by_seed, b_by_seed], axis="columns", keys=["a", "b"], verify_integrity=True)
    both = both.astype("float64").sort_index()
    differences: Any = both["a"] - both["b"]
    finite = np.isfinite(differences)

    def why(seed: Any) -> str:
        in_both = seed in a_by_seed.index and seed in b_by_seed.index
        return (reasons or {}).get(seed, LeftOut.no_value if in_both else LeftOut.no_partner)

    left_out = dict(sorted(Counter(why(seed) for seed in both.index[~finite]).items()))
    differences = differences[finite]
    rounding = ROUNDING * float(both[finite].abs().max(axis=None)) if finite.any() else 0.0
    if len(differences) and np.ptp(differences) <= rounding:
        # Rounding of a and b leaves a spread of the last bits, on which a t-test would be certain
        # of anything; a mean of last bits is no difference either.
        mean = float(np.mean(differences))
        differences[:] = 0.0 if abs(mean) <= rounding else mean
    return Pairs(differences, left_out, margin, rounding)


# --- how many seeds, how small a difference -------------------------------------------------------


def _spreads(sd: float, seeds: int) -> np.ndarray:
    """Return a standard deviation estimated from so many seeds, and the ends of its 80 % interval;
    nan where it is nan or 0, or below two seeds.
    """
    if seeds < 2 or not sd > 0:
        return np.full(3, math.nan)
    from scipy import stats as sps

    return sd * np.sqrt([1, *((seeds - 1) / sps.chi2.ppf([0.9, 0.1], seeds - 1))])


def smallest_difference(
    sd: float, seeds: int, *, alpha: float = ALPHA, power: float = POWER
) -> tuple[float, float, float]:
    """The true difference that a paired t-test with this many seeds finds with the given power.

    Args:
        sd: standard deviation of the differences within seeds, estimated from them.

    Returns:
        the difference in the unit of `sd`, for that and for the ends of its 80 % interval; nan if
        `sd` is nan or 0, or below two seeds.
    """
    spreads = _spreads(sd, seeds)
    if math.isnan(spreads[0]):
        return math.nan, math.nan, math.nan
    from statsmodels.stats.power import TTestPower

    solved = TTestPower().solve_power(
        nobs=seeds, alpha=alpha / 2, power=power, alternative="larger"
    )
    value, low, high = float(np.ravel(solved)[0]) * spreads
    return value, low, high


def _power(effect_size: float, seeds: int, alpha: float) -> float:
    """Power of a one-sided paired t-test; the effect in standard deviations of the differences.

    A two-sided test at alpha is two of these at alpha / 2; its chance of finding the wrong sign is
    left out, which is no power.
    """
    from scipy import stats as sps
    from statsmodels.stats.power import TTestPower

    found = TTestPower().power(effect_size, seeds, alpha, alternative="larger")
    if math.isnan(found):
        # SciPy's noncentral t gives up far out in its tails, where the answer is 0 or 1.
        return float(effect_size * math.sqrt(seeds) > sps.t.isf(alpha, seeds - 1))
    return float(found)


def seeds_for_margin(
    sd: float, seeds: int, margin: float, *, alpha: float = ALPHA, power: float = POWER
) -> tuple[float, float, float]:
    """The seeds, in all, that settle whether a true difference is as large as the margin or none.

    So many find a difference of the margin, and establish equivalence where there is none, each
    with this power. It does not depend on the difference that was observed: a plan made from that
    is right only by luck.

    Args:
        sd: standard deviation of the differences, estimated from `seeds` seeds.

    Returns:
        the number for `sd`, and for the ends of its 80 % interval; nan where sd is nan or 0, and
        inf for more than MOST_SEEDS.
    """
    value, low, high = (
        _fewest_seeds(margin / spread, alpha, power) if spread > 0 else math.nan
        for spread in _spreads(sd, seeds)
    )
    return value, low, high


def _fewest_seeds(effect_size: float, alpha: float, power: float) -> float:
    """The fewest seeds for a margin of so many standard deviations of the differences.

    The chance that both tests of equivalence pass is taken as the sum of their powers less 1. That
    leaves out the chance that both fail, so the answer can be one seed too many.
    """

    def enough(seeds: int) -> bool:
        found = _power(effect_size, seeds, alpha / 2)
        return min(found, 2 * _power(effect_size, seeds, alpha) - 1) >= power

    if not enough(MOST_SEEDS):
        return math.inf
    return float(2 + bisect.bisect_left(range(2, MOST_SEEDS), True, key=enough))


# --- families of comparisons ----------------------------------------------------------------------


class Verdict(StrEnum):
    """What the data say of a - b."""

    better = "better"
    worse = "worse"
    same = "equivalent"
    unclear = "inconclusive"
    untested = "not tested"


class Levels(NamedTuple):
    """The levels at which a family of comparisons is judged.

    each: of a two-sided test of no difference, and of each of the two one-sided tests of
    equivalence, in the family. alone: of a comparison by itself.
    """

    family: int
    each: float
    alone: float = ALPHA


@dataclass(frozen=True)
class Judgement:
    """What is said of one member of a family; see `judge`.

    Corrected p-values are ALPHA where the level is reached. `interval` is the one that the verdict
    rests on: of confidence 1 - 2 `levels.each` and within the margin if that is *equivalent*, else
    of confidence 1 - `levels.each`, which holds 0 just if that is *inconclusive* (or the whole
    margin and more). `alone` is that of the comparison by itself.
    """

    verdict: Verdict
    levels: Levels
    p_adjusted: float
    equivalence_p_adjusted: float
    interval: Interval
    alone: Interval
    corrected: float = math.nan  # see `sequential.corrected_for_stopping`; of *better* and *worse*


# Of a comparison that is not made.
NO_PAIRS = Pairs(pd.Series(dtype=float), {}, math.nan, 0.0)
_UNKNOWN = Interval(math.nan, math.nan, 1 - ALPHA)
UNTESTED = Judgement(Verdict.untested, Levels(0, ALPHA), math.nan, math.nan, _UNKNOWN, _UNKNOWN)


def judge(family: Sequence[Pairs], levels: Levels | None = None) -> list[Judgement]:
    """Judge pairs as one family, at the level ALPHA / their number (Bonferroni).

    Tests of difference and tests of equivalence are corrected apart, so that the chance of any
    false claim of a difference is at most ALPHA, and so is that of any false claim of equivalence.
    In this order:

    1. fewer than two pairs: *not tested*;
    2. the equivalence test passes: *equivalent*, also if the difference is significant,
       for then it is real but too small to matter;
    3. the difference is significant: *better* if it is a plus, else *worse*;
    4. *inconclusive*. That is no finding of "no difference".

    Args:
        levels: others to judge at, for what is looked at more than once.
    """
    if levels is None:
        tested = sum(pairs.n >= 2 for pairs in family)
        levels = Levels(tested, ALPHA / max(1, tested))
    return [_judge_one(pairs, levels) for pairs in family]


def _judge_one(pairs: Pairs, levels: Levels) -> Judgement:
    p, same_p = (min(ALPHA / levels.each * p, 1.0) for p in (pairs.p, pairs.equivalence_p))
    confidence = 1 - levels.each
    if pairs.n < 2:
        verdict = Verdict.untested
    elif same_p <= ALPHA:
        verdict, confidence = Verdict.same, 1 - 2 * levels.each
    elif p <= ALPHA:
        verdict = Verdict.better if pairs.mean > 0 else Verdict.worse
    else:
        verdict = Verdict.unclear
    interval, alone = pairs.interval(confidence), pairs.interval(1 - levels.alone)
    return Judgement(verdict, levels, p, same_p, interval, alone)
