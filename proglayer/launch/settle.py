"""A study that adds seeds until the claims that its report judges are settled.

Seeds come in batches; after each the claims are judged at levels that pay for the looks, and arms
that no open claim needs get no more seeds. Its jobs are those of any sweep. When it was looked at
is in `looks.json` in its folder; everything else follows from the runs, so the same command goes on
from there, and its report finds the same verdicts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from omegaconf import open_dict, read_write
from pydantic import Field

from proglayer.config import OnError
from proglayer.console import console
from proglayer.errors import ConfigError
from proglayer.files import SWEEP_FILE, sole_writer
from proglayer.launch.ask import short_hash
from proglayer.launch.common import Job, check_settings, record_of, unread
from proglayer.launch.sweep import (
    Checks,
    ProductSweeper,
    announce,
    check,
    expand,
    given_to_hydra,
    launch,
    open_folder,
    print_plans,
    sum_up,
)
from proglayer.results import keys_and_values
from proglayer.run.record import RecordError, RunState, read_sweep

if TYPE_CHECKING:
    from proglayer.report.comparisons import Comparison
    from proglayer.report.sequential import Looks
    from proglayer.results import Results


COST = "{hours:.3g} hours and {operations:.3g} operations"


class SettleSweeper(ProductSweeper, Protocol):
    """A sweeper of Hydra's with the settings of conf/hydra/sweeper/settle.yaml."""

    first: Annotated[int, Field(ge=2)]
    step: Annotated[int, Field(ge=1)]
    most: Annotated[int, Field(ge=2)]
    first_seed: Annotated[int, Field(ge=0)]
    margin: Annotated[float, Field(gt=0, le=100)]
    hours: Annotated[float | None, Field(gt=0)]
    operations: Annotated[float | None, Field(gt=0)]


def settle(sweeper: SettleSweeper, arguments: list[str]) -> None:
    """Run batches of seeds until every claim is settled, or `most` or a budget is reached.

    Ends the process with status 1 if a job failed, after the table of all jobs. Raises ConfigError
    for settings or arms that no claim can be settled with, and where a batch did not end.
    """
    with unread(sweeper.config):
        looks = _looks(sweeper)
        arms = _arms(sweeper, arguments)
        _name_folder(sweeper, arms)
        checks = Checks(sweeper)
        firsts = check(checks, ((n, _with_seed(arm, 0, looks)) for n, arm in enumerate(arms)))
        say = console().print
        if firsts[0].config.plan:
            print_plans(sweeper, firsts)
            at = ", ".join(map(str, looks.at))
            say(f"these {len(arms)} arms, looked at with {at} seeds", markup=False)
            return
        folder = open_folder(sweeper.config)
        with sole_writer(folder, "hydra.sweep.dir"):
            study = Study(sweeper, checks, folder, arms, looks)
            try:
                while study.next_batch():
                    pass
            finally:
                failed = sum_up([folder], firsts[0].config.report)
            for line in study.outcome():
                say(line, markup=False)
    if failed:
        sys.exit(1)


def _looks(sweeper: SettleSweeper) -> Looks:
    """The looks that are asked for, none taken. Raises ConfigError for settings out of range."""
    from proglayer.report.sequential import Looks

    check_settings(sweeper, SettleSweeper)
    if sweeper.most < sweeper.first:
        raise ConfigError(
            f"hydra.sweeper.most={sweeper.most} is less than hydra.sweeper.first={sweeper.first}"
        )
    names = "first", "step", "most", "first_seed", "margin"
    return Looks(**{name: getattr(sweeper, name) for name in names})


def _arms(sweeper: SettleSweeper, arguments: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each arm. Raises ConfigError for a seed, or arms that test no claim."""
    from proglayer.report import arms as known

    arms = expand(sweeper, arguments)
    if any(text.lstrip("+~").partition("=")[0] == "seed" for arm in arms for text in arm):
        raise ConfigError(
            "seed: hydra/sweeper=settle chooses the seeds itself: leave it out, or set "
            "hydra.sweeper.first_seed"
        )
    values = [dict(keys_and_values(arm)) for arm in arms]
    models = {own.get("model", known.STANDARD) for own in values}
    experiments = {own.get("experiment", known.ORIGINAL) for own in values}
    compared = {known.UNFROZEN, known.FROM_SCRATCH} & experiments
    if not ({known.STANDARD, known.DEEP} <= models or (known.ORIGINAL in experiments and compared)):
        raise ConfigError(
            "hydra/sweeper=settle: these arms test no claim: give both models "
            f"(model={known.STANDARD},{known.DEEP}), or experiment={known.ORIGINAL} with a control "
            f"({known.UNFROZEN}, {known.FROM_SCRATCH})"
        )
    return arms


def _with_seed(arm: tuple[str, ...], number: int, looks: Looks) -> tuple[str, ...]:
    return *arm, f"seed={looks.first_seed + number}"


def _name_folder(sweeper: SettleSweeper, arms: Sequence[tuple[str, ...]]) -> None:
    """Give the study the folder in which the same command finds it again."""
    master = sweeper.config
    if given_to_hydra(sweeper, "hydra.sweep.dir"):
        return
    name = f"settle_{short_hash(f'{list(arms)} {sweeper.first_seed}')}"
    folder = Path(master.hydra.sweep.dir).with_name(name)
    with read_write(master), open_dict(master):
        master.hydra.sweep.dir = str(folder)
        master.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")


class Study:
    """The study in a sweep's folder: the looks that it had, and what they leave open."""

    def __init__(
        self,
        sweeper: SettleSweeper,
        checks: Checks,
        folder: Path,
        arms: Sequence[tuple[str, ...]],
        looks: Looks,
    ) -> None:
        from proglayer.report.sequential import read_looks

        self._sweeper = sweeper
        self._checks = checks
        self._folder = folder
        self._arms = arms
        try:
            before = read_looks(folder)
            listed = read_sweep(folder).jobs if (folder / SWEEP_FILE).exists() else []
        except RecordError as error:
            raise ConfigError(f"hydra.sweep.dir={folder}: {error}") from error
        self._listed: dict[str, Sequence[str]] = {job.folder: job.overrides for job in listed}
        if before is not None and before.taken:
            _check_same(before, looks)
            looks = before
        self._looks = looks
        self._judge()

    def _judge(self) -> None:
        """Read the runs, judge the claims at the looks so far, and see which arms are needed."""
        from proglayer.report import measures
        from proglayer.report.arms import DEEP, STANDARD, Margins
        from proglayer.report.arms import arms as arms_of
        from proglayer.report.sequential import judge_looks
        from proglayer.results import load

        self._needed = list(range(len(self._arms)))
        self._claims: list[Comparison] = []
        if not self._looks.taken:
            return
        results: Any = load(self._folder)
        self._spent = _spent(results)
        self._runs = int((results.runs["status"] == RunState.completed).sum())
        arms = arms_of(results)
        conditions = [(name, arms.asked(n)) for n, name in enumerate(arms.conditions)]
        curves = measures.curves(results, arms.runs)
        margins = Margins(points=self._looks.margin)
        self._claims = judge_looks(conditions, curves, margins, self._looks)
        wanted = {
            (own.condition, variant, model)
            for own in self._claims
            if own.open
            for variant in filter(None, (own.a, own.b))
            for model in ([own.model] if own.model else [STANDARD, DEEP])
        }
        needed = set()
        for run in arms.runs.to_dict("records"):
            if (arms.conditions[run["condition"]], run["variant"], run["model"]) in wanted:
                needed.add(int(Path(run["folder"]).name.partition("_")[0]) % len(self._arms))
        self._needed = sorted(needed)

    def next_batch(self) -> bool:
        """Run a batch of seeds and look at the study; False where none is to be run."""
        from proglayer.report.sequential import write_looks

        looks, number = self._looks, len(self._looks.taken)
        before = looks.taken[-1] if number else 0
        if not self._needed or before == looks.most:
            return False
        seeds = looks.at[number]
        if number and self._budget_in_the_way():
            return False
        jobs = check(
            self._checks,
            [
                (seed * len(self._arms) + arm, _with_seed(self._arms[arm], seed, looks))
                for seed in range(before, seeds)
                for arm in self._needed
            ],
        )
        write_looks(self._folder, looks)
        self._run(jobs)
        self._looks = looks.model_copy(update={"taken": (*looks.taken, seeds)})
        write_looks(self._folder, self._looks)
        self._judge()
        self._say_look()
        return True

    def _run(self, jobs: list[Job]) -> None:
        """Run what did not complete of a batch. Raises ConfigError where a job does not end."""
        waiting = announce(self._sweeper, jobs)
        self._listed |= {job.folder: job.overrides for job in jobs}
        launch(self._sweeper, self._listed, waiting, self._sweeper.max_batch_size)
        states = [record_of(self._folder / job.folder).state for job in jobs]
        if left := sum(s not in (RunState.completed, RunState.failed) for s in states):
            raise ConfigError(
                f"{left} of {len(jobs)} jobs of this batch did not end, so the claims are not "
                "judged: the same command goes on with them"
            )
        if jobs[0].config.on_error is OnError.stop and RunState.failed in states:
            raise ConfigError("a job failed, and on_error=stop: the same command goes on")
        if RunState.completed not in states:
            raise ConfigError("every job of this batch failed, for the reasons in the table")

    def _next_cost(self) -> dict[str, float]:
        """What the next batch takes, as the runs so far did."""
        looks, taken = self._looks.at, self._looks.taken
        runs = (looks[len(taken)] - taken[-1]) * len(self._needed)
        return {name: spent * runs / max(1, self._runs) for name, spent in self._spent.items()}

    def _budget_in_the_way(self) -> str | None:
        """The setting of the budget that the next batch would exceed."""
        for name, cost in self._next_cost().items():
            budget = getattr(self._sweeper, name)
            if budget is not None and self._spent[name] + cost > budget:
                return f"hydra.sweeper.{name}={budget:g}"
        return None

    def _say_look(self) -> None:
        made = sum(bool(own.pairs) for own in self._claims)
        left = sum(own.open for own in self._claims)
        console().print(
            f"looked at {self._looks.taken[-1]} seeds: {made - left} of {made} comparisons settled"
            + (f"; {len(self._needed)} of {len(self._arms)} arms are still needed" if left else ""),
            markup=False,
        )

    def outcome(self) -> list[str]:
        """What is settled, what is not, and what it would take further, in lines."""
        from proglayer.report import stats, words

        looks, lines = self._looks, []
        several = len({own.condition for own in self._claims}) > 1
        for own in self._claims:
            on = f" on {own.condition}" if several else ""
            claim = f"{words.TITLES[own.claim]}{on}" if own.claim else ""
            if own.not_made:
                lines.append(f"{claim}: {words.why_not(own, own.not_made)}")
                continue
            what = f"{claim}: {words.described_as(own)}: {words.clause(own)}"
            if own.settled:
                lines.append(f"settled at {own.look} seeds: {what}")
                continue
            level = looks.levels(len(looks.at) - 1, own.judged.levels.family).each
            pairs = own.accuracy
            plan = stats.seeds_for_margin(pairs.sd, pairs.n, pairs.margin, alpha=level)
            known = not math.isnan(plan[0])
            takes = f"; it takes about {words.plan(*plan)} seeds in all" if known else ""
            lines.append(f"open: {what}{takes}")
        if not any(own.open for own in self._claims):
            return [*lines, "every claim that can be tested is settled"]
        if looks.taken[-1] == looks.most:
            return [
                *lines,
                f"hydra.sweeper.most={looks.most} is reached, and all of the error spent: "
                "to know more, plan a study of new seeds, with a larger most and "
                f"hydra.sweeper.first_seed={looks.first_seed + looks.most}",
            ]
        seeds = looks.at[len(looks.taken)] - looks.taken[-1]
        return [
            *lines,
            f"{self._budget_in_the_way()} is spent ({COST.format(**self._spent)}): {seeds} more "
            f"seeds in {len(self._needed)} arms take about {COST.format(**self._next_cost())}; "
            "with a larger budget the same command goes on",
        ]


def _check_same(before: Looks, asked: Looks) -> None:
    """Raise ConfigError where a study that was looked at is to be looked at otherwise."""
    for name, now in asked.model_dump(exclude={"taken"}).items():
        then = getattr(before, name)
        if then != now:
            raise ConfigError(
                f"hydra.sweeper.{name}={now:g}: this study was looked at with {then:g}, and what "
                "its looks may spend follows from that: leave it, or run a study of new seeds "
                "(hydra.sweeper.first_seed)"
            )


def _spent(results: Results) -> dict[str, float]:
    """The hours of training and evaluation, and the operations of training, of the phases of these
    runs, each counted once.
    """
    phases: Any = results.phases
    own = phases["run"] + " " + phases["phase"].astype(str)
    stage = phases["stage"].astype(object).where(phases["stage"].notna(), own)
    columns = ["train_seconds", "evaluation_seconds", "train_flops_head", "train_flops_body"]
    took: Any = phases[columns].astype("float64").groupby(stage.to_numpy()).max().sum()
    seconds = took["train_seconds"] + took["evaluation_seconds"]
    operations = took["train_flops_head"] + took["train_flops_body"]
    return {"hours": float(seconds) / 3600, "operations": float(operations)}
