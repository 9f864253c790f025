"""What a run trains, which is known before anything runs. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from proglayer.config import Config, DataConfig
from proglayer.console import tell
from proglayer.data.corpus import Corpus, open_corpus
from proglayer.data.pretrained import Pretrained
from proglayer.run.record import check_objective, corpus_record
from proglayer.training.plan import Phase, open_checkpoint, plan

Corpora = dict[DataConfig, Corpus]


# Compared by identity: the corpus holds arrays.
@dataclass(frozen=True, eq=False)
class Setup:
    """What a run trains: its phases, from this checkpoint if any, on this text."""

    corpus: Corpus
    checkpoint: Pretrained | None
    phases: tuple[Phase, ...]


def set_up(config: Config, corpora: Corpora) -> Setup:
    """Open the corpus and plan.

    corpora: those that are open; this one is added.

    Raises ConfigError where settings and corpus do not fit together.
    """
    checkpoint = open_checkpoint(config)
    if config.data not in corpora:
        corpora[config.data] = open_corpus(config.data, tell)
    corpus = corpora[config.data]
    phases = plan(config, corpus.vocab_size, checkpoint)
    for phase in phases:
        phase.train.windows(len(corpus.train))
    check_objective(config.objective, corpus_record(corpus))
    return Setup(corpus, checkpoint, phases)
