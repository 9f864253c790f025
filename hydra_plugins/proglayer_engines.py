"""Where Hydra looks for plugins: engines of others, with what a study needs on top.

The choices of `hydra/launcher` (joblib, slurm, ray) and `hydra/sweeper=optuna` lead here. Hydra
imports this module at every start, so nothing heavy is imported at its top; and an engine that is
not installed is a class all the same, one that says what to install.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import importlib.util
from collections.abc import Sequence
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


def _needs(choice: str, extra: str) -> Any:
    from proglayer.config import ConfigError
    from proglayer.versions import install_command

    return ConfigError(f"{choice} is not installed: {install_command(extra)}")


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
    from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
except ImportError:
    OptunaSweeper = _MissingSweeper


class _KnownVersions:
    """Has an engine say, when it is chosen, which of its libraries is not known to work here."""

    extra: str

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        from proglayer.versions import warn_of_unknown

        warn_of_unknown(self.extra)
        super().__init__(*arguments, **settings)


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


class ProglayerJoblibLauncher(_KnownVersions, JoblibLauncher):
    """joblib's workers on this machine."""

    extra = "joblib"

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from proglayer.launch.joblib import launch

        return launch(self, job_overrides, initial_job_idx)


class ProglayerRayLauncher(Launcher):
    """Tasks of Ray, on a cluster or on this machine."""

    @property
    def jobs_run_elsewhere(self) -> bool:
        """Whether this process cannot know the machines that jobs run on."""
        return self.ray.init.address != "local"

    def __init__(self, ray: DictConfig) -> None:
        from proglayer.versions import warn_of_unknown

        if importlib.util.find_spec("ray") is None:
            raise _needs("hydra/launcher=ray", "ray")
        warn_of_unknown("ray")
        self.ray = ray

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from proglayer.launch.ray import launch

        return launch(self, job_overrides, initial_job_idx)


class ProglayerSlurmLauncher(_KnownVersions, SlurmLauncher):
    """Jobs of a Slurm array, by submitit; a run that failed fails there too."""

    extra = "slurm"
    # This process cannot know the machines that jobs run on, and may end before they do.
    jobs_run_elsewhere = True
    jobs_outlive_command = True

    def in_queue(self) -> dict[str, str]:
        """Folder's name -> number in Slurm, of the jobs of this sweep that Slurm holds."""
        from proglayer.launch.slurm import in_queue

        return in_queue(self)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from proglayer.launch.slurm import launch

        return launch(self, job_overrides, initial_job_idx)


class ProglayerOptunaSweeper(_KnownVersions, OptunaSweeper):
    """Optuna's search, its trials checked, resumed and summed up as the jobs of any sweep."""

    extra = "optuna"

    def sweep(self, arguments: list[str]) -> Any:
        from proglayer.launch.search import search

        return search(self.sweeper, arguments)
