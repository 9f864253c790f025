"""The comparisons of a study, each made once: the founding experiment's claims, and the others.

The claims, of all conditions together, are one family, and the other comparisons another; what
belongs to the claims is not among the others. Accuracy is judged. The loss of the same pairs is
described by its 95 % interval, without a verdict of its own. Differences are a - b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from proglayer.console import counted
from proglayer.report import arms as arm
from proglayer.report import stats
from proglayer.report.arms import DEEP, STANDARD, Frame, Metric
from proglayer.results.read import TEXTS
from proglayer.run.record import RunState

# From this share on, a budget counts as spent: training ends with an epoch.
NEARLY_EQUAL = 0.9
# Where more of an arm's runs failed, or were cut, the others cannot speak for them.
MOST_LOST = 0.1


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
    mid_schedule = "mid schedule"  # the budget would end `b` before its decaying rate does
    failed = "failed"  # too many runs of `a` or `b`
    no_look = "no look"  # a study with looks, before its first one


@dataclass(frozen=True)
class NotMade:
    """Why a comparison is not made, and the overrides of the runs that would let it be made."""

    reason: Reason
    share: float = math.nan  # cut_short, mid_schedule: of the budget, that `b` was trained for
    first_look: int = 0  # no_look: the seeds that it takes
    lost: tuple[int, int] = (0, 0)  # failed: so many runs, of so many that ended
    arm: tuple[str, str] = ("", "")  # failed: the variant and model that they are of
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
    text: str = "validation"  # or test: what it is measured on
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
    def loss(self) -> stats.Pairs:
        """The same pairs in loss, which are described."""
        return self.pairs.get(Metric.loss, stats.NO_PAIRS)

    def repeats(self, other: Comparison) -> bool:
        """Whether it is of the same arms as another one, and gives the same differences."""
        same = (self.a, self.b, self.model) == (other.a, other.b, other.model)
        return same and self.accuracy.differences.equals(other.accuracy.differences)

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
        """Whether it came out as better, worse, or equivalent."""
        return self.verdict not in (stats.Verdict.unclear, stats.Verdict.untested)

    @property
    def open(self) -> bool:
        """Whether more seeds may settle it: it can be made, and is not settled."""
        return bool(self.pairs) and not self.settled

    @property
    def detectable(self) -> tuple[float, float, float]:
        """The smallest true difference that these seeds would probably find, in points; see
        `stats.smallest_difference`.
        """
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


def claimed(runs: Frame, curves: Frame, margin: float, condition: str = "") -> list[Comparison]:
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
    asked = {claim: [] for claim in Claim} | {Claim.deep_helps: _models(by_arm, judged_in, margin)}
    unfrozen = arm.plain_variant(runs, arm.UNFROZEN)
    scratch = arm.controls(runs, arm.FROM_SCRATCH).get(original or "")
    for claim, control, budgets in (
        (Claim.stable, unfrozen, (Budget.compute,)),
        (Claim.stepwise, scratch, (Budget.tokens, Budget.compute)),
    ):
        if original and control:
            asked[claim] = _within(runs, by_arm, curves, original, control, budgets, margin)
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


def _models(by_arm: ByArm, variants: Iterable[Any], margin: float) -> list[Comparison]:
    """Compare the change under deep supervision with that under Standard, in each variant."""
    made = []
    for variant in variants:
        deep, standard = by_arm.get((variant, DEEP)), by_arm.get((variant, STANDARD))
        if deep is None or standard is None or not (deep["phases"] > 1).any():
            continue
        text = deep["judged_on"].iloc[0]
        values = {m: (deep[m.change(text)], standard[m.change(text)]) for m in Metric}
        asked = Comparison(Kind.models, variant, "", "", text=text)
        made.append(_compared(asked, deep, standard, values, margin))
    return made


def _compared(
    asked: Comparison,
    a: Frame,
    b: Frame,
    values: Mapping[Metric, tuple[Frame, Frame]],
    margin: float,
) -> Comparison:
    """Pair two arms by seed in these values of theirs, unless too many runs of one failed."""
    for own in (a, b):
        failed = int((own["status"] == RunState.failed).sum())
        ended = failed + int((own["status"] == RunState.completed).sum())
        if failed > MOST_LOST * ended:
            of = str(own["variant"].iloc[0]), str(own["model"].iloc[0])
            return replace(asked, not_made=NotMade(Reason.failed, lost=(failed, ended), arm=of))
    reasons = pd.concat([b["lacks"], a["lacks"]]).dropna().to_dict()
    pairs = {
        metric: stats.paired(*both, margin=margin, reasons=reasons)
        for metric, both in values.items()
    }
    return replace(asked, pairs=pairs)


def _at_ends(asked: Comparison, a: Frame, b: Frame, margin: float) -> Comparison:
    """Pair accuracy and loss of two arms by seed, at their ends."""
    values = {m: (a[m.last(asked.text)], b[m.last(asked.text)]) for m in Metric}
    return _compared(asked, a, b, values, margin)


def _within(
    runs: Frame,
    by_arm: ByArm,
    curves: Frame,
    a: str,
    b: str,
    budgets: Sequence[Budget],
    margin: float,
) -> list[Comparison]:
    """Compare variant a at its end with b within what a spent, in each model that has both.

    Budgets in which the same epochs of b count are one comparison. Seeds of which b had less,
    because `max_epochs` cut it, are left out; where they are many the comparison is not made. Nor
    is it where b had more and its rate decays: there it has to have a schedule of that length.
    """
    made: list[Comparison] = []
    for model in dict.fromkeys(runs["model"]):
        own, other = by_arm.get((a, model)), by_arm.get((b, model))
        if own is None or other is None:
            continue
        lacking: list[Comparison] = []
        alike: dict[tuple[Budget, ...], Frame] = {}
        for budget in budgets:
            found = within_budget(own, other, curves, COLUMN[budget], _decays(runs, b))
            cut, reason = found[found["too_short"]], Reason.cut_short
            if not len(cut):
                cut, reason = found[found["amid"]], Reason.mid_schedule
            if len(cut) > MOST_LOST * found["share"].notna().sum():
                why = _cut_short(runs, b, model, cut, reason)
                lacking.append(
                    Comparison(Kind.budget, a, b, model, budgets=(budget,), not_made=why)
                )
                continue
            ends = Metric.loss.last("validation")
            same = [key for key, earlier in alike.items() if earlier[ends].equals(found[ends])]
            alike |= {(*same[0], budget): alike.pop(same[0])} if same else {(budget,): found}
        made += lacking[:1]
        for key, found in alike.items():
            # Records of earlier versions have no test figures of an epoch that was not selected.
            there = found["epoch"].notna() & ~found["too_short"]
            tested = found.loc[there, Metric.loss.last("test")].notna().all()
            text = own["judged_on"].iloc[0] if tested else "validation"
            asked = Comparison(Kind.budget, a, b, model, budgets=key, text=text)
            made.append(_at_ends(asked, own, found, margin))
    return made


def within_budget(
    own: Frame, other: Frame, curves: Frame, column: str, decays: bool = False
) -> Frame:
    """Return what each run of an arm comes to if it may spend what the run of the same seed spent.

    It counts at its epoch of lowest validation loss, at its final depth, among those that ended
    within that budget. Epoch 0, the model right after a growth, is no epoch of training.

    Args:
        own, other: the runs of two arms, indexed by seed; `own` sets the budget, in `column`.
        curves: of `measures.curves`, of these runs among others.
        decays: `other` has rates that decay, so a run whose end is near the budget counts whole.

    Returns:
        `other`, with the `epoch` that counts, its figures as those of the run's end (nan for a run
        without a partner, over the budget in its first epoch, or cut), the `share` of the budget
        that it was trained for, whether that is `too_short` because `max_epochs` cut it, whether
        the budget ends `amid` its decaying rates, and the epochs it `needs` for all.
    """
    budget = own[column].astype("float64").reindex(other.index)
    seeds = other.reset_index()[["run", "seed", "last_layers"]]
    final = curves.drop(columns="seed", errors="ignore").merge(seeds, on="run")
    final = final[(final["layers"] == final["last_layers"]) & (final["epoch"] > 0)]
    last = final.drop_duplicates("seed", keep="last").set_index("seed").reindex(other.index)
    share = last[column] / budget
    beyond = (1 - 1 / share) * last["cumulative_epochs"]
    amid = decays & (share > 1 / NEARLY_EQUAL) & (beyond >= 1)
    # The two sums were added up in different orders.
    most = budget.mask(decays & ~amid, math.inf) * (1 + 1e-9)
    inside = final[final[column] <= final["seed"].map(most)]
    best = inside.sort_values("validation_loss", kind="stable").drop_duplicates("seed")
    best = best.set_index("seed").reindex(other.index)
    over = best["cumulative_epochs"].isna() & other["lacks"].isna() & np.isfinite(budget)
    too_short = other["cut"].eq(True) & (share < NEARLY_EQUAL)
    ends = {}
    for name in (metric.last(text) for metric in Metric for text in TEXTS):
        figures = other[name].where(best["best"].eq(True), best[name.removeprefix("last_")])
        ends[name] = figures.mask(too_short)
    lacks = other["lacks"].mask(over, stats.LeftOut.over_budget)
    return other.assign(
        epoch=best["cumulative_epochs"],
        **ends,
        share=share,
        too_short=too_short,
        amid=amid,
        needs=other["last_epochs"] + np.ceil(-beyond),
        lacks=lacks.mask(too_short, stats.LeftOut.cut_short),
    )


def _decays(runs: Frame, variant: str) -> bool:
    """Whether the rate of a variant's last phase falls to its end."""
    first = runs[runs["variant"] == variant].iloc[0]
    own: Any = first.get("config.lr.grown.schedule") if first["phases"] > 1 else None
    return (first.get("config.lr.schedule", "constant") if pd.isna(own) else own) != "constant"


def _cut_short(runs: Frame, variant: str, model: str, cut: Frame, reason: Reason) -> NotMade:
    """Say how much of the budget a control had, and how many epochs it needs."""
    first = runs[runs["variant"] == variant].iloc[0]
    own = pd.notna(first.get("config.phase.initial.max_epochs"))
    single = "phase.initial.max_epochs" if own else "phase.max_epochs"
    setting = single if first["phases"] == 1 else "phase.grown.max_epochs"
    needed = f"{setting}={cut['needs'].max():.0f}"
    named = [f"experiment={first['experiment']}"] if first["experiment"] else []
    if first["experiment"] != arm.FROM_SCRATCH and first["phases"] == 1:
        named.append("phase=from_scratch")
    run = (*named, f"model={model}", needed)
    return NotMade(reason, share=float(cut["share"].median()), run=run)


# --- the others -----------------------------------------------------------------------------------


def others(
    runs: Frame, claims: Sequence[Comparison], curves: Frame, margin: float, condition: str = ""
) -> list[Comparison]:
    """Make every other comparison of one condition that tells something.

    The models in each variant with phases; each variant with the original, or, where it is a
    control, the original with it; and each growing variant with the controls of its own size, at
    equal compute too where the control from scratch goes by its setting and not by its name.
    Where the original was not run, the first variant that is its experiment as it is, else the
    first of all, stands for it; a control of a variant with other settings is compared with its
    own control there. Arms that trained the same models as an earlier one, and what gives
    the differences of a claim again, are left out: no error is paid for them.
    """
    runs = runs[runs["same_as"].isna()]
    by_arm = _by_arm(runs)
    variants = list(dict.fromkeys(runs["variant"]))
    claimed = {own.a for own in claims if own.kind is Kind.models}
    plain = runs["variant"][runs["base"].astype(bool)].tolist()
    reference = arm.plain_variant(runs, arm.ORIGINAL) or (plain or variants)[0]
    made = _models(by_arm, [v for v in variants if v not in claimed], margin)
    from_scratch = arm.controls(runs, arm.FROM_SCRATCH)
    by_phases = {} if (runs["experiment"] == arm.FROM_SCRATCH).any() else from_scratch
    for a, b in by_phases.items():
        made += _within(runs, by_arm, curves, a, b, (Budget.compute,), margin)
    pairs: dict[tuple[str, str], None] = {}
    controls = set(runs.loc[runs["experiment"].str.startswith("control_"), "variant"])
    for found in (from_scratch, arm.controls(runs, arm.KEEP_TRAINING)):
        pairs |= dict.fromkeys(found.items())
        controls |= set(found.values())
    plain_control = by_phases.get(reference)
    other_controls = {*by_phases.values()} - {plain_control}
    for variant in variants:
        if plain_control and variant in other_controls:
            pairs[variant, plain_control] = None
        elif variant != reference:
            pairs[(reference, variant) if variant in controls else (variant, reference)] = None
    for a, b in pairs:
        for model in dict.fromkeys(runs["model"]):
            if (a, model) in by_arm and (b, model) in by_arm:
                asked = Comparison(Kind.ends, a, b, model, text=runs["judged_on"].iloc[0])
                one = _at_ends(asked, by_arm[a, model], by_arm[b, model], margin)
                if not any(one.repeats(own) for own in (*claims, *made)):
                    made.append(one)
    return [replace(own, condition=condition) for own in made]


# --- as tables ------------------------------------------------------------------------------------


def as_frames(comparisons: Iterable[Comparison]) -> tuple[Frame, Frame]:
    """Return every comparison with its verdict, and the differences by seed, as plain tables.

    `low` and `high` hold with `confidence`, for all that `pays_for` names; `low_alone` and
    `high_alone` with `confidence_alone`, for one comparison (at all looks); those of the loss, in
    nats, with 95 %, for that alone. `mean_corrected` is `sequential.corrected_for_stopping`.
    """
    rows, by_seed = [], []
    for own in comparisons:
        which = {name: getattr(own, name) for name in ("claim", "condition", "a", "b", "model")}
        which |= {"measured": own.kind, "budgets": " ".join(own.budgets)}
        which |= {"text": own.text}
        judged, pairs = own.judged, own.accuracy
        loss = own.loss.interval(0.95)
        rows.append(
            which
            | {"verdict": own.verdict, "reason": own.not_made and own.not_made.reason}
            | {"n": pairs.n, "dropped": pairs.dropped, "left_out": tally(pairs.left_out)}
            | {"mean": pairs.mean, "sd": pairs.sd, "margin": pairs.margin}
            | {"look": own.look or None, **judged.interval._asdict()}
            | {f"{name}_alone": value for name, value in judged.alone._asdict().items()}
            | {"p": pairs.p, "p_adjusted": judged.p_adjusted}
            | {"equivalence_p": pairs.equivalence_p}
            | {"equivalence_p_adjusted": judged.equivalence_p_adjusted}
            | {"family": judged.levels.family, "level": judged.levels.each}
            | {"pays_for": pays_for(own), "mean_corrected": judged.corrected}
            | {"loss_mean": own.loss.mean, "loss_low_95": loss.low, "loss_high_95": loss.high}
        )
        by_seed += [
            which | {"metric": metric, "seed": seed, "difference": difference}
            for metric, each in own.pairs.items()
            for seed, difference in each.differences.items()
        ]
    return pd.DataFrame(rows), pd.DataFrame(by_seed)


def pays_for(own: Comparison) -> str:
    """Return what the interval of a verdict pays for: `7 comparisons and all looks`."""
    looks = " and all looks" if own.look else ""
    return f"{counted(own.judged.levels.family, 'comparison')}{looks}"


def tally(counts: Mapping[str, int]) -> str:
    """Return `2 failed, 1 waiting`."""
    return ", ".join(f"{count} {what}" for what, count in counts.items())
