"""The name under which Hydra finds what `proglayer.launch` does with its settings.

Hydra imports this module at every start, so nothing heavy is imported at its top.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProglayerSweeper(Sweeper):
    """Hands over what Hydra composed. `hydra.sweeper.design` says which jobs come of it."""

    def __init__(self, **_: Any) -> None:
        """Take the settings that Hydra gives; they are read from the configuration."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what composes jobs. Called by Hydra."""
        self._master = config
        self._loader: ConfigLoader = hydra_context.config_loader

    def sweep(self, arguments: list[str]) -> None:
        """End Hydra's part. Called by Hydra."""
        from proglayer.launch.main import Composed

        raise Composed(self._master, self._loader, arguments)


# `single` is what a command without -m runs. Hydra's own `basic` gives way, so that whatever
# configuration a command is made of comes to the checks of ours.
_TARGET = "hydra_plugins.proglayer_sweeper.ProglayerSweeper"
for _name, _design in {"basic": "product", "single": "single"}.items():
    ConfigStore.instance().store(
        group="hydra/sweeper",
        name=_name,
        node={"_target_": _TARGET, "_recursive_": False, "design": _design},
        provider="proglayer",
    )
ConfigStore.instance().store(
    group="hydra/launcher", name="basic", node={"engine": "basic"}, provider="proglayer"
)
