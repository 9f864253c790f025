"""Where Hydra looks for plugins: its names for the sweepers that live in `proglayer.launch`.

Hydra imports this module at every start, so nothing heavy is imported at its top.
"""

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
    """Checks every job before the first starts, launches what is distinct first, sums up."""

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, Any] | None = None,
        pairs: list[list[str]] | None = None,
        blocks: list[dict[str, Any]] | None = None,
        filter: str | None = None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.pairs = [list(group) for group in pairs or []]
        self.blocks = [dict(block) for block in blocks or []]
        self.filter = filter

    def sweep(self, arguments: list[str]) -> Any:
        from proglayer.launch.sweep import sweep

        return sweep(self, arguments)  # pyright: ignore[reportArgumentType]  # set up by Hydra


class ProglayerSettleSweeper(ProglayerSweeper):
    """Adds seeds until claims are settled; see conf/hydra/sweeper/settle.yaml."""

    def __init__(
        self,
        first: int,
        step: int,
        most: int,
        first_seed: int,
        margin: float,
        hours: float | None,
        operations: float | None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.first = first
        self.step = step
        self.most = most
        self.first_seed = first_seed
        self.margin = margin
        self.hours = hours
        self.operations = operations

    def sweep(self, arguments: list[str]) -> Any:
        from proglayer.launch.settle import settle

        settle(self, arguments)  # pyright: ignore[reportArgumentType]  # set up by Hydra


ConfigStore.instance().store(
    group="hydra/sweeper", name="proglayer", node=ProglayerSweeperConf, provider="proglayer"
)
