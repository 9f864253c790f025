"""From a command line to its jobs: what train.py does."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from proglayer import files
from proglayer.errors import FAILED, ConfigError, UserError, run_command
from proglayer.files import FolderKind
from proglayer.launch.ask import check_arguments, in_one_line, parse, register

SINGLE = "hydra/sweeper=single"
# What Hydra would take without an effect, by how an override begins.
WITHOUT_EFFECT = {
    "hydra.sweep.subdir": "folders of jobs are named by number and overrides",
    "hydra.job.env_set": "set variables in the shell",
    "hydra.job.chdir": "runs stay in the folder of the command",
    "hydra.output_subdir": "a run's settings are in .hydra",
}
OF_SWEEPS = (
    *("study=", "hydra.sweep.", "hydra.sweeper", "hydra/sweeper"),
    *("hydra.launcher", "hydra/launcher"),
)


class Composed(BaseException):
    """Raised through Hydra once it has composed a command: it is done, and jobs are ours."""

    def __init__(self, master: DictConfig, loader: ConfigLoader, arguments: Sequence[str]) -> None:
        super().__init__()
        self.given = master, loader, arguments


def train(main: Callable[[], object]) -> int:
    """Run train.py, whose `main` is Hydra's, and return the exit status."""
    return run_command(lambda: start(*composed(main)))


def composed(main: Callable[[], object]) -> tuple[DictConfig, ConfigLoader, Sequence[str]]:
    """Return what Hydra makes of the command line.

    Raises ConfigError; with HYDRA_FULL_ERROR=1 in the environment, errors as they are.
    """
    register()
    sys.argv[1:] = with_design(check_arguments(sys.argv[1:]))
    as_they_are = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra prints errors its own way unless it is asked to raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except Composed as end:
        return end.given
    except Exception as error:
        if as_they_are or isinstance(error, UserError):
            raise
        raise ConfigError(in_one_line(error)) from error
    finally:
        if not as_they_are:
            del os.environ["HYDRA_FULL_ERROR"]
    sys.exit()  # something was shown


def with_design(arguments: Sequence[str]) -> list[str]:
    """Return a command line by which Hydra hands a single run to `start`, as it does a sweep.

    Hydra itself would make a run's folder and write there before anybody can look whose it is.

    Raises ConfigError for settings of Hydra that have no effect on such a command.
    """
    from hydra._internal.utils import get_args_parser

    options, _ = get_args_parser().parse_known_intermixed_args(list(arguments))
    if any((options.help, options.hydra_help, options.cfg, options.info, options.shell_completion)):
        return list(arguments)
    sweeps = options.multirun or "hydra.mode=MULTIRUN" in options.overrides
    for text in options.overrides:
        name = text.lstrip("+~")
        for beginning, why in WITHOUT_EFFECT.items():
            if name.startswith(beginning):
                raise ConfigError(f"{text} has no effect: {why}")
        if not sweeps and name.startswith(OF_SWEEPS):
            raise ConfigError(f"{text} is of sweeps: add -m")
        if sweeps and name.startswith("hydra.run."):
            raise ConfigError(f"{text} is of single runs: a sweep's folder is hydra.sweep.dir")
    if sweeps:
        return list(arguments)
    for override in parse(options.overrides):
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line} has several values: add -m to run each")
    others = [text for text in arguments if text not in ("-r", "--run")]
    return ["-m", *others, "hydra.mode=MULTIRUN", SINGLE]


def not_ours() -> NoReturn:
    """Refuse a sweeper that starts jobs by itself."""
    raise ConfigError(
        "hydra/sweeper: this one runs jobs by itself, unchecked: take one of proglayer, settle, "
        "optuna"
    )


def start(master: DictConfig, loader: ConfigLoader, arguments: Sequence[str]) -> int:
    """Run the jobs of a command that Hydra composed, and return the exit status."""
    from proglayer.launch.job import Command, log_to_console

    log_to_console()
    command = Command(master, loader, arguments)
    design = command.sweeper.pop("design", None)
    if design == "single":
        return single(command)
    modules = {"product": "sweep", "settle": "settle", "optuna": "search"}
    module: Any = importlib.import_module(f"proglayer.launch.{modules[design]}")
    return module.run(command)


def single(command: Any) -> int:
    """Run or plan one job and return the exit status. Nothing is written before it is checked.

    Raises ConfigError, and KeyboardInterrupt where the run was interrupted.
    """
    from proglayer.console import tell
    from proglayer.launch.job import fail, leave_report, log_of, run_locked, submit
    from proglayer.launch.planned import Planner, print_plan
    from proglayer.run import machine
    from proglayer.run.record import RunState

    job = command.job(command.folder("run"))
    config, picked = machine.with_precision(job.config)
    if picked:
        tell(picked)
    job = replace(job, config=config)
    planned = Planner().plan(job)
    if config.plan:
        print_plan(planned)
        return 0
    machine.pick_device(config.device, config.precision)
    _check_other_run(job)
    files.claim_folder(job.folder, FolderKind.run)
    with files.sole_writer(job.folder, FolderKind.run.setting):
        submit(job)
        try:
            record = run_locked(job)
        except UserError as error:
            fail(job, error)
            raise
        if record.state is RunState.interrupted:
            raise KeyboardInterrupt
        if job.config.report:
            with log_of(job.folder):
                leave_report(job.folder)
    return 0 if record.state is RunState.completed else FAILED


def _check_other_run(job: Any) -> None:
    """Raise ConfigError where a folder holds a completed run with other settings."""
    from proglayer.launch.job import differing, record_of
    from proglayer.run.record import RunState

    record = record_of(job.folder)
    if record is None or record.state is not RunState.completed:
        return
    if others := differing(record.config, job.config.model_dump(mode="json")):
        raise ConfigError(
            f"hydra.run.dir={job.folder} holds a completed run with {'; '.join(others[:3])}: "
            "choose another folder"
        )
