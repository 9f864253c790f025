"""A study that adds seeds until the claims that its report judges are settled.

Seeds come in batches; after each the claims are judged at levels that pay for the looks, and arms
that no open claim needs get no more seeds. Its jobs are those of any sweep, and what the study is
about is in its `sweep.json`. When it was looked at is in `looks.json`; everything else follows from
the runs, so the same command goes on from there, and its report finds the same verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from proglayer.config import store_dir
from proglayer.console import say
from proglayer.errors import ConfigError
from proglayer.launch.ask import short_hash
from proglayer.launch.compose import Command
from proglayer.launch.job import recorded_state
from proglayer.launch.planned import Planned
from proglayer.launch.product import ProductSettings, expand
from proglayer.launch.sweep import Sweep
from proglayer.report import measures, words
from proglayer.report.arms import DEEP, FROM_SCRATCH, ORIGINAL, STANDARD, UNFROZEN
from proglayer.report.arms import arms as arms_of
from proglayer.report.comparisons import Comparison
from proglayer.report.sequential import Design, Looks, judge_looks, read_looks, write_looks
from proglayer.results import load
from proglayer.results.show import ranges
from proglayer.results.variants import identity, keys_and_values
from proglayer.run.record import RunState, record_of
from proglayer.store.entries import Entry


class SettleSettings(ProductSettings, Design):
    """The settings of conf/hydra/sweeper/settle.yaml."""

    first_seed: int = Field(ge=0)
    margin: float = Field(gt=0, le=100, allow_inf_nan=False)


def run(command: Command) -> int:
    """Run batches of seeds until every claim is settled, or `most` is reached.

    Returns the exit status. Raises ConfigError for settings or arms that no
    claim can be settled with, and where a batch did not end.
    """
    settings = command.settings("sweeper", SettleSettings)
    if settings.most < settings.first:
        raise ConfigError(
            f"hydra.sweeper.most={settings.most} is less than hydra.sweeper.first={settings.first}"
        )
    arms = expand(settings, command.arguments, command.loader)
    _check_arms(arms)
    sweep = Sweep(command, f"settle_{short_hash(f'{arms} {settings.first_seed}')}")
    study = Settle(sweep, settings, arms)
    firsts = sweep.jobs(study.numbered(range(1), range(len(arms))))
    if firsts[0].job.config.plan:
        sweep.show_plans(firsts)
        at = ", ".join(map(str, study.looks.at))
        say(f"these {len(arms)} arms, looked at with {at} seeds")
        return 0
    # What the study is about: its arms, their settings, and how it is looked at.
    about = {}
    for overrides, first in zip(arms, firsts, strict=True):
        same = identity(first.job.config.model_dump(mode="json")) | {"seed": None}
        about[" ".join(overrides)] = short_hash(str(same))
    sweep.about = {**study.looks.model_dump(exclude={"taken"}), "arms": about}
    failed = sweep.run(study.batches())
    say("\n".join(study.outcome()))
    return failed


def _check_arms(arms: Sequence[tuple[str, ...]]) -> None:
    """Raise ConfigError for arms with a seed, or that test no claim."""
    values = [dict(keys_and_values(arm)) for arm in arms]
    if any("seed" in each for each in values):
        raise ConfigError(
            "seed: hydra/sweeper=settle chooses the seeds itself: leave it out, or set "
            "hydra.sweeper.first_seed"
        )
    models = {each.get("model", STANDARD) for each in values}
    experiments = {each.get("experiment", ORIGINAL) for each in values}
    compared = {UNFROZEN, FROM_SCRATCH} & experiments
    if not ({STANDARD, DEEP} <= models or (ORIGINAL in experiments and compared)):
        raise ConfigError(
            "hydra/sweeper=settle: these arms test no claim: give both models "
            f"(model={STANDARD},{DEEP}), or experiment={ORIGINAL} with a control "
            f"({UNFROZEN}, {FROM_SCRATCH})"
        )


class Settle:
    """What the looks of a study leave open, and which arms that needs."""

    def __init__(
        self, sweep: Sweep, settings: SettleSettings, arms: Sequence[tuple[str, ...]]
    ) -> None:
        self.sweep = sweep
        self.arms = arms
        self.looks = Looks(**settings.model_dump(include={*Looks.model_fields}))
        self.claims: list[Comparison] = []
        self.needed = list(range(len(arms)))

    def numbered(
        self, seeds: Sequence[int], arms: Sequence[int]
    ) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Give the number and the overrides of the jobs of these arms with these seeds."""
        for seed in seeds:
            for arm in arms:
                given = f"seed={self.looks.first_seed + seed}"
                yield seed * len(self.arms) + arm, (*self.arms[arm], given)

    def batches(self) -> Iterator[Sequence[Planned]]:
        """Give the seeds up to each look, of the arms that are needed, and look.

        Raises ConfigError where a batch did not end.
        """
        self.begin()
        before = self.looks.taken[-1] if self.looks.taken else 0
        for seeds in self.looks.at[len(self.looks.taken) :]:
            if not self.needed:
                return
            batch = self.sweep.jobs(self.numbered(range(before, seeds), self.needed))
            yield batch
            self._name_seen(batch)
            self._look(seeds, [recorded_state(each.job) for each in batch])
            before = seeds

    def begin(self) -> None:
        """Go on from the looks that the study had. Raises RecordError where they are damaged."""
        self.looks = read_looks(self.sweep.folder) or self.looks
        write_looks(self.sweep.folder, self.looks)
        self._judge()

    def _look(self, seeds: int, states: Sequence[RunState | None]) -> None:
        """Look at the study. Raises ConfigError where a batch did not end."""
        if left := sum(s not in (RunState.completed, RunState.failed) for s in states):
            raise ConfigError(
                f"{left} of {len(states)} jobs of this batch did not end, so the claims are not "
                "judged: the same command goes on with them"
            )
        if RunState.completed not in states:
            raise ConfigError("every job of this batch failed, for the reasons in the table")
        self.looks = self.looks.model_copy(update={"taken": (*self.looks.taken, seeds)})
        write_looks(self.sweep.folder, self.looks)
        self._judge()
        made = sum(bool(each.pairs) for each in self.claims)
        still = sum(each.open for each in self.claims)
        arms = f"; {len(self.needed)} of {len(self.arms)} arms are still needed" if still else ""
        say(f"looked at {seeds} seeds: {made - still} of {made} comparisons settled{arms}")

    def _name_seen(self, batch: Sequence[Planned]) -> None:
        """Name the seeds that others have trained, too: judged there, they are seen once more."""
        seen: dict[Path, set[int]] = {}
        for each in batch:
            if (record := record_of(each.job.folder)) and record.phases:
                entry = Entry(
                    Path(store_dir(each.job.config.store.dir)), record.phases[-1].trajectory
                )
                for run in entry.users():
                    seen.setdefault(run.parent, set()).add(each.job.config.seed)
        seen.pop(self.sweep.folder.resolve(), None)
        for folder, seeds in sorted(seen.items()):
            say(
                f"seeds {ranges(seeds)} were trained in {folder}, too: if they were judged there, "
                "this is another look at them, which nothing pays for. Begin with unseen ones: "
                f"hydra.sweeper.first_seed={max(seeds) + 1}"
            )

    def _judge(self) -> None:
        """Read the runs, judge the claims at the looks so far, and see which arms are needed."""
        if not self.looks.taken:
            return
        results: Any = load(self.sweep.folder)
        arms = arms_of(results)
        conditions = [(name, arms.asked(n)) for n, name in enumerate(arms.conditions)]
        curves = measures.curves(results, arms.runs)
        self.claims = judge_looks(conditions, curves, self.looks)
        wanted = {
            (claim.condition, variant, model)
            for claim in self.claims
            if claim.open
            for variant in filter(None, (claim.a, claim.b))
            for model in ([claim.model] if claim.model else [STANDARD, DEEP])
        }
        self.needed = sorted(
            {
                int(Path(run["folder"]).name.partition("_")[0]) % len(self.arms)
                for run in arms.runs.to_dict("records")
                if (arms.conditions[run["condition"]], run["variant"], run["model"]) in wanted
            }
        )

    def outcome(self) -> list[str]:
        """Say what is settled, what is not, and what it would take further."""
        lines = []
        several = len({claim.condition for claim in self.claims}) > 1
        for claim in self.claims:
            assert claim.claim is not None
            on = f" on {claim.condition}" if several else ""
            title = f"{words.TITLES[claim.claim]}{on}"
            if claim.not_made:
                lines.append(f"{title}: {words.why_not(claim, claim.not_made)}")
            else:
                state = f"settled at {claim.look} seeds" if claim.settled else "open"
                what = f"{words.described_as(claim)}: {words.clause(claim)}"
                lines.append(f"{state}: {title}: {what}")
        if not any(claim.open for claim in self.claims):
            return [*lines, "every claim that can be tested is settled"]
        return [
            *lines,
            f"hydra.sweeper.most={self.looks.most} is reached, and all of the error spent: another "
            "study takes other seeds, by hydra.sweeper.first_seed="
            f"{self.looks.first_seed + self.looks.most}",
        ]
