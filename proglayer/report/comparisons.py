"""The comparisons of a study, each made once: the founding experiment's claims, and the others.

The claims, of all conditions together, are one family, and the other comparisons another; what
belongs to the claims is not among the others. Accuracy is judged. Loss and perplexity of the same
pairs are described by their 95 % intervals, without a verdict of their own.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from proglayer.report import ledger, stats, study
from proglayer.report.study import DEEP, METRICS, STANDARD, Frame, Margins
from proglayer.results import NOT_THE_EXPERIMENT, keys_and_values

NO_SECOND_LOOK = (
    "Do not add seeds to these and judge again: a plain test does not pay for a second look. Run "
    "new seeds with hydra/sweeper=settle, which does."
)
# From this share on, a budget counts as spent: training ends with an epoch.
NEARLY_EQUAL = 0.9


@dataclass(frozen=True)
class Claim:
    """A claim of the founding experiment: what is compared, in short and in full, and its runs."""

    title: str
    short: str
    measured_by: str
    experiments: tuple[str, ...]


DEEP_HELPS = Claim(
    "Deep supervision helps when layers are added",
    "deep supervision against Standard, change in accuracy",
    "the change in accuracy from the first phase to the last, deep supervision − Standard",
    (study.ORIGINAL,),
)
STABLE = Claim(
    "Existing layers must be stable",
    "existing layers frozen against nothing frozen",
    "the final accuracy with the existing layers frozen − with nothing frozen, at its best epoch "
    "within the operations that the frozen run took",
    (study.ORIGINAL, study.UNFROZEN),
)
STEPWISE = Claim(
    "Stepwise training works",
    "grown against from scratch",
    "the final accuracy of the grown model − that of the same depth trained from scratch, at its "
    "best epoch within the tokens (or operations, head included) that growing took in all phases",
    (study.ORIGINAL, study.FROM_SCRATCH),
)
CLAIMS = (DEEP_HELPS, STABLE, STEPWISE)


@dataclass(frozen=True, eq=False)
class Question:
    """A comparison that was asked for: of a with b in one model, or of two models in `a`."""

    a: str
    b: str
    model: str  # empty where the models are what is compared
    measured: str  # what of the two is compared, in words
    comparisons: Mapping[str, stats.Comparison]  # by the name of the metric; empty if not made
    claim: str = ""
    condition: str = ""
    reason: str = ""  # why it is not made, and what to run
    budgets: tuple[str, ...] = ()  # tokens, compute: what the two are equal in


NOT_MADE = stats.paired(pd.Series(dtype=float), pd.Series(dtype=float))
# What a question is called in the frames.
LABELS = ["claim", "condition", "a", "b", "model", "measured"]


def judge(questions: Iterable[Question], levels: stats.Levels | None = None) -> Frame:
    """Judge all these as one family, by their accuracy; at `levels` if they are given.

    Returns:
        one row per question: LABELS, `reason`, `comparisons` (the objects, by the name of the
        metric), and the columns of `stats.judge`.
    """
    questions = list(questions)
    names = [*LABELS, "reason", "comparisons"]
    labels = pd.DataFrame([[getattr(q, n) for n in names] for q in questions], columns=names)
    made = [q.comparisons.get(study.ACCURACY.name, NOT_MADE) for q in questions]
    return pd.concat([labels, stats.judge(made, levels)], axis="columns")


# --- the claims -----------------------------------------------------------------------------------


def claimed(runs: Frame, curves: Frame, margins: Margins) -> list[Question]:
    """What the claims ask of one condition; a claim that cannot be asked says why.

    Args:
        runs: of `Arms.asked`, also those that did not complete.
        curves: of `ledger.curves`, of these runs.
    """
    arms = _arms(runs)
    original = study.plain_variant(runs, study.ORIGINAL)
    growing = list(runs.loc[runs["grows"], "variant"].unique())
    asked: dict[Claim, list[Question]] = {claim: [] for claim in CLAIMS}
    judged_in = [original] if original is not None and original in growing else growing
    asked[DEEP_HELPS] = models(arms, judged_in, margins)
    if original is not None:
        unfrozen = study.plain_variant(runs, study.UNFROZEN)
        scratch = study.controls(runs, study.FROM_SCRATCH).get(original)
        for claim, control, measures in (
            (STABLE, unfrozen, {"compute": ledger.FLOPS}),
            (STEPWISE, scratch, {"tokens": ledger.TOKENS, "compute": ledger.FLOPS}),
        ):
            if control is not None:
                asked[claim] = _within(runs, arms, curves, original, control, measures, margins)
    questions = []
    for claim, own in asked.items():
        if not own:
            command = _command(runs, original or "", claim.experiments, (STANDARD, DEEP))
            own = [Question("", "", "", "", {}, reason=f"Not tested. Run: {command}")]
        questions += [replace(question, claim=claim.title) for question in own]
    return questions


# The runs of each arm, by variant and model, indexed by seed.
Arms = dict[tuple[str, str], Frame]


def _arms(runs: Frame) -> Arms:
    # Of the settings one is read; to select rows of all of them takes most of the time.
    read = [c for c in runs if not c.startswith("config.")]
    return {
        arm: own.set_index("seed")
        for arm, own in runs[read].groupby(["variant", "model"], sort=False)
    }


def models(arms: Arms, variants: Sequence[str], margins: Margins) -> list[Question]:
    """The change under deep supervision less that under Standard, in those variants with both."""
    questions = []
    for variant in variants:
        deep, standard = arms.get((variant, DEEP)), arms.get((variant, STANDARD))
        if deep is None or standard is None or not (deep["phases"] > 1).any():
            continue
        values = {m: (deep[m.change], standard[m.change]) for m in METRICS}
        compared = _compare(deep, standard, values, margins)
        questions.append(
            Question(variant, DEEP, "", "change, deep supervision − Standard", compared)
        )
    return questions


def _compare(
    a: Frame, b: Frame, values: Mapping[study.Metric, tuple[Frame, Frame]], margins: Margins
) -> dict[str, stats.Comparison]:
    """Compare two arms in these values of theirs, by the name of the metric."""
    reasons = pd.concat([b["lacks"], a["lacks"]]).dropna().to_dict()
    return {
        metric.name: stats.paired(*both, margin=metric.margin(margins), reasons=reasons)
        for metric, both in values.items()
    }


def _ends(a: Frame, b: Frame, margins: Margins, text: str = "end") -> dict[str, stats.Comparison]:
    """Compare accuracy and loss of two arms by seed, as judged or on the validation text.

    Perplexity is in percent of b's.
    """
    loss, other = a[f"{text}_loss"], b[f"{text}_loss"]
    fall = -100 * np.expm1(loss - other.reindex(loss.index))
    values = {
        study.ACCURACY: (a[f"{text}_accuracy"], b[f"{text}_accuracy"]),
        study.PERPLEXITY: (fall, 0 * other),
        study.LOSS: (-loss, -other),
    }
    return _compare(a, b, values, margins)


def _within(
    runs: Frame,
    arms: Arms,
    curves: Frame,
    a: str,
    b: str,
    measures: Mapping[str, ledger.Measure],
    margins: Margins,
) -> list[Question]:
    """Variant a at its end against b within what a spent, in each model that has both.

    Measures in which b gives the same figures are one comparison. One whose condition does not hold
    is not made: b had less, because `max_epochs` cut it.
    """
    questions: list[Question] = []
    for model in dict.fromkeys(runs["model"]):
        own, other = arms.get((a, model)), arms.get((b, model))
        if own is None or other is None:
            continue
        alike: dict[str, Frame] = {}
        reason = ""
        for word, measure in measures.items():
            found = within_budget(own, other, curves, measure)
            if found["cut"].any():
                if not reason:
                    reason = _cut_short(runs, b, model, found[found["cut"]], word)
                    measured = f"at equal {word}"
                    questions.append(Question(a, b, model, measured, {}, reason=reason))
                continue
            same = [n for n, earlier in alike.items() if earlier["epoch"].equals(found["epoch"])]
            name = f"{same[0]} and {word}" if same else f"at equal {word}"
            alike[name] = alike.pop(same[0]) if same else found
        for name, found in alike.items():
            # An epoch that its run did not select has no figures on the test text.
            judged = found["selected"].all()
            budgets = tuple(name.removeprefix("at equal ").split(" and "))
            compared = _ends(own, found, margins, "end" if judged else "validation")
            if not judged and (own["judged_on"] == "test").any():
                name += ", on the validation text"
            questions.append(Question(a, b, model, name, compared, budgets=budgets))
    return questions


def within_budget(own: Frame, other: Frame, curves: Frame, measure: ledger.Measure) -> Frame:
    """What each run of an arm comes to if it may spend what the run of the same seed spent.

    It counts at its epoch of lowest validation loss, at its final depth, among those that ended
    within that budget.

    Args:
        own, other: the runs of two arms, indexed by seed; `own` sets the budget.
        curves: of `ledger.curves`, of these runs among others.

    Returns:
        `other`, with the `epoch` that counts, whether the run itself `selected` it, its figures as
        `end_...` and `validation_...` (nan for a run without a partner, or over the budget in its
        first epoch), the `share` of the budget that it was trained for, whether it counts or not,
        whether that is less because `max_epochs` `cut` it, and the epochs that it `needs` for all.
    """
    budget = own[measure.column].astype("float64").reindex(other.index)
    seeds = other.reset_index()[["run", "seed", "last_layers"]]
    final = curves.drop(columns="seed", errors="ignore").merge(seeds, on="run")
    final = final[final["layers"] == final["last_layers"]]
    last = final.drop_duplicates("seed", keep="last").set_index("seed").reindex(other.index)
    # The two sums were added up in different orders.
    inside = final[final[measure.column] <= final["seed"].map(budget) * (1 + 1e-9)]
    best = inside.sort_values("loss", kind="stable").drop_duplicates("seed")
    best = best.set_index("seed").reindex(other.index)
    none, selected = best["step"].isna(), best["best"].eq(True)
    over = none & other["lacks"].isna() & np.isfinite(budget)
    share = last[measure.column] / budget
    more = np.ceil((1 / share - 1) * last["step"])
    return other.assign(
        epoch=best["step"],
        selected=selected | none,
        end_accuracy=other["end_accuracy"].where(selected, best["accuracy_percent"]),
        end_loss=other["end_loss"].where(selected, best["loss"]),
        validation_accuracy=best["accuracy_percent"],
        validation_loss=best["loss"],
        share=share,
        cut=other["stopped"].astype(str).str.startswith("max_epochs") & (share < NEARLY_EQUAL),
        needs=other["last_epochs"] + more,
        lacks=other["lacks"].mask(over, "over the budget in its first epoch"),
    )


def _cut_short(runs: Frame, variant: str, model: str, cut: Frame, word: str) -> str:
    """Why a comparison within a budget is not made, and what to run."""
    share = cut["share"].median()
    words = "half" if abs(share - 0.5) < 0.02 else f"{share:.0%} of"
    name = study.variant_name(variant)
    first = runs[runs["variant"] == variant].iloc[0]
    setting = "phase.max_epochs" if first["phases"] == 1 else "phase.grown.max_epochs"
    most = f"{setting}={cut['needs'].max():.0f}"
    command = _command(runs, variant, (first["experiment"],), (model,), most)
    return (
        f"{name[:1].upper()}{name[1:]} had {words} the {word} (cut by max_epochs). Run: {command}"
    )


def _command(
    runs: Frame, like: str, experiments: Sequence[str], models: Sequence[str], *extra: str
) -> str:
    """The command that gives the runs of these experiments, otherwise as the variant `like`."""
    named = {"experiment", "model", "seed", *NOT_THE_EXPERIMENT}
    named |= {text.split("=")[0] for text in extra}
    rows = runs[runs["variant"] == like]
    first = rows["overrides"].dropna().iloc[:1].tolist()
    kept = [f"{k}={v}" for k, v in keys_and_values(shlex.split("".join(first))) if k not in named]
    numbers = sorted(set(runs["seed"].tolist()))
    whole = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
    seeds = f"range({numbers[0]},{numbers[-1] + 1})" if whole else ",".join(map(str, numbers))
    words = [f"experiment={','.join(experiments)}", f"model={','.join(models)}", *kept, *extra]
    return f"python train.py -m {shlex.join([*words, f'seed={seeds}'])}"


# --- the others -----------------------------------------------------------------------------------


def others(runs: Frame, claims: Sequence[Question], margins: Margins) -> list[Question]:
    """Every other comparison of one condition that tells something.

    The models in each variant with phases; each variant with the original, or, where it is a
    control, the original with it; and each growing variant with the controls of its own size.
    Where the original was not run, the first variant that is its experiment as it is, else the
    first of all, stands for it.
    """
    arms = _arms(runs)
    variants = list(dict.fromkeys(runs["variant"]))
    claimed = {question.a for question in claims if not question.model}
    original = study.plain_variant(runs, study.ORIGINAL)
    plain = runs["variant"][runs["base"].astype(bool)].tolist()
    reference = original or (plain or variants)[0]
    questions = models(arms, [v for v in variants if v not in claimed], margins)
    pairs: dict[tuple[str, str], None] = {}
    for experiment in (study.FROM_SCRATCH, study.KEEP_TRAINING):
        pairs |= dict.fromkeys(study.controls(runs, experiment).items())
    controls = set(runs.loc[runs["experiment"].str.startswith("control_"), "variant"])
    for variant in variants:
        if variant != reference:
            pairs[(reference, variant) if variant in controls else (variant, reference)] = None
    for a, b in pairs:
        for model in dict.fromkeys(runs["model"]):
            if (a, model) in arms and (b, model) in arms:
                compared = _ends(arms[a, model], arms[b, model], margins)
                questions.append(Question(a, b, model, "each at its own end", compared))
    return questions


def described(judged: Frame) -> tuple[Frame, Frame]:
    """Every comparison with every metric, and the differences by seed, as plain tables.

    Returns:
        the columns of `judge` without its objects, with `metric`, `effect_size` and `sign_flip_p`,
        a row per comparison and metric; the columns of the verdict are missing for those that are
        not judged. And `claim`, `condition`, `a`, `b`, `model`, `measured`, `metric`, `seed`,
        `difference`.
    """
    rows, by_seed = [], []
    for row in judged.to_dict("records"):
        label = {name: row[name] for name in LABELS}
        own = row.pop("comparisons") or {study.ACCURACY.name: NOT_MADE}
        for metric, compared in own.items():
            low, high = compared.interval(0.95)
            found = {"n": compared.n, "dropped": compared.dropped, "left_out": compared.left_out}
            found |= {"mean": compared.mean, "sd": compared.sd, "margin": compared.margin}
            found |= {"low_95": low, "high_95": high, "effect_size": compared.effect_size}
            found["sign_flip_p"] = compared.sign_flip_p
            verdict = row if metric == study.ACCURACY.name else {}
            rows.append(label | {"metric": metric} | verdict | found)
            by_seed += [
                label | {"metric": metric, "seed": seed, "difference": difference}
                for seed, difference in compared.differences.items()
            ]
    return pd.DataFrame(rows), pd.DataFrame(by_seed)


# --- in words -------------------------------------------------------------------------------------


def label(row: Mapping[str, Any]) -> str:
    """What a comparison is of."""
    if not row["model"]:
        return f"{study.variant_name(row['a'])}: deep supervision − Standard"
    return f"{study.variant_name(row['a'])} − {study.variant_name(row['b'])}"


def described_as(row: Mapping[str, Any]) -> str:
    """What a comparison is of, in which model, and what the two are equal in."""
    where = row["measured"] if row["measured"].startswith("at ") else ""
    model = study.model_name(row["model"]) if row["model"] else ""
    return ", ".join(part for part in (label(row), model, where) if part)


def answer(rows: Frame) -> str:
    """One sentence on a claim in a condition: what was found in each model, with its numbers."""
    if rows["reason"].astype(bool).all():
        # One command for all models that lack the same.
        reasons: dict[str, list[str]] = {}
        for row in rows.to_dict("records"):
            alike = row["reason"].replace(f" model={row['model']} ", " model={} ")
            reasons.setdefault(alike, []).append(row["model"])
        return " ".join(text.replace("{}", ",".join(own)) for text, own in reasons.items())
    parts: list[str] = []
    before = ""
    for row in rows.to_dict("records"):
        who = study.model_name(row["model"]) if row["model"] else ""
        if not who and rows["a"].nunique() > 1:
            who = study.variant_name(row["a"])
        where = row["measured"] if row["measured"].startswith("at ") else ""
        same, before = where == before, where
        who = who[:1].lower() + who[1:] if who == study.model_name(DEEP) else who
        head = ", ".join(part for part in ("" if same else where, who) if part)
        parts.append(f"{head}: {clause(row)}" if head else clause(row))
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def clause(row: Mapping[str, Any]) -> str:
    """A verdict with the difference and the interval that it rests on."""
    if row["reason"]:
        return f"not tested ({row['reason'].rstrip('.')})"
    if row["n"] < 2:
        count = "no seed" if row["n"] == 0 else "one seed"
        left_out = f", left out: {row['left_out']}" if row["left_out"] else ""
        return f"not tested ({count} in both arms{left_out})"
    digits = decimals(row)
    seeds = seeds_text(row)
    interval = (
        f"{percent(row['confidence'])} interval {row['low']:+.{digits}f} to "
        f"{row['high']:+.{digits}f}, {seeds}"
        if math.isfinite(row["low"])
        else f"the same difference in all of {seeds}"
    )
    size = f"{abs(row['mean']):.{digits}f} points"
    verdict = row["verdict"]
    if verdict in (stats.Verdict.better, stats.Verdict.worse):
        return f"{verdict} by {size} ({interval})"
    if verdict == stats.Verdict.same:
        return f"the same within ±{row['margin']:g} points ({interval})"
    return f"{verdict} (difference {row['mean']:+.{digits}f} points, {interval})"


def seeds_text(row: Mapping[str, Any]) -> str:
    """`8 seeds`, or `6 of 8 seeds, left out: 2 failed`."""
    if not row["dropped"]:
        return f"{row['n']} seeds"
    return f"{row['n']} of {row['n'] + row['dropped']} seeds, left out: {row['left_out']}"


def percent(confidence: float) -> str:
    """A confidence as people write it: 95 %, 99.3 %."""
    return f"{math.floor(1000 * confidence + 1e-9) / 10:g} %"


def decimals(row: Mapping[str, Any]) -> int:
    """The decimals that a difference deserves: two digits of half its 95 % interval."""
    half = (row["high_95"] - row["low_95"]) / 2
    if not (math.isfinite(half) and half > 0):
        return 2
    return min(4, max(0, 1 - math.floor(math.log10(half))))


def plan(seeds: float, low: float, high: float) -> str:
    """`24 (8 to 60)`: a number of seeds and its range; see `stats.seeds_for_margin`."""

    def text(number: float) -> str:
        return "more than a million" if math.isinf(number) else f"{float(f'{number:.2g}'):,.0f}"

    return f"{text(seeds)} ({text(low)} to {text(high)})"


def detectable(row: Mapping[str, Any]) -> float:
    """The smallest true difference that these seeds would probably find, in points."""
    return stats.smallest_difference(row["sd"], row["n"], alpha=row["level"])


def seeds_to_plan(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """How many seeds in all would settle a comparison; see `stats.seeds_for_margin`."""
    return stats.seeds_for_margin(row["sd"], row["n"], row["margin"], alpha=row["level"])


def how_judged(made: Frame, margins: Margins) -> str:
    """What the words and the lines of the first picture mean."""
    family, looks = int(made["family"].max()), "look" in made
    levels = made["level"].max(), made["level"].min()

    def confidence(sides: int) -> str:
        return " to ".join(dict.fromkeys(percent(1 - sides * level) for level in levels))

    what = [f"{family} comparisons"] * (family > 1) + ["all looks"] * looks
    together = f"; {' and '.join(what)} are judged together, so that all lines hold with 95 %"
    return (
        f"Differences under {margins.points:g} points are treated as equal (shaded). Dots are "
        f"seeds. A line is the interval that the verdict rests on: {confidence(1)}, or "
        f"{confidence(2)} for “same”{together if what else ''}. Unclear means that the data do not "
        "tell; it does not mean that there is no difference."
    )


def limits(made: Frame) -> list[str]:
    """What these seeds can show, what it would take to know more, and which seeds stand apart."""
    notes = []
    records = made.to_dict("records")
    shown = [value for value in map(detectable, records) if math.isfinite(value)]
    if shown:
        count = " to ".join(dict.fromkeys([f"{made['n'].min()}", f"{made['n'].max()}"]))
        low, high = (f"{value:.2g}" for value in (min(shown), max(shown)))
        several = f"{low} to {high} points, depending on the comparison,"
        size = f"{high} points" if low == high else several
        notes.append(
            f"With {count} seeds, only differences above roughly {size} would probably be detected "
            "(power 80 %)."
        )
    plans = [seeds_to_plan(row) for row in records if row["verdict"] == stats.Verdict.unclear]
    plans = [own for own in plans if not math.isnan(own[0])]
    if plans:
        notes.append(
            f"To settle all that is unclear takes about {plan(*max(plans))} seeds in all, with a "
            "power of 80 % for a difference of the margin, or for none; so few seeds show the "
            "spread, and so that number, only roughly."
            + ("" if "look" in made else f" {NO_SECOND_LOOK}")
        )
    for row in records:
        own = row["comparisons"][study.ACCURACY.name]
        if apart := own.outlying:
            values = ", ".join(f"seed {seed}: {own.differences[seed]:+.2g}" for seed in apart)
            model = f", {study.model_name(row['model'])}" if row["model"] else ""
            notes.append(
                f"Outlying in {label(row)}{model}: {values} points; the others' median is "
                f"{own.differences.drop(apart).median():+.2g}. The mean is of both kinds of runs."
            )
    return notes
