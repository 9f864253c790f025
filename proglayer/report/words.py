"""What verdicts are in words. Nothing reads these back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from proglayer.console import counted
from proglayer.errors import printable
from proglayer.report import arms, stats
from proglayer.report.arms import DEEP, STANDARD
from proglayer.report.comparisons import Claim, Comparison, Kind, NotMade, Reason, tally
from proglayer.report.early_exit import WITHIN_POINTS, Worth, needed
from proglayer.report.measures import Timing
from proglayer.report.stats import Verdict
from proglayer.results.show import listed

MODEL_NAMES = {STANDARD: "Standard", DEEP: "Deep supervision"}


def model_name(model: str) -> str:
    """Return a model for people."""
    return MODEL_NAMES.get(model, model)


def variant_name(variant: str) -> str:
    """Return a variant for people: `from scratch` for `control_from_scratch`."""
    experiment, space, rest = variant.partition(" ")
    if experiment in arms.ORDER:
        experiment = experiment.removeprefix("control_").replace("_", " ")
    return printable(experiment + space + rest)


def sentence(text: str) -> str:
    """Return text that begins with a capital."""
    return text[:1].upper() + text[1:]


TITLES = {claim: sentence(claim) for claim in Claim}


def engineering(value: float) -> str:
    """Return a large number for people: 1.5 T, 320 M."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g}"


def label(one: Comparison) -> str:
    """Return what a comparison is of."""
    if one.kind is Kind.models:
        return f"{variant_name(one.a)}: deep supervision − Standard"
    return f"{variant_name(one.a)} − {variant_name(one.b)}"


def budget_text(one: Comparison) -> str:
    """Return what the two are equal in: `at equal tokens and compute`; nothing for other kinds."""
    if one.kind is not Kind.budget:
        return ""
    return f"at equal {' and '.join(one.budgets)}"


def measured(one: Comparison) -> str:
    """Return what of the two is compared."""
    if one.kind is Kind.models:
        return f"change in {one.text} accuracy"
    return f"{one.text} accuracy {budget_text(one) or 'of each at its own end'}"


def described_as(one: Comparison) -> str:
    """Return what a comparison is of, in which model, and what the two are equal in."""
    model = model_name(one.model) if one.model else ""
    return ", ".join(filter(None, (label(one), model, budget_text(one))))


def why_not(one: Comparison, lacks: NotMade) -> str:
    """Return why a comparison is not made, and what to run."""
    if lacks.reason is Reason.failed:
        failed, ended = lacks.lost
        which = f"{variant_name(lacks.arm[0])}, {model_name(lacks.arm[1])}"
        return f"{failed} of {ended} runs of {which} failed: the others cannot speak for them."
    if lacks.reason is Reason.no_look:
        return f"The first interim look is at {lacks.first_look} seeds."
    run = f"Run {' '.join(lacks.run)} with the same seeds and settings."
    if lacks.reason is Reason.no_runs:
        return run
    if lacks.reason is Reason.mid_schedule:
        much = f"{lacks.share:.2g} times the {one.budgets[0]}"
        cut = "within it, its rate is amid its schedule"
        return f"{sentence(variant_name(one.b))} had {much}: {cut}. {run}"
    share = "half" if abs(lacks.share - 0.5) < 0.02 else f"{lacks.share:.0%} of"
    return (
        f"{sentence(variant_name(one.b))} had {share} the {one.budgets[0]} (cut by max_epochs). "
        f"{run}"
    )


def clause(one: Comparison) -> str:
    """Return a verdict with the difference and the interval that it rests on."""
    word, mean, on = one.verdict, one.accuracy.mean, f"of {one.text} accuracy"
    if not one.tested:
        return f"{word} ({numbers(one).rstrip('.')})"
    if one.verdict in (Verdict.better, Verdict.worse):
        return f"{word} by {abs(mean):.{decimals(one)}f} points {on} ({interval_text(one)})"
    if one.verdict is Verdict.same:
        return f"{word} within ±{one.accuracy.margin:g} points {on} ({interval_text(one)})"
    return f"{word} (difference {mean_text(one)} points {on}, {interval_text(one)})"


def numbers(one: Comparison) -> str:
    """Return what stands beside the word of a verdict: the difference with its interval, or why
    there is none.
    """
    if one.not_made:
        return why_not(one, one.not_made)
    if not one.tested:
        return f"{seeds_text(one.accuracy)} in both arms"
    return f"{mean_text(one)} points of {one.text} accuracy ({interval_text(one)})"


def interval_text(one: Comparison) -> str:
    """Return the interval that a verdict rests on, with the number of seeds."""
    interval = one.judged.interval
    if not math.isfinite(interval.low):
        return f"the same difference in all of {seeds_text(one.accuracy)}"
    form = f"+.{decimals(one)}f"
    ends = f"{interval.low:{form}} to {interval.high:{form}}"
    repeated = " repeated" if one.look else ""
    text = f"{percent(interval.confidence)}{repeated} interval {ends}, {seeds_text(one.accuracy)}"
    estimate = one.judged.corrected
    if not (one.look and math.isfinite(estimate)):
        return text
    return f"{text}; corrected for stopping there: {estimate:{form}}"


def with_interval(mean: float, low: float, high: float, form: str) -> str:
    """Return `+0.1 (-0.1 to +0.3)`, as far as it is known."""
    around = f" ({low:{form}} to {high:{form}})" if math.isfinite(low) else ""
    return f"{mean:{form}}{around}" if math.isfinite(mean) else ""


def ends_text(one: Comparison) -> str:
    """Return the interval that a verdict rests on, with its confidence, where it is known."""
    interval, form = one.judged.interval, f"+.{decimals(one)}f"
    shown = f"{interval.low:{form}} to {interval.high:{form}} ({percent(interval.confidence)})"
    return shown if math.isfinite(interval.low) else ""


def mean_text(one: Comparison) -> str:
    """Return the mean difference, in points."""
    return f"{one.accuracy.mean:+.{decimals(one)}f}" if one.accuracy.n else ""


def seeds_text(pairs: stats.Pairs) -> str:
    """Return `8 seeds`, or `6 of 8 seeds, left out: 2 failed`."""
    if not pairs.dropped:
        return counted(pairs.n, "seed")
    of = counted(pairs.n + pairs.dropped, "seed")
    return f"{pairs.n} of {of}, left out: {tally(pairs.left_out)}"


def percent(confidence: float) -> str:
    """Return a confidence as people write it: 95 %, 99.3 %."""
    return f"{math.floor(1000 * confidence + 1e-9) / 10:g} %"


def decimals(one: Comparison) -> int:
    """Return the decimals that a difference deserves: two digits of half its interval alone."""
    half = (one.judged.alone.high - one.judged.alone.low) / 2
    if not (math.isfinite(half) and half > 0):
        return 2
    return min(4, max(0, 1 - math.floor(math.log10(half))))


def plan(seeds: float, low: float, high: float) -> str:
    """Return a number of seeds and its range, `24 (8 to 60)`; see `stats.seeds_for_margin`."""

    def text(number: float) -> str:
        return "more than a million" if math.isinf(number) else f"{float(f'{number:.2g}'):,.0f}"

    return f"{text(seeds)} ({text(low)} to {text(high)})"


def limits(made: Sequence[Comparison]) -> list[str]:
    """Return what these seeds can show, what it would take to know more, and outlying seeds."""
    notes = []
    shown = [one.detectable for one in made if math.isfinite(one.detectable[0])]
    if shown:
        seeds = [one.accuracy.n for one in made]
        count = " to ".join(dict.fromkeys([f"{min(seeds)}", f"{max(seeds)}"]))
        size, low, high = max(shown)
        notes.append(
            f"With {count} seeds, a true difference of {size:.2g} points ({low:.2g} to {high:.2g}, "
            "as the spread is uncertain) would be detected in each comparison with a power of 80 %."
        )
    plans = [one.seeds_to_plan for one in made if one.verdict is Verdict.unclear]
    plans = [one for one in plans if not math.isnan(one[0])]
    if plans:
        notes.append(
            f"To settle all that is inconclusive takes about {plan(*max(plans))} seeds in all, "
            "with a power of 80 % for a difference of the margin, or for none; with so few seeds "
            "this is a rough estimate."
        )
        if not any(one.look for one in made):
            last = max(max(one.accuracy.differences.index) for one in made)
            notes.append(
                "Do not add seeds to these and judge again: a plain test does not pay for a second "
                "look. Run new ones with hydra/sweeper=settle "
                f"hydra.sweeper.first_seed={last + 1}, which pays for its looks."
            )
    for one in made:
        differences = one.accuracy.differences
        if apart := one.accuracy.outlying:
            values = ", ".join(f"seed {seed}: {differences[seed]:+.2g}" for seed in apart)
            notes.append(
                f"Outliers in {described_as(one)}: {values} points; the others' median is "
                f"{differences.drop(apart).median():+.2g}. The mean includes "
                f"{'this outlier' if len(apart) == 1 else 'these outliers'}."
            )
    return notes


def timing_text(timing: Timing) -> str:
    """Return the best moment of growth, and how sure that is."""
    best, moments = timing.best, list(timing.losses)
    same = [
        f"after {_epochs([first])} and after {_epochs(others)}"
        for first, others in timing.alike.items()
        if others
    ]
    seeds = len(timing.losses)
    which = ", ".join([model_name(timing.model), *timing.settings])
    text = (
        f"{which}: with the same {engineering(timing.budget)} operations in all phases the mean "
        f"validation loss is lowest, {timing.losses[best].mean():.4f} nats, where growth comes "
        f"after {_epochs([best])}, {100 * timing.shares[best]:.0f} % of the operations"
    )
    if best in (moments[0], moments[-1]):
        end = "earliest" if best == moments[0] else "latest"
        text += f" (the {end} that was tried: the best may lie beyond it)"
    if seeds < 2:
        return text + ". One seed: nothing can be concluded."
    worse = timing.worse
    others = [m for m in moments if m != best and m not in worse]
    text += f"; it is the lowest in {timing.best_in} of {seeds} seeds. "
    text += f"Shown to be worse: {f'after {_epochs(worse)}' if worse else 'no other moment'}; "
    text += f"not told apart from it: {f'after {_epochs(others)}' if others else 'none'}."
    return text + "".join(
        f" The models grown {each} are the same, and count once." for each in same
    )


def _epochs(moments: list[int]) -> str:
    return f"{listed([str(moment) for moment in moments], 12)} epoch{'s' * (moments != [1])}"


def needed_texts(found: Worth) -> list[str]:
    """Return of each arm how many layers it needs to predict as well as with all of them."""
    if found.early_exit.empty:
        return []
    return [
        f"{variant_name(one.variant)}, {model_name(one.model)}: the fewest layers a token that "
        f"lose at most {WITHIN_POINTS:g} points against all {one.of_layers} are {one.layers:.2f}, "
        f"at a confidence of {one.threshold:g}: validation accuracy is {one.early_percent:.2f} %, "
        f"with all layers {one.accuracy_percent:.2f} % (mean over {counted(one.seeds, 'seed')}). "
        "The last exit accepts "
        f"{one.accepted_percent:.0f} % of the first one's guesses."
        for one in needed(found).itertuples()
    ]


def left_out_texts(found: Worth) -> list[str]:
    """Return of each arm what the loss is without one of the upper half of its layers."""
    changed, texts = found.changed_layers, list[str]()
    if changed.empty:
        return texts
    middle = changed.groupby("run")["layer"].transform("max") / 2
    upper = changed[(changed["change"] == "left out") & (changed["layer"] > middle)]
    for (variant, model), arm in upper.groupby(["variant", "model"], sort=False):
        over = stats.summary(arm.groupby("seed")["loss_rise"].mean())
        change = with_interval(over.mean, over.low, over.high, "+.4f")
        texts.append(
            f"{variant_name(variant)}, {model_name(model)}: to leave out one of the upper half of "
            f"its layers changes the validation loss by {change} nats (mean over these layers and "
            f"{counted(over.n, 'seed')}, 95 % interval)."
        )
    return texts
