"""Where Hydra looks for plugins: engines of others, with what a study needs on top.

The choices of `hydra/launcher` (joblib, slurm, ray) and `hydra/sweeper=optuna` lead here. Hydra
imports this module at every start, so nothing heavy is imported at its top; and an engine that is
not installed is a class all the same, one that says what to install.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import atexit
import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper


def _needs(choice: str, extra: str) -> Any:
    from proglayer.config import ConfigError

    return ConfigError(f"{choice} is not installed: pip install 'proglayer[{extra}]'")


class _MissingLauncher(Launcher):
    extra: str

    def __init__(self, **_: Any) -> None:
        raise _needs(f"hydra/launcher={self.extra}", self.extra)

    def setup(self, **_: Any) -> None: ...

    def launch(self, *_: Any, **__: Any) -> Sequence[JobReturn]: ...


class _MissingSweeper(Sweeper):
    def __init__(self, **_: Any) -> None:
        raise _needs("hydra/sweeper=optuna", "optuna")

    def setup(self, **_: Any) -> None: ...

    def sweep(self, arguments: list[str]) -> Any: ...


try:
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
except ImportError:
    JoblibLauncher = _MissingLauncher
try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ImportError:
    SlurmLauncher = _MissingLauncher
try:
    from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher
except ImportError:
    RayLauncher = _MissingLauncher
try:
    from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
except ImportError:
    OptunaSweeper = _MissingSweeper


# Choices of others whose place files of `conf/hydra` take.
REPLACED = {"launcher": ("joblib.yaml", "ray.yaml"), "sweeper": ("optuna.yaml",)}


class OurChoices(SearchPathPlugin):
    """Lets the files of `conf/hydra` take the place of the plugins' choices of the same name.

    Hydra would validate the one against the other, or refuse both. It calls this once all plugins
    have stored theirs.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        hydra = ConfigStore.instance().repo["hydra"]
        for group, names in REPLACED.items():
            hydra[group] = _Group(
                {name: node for name, node in hydra[group].items() if name not in names}
            )


class _Group(dict[str, Any]):
    """Choices of a group that cannot be had back: a worker that is given this process's store
    looks for plugins anew, and they store theirs again.
    """

    def __setitem__(self, name: str, node: Any) -> None:
        if not any(name in names for names in REPLACED.values()):
            super().__setitem__(name, node)


class ProglayerJoblibLauncher(JoblibLauncher):
    """joblib's workers on this machine."""

    extra = "joblib"


class ProglayerRayLauncher(RayLauncher):
    """Ray's workers, on a cluster or here."""

    extra = "ray"


class ProglayerSlurmLauncher(SlurmLauncher):
    """Jobs of a Slurm array, by submitit; a run that failed fails there too."""

    extra = "slurm"

    def __call__(self, *arguments: Any, **named: Any) -> JobReturn:
        from proglayer.record import Status, read_result

        job = super().__call__(*arguments, **named)
        result = read_result(Path(job.hydra_cfg.hydra.runtime.output_dir))
        if result is not None and result["status"] == Status.failed:
            # The launcher is still to be told how the job ended; Slurm goes by the exit status.
            atexit.register(_exit_with_failure)
        return job

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        import submitit
        from submitit.core.utils import FailedJobError

        from proglayer.config import ConfigError

        # It warns at every look that a cluster without accounting cannot tell it more.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        # The parent class gives up at the first job whose process ended without a word, while the
        # others are still at work.
        results = submitit.Job.results
        submitit.Job.results = functools.partialmethod(_or_lost, results)
        try:
            return super().launch(job_overrides, initial_job_idx)
        except (FailedJobError, RuntimeError) as error:
            # Where jobs were handed over, none of these is left.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"hydra/launcher=slurm cannot hand over jobs: {lines[-1]}") from error
        finally:
            submitit.Job.results = results


def _or_lost(job: Any, results: Any) -> list[Any]:
    """`results` of a job of submitit, with one that was lost as one that returned nothing."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return results(job)
    except (FailedJobError, UncompletedJobError) as error:
        reason = str(error).strip().splitlines()[0]
        logging.getLogger(__name__).error("job %s of the scheduler: %s", job.job_id, reason)
        lost = JobReturn(status=JobStatus.COMPLETED)
        lost.return_value = None
        return [lost]


def _exit_with_failure() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class ProglayerOptunaSweeper(OptunaSweeper):
    """Optuna's search, its trials checked, resumed and summed up as the jobs of any sweep."""

    def sweep(self, arguments: list[str]) -> Any:
        from proglayer.search import search

        return search(self.sweeper, arguments)
