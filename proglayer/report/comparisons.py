"""The comparisons of a study, each made once: the founding experiment's claims, and the others.

The claims, of all conditions together, are one family, and the other comparisons another; what
belongs to the claims is not among the others. Accuracy is judged. Loss and perplexity of the same
pairs are described by their 95 % intervals, without a verdict of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from proglayer.report import arms as arm
from proglayer.report import stats
from proglayer.report.arms import DEEP, STANDARD, Frame, Margins, Metric

# From this share on, a budget counts as spent: training ends with an epoch.
NEARLY_EQUAL = 0.9


class Claim(StrEnum):
    """A claim of the founding experiment."""

    deep_helps = "deep supervision helps when layers are added"
    stable = "existing layers must be stable"
    stepwise = "stepwise training works"


# The experiments that each claim compares, the one with the claim first.
EXPERIMENTS = {
    Claim.deep_helps: (arm.ORIGINAL,),
    Claim.stable: (arm.ORIGINAL, arm.UNFROZEN),
    Claim.stepwise: (arm.ORIGINAL, arm.FROM_SCRATCH),
}


class Kind(StrEnum):
    """What is compared of two arms.

    models: the change from the first phase to the last, deep supervision - Standard, in `a`.
    budget: `a` at its end - `b` at its best epoch within what `a` spent.
    ends: `a` - `b`, each at its own end.
    """

    models = "models"
    budget = "budget"
    ends = "ends"


class Budget(StrEnum):
    """What two arms are equal in: training tokens, or operations with the head."""

    tokens = "tokens"
    compute = "compute"


# The column of `measures.curves` that counts it.
COLUMN = {Budget.tokens: "tokens", Budget.compute: "flops"}


class Reason(StrEnum):
    """Why a comparison is not made."""

    no_runs = "no runs"  # of what it compares
    cut_short = "cut short"  # `max_epochs` ended `b` before it had spent its budget
    no_look = "no look"  # a study with looks, before its first one


@dataclass(frozen=True)
class NotMade:
    """Why a comparison is not made, and the overrides of the runs that would let it be made."""

    reason: Reason
    share: float = math.nan  # cut_short: of the budget, that `b` was trained for
    first_look: int = 0  # no_look: the seeds that it takes
    run: tuple[str, ...] = ()  # overrides; seeds and other settings are those of the others


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison that was asked for, and what is said of it."""

    kind: Kind
    a: str  # a variant
    b: str  # another; empty where the models of one are compared
    model: str  # empty where the models are what is compared
    pairs: Mapping[Metric, stats.Pairs] = field(default_factory=dict)  # empty if it is not made
    budgets: tuple[Budget, ...] = ()  # those in which the same epochs of `b` count
    on_validation: bool = False  # though others are judged on the test text
    not_made: NotMade | None = None
    claim: Claim | None = None
    condition: str = ""
    judged: stats.Judgement = stats.UNTESTED
    look: int = 0  # the seeds of the look that it is of; 0 in a study that is looked at once

    @property
    def accuracy(self) -> stats.Pairs:
        """The pairs that are judged."""
        return self.pairs.get(Metric.accuracy, stats.NO_PAIRS)

    @property
    def verdict(self) -> stats.Verdict:
        """What the data say of a - b."""
        return self.judged.verdict

    @property
    def tested(self) -> bool:
        """Whether there are pairs enough for a verdict."""
        return self.accuracy.n > 1

    @property
    def settled(self) -> bool:
        """Whether it came out as better, worse, or the same within the margin."""
        return self.verdict not in (stats.Verdict.unclear, stats.Verdict.untested)

    @property
    def open(self) -> bool:
        """Whether more seeds may settle it: it can be made, and is not settled."""
        return bool(self.pairs) and not self.settled

    @property
    def detectable(self) -> float:
        """The smallest true difference that these seeds would probably find, in points."""
        own = self.accuracy
        return stats.smallest_difference(own.sd, own.n, alpha=self.judged.levels.each)

    @property
    def seeds_to_plan(self) -> tuple[float, float, float]:
        """How many seeds in all would settle it; see `stats.seeds_for_margin`."""
        own = self.accuracy
        return stats.seeds_for_margin(own.sd, own.n, own.margin, alpha=self.judged.levels.each)


def judge(
    comparisons: Iterable[Comparison], levels: stats.Levels | None = None
) -> list[Comparison]:
    """Judge all these as one family, by their accuracy; at `levels` if they are given."""
    family = list(comparisons)
    judged = stats.judge([own.accuracy for own in family], levels)
    return [replace(own, judged=found) for own, found in zip(family, judged, strict=True)]


# --- the claims -----------------------------------------------------------------------------------


def claimed(runs: Frame, curves: Frame, margins: Margins, condition: str = "") -> list[Comparison]:
    """Make what the claims ask of one condition; a claim that cannot be asked says why.

    Args:
        runs: of `Arms.asked`, also those that did not complete.
        curves: of `measures.curves`, of these runs.
        condition: its name.
    """
    by_arm = _by_arm(runs)
    original = arm.plain_variant(runs, arm.ORIGINAL)
    growing = list(runs.loc[runs["grows"].astype(bool), "variant"].unique())
    judged_in = [original] if original in growing else growing
    asked = {claim: [] for claim in Claim} | {Claim.deep_helps: _models(by_arm, judged_in, margins)}
    unfrozen = arm.plain_variant(runs, arm.UNFROZEN)
    scratch = arm.controls(runs, arm.FROM_SCRATCH).get(original or "")
    for claim, control, budgets in (
        (Claim.stable, unfrozen, (Budget.compute,)),
        (Claim.stepwise, scratch, (Budget.tokens, Budget.compute)),
    ):
        if original and control:
            asked[claim] = _within(runs, by_arm, curves, original, control, budgets, margins)
    for claim, own in asked.items():
        if not own:
            run = f"experiment={','.join(EXPERIMENTS[claim])}", f"model={STANDARD},{DEEP}"
            lacks = NotMade(Reason.no_runs, run=run)
            own.append(Comparison(Kind.models, "", "", "", not_made=lacks))
    return [
        replace(comparison, claim=claim, condition=condition)
        for claim, own in asked.items()
        for comparison in own
    ]


# The runs of each arm, by variant and model, indexed by seed.
ByArm = dict[tuple[str, str], Frame]


def _by_arm(runs: Frame) -> ByArm:
    # Of the settings none is read; to select rows of all of them takes most of the time.
    read = [c for c in runs if not c.startswith("config.")]
    return {
        which: own.set_index("seed")
        for which, own in runs[read].groupby(["variant", "model"], sort=False)
    }


def _models(by_arm: ByArm, variants: Iterable[Any], margins: Margins) -> list[Comparison]:
    """Compare the change under deep supervision with that under Standard, in each variant."""
    made = []
    for variant in variants:
        deep, standard = by_arm.get((variant, DEEP)), by_arm.get((variant, STANDARD))
        if deep is None or standard is None or not (deep["phases"] > 1).any():
            continue
        values = {m: (deep[m.change], standard[m.change]) for m in Metric}
        pairs = _pairs(deep, standard, values, margins)
        made.append(Comparison(Kind.models, variant, "", "", pairs))
    return made


def _pairs(
    a: Frame, b: Frame, values: Mapping[Metric, tuple[Frame, Frame]], margins: Margins
) -> dict[Metric, stats.Pairs]:
    """Pair two arms by seed in these values of theirs."""
    reasons = pd.concat([b["lacks"], a["lacks"]]).dropna().to_dict()
    return {
        metric: stats.paired(*both, margin=margins.of(metric), reasons=reasons)
        for metric, both in values.items()
    }


# The columns of accuracy and loss: of the text that is judged on, and of the validation text.
JUDGED = ("end_accuracy", "end_loss")
VALIDATION = ("last_accuracy_percent", "last_loss")


def _ends(
    a: Frame, b: Frame, margins: Margins, columns: tuple[str, str] = JUDGED
) -> dict[Metric, stats.Pairs]:
    """Pair accuracy and loss of two arms by seed. Perplexity is in percent of b's."""
    accuracy, loss = ([own[name].astype("float64") for own in (a, b)] for name in columns)
    own, other = loss
    fall = arm.fall_in_perplexity(other.reindex(own.index) - own)
    values = {
        Metric.accuracy: (accuracy[0], accuracy[1]),
        Metric.perplexity: (fall, 0 * other),
        Metric.loss: (-own, -other),
    }
    return _pairs(a, b, values, margins)


def _within(
    runs: Frame,
    by_arm: ByArm,
    curves: Frame,
    a: str,
    b: str,
    budgets: Sequence[Budget],
    margins: Margins,
) -> list[Comparison]:
    """Compare variant a at its end with b within what a spent, in each model that has both.

    Budgets in which the same epochs of b count are one comparison. One whose condition does not
    hold is not made: b had less, because `max_epochs` cut it.
    """
    made: list[Comparison] = []
    for model in dict.fromkeys(runs["model"]):
        own, other = by_arm.get((a, model)), by_arm.get((b, model))
        if own is None or other is None:
            continue
        lacking: list[Comparison] = []
        alike: dict[tuple[Budget, ...], Frame] = {}
        for budget in budgets:
            found = within_budget(own, other, curves, COLUMN[budget])
            if (cut := found[found["too_short"]]).size:
                why = _cut_short(runs, b, model, cut)
                lacking.append(
                    Comparison(Kind.budget, a, b, model, budgets=(budget,), not_made=why)
                )
                continue
            same = [
                key for key, earlier in alike.items() if earlier["epoch"].equals(found["epoch"])
            ]
            alike |= {(*same[0], budget): alike.pop(same[0])} if same else {(budget,): found}
        made += lacking[:1]
        for key, found in alike.items():
            # An epoch that its run did not select has no figures on the test text.
            selected = found["selected"].all()
            pairs = _ends(own, found, margins, JUDGED if selected else VALIDATION)
            on_validation = not selected and (own["judged_on"] == "test").any()
            made.append(
                Comparison(
                    Kind.budget, a, b, model, pairs, budgets=key, on_validation=bool(on_validation)
                )
            )
    return made


def within_budget(own: Frame, other: Frame, curves: Frame, column: str) -> Frame:
    """Return what each run of an arm comes to if it may spend what the run of the same seed spent.

    It counts at its epoch of lowest validation loss, at its final depth, among those that ended
    within that budget. Epoch 0, the model right after a growth, is no epoch of training.

    Args:
        own, other: the runs of two arms, indexed by seed; `own` sets the budget, in `column`.
        curves: of `measures.curves`, of these runs among others.

    Returns:
        `other`, with the `epoch` that counts, whether the run itself `selected` it, its figures in
        JUDGED and VALIDATION (nan for a run without a partner, or over the budget in its first
        epoch), the `share` of the budget that it was trained for, whether it counts or not,
        whether that is `too_short` because `max_epochs` cut it, and the epochs it `needs` for all.
    """
    budget = own[column].astype("float64").reindex(other.index)
    seeds = other.reset_index()[["run", "seed", "last_layers"]]
    final = curves.drop(columns="seed", errors="ignore").merge(seeds, on="run")
    final = final[(final["layers"] == final["last_layers"]) & (final["epoch"] > 0)]
    last = final.drop_duplicates("seed", keep="last").set_index("seed").reindex(other.index)
    # The two sums were added up in different orders.
    inside = final[final[column] <= final["seed"].map(budget) * (1 + 1e-9)]
    best = inside.sort_values("loss", kind="stable").drop_duplicates("seed")
    best = best.set_index("seed").reindex(other.index)
    none, selected = best["step"].isna(), best["best"].eq(True)
    over = none & other["lacks"].isna() & np.isfinite(budget)
    share = last[column] / budget
    return other.assign(
        epoch=best["step"],
        selected=selected | none,
        end_accuracy=other["end_accuracy"].where(selected, best["accuracy_percent"]),
        end_loss=other["end_loss"].where(selected, best["loss"]),
        last_accuracy_percent=best["accuracy_percent"],
        last_loss=best["loss"],
        share=share,
        too_short=other["cut"].eq(True) & (share < NEARLY_EQUAL),
        needs=other["last_epochs"] + np.ceil((1 / share - 1) * last["step"]),
        lacks=other["lacks"].mask(over, stats.LeftOut.over_budget),
    )


def _cut_short(runs: Frame, variant: str, model: str, cut: Frame) -> NotMade:
    """Say how much of the budget a control had, and how many epochs it needs."""
    first = runs[runs["variant"] == variant].iloc[0]
    setting = "phase.max_epochs" if first["phases"] == 1 else "phase.grown.max_epochs"
    longer = f"{setting}={cut['needs'].max():.0f}"
    run = f"experiment={first['experiment']}", f"model={model}", longer
    return NotMade(Reason.cut_short, share=float(cut["share"].median()), run=run)


# --- the others -----------------------------------------------------------------------------------


def others(
    runs: Frame, claims: Sequence[Comparison], margins: Margins, condition: str = ""
) -> list[Comparison]:
    """Make every other comparison of one condition that tells something.

    The models in each variant with phases; each variant with the original, or, where it is a
    control, the original with it; and each growing variant with the controls of its own size.
    Where the original was not run, the first variant that is its experiment as it is, else the
    first of all, stands for it.
    """
    by_arm = _by_arm(runs)
    variants = list(dict.fromkeys(runs["variant"]))
    claimed = {own.a for own in claims if own.kind is Kind.models}
    plain = runs["variant"][runs["base"].astype(bool)].tolist()
    reference = arm.plain_variant(runs, arm.ORIGINAL) or (plain or variants)[0]
    made = _models(by_arm, [v for v in variants if v not in claimed], margins)
    pairs: dict[tuple[str, str], None] = {}
    for experiment in (arm.FROM_SCRATCH, arm.KEEP_TRAINING):
        pairs |= dict.fromkeys(arm.controls(runs, experiment).items())
    controls = set(runs.loc[runs["experiment"].str.startswith("control_"), "variant"])
    for variant in variants:
        if variant != reference:
            pairs[(reference, variant) if variant in controls else (variant, reference)] = None
    for a, b in pairs:
        for model in dict.fromkeys(runs["model"]):
            if (a, model) in by_arm and (b, model) in by_arm:
                both = _ends(by_arm[a, model], by_arm[b, model], margins)
                made.append(Comparison(Kind.ends, a, b, model, both))
    return [replace(own, condition=condition) for own in made]


# --- as tables ------------------------------------------------------------------------------------


def as_frames(comparisons: Iterable[Comparison]) -> tuple[Frame, Frame]:
    """Return every comparison with every metric, and the differences by seed, as plain tables.

    A row per comparison and metric; the columns of the verdict are missing for metrics that are not
    judged. `low_95` and `high_95` are of a metric by itself, whatever the looks.
    """
    rows, by_seed = [], []
    for own in comparisons:
        which = {name: getattr(own, name) for name in ("claim", "condition", "a", "b", "model")}
        which |= {"measured": own.kind, "budgets": " ".join(own.budgets)}
        which |= {"on_validation": own.on_validation}
        judged = own.judged
        verdict = {
            "verdict": own.verdict,
            "reason": own.not_made and own.not_made.reason,
            "look": own.look or None,
            **judged.interval._asdict(),
            **{f"{name}_alone": value for name, value in judged.alone._asdict().items()},
            "p": own.accuracy.p,
            "p_adjusted": judged.p_adjusted,
            "equivalence_p": own.accuracy.equivalence_p,
            "equivalence_p_adjusted": judged.equivalence_p_adjusted,
            "family": judged.levels.family,
            "level": judged.levels.each,
        }
        for metric, pairs in (own.pairs or {Metric.accuracy: stats.NO_PAIRS}).items():
            low, high, _ = pairs.interval(0.95)
            rows.append(
                which
                | {"metric": metric, **(verdict if metric is Metric.accuracy else {})}
                | {"n": pairs.n, "dropped": pairs.dropped, "mean": pairs.mean, "sd": pairs.sd}
                | {"left_out": ", ".join(f"{n} {why}" for why, n in pairs.left_out.items())}
                | {"margin": pairs.margin, "low_95": low, "high_95": high}
            )
            by_seed += [
                which | {"metric": metric, "seed": seed, "difference": difference}
                for seed, difference in pairs.differences.items()
            ]
    return pd.DataFrame(rows), pd.DataFrame(by_seed)
