"""What a handful of seeds can and cannot say: summaries, paired comparisons, verdicts.

Pure functions on numpy arrays and pandas objects. Every test of significance, correction and power
of a t-test is SciPy's or statsmodels'; written out here are Hedges' factor and the binomial error.

Three conventions hold throughout:

- A change is signed so that **plus is an improvement**: accuracy after - before, perplexity and
  loss before - after. A comparison of a with b is a - b, so plus means that a did better.
- Runs are **paired by seed**. Two arms that share a seed share their initial phase and their batch
  order; the difference within a seed is much less noisy than the two values.
- Values that are not finite (a failed or diverged run) are left out and **counted** in `dropped`;
  a comparison also says why, for what is true of the seeds that came through need not be of all.

With the small numbers of seeds that a study can afford, the paired t-test is the test that decides;
the exact sign-flip test, which assumes only symmetry, stands beside it. Where every difference is
the same, a t-test has no spread to judge by, and exact sign tests decide instead.

SciPy and statsmodels take a second to import, and of one seed nothing is tested: they are imported
where they are used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

# With more seeds than the first there would be more sign patterns than the second.
EXACT_SIGN_FLIP_SEEDS = 13
SIGN_FLIP_RESAMPLES = 9_999
# Beyond this a number of seeds is no plan any more, and the answer is "infinitely many".
MOST_SEEDS = 1_000_000
# Differences that agree to this share of the values themselves differ by rounding only.
ROUNDING = 1e-12


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
        from scipy import stats as sps

        sd = float(np.std(finite, ddof=1))
        scale = sd / math.sqrt(n)
        low, high = map(float, sps.t.interval(confidence, n - 1, loc=mean, scale=scale))
    return Summary(n, array.size - n, mean, sd, low, high)


def _too_few(seeds: int) -> str:
    if seeds == 0:
        return "no seed: nothing can be concluded"
    return "one seed: nothing can be concluded" if seeds == 1 else ""


def _require_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value:g} must lie between 0 and 1")


# --- two arms, paired by seed ---------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The difference a - b within seeds, in the unit of the values. See `paired`."""

    n: int  # seeds with a finite value in both arms
    dropped: int  # seeds of either arm without such a partner
    left_out: str  # why those were dropped, each reason with the number of seeds; empty if none was
    mean: float  # mean difference; nan without a pair
    sd: float  # of the differences; nan below two pairs; exactly 0 if they are all the same
    low: float  # interval of the mean difference at confidence 1 - alpha; nan below two pairs
    high: float
    t_p: float  # paired t-test, two-sided; nan below two pairs and where sd is 0
    sign_flip_p: float  # sign-flip test of the mean, two-sided; nan below two pairs
    sign_flip_exact: bool  # every sign pattern was tried, rather than a random sample of them
    effect_size: float  # Cohen's dz with Hedges' correction, unitless; nan below three pairs
    equivalence_p: float  # that the true difference lies outside +-margin; nan below two pairs
    margin: float  # differences within +-margin count as none
    alpha: float  # level of the intervals and of the figures of planning below
    power: float  # of those figures

    @property
    def constant(self) -> bool:
        """Every seed shows the same difference, up to rounding."""
        return self.n >= 2 and self.sd == 0

    @property
    def p(self) -> float:
        """The p-value that decides: the t-test's; the sign-flip test's where that is undefined."""
        return self.sign_flip_p if self.constant else self.t_p

    @property
    def sign_flip_floor(self) -> float:
        """The lowest p that the sign-flip test can reach with this many seeds."""
        return min(1.0, 2.0 ** (1 - self.n))

    @property
    def smallest_difference(self) -> float:
        """The difference that this many seeds would have shown with the given power.

        nan below two pairs, and where sd is 0, since then the spread is not known.
        """
        return smallest_difference(self.sd, self.n, alpha=self.alpha, power=self.power)

    @property
    def seeds_for_difference(self) -> float:
        """Seeds to find a difference, if the observed mean and sd are the true ones."""
        return seeds_for_difference(self.mean, self.sd, alpha=self.alpha, power=self.power)

    @property
    def seeds_for_equivalence(self) -> float:
        """Seeds to establish equivalence, if the observed mean and sd are the true ones."""
        return seeds_for_equivalence(
            self.sd, self.margin, difference=self.mean, alpha=self.alpha, power=self.power
        )

    @property
    def note(self) -> str:
        """What limits these numbers, in words; empty if nothing special does."""
        if self.n < 2:
            return _too_few(self.n)
        notes = []
        if self.constant:
            notes.append("every seed shows the same difference, so exact sign tests decide")
        if self.sign_flip_floor > self.alpha:
            fewest = _fewest_sign_flips(self.alpha)
            notes.append(
                f"with {self.n} seeds the sign-flip test cannot go below"
                f" p = {self.sign_flip_floor:.3g}; {fewest} are the fewest that reach"
                f" {self.alpha:g}"
            )
        return "; ".join(notes)


def paired(
    a_by_seed: pd.Series,
    b_by_seed: pd.Series,
    *,
    margin: float = 0.1,
    alpha: float = 0.05,
    power: float = 0.8,
    reasons: Mapping[Any, str] | None = None,
) -> Comparison:
    """Compare two arms by their differences a - b within seeds.

    Args:
        a_by_seed, b_by_seed: one value per seed, indexed by seed. Seeds that only one arm has, or
            that lack a finite value, are counted in `dropped`.
        reasons: seed -> why one of its arms has no finite value, for `left_out`.
        margin: a true difference within +-margin counts as none; in the unit of the values.
        alpha: significance level; intervals have confidence 1 - alpha.
        power: of the smallest difference and the numbers of seeds.

    Two-sided tests of no difference: the paired t-test (`scipy.stats.ttest_1samp` of the
    differences) and the sign-flip test, exact up to EXACT_SIGN_FLIP_SEEDS seeds
    (`scipy.stats.permutation_test`), above with a fixed random sample of SIGN_FLIP_RESAMPLES sign
    patterns (`scipy.stats.monte_carlo_test`: a standard error of 0.002 at p = 0.05). Equivalence:
    two one-sided t-tests (`DescrStatsW.ttost_mean`; Schuirmann 1987), whose p-value is the larger
    of the two. Effect size: mean / sd, times Hedges' (1981) factor for n - 1 degrees of freedom.

    Where every difference is the same (up to rounding), the t-tests are undefined: `t_p` and the
    effect size are nan, the sign-flip test is exact for any number of seeds, and equivalence is
    judged by the exact sign test, whose p is 0.5 ** n if the difference is within the margin,
    else 1.

    Raises:
        ValueError: for a seed that occurs twice in one arm, or a margin that is not positive.
    """
    _require_probability("alpha", alpha)
    _require_probability("power", power)
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin={margin:g} must be positive")
    for name, arm in (("a_by_seed", a_by_seed), ("b_by_seed", b_by_seed)):
        repeated = arm.index[arm.index.duplicated()].unique()
        if len(repeated):
            raise ValueError(f"{name} has more than one value for seed {_listed(repeated)}")

    arms = pd.concat([a_by_seed, b_by_seed], axis=1, keys=["a", "b"]).astype(float)
    pairs = arms.loc[np.isfinite(arms.to_numpy()).all(axis=1)]
    dropped = arms.index.difference(pairs.index, sort=False)
    in_both = a_by_seed.index.intersection(b_by_seed.index)
    why = Counter(
        (reasons or {}).get(seed, "no finite value" if seed in in_both else "not in both arms")
        for seed in dropped
    )
    a, b = pairs["a"].to_numpy(), pairs["b"].to_numpy()
    differences = a - b
    n = len(differences)
    rounding = ROUNDING * max(np.abs(a).max(), np.abs(b).max()) if n else 0.0
    if n and np.ptp(differences) <= rounding:
        # Rounding of a and b leaves a spread of the last bits, on which a t-test would be certain
        # of anything; a mean of last bits is no difference either.
        mean = float(np.mean(differences))
        differences = np.full(n, 0.0 if abs(mean) <= rounding else mean)

    over_seeds = summary(differences, confidence=1 - alpha)
    mean, sd = over_seeds.mean, over_seeds.sd
    t_p, effect_size, equivalence_p = math.nan, math.nan, math.nan
    sign_flip_p, sign_flip_exact = math.nan, True
    if n >= 2:
        from scipy import stats as sps
        from statsmodels.stats.weightstats import DescrStatsW

        if sd == 0:
            # Of equal differences a sum is as large as the one observed only with all its signs.
            sign_flip_p = float(sps.binomtest(n, n, 0.5).pvalue) if mean else 1.0
            inside = n if margin - abs(mean) > max(rounding, ROUNDING * margin) else 0
            equivalence_p = float(sps.binomtest(inside, n, 0.5, alternative="greater").pvalue)
        else:
            sign_flip_p, sign_flip_exact = _sign_flip(differences)
            t_p = float(np.asarray(sps.ttest_1samp(differences, 0.0)[1]))
            equivalence_p = float(DescrStatsW(differences).ttost_mean(-margin, margin)[0])
            if n >= 3:
                effect_size = _hedges_factor(n - 1) * mean / sd
    return Comparison(
        n=n,
        dropped=len(dropped),
        left_out=", ".join(f"{count} {reason}" for reason, count in sorted(why.items())),
        mean=mean,
        sd=sd,
        low=over_seeds.low,
        high=over_seeds.high,
        t_p=t_p,
        sign_flip_p=sign_flip_p,
        sign_flip_exact=sign_flip_exact,
        effect_size=effect_size,
        equivalence_p=equivalence_p,
        margin=margin,
        alpha=alpha,
        power=power,
    )


def _sign_flip(differences: np.ndarray) -> tuple[float, bool]:
    """The two-sided p of the mean among those of all sign patterns, and whether all were tried.

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
        return float(exact.pvalue), True
    sampled = sps.monte_carlo_test(
        np.ones(len(ordered)),
        lambda size: 2.0 * draw.integers(0, 2, size, dtype=np.int8) - 1.0,
        # Not by `@`: BLAS would wake threads for so little, which on a busy machine takes longest.
        lambda signs, axis: np.einsum("...j,j->...", signs, ordered),
        vectorized=True,
        n_resamples=SIGN_FLIP_RESAMPLES,
        batch=1_000,
    )
    return float(sampled.pvalue), False


def _hedges_factor(degrees: int) -> float:
    """Hedges (1981), J. Educ. Stat. 6, eq. 6e: what makes mean / sd an unbiased effect size."""
    log_ratio = math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)
    return math.exp(log_ratio) / math.sqrt(degrees / 2)


def _listed(names: Iterable[Any], most: int = 5) -> str:
    names = [str(name) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# --- how many seeds, how small a difference -------------------------------------------------------


def smallest_difference(sd: float, seeds: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
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
    difference: float, sd: float, *, alpha: float = 0.05, power: float = 0.8
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
    sd: float,
    margin: float,
    *,
    difference: float = 0.0,
    alpha: float = 0.05,
    power: float = 0.8,
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


# --- families of comparisons ----------------------------------------------------------------------


def holm(p_values: Any) -> np.ndarray:
    """Holm's adjusted p-values; nan stays nan and does not count in the family.

    Args:
        p_values: (comparisons,) raw p-values.
    """
    raw = np.asarray(p_values, dtype=float)
    adjusted = np.full(raw.shape, math.nan)
    tested = ~np.isnan(raw)
    if np.any((raw[tested] < 0) | (raw[tested] > 1)):
        raise ValueError("p-values must lie between 0 and 1")
    if tested.any():
        from statsmodels.stats.multitest import multipletests

        adjusted[tested] = multipletests(raw[tested], method="holm")[1]
    return adjusted


class Outcome(StrEnum):
    """What the data say of a hypothesis."""

    supported = "supported"
    refuted = "refuted"
    equivalent = "equivalent within the margin"
    undecided = "undecided"


@dataclass(frozen=True)
class Verdict:
    """An outcome, the numbers it rests on, and what it would take to decide."""

    outcome: Outcome
    sentence: str  # one line of plain text
    seeds_needed: float  # to decide; the seeds at hand if decided; inf, or nan if unknown
    could_show: float  # the smallest difference at the level of the family; nan if unknown


def verdict(
    comparison: Comparison,
    *,
    p_adjusted: float | None = None,
    equivalence_p_adjusted: float | None = None,
    family: int = 1,
    unit: str = "",
) -> Verdict:
    """Judge the hypothesis that a is above b, at the comparison's alpha.

    In this order:

    1. fewer than two pairs: *undecided*, nothing can be concluded;
    2. the equivalence test passes: *equivalent within the margin*, also if the difference is
       significant, for then it is real but too small to matter;
    3. the difference is significant: *supported* if it is a plus, else *refuted*;
    4. *undecided*. That is no finding of "no difference".

    Args:
        p_adjusted, equivalence_p_adjusted: the p-values corrected for the family of comparisons;
            without them the comparison's own count.
        family: how many comparisons the correction runs over. The seeds needed and the difference
            that could be shown are for the level alpha / family, the strictest of Holm's steps, and
            thus enough for any of them.
        unit: of the values, for the sentence ("points").

    The seeds needed to decide are the fewer of those that would show the difference and those that
    would show equivalence, were the observed mean and sd the true ones.
    """
    if family < 1:
        raise ValueError(f"family={family} must be at least 1")
    if comparison.n < 2:
        sentence = _sentence(comparison, None, None, unit)
        return Verdict(Outcome.undecided, sentence, math.nan, math.nan)

    p = comparison.p if p_adjusted is None else p_adjusted
    equivalence_p = (
        comparison.equivalence_p if equivalence_p_adjusted is None else equivalence_p_adjusted
    )
    level = comparison.alpha / family
    mean, sd, n, power = comparison.mean, comparison.sd, comparison.n, comparison.power
    could_show = smallest_difference(sd, n, alpha=level, power=power)
    at_level = f", at the level {level:.2g} of its family of {family}" if family > 1 else ""
    parts = [_sentence(comparison, p_adjusted, equivalence_p_adjusted, unit)]
    if comparison.note:
        parts.append(comparison.note)
    if math.isfinite(could_show):
        parts.append(
            f"{could_show:.3g}{f' {unit}' if unit else ''} was the smallest difference that"
            f" {n} seeds could show with power {power:g}{at_level}"
        )
    needed = float(n)
    if equivalence_p <= comparison.alpha:
        outcome = Outcome.equivalent
        if p <= comparison.alpha:
            parts.append("a real difference, but a negligible one")
    elif p <= comparison.alpha:
        outcome = Outcome.supported if mean > 0 else Outcome.refuted
    else:
        outcome = Outcome.undecided
        needed = min(
            seeds_for_difference(mean, sd, alpha=level, power=power),
            seeds_for_equivalence(sd, comparison.margin, difference=mean, alpha=level, power=power),
        )
        # More seeds than were not enough.
        needed = float(max(needed, n + 1))
        if math.isinf(needed):
            parts.append(f"not even {MOST_SEEDS:,} seeds would decide")
        else:
            parts.append(
                f"were these the true values, about {needed:,.0f} seeds would decide"
                + (", at that level" if at_level and math.isfinite(could_show) else at_level)
            )
    return Verdict(outcome, "; ".join(parts), needed, could_show)


def _sentence(
    comparison: Comparison,
    p_adjusted: float | None,
    equivalence_p_adjusted: float | None,
    unit: str,
) -> str:
    """The numbers of the tests that a verdict rests on, in one line of plain text."""
    unit = f" {unit}" if unit else ""
    seeds = f"{comparison.n} seeds"
    left_out = ""
    if comparison.dropped:
        seeds = f"{comparison.n} of {comparison.n + comparison.dropped} seeds"
        left_out = f" (left out: {comparison.left_out})"
    if comparison.n == 0:
        return comparison.note + left_out
    if comparison.n == 1:
        return f"difference {comparison.mean:+.3g}{unit}; {comparison.note}{left_out}"
    test = "sign-flip" if comparison.constant else "paired t"
    parts = [
        f"difference {comparison.mean:+.3g}{unit}, {1 - comparison.alpha:.0%} interval"
        f" {comparison.low:+.3g} to {comparison.high:+.3g}, {seeds}{left_out}",
        f"{test} {_p(comparison.p)}"
        + (f", {_p(p_adjusted)} adjusted" if p_adjusted is not None else "")
        + (f", sign-flip {_p(comparison.sign_flip_p)}" if not comparison.constant else ""),
        f"equivalence within {comparison.margin:g}{unit} {_p(comparison.equivalence_p)}"
        + (
            f", {_p(equivalence_p_adjusted)} adjusted" if equivalence_p_adjusted is not None else ""
        ),
    ]
    return "; ".join(parts)


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def compare(
    runs: pd.DataFrame,
    *,
    value: str,
    variant: str,
    pairs: Iterable[tuple[Hashable, Hashable]],
    within: str | None = None,
    seed: str = "seed",
    margin: float = 0.1,
    alpha: float = 0.05,
    power: float = 0.8,
    reason: str | None = None,
) -> dict[tuple[Any, Any, Any], Comparison]:
    """Pair the runs of two variants by seed, for every pair of variants asked for.

    Args:
        runs: one row per run.
        value: the column to compare, as `accuracy_change`.
        variant: the column that tells the arms apart, as `experiment`.
        pairs: (a, b) values of that column; the difference is a - b. A pair of which one side has
            no runs gives a comparison of no seeds.
        within: pairs are made within each value of this column, as `model`.
        seed: the column that pairs runs. Rows without a seed are ignored.
        reason: a column that says why a run has no finite value, if it does.

    Returns:
        (value of `within`, a, b) -> Comparison; the first is None without `within`.

    Raises:
        ValueError: for a missing column, or if a variant has more than one finite value for a seed
            (within the same value of `within`), naming them: the runs then differ in something
            else, and picking one would be arbitrary.
    """
    keys = ([] if within is None else [within]) + [variant, seed]
    told = [value, *([] if reason is None else [reason])]
    missing = [column for column in [*told, *keys] if column not in runs.columns]
    if missing:
        raise ValueError(f"the runs have no column {_listed(missing)}")
    pairs = list(pairs)
    arms = {arm for pair in pairs for arm in pair}
    used = runs.loc[runs[variant].isin(list(arms)) & runs[seed].notna(), [*keys, *told]]
    is_finite = np.isfinite(used[value].to_numpy(dtype=float, na_value=math.nan))
    finite = used.loc[is_finite]
    repeated = finite.loc[finite.duplicated(subset=keys)].drop_duplicates(subset=keys)
    if len(repeated):
        rows = [
            " ".join(f"{key}={row[key]}" for key in keys) for row in repeated.to_dict("records")
        ]
        raise ValueError(f"more than one run for {_listed(rows)}")
    # A failed run beside a finished one of the same seed is no rival of it.
    finite_first = np.argsort(~is_finite, kind="stable")
    used = used.iloc[finite_first].drop_duplicates(subset=keys)

    groups = [(None, used)]
    if within is not None:
        groups = list(used.groupby(within, sort=False, dropna=False, observed=True))
    result = {}
    for group, rows in groups:
        of_arm = {arm: rows.loc[rows[variant] == arm].set_index(seed) for arm in arms}
        values = {arm: own[value].astype(float) for arm, own in of_arm.items()}
        reasons: dict[Any, dict[Any, str]] = {arm: {} for arm in arms}
        if reason is not None:
            reasons = {arm: own[reason].dropna().to_dict() for arm, own in of_arm.items()}
        for a, b in pairs:
            result[group, a, b] = paired(
                values[a],
                values[b],
                margin=margin,
                alpha=alpha,
                power=power,
                reasons=reasons[b] | reasons[a],
            )
    return result


# What a row of `judge` tells of its comparison.
FIGURES = (
    "n",
    "dropped",
    "left_out",
    "mean",
    "sd",
    "low",
    "high",
    "t_p",
    "sign_flip_p",
    "sign_flip_exact",
    "p",
    "effect_size",
    "equivalence_p",
    "margin",
    "alpha",
    "smallest_difference",
    "seeds_for_difference",
    "seeds_for_equivalence",
    "note",
)


FOR_THE_FAMILY = ("verdict", "sentence", "seeds_needed", "could_show")


def judge(
    comparisons: Mapping[Any, Comparison] | Sequence[Comparison], *, unit: str = ""
) -> pd.DataFrame:
    """Judge comparisons as one family, with Holm's correction over all of them.

    The tests of difference and the tests of equivalence are corrected apart, so that the chance of
    any false claim of a difference is at most alpha, and so is that of any false claim of
    equivalence.

    Args:
        comparisons: what `compare` returns (several of its results merged make one family), or any
            mapping from labels to comparisons.

    Returns:
        one row per comparison. Columns: `within`, `a`, `b` (if the labels are such triples, else
        `label`); FIGURES, which are attributes of Comparison and hold for that comparison alone;
        `p_adjusted` and `equivalence_p_adjusted`; `verdict`, `sentence`, `seeds_needed` and
        `could_show`, which hold for the family.
    """
    if not isinstance(comparisons, Mapping):
        comparisons = dict(enumerate(comparisons))
    judged = list(comparisons.values())
    p_adjusted = holm([comparison.p for comparison in judged])
    equivalence_p_adjusted = holm([comparison.equivalence_p for comparison in judged])
    family = max(1, int(np.sum(~np.isnan(p_adjusted))))
    triples = all(isinstance(label, tuple) and len(label) == 3 for label in comparisons)
    label_columns = ("within", "a", "b") if triples else ("label",)
    rows = []
    for label, comparison, p, equivalence_p in zip(
        comparisons, judged, p_adjusted, equivalence_p_adjusted, strict=True
    ):
        found = verdict(
            comparison,
            p_adjusted=float(p),
            equivalence_p_adjusted=float(equivalence_p),
            family=family,
            unit=unit,
        )
        rows.append(
            [
                *(label if triples else (label,)),
                *(getattr(comparison, figure) for figure in FIGURES),
                p,
                equivalence_p,
                str(found.outcome),
                found.sentence,
                found.seeds_needed,
                found.could_show,
            ]
        )
    columns = [*label_columns, *FIGURES, "p_adjusted", "equivalence_p_adjusted"]
    return pd.DataFrame(rows, columns=[*columns, *FOR_THE_FAMILY])


def compare_all(runs: pd.DataFrame, *, unit: str = "", **pairing: Any) -> pd.DataFrame:
    """`compare` (which takes `pairing`) and `judge` in one: the pairs asked for are the family."""
    return judge(compare(runs, **pairing), unit=unit)
