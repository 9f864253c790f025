"""A run's model of `transformers` as a folder that the library loads by itself: no code of ours."""

from __future__ import annotations

from pathlib import Path

from proglayer import __version__, files
from proglayer.config import BPE, WORDS, Config
from proglayer.data.corpus import open_corpus
from proglayer.errors import ConfigError, first_line
from proglayer.run.record import PhaseRecord, RunRecord, read_record
from proglayer.run.run import load_run
from proglayer.training.causal_lm import CausalModel, quiet
from proglayer.training.stopping import perplexity

CARD = "README.md"


def export_run(folder: str | Path, to: str | Path) -> Path:
    """Write the model of a completed run of `model=causal_lm` for `transformers`.

    What is written is what `AutoModelForCausalLM.from_pretrained(to)` reads: weights, settings, the
    tokenizer where the text was cut by one, and a model card that says how the model was grown.

    to: a folder that is not there yet.

    Returns:
        the folder.

    Raises what `load_run` does, and ConfigError for a run of the project's own model, or where
    something is in the place of `to`.
    """
    folder, to = Path(folder), Path(to)
    model, record = load_run(folder), read_record(folder)
    if not isinstance(model, CausalModel):
        raise ConfigError(
            f"{folder} holds the project's own model, which transformers does not know: only runs "
            "of model=causal_lm are exported"
        )
    if record.config is None:
        raise ConfigError(f"{folder} holds no record of a run, which the model card is made from")
    if to.exists():
        raise ConfigError(f"{to} is there already: name a folder that is not")
    config = Config.model_validate(record.config)
    to.parent.mkdir(parents=True, exist_ok=True)
    with files.new_folder(to.parent, f"{to.name}.partial") as partial:
        with quiet():
            model.pretrained().save_pretrained(partial)
        _write_tokenizer(config, partial)
        with open(partial / CARD, "x", encoding="utf-8") as card:
            card.write(_card(config, record))
        files.put_in_place(partial, to)
    return to


def _write_tokenizer(config: Config, folder: Path) -> None:
    """Put the tokenizer of the run's text there, with what its own folder says of it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = config.data.tokenizer
    if name == WORDS:
        return
    try:
        with quiet():
            if name == BPE:
                file = open_corpus(config.data).tokenizer_file
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
            else:
                tokenizer = AutoTokenizer.from_pretrained(
                    Path(name).expanduser() if Path(name).expanduser().is_dir() else name,
                    revision=config.data.tokenizer_revision or "main",
                    trust_remote_code=False,
                )
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the library raises many kinds
        raise ConfigError(
            f"data.tokenizer={name} cannot be had any more ({first_line(error)})"
        ) from error


def _card(config: Config, record: RunRecord) -> str:
    """The model card."""
    at, corpus, family = record.checkpoint, record.corpus, config.model.family
    began = f"an untrained model of the family {family.name}" if family else ""
    if at is not None:
        revision = f" at revision `{at.revision}`" if at.revision else ""
        began = f"the first {at.layers} layers of `{at.path}`{revision}"
        began += f" (SHA-256 of its settings and weights: `{at.sha256}`)"
    windows = f"{corpus.train_windows:,} of {corpus.seq_len:,} tokens" if corpus else ""
    phases = "\n".join(_card_row(*each) for each in enumerate(record.phases, start=1))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [proglayer, progressive-layer-training]
---

# A language model grown in depth

It began as {began}.
proglayer {__version__} trained it in the phases below, with seed {record.seed}.

| phase | layers | new layers | frozen | epochs | validation loss | perplexity |
|---|---|---|---|---|---|---|
{phases}

Layers are counted from 1 at the bottom. Losses are in nats per token, at the selected epoch.

- Growth: `growth.init={config.growth.init.name}`, `growth.position={config.growth.position.name}`.
- Learning rate: {config.lr.base:g}, schedule {config.lr.schedule.name}; AdamW.
- Text: {corpus and corpus.name}, tokenizer `{config.data.tokenizer}`, training windows: {windows}.
- Command: `{" ".join(record.overrides or [])}`.
- Dropout is off, as it was in training.
"""


def _card_row(number: int, phase: PhaseRecord) -> str:
    frozen = phase.frozen
    others = [part for part in frozen if not part.startswith("layers.")]
    cells = (
        f"{number} {phase.name}",
        str(phase.layers),
        ", ".join(str(layer + 1) for layer in phase.new_layers) or "none",
        ", ".join((f"{len(frozen) - len(others)} layers", *others)),
        str(phase.epochs),
        f"{phase.validation.loss:.4f}",
        f"{perplexity(phase.validation.loss):.2f}",
    )
    return f"| {' | '.join(cells)} |"
