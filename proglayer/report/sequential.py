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

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from proglayer import files
from proglayer.report import comparisons, stats
from proglayer.report.comparisons import Question
from proglayer.report.study import Frame, Margins
from proglayer.results import Results
from proglayer.results.formatting import listed
from proglayer.store.record import SWEEP, RecordError

# In the folder of a sweep: how it is looked at, and when it was.
LOOKS = "looks.json"
is_looks = files.begins_with(b'{"first":')


@dataclass(frozen=True)
class Design:
    """When a study is looked at: with `first` seeds, after every `step` more, and at `most`."""

    first: int
    step: int
    most: int

    @property
    def looks(self) -> tuple[int, ...]:
        """The number of seeds at each look."""
        return *range(self.first, self.most, self.step), self.most

    def levels(self, look: int, family: int) -> stats.Levels:
        """The levels at look number `look` (from 0), for a family of so many comparisons."""
        before = self.looks[look - 1] if look else 0
        share = (self.looks[look] - before) / self.most
        level = share * stats.ALPHA / max(1, family)
        return stats.Levels(family, level, share * stats.ALPHA)


# --- the looks of a study -------------------------------------------------------------------------


@dataclass(frozen=True)
class Looks:
    """How a study is looked at, and the number of seeds at each look that it had: `looks.json`."""

    design: Design
    first_seed: int
    margin: float  # points of accuracy
    taken: tuple[int, ...] = ()


def read_looks(sweep: Path) -> Looks | None:
    """The looks of the study in the folder of a sweep; None where it has no such file of ours.

    Raises RecordError for one that is damaged.
    """
    if not files.is_ours(sweep / LOOKS, is_looks):
        return None
    try:
        plain = json.loads((sweep / LOOKS).read_text(encoding="utf-8"))
        design = Design(*(int(plain[name]) for name in ("first", "step", "most")))
        taken = tuple(int(seeds) for seeds in plain["taken"])
        if taken != design.looks[: len(taken)]:
            raise ValueError(f"{LOOKS} has other looks than its design")
        return Looks(design, int(plain["first_seed"]), float(plain["margin"]), taken)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError("damaged", f"{sweep / LOOKS} cannot be read ({error})") from error


def write_looks(sweep: Path, looks: Looks) -> None:
    """Write `looks.json` into the folder of a sweep. Raises StoreError."""
    plain = asdict(looks.design) | {
        "first_seed": looks.first_seed,
        "margin": looks.margin,
        "taken": looks.taken,
    }
    text = json.dumps(plain, indent=1).encode()
    files.write_atomically(sweep / LOOKS, text, SWEEP, is_looks)


def sweeps_with_looks(results: Results) -> list[Path]:
    """The folders, of the sweeps that these runs are of, that hold a study with looks."""
    own = results.runs.loc[results.runs["sweep"].notna(), "folder"]
    return sorted({p for p in (Path(f).parent for f in own) if files.is_ours(p / LOOKS, is_looks)})


def looks_of(results: Results) -> Looks | None:
    """The looks of the study that all these runs are of; None where they are of no such study.

    Raises RecordError for a file that cannot be read.
    """
    folders = {Path(folder).parent for folder in results.runs["folder"]}
    return read_looks(folders.pop()) if len(folders) == 1 else None


def judge(
    conditions: Iterable[tuple[str, Frame]], curves: Frame, margins: Margins, looks: Looks
) -> Frame:
    """The claims, each as the look that settled it found it, else as the last look did.

    Only the seeds of a look are seen by it.

    Args:
        conditions: the name of each and its runs, as of `study.Arms.asked`.
        curves: of `ledger.curves`, of these runs.
        margins: that of accuracy is the looks'.

    Returns:
        as `comparisons.judge`, and `look`: the number of seeds of the look that the row is of.
    """
    conditions = list(conditions)
    if not looks.taken:
        reason = f"Not tested yet: the first look is at {looks.design.first} seeds."
        return comparisons.judge(
            Question("", "", "", "", {}, claim=claim.title, condition=name, reason=reason)
            for claim in comparisons.CLAIMS
            for name, _ in conditions
        )
    settled: dict[tuple[str, ...], dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    family = 0
    for number, seeds in enumerate(looks.taken):
        questions: list[Question] = []
        for name, runs in conditions:
            seen = runs[runs["seed"].between(looks.first_seed, looks.first_seed + seeds - 1)]
            asked = comparisons.claimed(seen, curves, margins)
            questions += [replace(question, condition=name) for question in asked]
        # Budgets in which a comparison is the same so far may part with more seeds.
        family = max(family, sum(max(1, len(q.budgets)) for q in questions if q.comparisons))
        levels = looks.design.levels(number, family)
        judged = comparisons.judge(questions, levels).to_dict("records")
        rows = []
        for question, row in zip(questions, judged, strict=True):
            which = question.condition, question.claim, question.a, question.b, question.model
            keys = [(*which, budget) for budget in question.budgets or ("",)]
            row["look"] = seeds
            if all(key in settled for key in keys):
                row = settled[keys[0]]
            elif is_settled(row):
                settled |= dict.fromkeys(keys, row)
            if not any(row is other for other in rows):
                rows.append(row)
    return pd.DataFrame(rows)


def in_words(looks: Looks) -> str:
    """When a study was looked at, and what that does to its error."""
    at = listed([str(seeds) for seeds in looks.taken], 20)
    return (
        f"Looked at with {at} seeds, of at most {looks.design.most}. Each look spends its share of "
        "the 5 %, so that looking again raises no error. A verdict and its interval are of the "
        "look that settled it, or else of the last."
    )


def is_settled(row: Any) -> bool:
    """Whether a comparison came out as better, worse, or the same within the margin."""
    return row["verdict"] in (stats.Verdict.better, stats.Verdict.worse, stats.Verdict.same)


def is_open(row: Any) -> bool:
    """Whether more seeds may settle a comparison: it can be made, and is not settled."""
    return bool(row["comparisons"]) and not is_settled(row)
