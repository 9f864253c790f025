"""Where Hydra looks for plugins: its names for the sweepers that live in `proglayer.launch`.

Hydra imports this module at every start, so nothing heavy is imported at its top.
"""

import importlib
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore


@dataclass
class ProglayerSweeperConf:
    """Hydra's basic sweeper with its grammar, and what a product of all values does not say.

    pairs: keys whose values go together.
    blocks: several sweeps in one, each with settings of its own, written as `params` are.
    filter: an expression; combinations for which it does not hold are left out.
    """

    _target_: str = "hydra_plugins.proglayer_sweeper.ProglayerSweeper"
    max_batch_size: int | None = None
    params: Any = None
    pairs: list[list[str]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    filter: str | None = None


class ProglayerSweeper(BasicSweeper):
    """Checks every job before the first starts, launches what is distinct first, sums up.

    Its settings are its attributes: see `ProglayerSweeperConf` and conf/hydra/sweeper.
    """

    # In `proglayer.launch`, with a function of the same name.
    module = "sweep"

    def __init__(self, max_batch_size: int | None = None, params: Any = None, **own: Any) -> None:
        super().__init__(max_batch_size, params)
        vars(self).update(own)

    def sweep(self, arguments: list[str]) -> Any:
        module = importlib.import_module(f"proglayer.launch.{self.module}")
        return getattr(module, self.module)(self, arguments)


class ProglayerSettleSweeper(ProglayerSweeper):
    """Adds seeds until claims are settled; see conf/hydra/sweeper/settle.yaml."""

    module = "settle"


ConfigStore.instance().store(
    group="hydra/sweeper", name="proglayer", node=ProglayerSweeperConf, provider="proglayer"
)
