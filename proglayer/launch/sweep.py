"""A sweep: batches of jobs, each checked before it starts, and what came out told at the end.

A product of values (`product`), a study that adds seeds (`settle`) and a search (`search`) give
batches, one after another: each asks for the next once it has seen what came of the last.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from proglayer import files
from proglayer.console import console, say
from proglayer.errors import FAILED, ConfigError
from proglayer.files import FolderKind
from proglayer.launch.ask import short_hash
from proglayer.launch.compose import Command
from proglayer.launch.engines import Engine, Joblib, Ray
from proglayer.launch.job import differing, leave_report, recorded_state, submit
from proglayer.launch.planned import Planned, describe_work, in_launch_order, planned, print_plan
from proglayer.launch.slurm import Slurm
from proglayer.run import record as records
from proglayer.run.environment import git_state, place
from proglayer.run.record import RunState
from proglayer.run.setup import Opened
from proglayer.run.signals import interrupt, on_signals

ENGINES = {"basic": Engine, "joblib": Joblib, "ray": Ray, "slurm": Slurm}


def engine_of(command: Command) -> Engine:
    """Return the engine that `hydra.launcher` describes. Raises ConfigError."""
    name = command.master.hydra.launcher.get("engine")
    if name not in ENGINES:
        raise ConfigError(f"hydra/launcher: no engine {name}: take one of {', '.join(ENGINES)}")
    engine = command.settings("launcher", ENGINES[name])
    engine.check()
    return engine


class Sweep:
    """The sweep of a command: its folder, its engine, and the jobs that it has so far.

    name: what its folder is called where the command line does not say.
    about: what has to be the same where a command goes on in a folder; empty where anything may.

    Raises ConfigError for an engine that cannot work here.
    """

    def __init__(self, command: Command, name: str | None = None) -> None:
        if (where := place()).size > 1:
            raise ConfigError(
                f"-m: this process was started as one of {where.size} of a run "
                f"(WORLD_SIZE={where.size}): a sweep starts the processes of its jobs itself, so "
                "give the command without torchrun"
            )
        self.command = command
        self.engine = engine_of(command)
        self.folder = command.folder("sweep", name)
        self.opened: Opened = {}
        self.about: dict[str, Any] = {}
        self.listed: dict[str, list[str]] = {}

    def folder_of(self, number: int, overrides: Sequence[str]) -> Path:
        """Return a job's folder: its number and a short hash."""
        return self.folder / f"{number}_{short_hash(' '.join(overrides))}"

    def job(self, number: int, overrides: tuple[str, ...]) -> Planned:
        """Compose and plan a job. Raises ConfigError."""
        folder = self.folder_of(number, overrides)
        job = self.command.job(folder, overrides, number, self.engine.threads_of)
        self.engine.check_job(job.config)
        return planned(job, self.opened)

    def jobs(self, numbered: Iterable[tuple[int, tuple[str, ...]]]) -> list[Planned]:
        """Compose and plan jobs. Raises ConfigError with the problems of all."""
        jobs: list[Planned] = []
        problems: dict[str, str] = {}
        for number, overrides in numbered:
            try:
                jobs.append(self.job(number, overrides))
            except ConfigError as error:
                for line in str(error).splitlines():
                    problems.setdefault(line, " ".join(overrides))
        if problems:
            raise ConfigError("\n".join(f"{line}  [{text}]" for line, text in problems.items()))
        return jobs

    def show_plans(self, jobs: Sequence[Planned]) -> None:
        """Print the plan of each job, and how long what is left of all may take."""
        for each in jobs:
            title = f"{each.job.name}: {' '.join(each.job.overrides)}"
            print_plan(each, title, self.engine.elsewhere)
        with contextlib.suppress(ConfigError):  # the device is another machine's
            self._say_work(jobs)

    def _say_work(self, jobs: Sequence[Planned]) -> None:
        say(describe_work(jobs, self.engine.at_once, self.engine.elsewhere))

    def run(self, batches: Iterator[Sequence[Planned]]) -> int:
        """Run batches until there are no more, and return the exit status: 1 if a job failed.

        The next one is asked for when a batch has ended.

        Raises ConfigError, and KeyboardInterrupt, after the table of all jobs.
        """
        with files.sole_writer(self.folder, FolderKind.sweep):
            self._go_on()
            self._write()
            with records.sign_of_life(self.folder / FolderKind.sweep.mark):
                try:
                    for batch in batches:
                        self._launch(batch)
                finally:
                    failed = self._sum_up()
        return FAILED if failed else 0

    def _go_on(self) -> None:
        """Take over the jobs of the folder's sweep. Raises ConfigError where it is another, and
        RecordError where that cannot be read.
        """
        if not (self.folder / FolderKind.sweep.mark).exists():
            return
        before = records.read_sweep(self.folder)
        if others := differing(before.about, self.about):
            raise ConfigError(
                f"hydra.sweep.dir={self.folder} holds a study with {others}: its results follow "
                "from that, so run another one in another folder"
            )
        self.listed = {job.folder: job.overrides for job in before.jobs}

    def _write(self) -> None:
        record = records.SweepRecord(
            jobs=[records.SweepJob(folder=n, overrides=given) for n, given in self.listed.items()],
            command=["python", *sys.argv],
            git=git_state(),
            about=self.about,
        )
        records.write_record(self.folder, record)

    def _launch(self, batch: Sequence[Planned]) -> None:
        """Run what did not complete of a batch, in the order of launching.

        Raises ConfigError where it cannot be run or does not come to its end, and for a job that
        failed where that stops the sweep.
        """
        waiting = [each.job for each in in_launch_order(batch) if not each.completed]
        where = os.path.relpath(self.folder)
        say(f"{len(batch)} jobs in {where}, {len(batch) - len(waiting)} finished before")
        # With nothing to run, torch, which knows the machine's part in the keys, is not needed.
        if waiting:
            self._say_work(batch)
        held = self.engine.held(self.folder)
        for job in waiting:
            record = records.record_of(job.folder) if job.name in held else None
            if record is not None and not records.same_settings(record, job.config):
                raise ConfigError(
                    f"hydra.sweep.dir={where}: its job {job.name} is in the queue with other "
                    f"settings: choose another folder, or end that job ({held[job.name]}) first"
                )
        self.listed |= {each.job.name: list(each.job.overrides) for each in batch}
        self._write()
        for job in waiting:
            if job.name not in held:
                submit(job)
        with (
            on_signals(interrupt, once=False),
            contextlib.closing(self.engine.run(waiting, self.folder)) as ended,
        ):
            for job in ended:
                stops = job.config.on_error == "stop"
                if stops and recorded_state(job) is RunState.failed:
                    raise ConfigError(
                        f"job {job.name} failed, and on_error=stop: the same command goes on"
                    )

    def _sum_up(self) -> bool:
        """Print the table of the jobs, and leave the report. Returns whether a job failed.

        After Ctrl-C the table is enough: the same command goes on, and reports at its end.
        """
        from proglayer.results import load
        from proglayer.results.show import print_results

        results = load(self.folder)
        print_results(results, console())
        if self.command.master.report and not isinstance(sys.exception(), KeyboardInterrupt):
            leave_report(self.folder, results)
        return results.failures > 0
