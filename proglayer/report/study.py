"""A study: many runs read together, with every comparison made and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proglayer.report import arms as arm
from proglayer.report import comparisons, early_exit, measures, sequential
from proglayer.report.arms import FROM_SCRATCH, MARGIN, Arms, Frame
from proglayer.report.comparisons import Comparison
from proglayer.results import Results


@dataclass(frozen=True, eq=False)
class Condition:
    """The runs that compare with each other, and what they come to."""

    name: str
    number: int  # in the order of the first runs
    runs: Frame
    asked: Frame  # these, and those of their arms that did not complete
    curves: Frame
    worth: early_exit.Worth
    tables: Mapping[str, Frame]  # by the names of their files


@dataclass(frozen=True, eq=False)
class Study:
    """A study as a report shows it."""

    results: Results
    arms: Arms
    conditions: list[Condition]  # the largest first: it is what the study is about
    claims: list[Comparison]
    others: list[Comparison]
    margin: float  # differences within it count as none, in points of accuracy
    looks: sequential.Looks | None


def judge_study(results: Results, margin: float, looks: sequential.Looks | None) -> Study:
    """Sort runs into conditions, and make and judge every comparison of theirs.

    Args:
        margin: differences within it count as none, in points of accuracy.
        looks: how the study was looked at while seeds were added; None for one looked at once.
    """
    arms = arm.arms(results)
    every = measures.curves(results, arms.runs)
    conditions = [_condition(results, arms, every, n) for n in range(len(arms.conditions))]
    conditions.sort(key=lambda condition: -len(condition.runs))
    claims: list[Comparison] = []
    others: list[Comparison] = []
    for own in conditions:
        asked = comparisons.claimed(own.asked, own.curves, margin, own.name)
        others += comparisons.others(own.asked, asked, own.curves, margin, own.name)
        claims += asked
    if looks is None:
        claims = comparisons.judge(claims)
    else:
        named = [(own.name, own.asked) for own in conditions]
        claims = sequential.judge_looks(named, every, looks)
    return Study(results, arms, conditions, claims, comparisons.judge(others), margin, looks)


def verdicts(results: Results, margin: float = MARGIN) -> Frame:
    """Return every comparison of a study with its verdict, a row each: `comparisons.csv`.

    Raises RecordError for interim looks that cannot be read.
    """
    study = judge_study(results, margin, sequential.looks_of(results))
    return comparisons.as_frames([*study.claims, *study.others])[0]


def _condition(results: Results, arms: Arms, curves: Frame, number: int) -> Condition:
    runs, asked = arms.of(number), arms.asked(number)
    curves = curves.merge(runs[["run", "variant", "model", "seed", "grows"]], on="run")
    worth = early_exit.worth(runs)
    tables = {
        "growth": measures.growths(results, runs),
        "exits_worth": worth.exits,
        "early_exit": worth.early_exit,
        "changed_layers": worth.changed_layers,
        "ledger": measures.spent(results, runs),
        "speed_up": measures.speed_up(runs, curves, arm.controls(runs, FROM_SCRATCH)),
    }
    return Condition(arms.conditions[number], number, runs, asked, curves, worth, tables)
