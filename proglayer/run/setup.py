"""What a run trains, which is known before anything runs. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proglayer.config import Config
from proglayer.console import tell
from proglayer.data.corpus import Corpus, open_corpus
from proglayer.data.pretrained import Pretrained
from proglayer.errors import ConfigError
from proglayer.run.record import check_objective, corpus_record
from proglayer.training.plan import Phase, open_checkpoint, plan

# What was opened for earlier jobs: settings -> a corpus, a checkpoint, or why there is none.
Opened = dict[Any, Any]


# Compared by identity: the corpus holds arrays.
@dataclass(frozen=True, eq=False)
class Setup:
    """What a run trains: its phases, from this checkpoint if any, on this text."""

    corpus: Corpus
    checkpoint: Pretrained | None
    phases: tuple[Phase, ...]


def set_up(config: Config, opened: Opened) -> Setup:
    """Open the corpus and plan. What was opened is added to `opened`, and never asked for again.

    Raises ConfigError where settings and corpus do not fit together.
    """
    checkpoint = once(opened, config.model, lambda: open_checkpoint(config))
    corpus = once(opened, config.data, lambda: open_corpus(config.data, tell))
    phases = plan(config, corpus.vocab_size, checkpoint)
    for phase in phases:
        _check_windows(config, phase, len(corpus.train))
        if (batch := phase.train.batch_size) < config.least_devices:
            raise ConfigError(f"batch_size={batch} is smaller than devices={config.devices}")
    check_objective(config.objective, corpus_record(corpus))
    return Setup(corpus, checkpoint, phases)


def _check_windows(config: Config, phase: Phase, there: int) -> None:
    """Raise ConfigError where a phase asks for more training windows than there are."""
    part = "grown" if phase.index else "initial"
    own = f"{part}." if getattr(config.phase, part).samples is not None else ""
    if (wanted := phase.train.samples) is not None and wanted > there:
        raise ConfigError(
            f"phase.{own}samples={wanted} asks for more windows than the corpus gives ({there}): "
            "lower it or raise data.samples"
        )


def once(opened: Opened, settings: Any, make: Callable[[], Any]) -> Any:
    """Return what these settings stand for, opened by `make` if no earlier job had them.

    Raises ConfigError, again if there was none.
    """
    if settings not in opened:
        try:
            opened[settings] = make()
        except ConfigError as error:
            opened[settings] = error
    if isinstance(opened[settings], ConfigError):
        raise opened[settings]
    return opened[settings]
