"""What a handful of seeds can and cannot say: summaries, paired comparisons, verdicts.

Pure functions on numpy arrays and pandas objects. Distributions and powers are SciPy's and
statsmodels'; written out here are the t-tests, Hedges' factor and two binomial errors.

Three conventions hold throughout:

- A change is signed so that **plus is an improvement**: accuracy after - before, perplexity and
  loss before - after. A comparison of a with b is a - b, so plus means that a did better.
- Runs are **paired by seed**. Two arms that share a seed share their initial phase and their batch
  order; the difference within a seed is much less noisy than the two values.
- Values that are not finite (a failed or diverged run) are left out and **counted** in `dropped`;
  a comparison also says why, for what is true of the seeds that came through need not be of all.

With the small numbers of seeds that a study can afford, the paired t-test decides; the exact
sign-flip test, which assumes only symmetry, stands beside it. Where every difference is the same, a
t-test has no spread to judge by, and exact sign tests decide instead. Of several comparisons each
is judged at the level 0.05 / their number (Bonferroni): then an interval belongs to every verdict
and cannot contradict it, and all of them hold together with 95 %. Holm's procedure would find a
little more and leaves no such intervals.

SciPy and statsmodels take a second to import, and of one seed nothing is tested: they are imported
where they are used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

# With more seeds than the first there would be more sign patterns than the second.
EXACT_SIGN_FLIP_SEEDS = 13
SIGN_FLIP_RESAMPLES = 9_999
# Beyond this a number of seeds is no plan any more, and the answer is "infinitely many".
MOST_SEEDS = 1_000_000
# Differences that agree to this share of the values themselves differ by rounding only.
ROUNDING = 1e-12
ALPHA = 0.05
POWER = 0.8
# Beyond this modified z-score a value is an outlier: Iglewicz & Hoaglin (1993).
OUTLYING = 3.5


# --- changes of a run -----------------------------------------------------------------------------


def accuracy_change_points(before: Any, after: Any) -> Any:
    """Change in accuracy in percentage points, plus for an improvement.

    Args:
        before, after: accuracies as shares from 0 to 1 (numbers, arrays or Series).

    Raises:
        ValueError: for a value outside 0 to 1, as when percent were given.
    """
    _require_shares("before", before)
    _require_shares("after", after)
    return (after - before) * 100


def perplexity_change_percent(before: Any, after: Any) -> Any:
    """(before - after) / before x 100: fall in perplexity in percent, plus for an improvement."""
    return (before - after) / before * 100


def loss_change_nats(before: Any, after: Any) -> Any:
    """before - after: the fall in the mean loss per token in nats, plus for an improvement."""
    return before - after


def binomial_error(accuracy: float, tokens: int) -> float:
    """Standard error, in percentage points, of an accuracy measured on `tokens` tokens.

    It is the noise of the validation set alone, as if tokens were independent; the spread between
    seeds comes on top. It is all that one seed can say about its own uncertainty.

    Args:
        accuracy: share of right predictions, 0 to 1.
        tokens: how many predictions it is the share of.

    Raises:
        ValueError: for an accuracy outside 0 to 1 or fewer than one token.
    """
    _require_shares("accuracy", accuracy)
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    return 100 * math.sqrt(accuracy * (1 - accuracy) / tokens)


def paired_binomial_error(accuracy_a: float, accuracy_b: float, tokens: int) -> float:
    """The largest standard error, in points, that a text gives a difference of two accuracies.

    McNemar's (1947): only tokens that one model gets right and the other wrong count. How many
    those are is taken as if the models erred unrelatedly; the more alike they are, the smaller the
    true error. It does not shrink with more seeds that read the same text.

    Args:
        accuracy_a, accuracy_b: shares of right predictions, 0 to 1.
        tokens: how many predictions each is the share of.
    """
    _require_shares("accuracy", [accuracy_a, accuracy_b])
    disagreeing = accuracy_a * (1 - accuracy_b) + accuracy_b * (1 - accuracy_a)
    return 100 * math.sqrt((disagreeing - (accuracy_a - accuracy_b) ** 2) / tokens)


def _require_shares(name: str, values: Any) -> None:
    array = np.asarray(values, dtype=float)
    wrong = array[(array < 0) | (array > 1)]
    if wrong.size:
        raise ValueError(f"{name}={wrong.flat[0]:g} is not a share from 0 to 1")


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
    _require_probability("confidence", confidence)
    array = np.asarray(values, dtype=float).ravel()
    finite = array[np.isfinite(array)]
    n, mean, sd, low, high = len(finite), math.nan, math.nan, math.nan, math.nan
    if n >= 1:
        mean = float(np.mean(finite))
    if n >= 2 and np.ptp(finite) == 0:
        # Said exactly, for the sum of equal numbers is rounded.
        mean, sd, low, high = float(finite[0]), 0.0, float(finite[0]), float(finite[0])
    elif n >= 2:
        from scipy.special import stdtrit

        sd = float(np.std(finite, ddof=1))
        half = float(stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)
        low, high = mean - half, mean + half
    return Summary(n, array.size - n, mean, sd, low, high)


def _require_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value:g} must lie between 0 and 1")


# --- two arms, paired by seed ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison:
    """The difference a - b within seeds, in the unit of the values. See `paired`."""

    differences: pd.Series  # of the seeds with a finite value in both arms, indexed by seed
    dropped: int  # seeds of either arm without such a partner
    left_out: str  # why those were dropped, each reason with the number of seeds; empty if none was
    margin: float  # differences within +-margin count as none
    rounding: float  # what rounding alone can make of a difference

    @property
    def n(self) -> int:
        """The number of seeds compared."""
        return len(self.differences)

    @property
    def _values(self) -> np.ndarray:
        return self.differences.to_numpy(dtype=float)

    @property
    def mean(self) -> float:
        """The mean difference; nan without a pair."""
        return self._over_seeds.mean

    @property
    def sd(self) -> float:
        """Sample standard deviation; nan below two pairs; exactly 0 if all are the same."""
        return self._over_seeds.sd

    @cached_property
    def _over_seeds(self) -> Summary:
        return summary(self._values)

    @property
    def constant(self) -> bool:
        """Whether every seed shows the same difference, up to rounding."""
        return self.n >= 2 and self.sd == 0

    def interval(self, confidence: float) -> tuple[float, float]:
        """Student's interval of the mean difference.

        Returns:
            low and high; nan below two pairs, and where sd is 0, since the spread is not known.
        """
        found = summary(self._values, confidence)
        return (math.nan, math.nan) if self.constant else (found.low, found.high)

    @cached_property
    def p(self) -> float:
        """The p-value that decides, two-sided: the paired t-test's; where sd is 0 the exact sign
        test's; nan below two pairs.
        """
        if self.n < 2:
            return math.nan
        if self.constant:
            from scipy import stats as sps

            # Of equal differences a sum is as large as the one observed only with all its signs.
            return float(sps.binomtest(self.n, self.n, 0.5).pvalue) if self.mean else 1.0
        return 2 * self._tail(-abs(self.mean))

    def _tail(self, away: float) -> float:
        """The chance that Student's t lies below `away` standard errors (in the unit of values)."""
        from scipy.special import stdtr

        return float(stdtr(self.n - 1, away * math.sqrt(self.n) / self.sd))

    @cached_property
    def sign_flip_p(self) -> float:
        """The sign-flip test of the mean, two-sided; nan below two pairs."""
        if self.n < 2 or self.constant:
            return self.p
        return _sign_flip(self._values)

    @cached_property
    def equivalence_p(self) -> float:
        """That the true difference lies outside +-margin; nan below two pairs."""
        if self.n < 2:
            return math.nan
        if self.constant:
            from scipy import stats as sps

            inside = self.margin - abs(self.mean) > max(self.rounding, ROUNDING * self.margin)
            tests = sps.binomtest(self.n * inside, self.n, 0.5, alternative="greater")
            return float(tests.pvalue)
        return max(self._tail(side * self.mean - self.margin) for side in (-1, 1))

    @property
    def effect_size(self) -> float:
        """Cohen's dz with Hedges' correction, unitless; nan below three pairs."""
        if self.n < 3 or self.constant:
            return math.nan
        return _hedges_factor(self.n - 1) * self.mean / self.sd

    @property
    def outlying(self) -> list[Any]:
        """The seeds whose differences stand apart: a modified z-score above OUTLYING."""
        away = (self.differences - self.differences.median()).abs()
        typical = away.median() / 0.6745
        if self.n < 4 or not typical > 0:
            return []
        return list(self.differences.index[away / typical > OUTLYING])


def paired(
    a_by_seed: pd.Series | Mapping[Any, float],
    b_by_seed: pd.Series | Mapping[Any, float],
    *,
    margin: float = 0.1,
    reasons: Mapping[Any, str] | None = None,
) -> Comparison:
    """Compare two arms by their differences a - b within seeds.

    Args:
        a_by_seed, b_by_seed: one value per seed, indexed by seed. Seeds that only one arm has, or
            that lack a finite value, are counted in `dropped`.
        reasons: seed -> why one of its arms has no finite value, for `left_out`.
        margin: a true difference within +-margin counts as none; in the unit of the values.

    Two-sided tests of no difference: the paired t-test (Student's distribution is that of
    `scipy.special`) and the sign-flip test, exact up to EXACT_SIGN_FLIP_SEEDS seeds
    (`scipy.stats.permutation_test`), above with a fixed random sample of SIGN_FLIP_RESAMPLES sign
    patterns (`scipy.stats.monte_carlo_test`: a standard error of 0.002 at p = 0.05). Equivalence:
    two one-sided t-tests (Schuirmann 1987), whose p-value is the larger
    of the two. Effect size: mean / sd, times Hedges' (1981) factor for n - 1 degrees of freedom.

    Where every difference is the same (up to rounding), the t-tests are undefined: the sign test
    decides, and equivalence is judged by the exact sign test, whose p is 0.5 ** n if the difference
    is within the margin, else 1.

    Raises:
        ValueError: for a seed that occurs twice in one arm, or a margin that is not positive.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin={margin:g} must be positive")
    for name, arm in (("a_by_seed", a_by_seed), ("b_by_seed", b_by_seed)):
        repeated = [seed for seed, count in Counter(arm.keys()).items() if count > 1]
        if repeated:
            raise ValueError(f"{name} has more than one value for seed {_listed(repeated)}")
    a: Any = dict(a_by_seed)
    b: Any = dict(b_by_seed)
    pairs = [s for s in sorted(a.keys() & b.keys()) if math.isfinite(a[s] - b[s])]
    dropped = (a.keys() | b.keys()) - set(pairs)
    why = Counter(
        (reasons or {}).get(
            seed, "no finite value" if seed in a and seed in b else "not in both arms"
        )
        for seed in dropped
    )
    differences = pd.Series([a[s] - b[s] for s in pairs], index=pairs, dtype=float)
    rounding = ROUNDING * max((abs(x) for s in pairs for x in (a[s], b[s])), default=0.0)
    if pairs and np.ptp(differences) <= rounding:
        # Rounding of a and b leaves a spread of the last bits, on which a t-test would be certain
        # of anything; a mean of last bits is no difference either.
        mean = float(np.mean(differences))
        differences[:] = 0.0 if abs(mean) <= rounding else mean
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(why.items()))
    return Comparison(differences, len(dropped), left_out, margin, rounding)


def _sign_flip(differences: np.ndarray) -> float:
    """The two-sided p of the mean among those of all sign patterns, or of a sample of them.

    `permutation_test` would take a random sample, too, but draws it at random pair by pair: ten
    times the time of `monte_carlo_test`, which is given signs by the block.
    """
    from scipy import stats as sps

    ordered = np.sort(differences)  # the same seeds in any order give the same p-value
    draw = np.random.default_rng(0)
    if len(ordered) <= EXACT_SIGN_FLIP_SEEDS:
        exact = sps.permutation_test(
            (ordered,),
            np.mean,
            permutation_type="samples",  # of a single sample: its signs
            vectorized=True,
            n_resamples=2 ** len(ordered),
            rng=draw,
        )
        return float(exact.pvalue)
    sampled = sps.monte_carlo_test(
        np.ones(len(ordered)),
        lambda size: 2.0 * draw.integers(0, 2, size, dtype=np.int8) - 1.0,
        # Not by `@`: BLAS would wake threads for so little, which on a busy machine takes longest.
        lambda signs, axis: np.einsum("...j,j->...", signs, ordered),
        vectorized=True,
        n_resamples=SIGN_FLIP_RESAMPLES,
        batch=1_000,
    )
    return float(sampled.pvalue)


def _hedges_factor(degrees: int) -> float:
    """Hedges (1981), J. Educ. Stat. 6, eq. 6e: what makes mean / sd an unbiased effect size."""
    log_ratio = math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)
    return math.exp(log_ratio) / math.sqrt(degrees / 2)


def _listed(names: Iterable[Any], most: int = 5) -> str:
    names = [str(name) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# --- how many seeds, how small a difference -------------------------------------------------------


def smallest_difference(
    sd: float, seeds: int, *, alpha: float = ALPHA, power: float = POWER
) -> float:
    """The true difference that a paired t-test with this many seeds finds with the given power.

    Args:
        sd: standard deviation of the differences within seeds. An estimate from a few seeds is
            itself rough: from five, the true one may well be twice as large.

    Returns:
        the difference in the unit of `sd`; nan if `sd` is nan or 0, or below two seeds.
    """
    if seeds < 2 or not sd > 0:
        return math.nan
    from statsmodels.stats.power import TTestPower

    solved = TTestPower().solve_power(
        nobs=seeds, alpha=alpha / 2, power=power, alternative="larger"
    )
    return float(np.ravel(solved)[0]) * sd


def seeds_for_difference(
    difference: float, sd: float, *, alpha: float = ALPHA, power: float = POWER
) -> float:
    """The fewest seeds with which a paired t-test finds this true difference with this power.

    Returns:
        a whole number from 2 up; inf if more than MOST_SEEDS would be needed, as for a difference
        of 0; nan if `difference` or `sd` is nan. For sd = 0: the fewest seeds with which the exact
        sign-flip test reaches `alpha`.
    """
    if math.isnan(difference) or math.isnan(sd):
        return math.nan
    if difference == 0:
        return math.inf
    if sd == 0:
        return float(_fewest_sign_flips(alpha))
    return _fewest_seeds(lambda n: _power(abs(difference) / sd, n, alpha / 2), power)


def seeds_for_equivalence(
    sd: float, margin: float, *, difference: float = 0.0, alpha: float = ALPHA, power: float = POWER
) -> float:
    """The fewest seeds with which two one-sided t-tests establish equivalence within +-margin.

    The chance that both tests pass is taken as the sum of their powers less 1. That leaves out the
    chance that both fail, so the answer can be one seed too many, which no plan will regret.

    Args:
        difference: the true difference to plan for.

    Returns:
        a whole number from 2 up; inf if more than MOST_SEEDS would be needed, as for a true
        difference outside the margin; nan if `difference` or `sd` is nan. For sd = 0: the fewest
        seeds with which the exact sign test reaches `alpha`.
    """
    if math.isnan(difference) or math.isnan(sd):
        return math.nan
    if abs(difference) >= margin:
        return math.inf
    if sd == 0:
        return float(max(2, math.ceil(-math.log2(alpha))))
    return _fewest_seeds(
        lambda n: (
            _power((margin - difference) / sd, n, alpha)
            + _power((margin + difference) / sd, n, alpha)
            - 1
        ),
        power,
    )


def _fewest_sign_flips(alpha: float) -> int:
    """The fewest seeds with 2 ** (1 - n) <= alpha."""
    return max(2, math.ceil(1 - math.log2(alpha)))


def _fewest_seeds(power_with: Callable[[int], float], power: float) -> float:
    low, high = 1, 2
    while not power_with(high) >= power:
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_with(middle) >= power else (middle, high)
    return float(high)


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
        the number for `sd`, and for the ends of its 80 % interval; nan where sd is nan or 0.
    """
    if seeds < 2 or not sd > 0:
        return math.nan, math.nan, math.nan
    from scipy import stats as sps

    quantiles = sps.chi2.ppf([0.9, 0.1], seeds - 1)
    low, high = sd * np.sqrt((seeds - 1) / quantiles)

    def needed(spread: float) -> float:
        return max(
            seeds_for_difference(margin, spread, alpha=alpha, power=power),
            seeds_for_equivalence(spread, margin, alpha=alpha, power=power),
        )

    return needed(sd), needed(float(low)), needed(float(high))


# --- families of comparisons ----------------------------------------------------------------------


class Verdict(StrEnum):
    """What the data say of a - b."""

    better = "better"
    worse = "worse"
    same = "same within the margin"
    unclear = "unclear"
    untested = "not tested"


# The columns of `judge`, after its labels.
JUDGED = (
    *("verdict", "n", "dropped", "left_out", "mean", "sd", "low", "high", "confidence"),
    *("low_95", "high_95", "p", "p_adjusted", "equivalence_p", "equivalence_p_adjusted"),
    *("margin", "family"),
)


class Levels(NamedTuple):
    """The levels at which a family of comparisons is judged.

    difference, alone: of a two-sided test of no difference, in the family and by itself.
    equivalence: of each of the two one-sided tests of equivalence.
    """

    family: int
    difference: float
    equivalence: float
    alone: float = ALPHA


def judge(
    comparisons: Iterable[Comparison], alpha: float = ALPHA, levels: Levels | None = None
) -> pd.DataFrame:
    """Judge comparisons as one family, at the level alpha / their number (Bonferroni).

    Tests of difference and tests of equivalence are corrected apart, so that the chance of any
    false claim of a difference is at most alpha, and so is that of any false claim of equivalence.
    In this order:

    1. fewer than two pairs: *not tested*;
    2. the equivalence test passes: *same within the margin*, also if the difference is significant,
       for then it is real but too small to matter;
    3. the difference is significant: *better* if it is a plus, else *worse*;
    4. *unclear*. That is no finding of "no difference".

    Args:
        levels: others to judge at, for what is looked at more than once.

    Returns:
        one row per comparison, with the columns JUDGED. Corrected p-values are alpha where the
        level is reached. `low` and `high` are the interval that
        belongs to the verdict: of confidence 1 - 2 alpha / family and within the margin if that is
        *same*, else of confidence 1 - alpha / family, which holds 0 just if that is *unclear* (or
        the whole margin and more). nan where every seed shows the same difference.
    """
    comparisons = list(comparisons)
    if levels is None:
        family = sum(comparison.n >= 2 for comparison in comparisons)
        levels = Levels(family, alpha / max(1, family), alpha / max(1, family))
    rows = []
    for own in comparisons:
        p = min(1.0, alpha / levels.difference * own.p)
        equivalence_p = min(1.0, alpha / levels.equivalence * own.equivalence_p)
        confidence = 1 - levels.difference
        if own.n < 2:
            verdict = Verdict.untested
            p = equivalence_p = math.nan
        elif equivalence_p <= alpha:
            verdict, confidence = Verdict.same, 1 - 2 * levels.equivalence
        elif p <= alpha:
            verdict = Verdict.better if own.mean > 0 else Verdict.worse
        else:
            verdict = Verdict.unclear
        rows.append(
            {
                "verdict": str(verdict),
                **{name: getattr(own, name) for name in ("n", "dropped", "left_out", "mean", "sd")},
                **dict(zip(("low", "high"), own.interval(confidence), strict=True)),
                "confidence": confidence,
                **dict(zip(("low_95", "high_95"), own.interval(1 - levels.alone), strict=True)),
                "p": own.p,
                "p_adjusted": p,
                "equivalence_p": own.equivalence_p,
                "equivalence_p_adjusted": equivalence_p,
                "margin": own.margin,
                "family": levels.family,
            }
        )
    return pd.DataFrame(rows, columns=list(JUDGED))
