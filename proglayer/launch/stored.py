"""What the store has of a job before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from proglayer.config import Config, stages_dir
from proglayer.data.corpus import Corpus
from proglayer.errors import ConfigError
from proglayer.store.nearest import Nearest
from proglayer.training.plan import Phase

if TYPE_CHECKING:
    from proglayer.store.trajectory import StoredEpochs


def follow_store(
    config: Config, corpus: Corpus, phases: Sequence[Phase]
) -> list[StoredEpochs | None]:
    """What is stored of each phase; None where the one before is not complete.

    Raises ConfigError for a device that is not here.
    """
    from proglayer.run import machine
    from proglayer.store.trajectory import stored_epochs

    config, _ = machine.with_precision(config)
    device = machine.pick_device(config.device, config.precision)
    with machine.switches(config.threads, config.precision):
        here = machine.describe_machine(device)
    parent: tuple[str, int] | None = None
    reachable = config.reuse
    stored: list[StoredEpochs | None] = []
    for planned in phases:
        phase = replace(planned, precision=config.precision)
        found = None
        if reachable:
            store = Path(stages_dir(config))
            found = stored_epochs(store, parent, phase, corpus.fingerprint, here)
            reachable = found.selected is not None
            parent = found.key, found.selected or 0
        stored.append(found)
    return stored


class StoredPlans:
    """What the plan of a job says of the store. A store's descriptions are read once for all."""

    def __init__(self) -> None:
        self._near: dict[str, Nearest] = {}

    def follow(
        self, config: Config, corpus: Corpus, phases: Sequence[Phase]
    ) -> list[StoredEpochs | None] | None:
        """As `follow_store`; None where the device that the settings ask for is not here."""
        try:
            return follow_store(config, corpus, phases)
        except ConfigError:
            return None

    def said(
        self, config: Config, stored: Sequence[StoredEpochs | None] | None
    ) -> list[tuple[str, str | None]]:
        """For each phase what is stored, and of the first that is not, why; empty where there is
        no store, or nothing could be looked up.
        """
        folder = stages_dir(config)
        if stored is None or not Path(folder).is_dir():
            return []
        near = self._near.setdefault(folder, Nearest(Path(folder)))
        said: list[tuple[str, str | None]] = []
        for found in stored:
            epochs = len(found.epochs) if found else 0
            some = f"{epochs} epoch{'s' if epochs != 1 else ''}"
            complete = found is not None and found.selected is not None
            what = some if complete else f"{some}, goes on" if epochs else "no"
            why = near.why_afresh(found.description) if found and not epochs else None
            said.append((what, why))
        return said
