"""What a report says, before it is laid out: conditions with their tables, judged comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from proglayer.report import comparisons, early_exit, growth, ledger, sequential, study, tokenizers
from proglayer.report.study import Arms, Frame, Margins
from proglayer.results import Results

# A section of a page shows so many variants; the others are in the tables.
MOST_VARIANTS = 12
# And so many conditions.
MOST_CONDITIONS = 4


@dataclass(frozen=True, eq=False)
class Condition:
    """The runs that compare with each other, and what was found of them."""

    name: str
    slug: str  # what tells its pictures from those of other conditions
    runs: Frame
    asked: Frame  # these, and those of their arms that did not complete
    curves: Frame
    reference: str  # the variant whose final loss is the target of `to_target`
    tables: Mapping[str, Frame]  # by the names of their files

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(self.runs["variant"]))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(self.runs["model"]))

    @property
    def shown(self) -> list[str]:
        """The variants that a page has room for."""
        return self.variants[:MOST_VARIANTS]

    def of_shown(self, table: Frame) -> Frame:
        """The rows of these variants."""
        return table[table["variant"].isin(self.shown)] if len(table) else table


@dataclass(frozen=True, eq=False)
class Judged:
    """A study as a report sees it."""

    results: Results
    arms: Arms
    conditions: list[Condition]  # the largest first: it is what the study is about
    claims: Frame
    others: Frame
    tokenizers: Frame  # of `tokenizers.across`
    margins: Margins
    looks: sequential.Looks | None

    @property
    def several(self) -> bool:
        """Whether there are several conditions, so that their names have to be said."""
        return len(self.conditions) > 1


def judge(results: Results, margins: Margins, looks: sequential.Looks | None) -> Judged:
    """Sort runs into conditions, and make and judge every comparison of theirs."""
    arms = study.arms(results)
    every = ledger.curves(results, arms.runs)
    numbers = range(len(arms.conditions))
    conditions = [_condition(results, arms, every, number) for number in numbers]
    conditions.sort(key=lambda condition: -len(condition.runs))
    claims, others = [], []
    for condition in conditions:
        own = comparisons.claimed(condition.asked, condition.curves, margins)
        rest = comparisons.others(condition.asked, own, margins)
        claims += [replace(question, condition=condition.name) for question in own]
        others += [replace(question, condition=condition.name) for question in rest]
    if looks is None:
        judged = comparisons.judge(claims)
    else:
        asked = [(condition.name, condition.asked) for condition in conditions]
        judged = sequential.judge(asked, every, margins, looks)
    rest, between = comparisons.judge(others), tokenizers.across(arms)
    return Judged(results, arms, conditions, judged, rest, between, margins, looks)


def _condition(results: Results, arms: Arms, curves: Frame, number: int) -> Condition:
    runs, asked = arms.of(number), arms.asked(number)
    curves = curves.merge(runs[["run", "variant", "model", "seed", "grows"]], on="run")
    original = study.plain_variant(runs, study.ORIGINAL)
    scratch = study.plain_variant(runs, study.FROM_SCRATCH)
    reference = scratch or original or runs["variant"].iloc[0]
    worth = early_exit.worth(runs)
    targets = ledger.default_targets(runs, reference)
    tables = {
        "changes": study.changes(asked),
        "growth": growth.growths(results, runs),
        "exits_worth": worth.exits,
        "early_exit": worth.early_exit,
        "changed_layers": worth.changed_layers,
        "ledger": ledger.spent(results, runs),
        "to_target": ledger.to_target(runs, curves, targets),
        "speed_up": ledger.speed_up(runs, curves, study.controls(runs, study.FROM_SCRATCH)),
    }
    slug = f"-{number + 1}" if number else ""
    return Condition(arms.conditions[number], slug, runs, asked, curves, reference, tables)
