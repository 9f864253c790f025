"""Verdicts that pay for looking again: a study that adds seeds until its claims are settled.

When a study is looked at is fixed beforehand (a group-sequential design, Jennison & Turnbull 2000).
The chance of a false claim is shared out among the looks: each may spend as much of it as seeds
were added, of the most that there will be; and within a look among the family of comparisons, as in
`stats.judge` (Bonferroni, both times). So the chance of any false claim at any look is at most
that of one test, whatever the looks and the comparisons have in common, and whatever ends the
study. An interval with the level of its look (a repeated confidence interval, Jennison & Turnbull
1989) holds at all looks together with its confidence.

A comparison that is settled keeps the verdict and the interval of the look that settled it.
docs/report.md has what was simulated with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proglayer import files
from proglayer.report import comparisons, stats
from proglayer.report.arms import Frame, Margins
from proglayer.report.comparisons import Claim, Comparison, Kind, NotMade, Reason
from proglayer.results import Results
from proglayer.run.record import RecordError

# In the folder of a sweep: how it is looked at, and when it was.
LOOKS = "looks.json"


class Design(BaseModel):
    """When a study is looked at: with `first` seeds, after every `step` more, and at `most`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    first: int = Field(ge=2)
    step: int = Field(ge=1)
    most: int = Field(ge=2)

    @property
    def at(self) -> tuple[int, ...]:
        """The number of seeds at each look."""
        return *range(self.first, self.most, self.step), self.most

    def levels(self, look: int, family: int) -> stats.Levels:
        """Return the levels at look number `look` (from 0), for a family of so many comparisons."""
        before = self.at[look - 1] if look else 0
        share = (self.at[look] - before) / self.most
        level = share * stats.ALPHA / max(1, family)
        return stats.Levels(family, level, share * stats.ALPHA)


class Looks(Design):
    """How a study is looked at, and the number of seeds at each look that it had: `looks.json`."""

    first_seed: int = Field(ge=0)
    margin: float = Field(gt=0, allow_inf_nan=False)  # points of accuracy
    taken: tuple[int, ...] = ()


def read_looks(sweep: Path) -> Looks | None:
    """Return the looks of the study in the folder of a sweep; None for any other sweep.

    Raises RecordError for a file that is damaged.
    """
    file = sweep / LOOKS
    try:
        return Looks.model_validate_json(file.read_bytes()) if file.exists() else None
    except (OSError, ValidationError) as error:
        raise RecordError(f"{file} cannot be read ({error})") from error


def write_looks(sweep: Path, looks: Looks) -> None:
    """Write `looks.json` into the folder of a sweep."""
    text = looks.model_dump_json(indent=1).encode()
    files.write_atomically(sweep / LOOKS, text)


def looks_of(results: Results) -> Looks | None:
    """Return the looks of the study that all these runs are of; None where they are of no such
    study, or of several.
    """
    folders = {Path(folder).parent for folder in results.runs["folder"].dropna()}
    return read_looks(folders.pop()) if len(folders) == 1 else None


def sweeps_with_looks(results: Results) -> list[Path]:
    """Return the folders, of the sweeps that these runs are of, that hold a study with looks."""
    folders = {Path(folder).parent for folder in results.runs["folder"].dropna()}
    return sorted(folder for folder in folders if (folder / LOOKS).exists())


def judge_looks(
    conditions: Iterable[tuple[str, Frame]], curves: Frame, margins: Margins, looks: Looks
) -> list[Comparison]:
    """Judge the claims, each as the look that settled it found it, else as the last look did.

    Only the seeds of a look are seen by it.

    Args:
        conditions: the name of each and its runs, as of `Arms.asked`.
        curves: of `measures.curves`, of these runs.
        margins: that of accuracy is the looks'.
    """
    conditions = list(conditions)
    if not looks.taken:
        why = NotMade(Reason.no_look, first_look=looks.first)
        return [
            Comparison(Kind.models, "", "", "", not_made=why, claim=claim, condition=name)
            for claim in Claim
            for name, _ in conditions
        ]
    settled: dict[tuple[str | None, ...], Comparison] = {}
    shown: list[Comparison] = []
    family = 0
    for number, seeds in enumerate(looks.taken):
        last_seed = looks.first_seed + seeds - 1
        asked: list[Comparison] = []
        for name, runs in conditions:
            seen = runs[runs["seed"].between(looks.first_seed, last_seed)]
            asked += comparisons.claimed(seen, curves, margins, name)
        # Budgets in which a comparison is the same so far may part with more seeds.
        family = max(family, sum(max(1, len(own.budgets)) for own in asked if own.pairs))
        shown = []
        for own in comparisons.judge(asked, looks.levels(number, family)):
            own = replace(own, look=seeds)
            which = own.condition, own.claim, own.a, own.b, own.model
            keys = [(*which, budget) for budget in own.budgets or ("",)]
            if all(key in settled for key in keys):
                own = settled[keys[0]]
            elif own.settled:
                settled |= dict.fromkeys(keys, own)
            if not any(own is other for other in shown):
                shown.append(own)
    return shown
