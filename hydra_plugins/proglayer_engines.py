"""Where Hydra looks for plugins: engines of others, with what a study needs on top.

The choices of `hydra/launcher` (joblib, slurm, ray) and `hydra/sweeper=optuna` lead here. Hydra
imports this module at every start, so nothing heavy is imported at its top; and an engine that is
not installed is a class all the same, one that says what to install.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


def _needs(choice: str, extra: str) -> Any:
    from proglayer.errors import ConfigError
    from proglayer.versions import install_command

    return ConfigError(f"{choice} is not installed: {install_command(extra)}")


class _MissingSweeper(Sweeper):
    def __init__(self, **_: Any) -> None:
        raise _needs("hydra/sweeper=optuna", "optuna")

    def setup(self, **_: Any) -> None: ...

    def sweep(self, arguments: list[str]) -> Any: ...


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


class OurChoices(SearchPathPlugin):
    """Lets the files of `conf/hydra` take the place of choices of the same name in other plugins.

    Hydra would refuse both, or check the one against the other: `hydra/launcher=joblib` would fail
    wherever hydra-joblib-launcher is installed. Hydra calls this once all plugins have stored
    their choices.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in search_path.get_path():
            conf = Path(str(element.path).removeprefix("file://"))
            for file in conf.glob("hydra/*/**/*.yaml"):
                choices = ConfigStore.instance().repo
                for name in file.relative_to(conf).parent.parts:
                    choices = choices.get(name, {})
                choices.pop(file.name, None)


class _OurLauncher(Launcher):
    """A launcher that lives in `proglayer.launch`, in the module of that name."""

    module: str
    extra: str | None = None
    needs: str | None = None

    def __init__(self, **settings: Any) -> None:
        from proglayer.versions import warn_of_unknown

        if self.extra is not None:
            if importlib.util.find_spec(self.needs or self.extra) is None:
                raise _needs(f"hydra/launcher={self.extra}", self.extra)
            warn_of_unknown(self.extra)
        self.settings: Any = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        module = importlib.import_module(f"proglayer.launch.{self.module}")
        return module.launch(self, job_overrides, initial_job_idx)


class ProglayerBasicLauncher(_OurLauncher):
    """One job after another in the process of the command, numbered as their folders are."""

    module = "common"


class ProglayerJoblibLauncher(_OurLauncher):
    """joblib's workers on this machine."""

    module = extra = "joblib"


class ProglayerRayLauncher(_OurLauncher):
    """Tasks of Ray, on a cluster or on this machine."""

    module = extra = "ray"

    @property
    def jobs_run_elsewhere(self) -> bool:
        """Whether this process cannot know the machines that jobs run on."""
        return self.settings["ray"]["init"]["address"] != "local"


class ProglayerSlurmLauncher(_OurLauncher):
    """Jobs of a Slurm array, by submitit; a run that failed fails there too."""

    module = extra = "slurm"
    needs = "submitit"
    # This process cannot know the machines that jobs run on.
    jobs_run_elsewhere = True

    def in_queue(self) -> dict[str, str]:
        """Folder's name -> number in Slurm, of the jobs of this sweep that Slurm holds."""
        from proglayer.launch.slurm import in_queue

        return in_queue(self)


class ProglayerOptunaSweeper(_KnownVersions, OptunaSweeper):
    """Optuna's search, its trials checked, resumed and summed up as the jobs of any sweep."""

    extra = "optuna"

    def sweep(self, arguments: list[str]) -> Any:
        from proglayer.launch.search import search

        return search(self.sweeper, arguments)
