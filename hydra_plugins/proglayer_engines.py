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
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.proglayer_sweeper import ProglayerSweeper


def _check_installed(choice: str, extra: str, module: str) -> None:
    """Raise ConfigError without the module that an extra brings."""
    from proglayer.errors import ConfigError, install_command

    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{choice} is not installed: {install_command(extra)}")


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
    # What the next launch is to run: the sweep's `Job`s, composed.
    jobs: Sequence[Any] = ()

    def __init__(self, **settings: Any) -> None:
        if self.extra is not None:
            _check_installed(f"hydra/launcher={self.extra}", self.extra, self.needs or self.extra)
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
        if len(self.jobs) != len(job_overrides):
            from proglayer.errors import ConfigError

            raise ConfigError(
                "hydra/launcher: this one takes the jobs of hydra/sweeper=proglayer, optuna and "
                "settle alone"
            )
        return importlib.import_module(f"proglayer.launch.{self.module}").launch(self)


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

    def check(self) -> None:
        """Raise ConfigError where no Slurm answers."""
        from proglayer.launch.slurm import check

        check()

    def in_queue(self) -> dict[str, str]:
        """Folder's name -> number in Slurm, of the jobs of this sweep that Slurm holds."""
        from proglayer.launch.slurm import in_queue

        return in_queue(self)


class ProglayerOptunaSweeper(ProglayerSweeper):
    """A search by Optuna. Its settings are explained in conf/hydra/sweeper/optuna.yaml."""

    module = "search"

    def __init__(self, **settings: Any) -> None:
        _check_installed("hydra/sweeper=optuna", "optuna", "optuna")
        super().__init__(**settings)
