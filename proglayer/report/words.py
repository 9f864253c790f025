"""What verdicts are in words. Nothing reads these back."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from proglayer.console import counted
from proglayer.report import arms, stats
from proglayer.report.arms import DEEP, STANDARD
from proglayer.report.comparisons import Claim, Comparison, Kind, NotMade, Reason
from proglayer.report.early_exit import WITHIN_POINTS, Needed
from proglayer.report.measures import Timing
from proglayer.report.stats import Verdict
from proglayer.results.show import listed

MODEL_NAMES = {STANDARD: "Standard", DEEP: "Deep supervision"}
# A label longer than this is cut: it has to fit beside a figure.
LONGEST_LABEL = 60
NO_SECOND_LOOK = (
    "Do not add seeds to these and judge again: a plain test does not pay for a second look. Run "
    "new seeds with hydra/sweeper=settle, which does."
)
VERDICTS = {
    Verdict.better: "better",
    Verdict.worse: "worse",
    Verdict.same: "equivalent",
    Verdict.unclear: "inconclusive",
    Verdict.untested: "not tested",
}
TITLES = {
    Claim.deep_helps: "Deep supervision helps when layers are added",
    Claim.stable: "Existing layers must be stable",
    Claim.stepwise: "Stepwise training works",
}
KINDS = {Kind.models: "change in accuracy", Kind.ends: "each at its own end"}


def model_name(model: str) -> str:
    """Return a model for people."""
    return MODEL_NAMES.get(model, model)


def variant_name(variant: str) -> str:
    """Return a variant for people: `from scratch` for `control_from_scratch`."""
    experiment, space, rest = variant.partition(" ")
    if experiment in arms.ORDER:
        experiment = experiment.removeprefix("control_").replace("_", " ")
    name = experiment + space + rest
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def sentence(text: str) -> str:
    """Return text that begins with a capital."""
    return text[:1].upper() + text[1:]


def engineering(value: float) -> str:
    """Return a large number for people: 1.5 T, 320 M."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g}"


def label(own: Comparison) -> str:
    """Return what a comparison is of."""
    if own.kind is Kind.models:
        return f"{variant_name(own.a)}: deep supervision − Standard"
    return f"{variant_name(own.a)} − {variant_name(own.b)}"


def budget_text(own: Comparison) -> str:
    """Return what the two are equal in: `at equal tokens and compute`; nothing for other kinds."""
    if own.kind is not Kind.budget:
        return ""
    where = ", on the validation text" if own.on_validation else ""
    return f"at equal {' and '.join(own.budgets)}{where}"


def measured(own: Comparison) -> str:
    """Return what of the two is compared."""
    return budget_text(own) or KINDS[own.kind]


def described_as(own: Comparison) -> str:
    """Return what a comparison is of, in which model, and what the two are equal in."""
    model = model_name(own.model) if own.model else ""
    return ", ".join(filter(None, (label(own), model, budget_text(own))))


def command(lacks: NotMade) -> str:
    """Return the command that gives what a comparison lacks."""
    seeds = lacks.seeds
    whole = len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1
    text = f"range({seeds[0]},{seeds[-1] + 1})" if whole else ",".join(map(str, seeds))
    words = [f"experiment={','.join(lacks.experiments)}", f"model={','.join(lacks.models)}"]
    return f"python train.py -m {shlex.join([*words, *lacks.settings, f'seed={text}'])}"


def why_not(own: Comparison, lacks: NotMade) -> str:
    """Return why a comparison is not made, and what to run."""
    if lacks.reason is Reason.no_look:
        return f"The first interim look is at {lacks.first_look} seeds."
    if lacks.reason is Reason.no_runs:
        return f"Run: {command(lacks)}"
    share = "half" if abs(lacks.share - 0.5) < 0.02 else f"{lacks.share:.0%} of"
    return (
        f"{sentence(variant_name(own.b))} had {share} the {own.budgets[0]} (cut by max_epochs). "
        f"Run: {command(lacks)}"
    )


def answer(several: Sequence[Comparison]) -> str:
    """Return a sentence on a claim in a condition: what was found in each model."""
    parts = []
    for own in several:
        head = ", ".join(filter(None, (budget_text(own), own.model and model_name(own.model))))
        parts.append(f"{head}: {clause(own)}" if head else clause(own))
    return sentence("; ".join(parts)) + "."


def clause(own: Comparison) -> str:
    """Return a verdict with the difference and the interval that it rests on."""
    word, mean = VERDICTS[own.verdict], own.accuracy.mean
    if not own.tested:
        return f"{word} ({numbers(own).rstrip('.')})"
    if own.verdict in (Verdict.better, Verdict.worse):
        return f"{word} by {abs(mean):.{decimals(own)}f} points ({interval_text(own)})"
    if own.verdict is Verdict.same:
        return f"{word} within ±{own.accuracy.margin:g} points ({interval_text(own)})"
    return f"{word} (difference {mean_text(own)} points, {interval_text(own)})"


def numbers(own: Comparison) -> str:
    """Return what stands beside the word of a verdict: the difference with its interval, or why
    there is none.
    """
    if own.not_made:
        return why_not(own, own.not_made)
    if not own.tested:
        return f"{seeds_text(own.accuracy)} in both arms"
    return f"{mean_text(own)} points ({interval_text(own)})"


def interval_text(own: Comparison) -> str:
    """Return the interval that a verdict rests on, with the number of seeds."""
    interval = own.judged.interval
    if not math.isfinite(interval.low):
        return f"the same difference in all of {seeds_text(own.accuracy)}"
    text = f"{percent(interval.confidence)} interval {ends(interval, decimals(own))}"
    return f"{text}, {seeds_text(own.accuracy)}"


def ends(interval: stats.Interval, digits: int) -> str:
    """Return an interval, `-0.1 to +0.3`, where it is known."""
    known = math.isfinite(interval.low)
    return f"{interval.low:+.{digits}f} to {interval.high:+.{digits}f}" if known else ""


def mean_text(own: Comparison) -> str:
    """Return the mean difference, in points."""
    return f"{own.accuracy.mean:+.{decimals(own)}f}" if own.accuracy.n else ""


def left_out_text(pairs: stats.Pairs) -> str:
    """Return why seeds were left out: `2 failed, 1 waiting`."""
    return ", ".join(f"{count} {why}" for why, count in pairs.left_out.items())


def seeds_text(pairs: stats.Pairs) -> str:
    """Return `8 seeds`, or `6 of 8 seeds, left out: 2 failed`."""
    if not pairs.dropped:
        return counted(pairs.n, "seed")
    return (
        f"{pairs.n} of {counted(pairs.n + pairs.dropped, 'seed')}, left out: {left_out_text(pairs)}"
    )


def percent(confidence: float) -> str:
    """Return a confidence as people write it: 95 %, 99.3 %."""
    return f"{math.floor(1000 * confidence + 1e-9) / 10:g} %"


def decimals(own: Comparison) -> int:
    """Return the decimals that a difference deserves: two digits of half its interval alone."""
    half = (own.judged.alone.high - own.judged.alone.low) / 2
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
    shown = [own.detectable for own in made if math.isfinite(own.detectable)]
    if shown:
        seeds = [own.accuracy.n for own in made]
        count = " to ".join(dict.fromkeys([f"{min(seeds)}", f"{max(seeds)}"]))
        size = " to ".join(dict.fromkeys([f"{min(shown):.2g}", f"{max(shown):.2g}"]))
        notes.append(
            f"With {count} seeds, only differences above roughly {size} points would probably be "
            "detected (power 80 %); with so few seeds this is a rough estimate."
        )
    plans = [own.seeds_to_plan for own in made if own.verdict is Verdict.unclear]
    plans = [own for own in plans if not math.isnan(own[0])]
    if plans:
        notes.append(
            f"To settle all that is inconclusive takes about {plan(*max(plans))} seeds in all, "
            "with a power of 80 % for a difference of the margin, or for none; so few seeds show "
            "the spread, and so that number, only roughly."
            + ("" if any(own.look for own in made) else f" {NO_SECOND_LOOK}")
        )
    for own in made:
        differences = own.accuracy.differences
        if apart := own.accuracy.outlying:
            values = ", ".join(f"seed {seed}: {differences[seed]:+.2g}" for seed in apart)
            notes.append(
                f"Outliers in {described_as(own)}: {values} points; the others' median is "
                f"{differences.drop(apart).median():+.2g}. The mean includes them."
            )
    return notes


def timing_text(timing: Timing) -> str:
    """Return the best moment of growth, and how sure that is."""
    best, moments = timing.best, list(timing.losses)
    seeds = len(timing.losses)
    text = (
        f"{timing_title(timing)}: with the same {engineering(timing.budget)} operations in all "
        f"phases the mean loss is lowest, {timing.losses[best].mean():.4f} nats, where growth "
        f"comes after {_epochs([best])}, {100 * timing.shares[best]:.0f} % of the operations"
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
    return text + f"not told apart from it: {f'after {_epochs(others)}' if others else 'none'}."


def timing_title(timing: Timing) -> str:
    """Return which arms a study of the moment of growth is of."""
    return ", ".join([model_name(timing.model), *timing.settings])


def _epochs(moments: list[int]) -> str:
    return f"{listed([str(moment) for moment in moments], 12)} epoch{'s' * (moments != [1])}"


def needed_text(own: Needed) -> str:
    """Return how many layers an arm needs to predict as well as with all of them."""
    return (
        f"{variant_name(own.variant)}, {model_name(own.model)}: within {WITHIN_POINTS:g} "
        f"points of all {own.of_layers} layers' {own.accuracy_percent:.2f} % with "
        f"{own.layers:.2f} layers a token (from a confidence of {own.threshold:g} on; mean "
        f"over {counted(own.seeds, 'seed')}); the last exit accepts "
        f"{own.accepted_percent:.0f} % of the first one's guesses."
    )
