"""What the store has of a job before it starts, and the plan that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from proglayer.config import Config, store_dir
from proglayer.console import console, counted
from proglayer.data.corpus import Corpus
from proglayer.errors import ConfigError, printable
from proglayer.run.progress import plan_table
from proglayer.training.plan import Phase
from proglayer.training.unused import unused_settings

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
    reachable = True
    stored: list[StoredEpochs | None] = []
    for planned in phases:
        train = replace(planned.train, precision=config.precision)
        phase = replace(planned, train=train)
        found = None
        if reachable:
            store = Path(store_dir(config))
            found = stored_epochs(store, parent, phase, corpus.fingerprint, here)
            reachable = found.selected is not None
            parent = found.key, found.selected or 0
        stored.append(found)
    return stored


def print_plan(
    config: Config,
    corpus: Corpus,
    phases: Sequence[Phase],
    title: str = "plan",
    stored: Sequence[StoredEpochs | None] = (),
) -> None:
    """Print a run's phases, what they cost, and what is stored of them.

    stored: what `follow_store` gave; empty where it is not known.
    """
    store = Path(store_dir(config))
    said: list[str] = []
    for found in stored if store.is_dir() else ():
        epochs = len(found.epochs) if found else 0
        some = counted(epochs, "epoch")
        complete = found is not None and found.selected is not None
        said.append(some if complete else f"{some}, goes on" if epochs else "no")
    windows = len(corpus.train), len(corpus.validation)
    console().print(plan_table(phases, config.data.seq_len, *windows, title, said))
    if unused := unused_settings(config, phases):
        console().print(printable(unused), markup=False)


def stored_here(
    config: Config, corpus: Corpus, phases: Sequence[Phase]
) -> list[StoredEpochs | None]:
    """As `follow_store`; empty where the device that the settings ask for is not here."""
    try:
        return follow_store(config, corpus, phases)
    except ConfigError:
        return []
