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

from dataclasses import dataclass

from proglayer.report import stats


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
        return stats.Levels(family, level, level, share * stats.ALPHA)
