"""A run's model of `transformers` as a folder that the library loads by itself: no code of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from proglayer import __version__, files
from proglayer.config import BPE, WORDS, Config, from_plain
from proglayer.data.corpus import open_corpus
from proglayer.errors import ConfigError, first_line
from proglayer.run.experiment import load_run
from proglayer.store.record import PhaseRecord, RunRecord, read_record
from proglayer.training.causal_lm import CausalModel, quiet

CARD = "README.md"


def export_run(folder: str | Path, to: str | Path) -> Path:
    """Write the model of a completed run of `model=causal_lm` for `transformers`.

    What is written is what `AutoModelForCausalLM.from_pretrained(to)` reads: weights, settings, the
    tokenizer where the text was cut by one, and a model card that says how the model was grown.

    to: a folder that is not there yet.

    Returns:
        the folder.

    Raises FileNotFoundError or StoreError as `load_run` does, and ConfigError for a run of the
    project's own model, or where something is in the place of `to`.
    """
    folder, to = Path(folder), Path(to)
    model, record = load_run(folder), read_record(folder)
    if not isinstance(model, CausalModel):
        raise ConfigError(
            f"{folder} holds the project's own model, which transformers does not know: only runs "
            "of model=causal_lm are exported"
        )
    if record is None or record.config is None:
        raise ConfigError(f"{folder} holds no record of a run, which the model card is made from")
    if to.exists():
        raise ConfigError(f"{to} is there already: name a folder that is not")
    config = from_plain(record.config)
    to.parent.mkdir(parents=True, exist_ok=True)
    with files.new_folder(to.parent, f"{to.name}.partial") as partial:
        with quiet():
            model.pretrained().save_pretrained(partial)
        _write_tokenizer(config, partial)
        with open(partial / CARD, "x", encoding="utf-8") as card:
            card.write("\n".join(_card(config, record)) + "\n")
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


def _card(config: Config, record: RunRecord) -> Iterator[str]:
    """The lines of the model card."""
    model, growth, corpus = config.model, config.growth, record.corpus
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation")
    yield from ("tags: [proglayer, progressive-layer-training]", "---", "")
    yield from ("# A language model grown in depth", "")
    if record.checkpoint is not None:
        at = record.checkpoint
        revision = f" at revision `{at.revision}`" if at.revision else ""
        yield f"It began as the first {at.layers} layers of `{at.path}`{revision}"
        yield f"(SHA-256 of its settings and weights: `{at.sha256}`)."
    else:
        assert model.family is not None
        yield f"It began as an untrained model of the family {model.family.name}."
    yield from (
        f"proglayer {__version__} trained it in the phases below, with seed {record.seed}.",
        "",
        "| phase | layers | new layers | frozen | epochs | validation loss | perplexity |",
        "|---|---|---|---|---|---|---|",
    )
    yield from (_card_row(phase) for phase in record.phases)
    yield from (
        "",
        "Layers are counted from 1 at the bottom. Losses are in nats per token, at the selected "
        "epoch.",
        "",
        f"- Growth: `growth.init={growth.init.name}`, `growth.position={growth.position.name}`.",
        f"- Learning rate: {config.lr.base:g}, schedule {config.lr.schedule.name}; AdamW.",
    )
    if corpus is not None:
        yield (
            f"- Text: {corpus.name}, {corpus.train_windows:,} training windows of "
            f"{corpus.seq_len:,} tokens, tokenizer `{config.data.tokenizer}`."
        )
    dropout = "Dropout is off, as it was in training."
    yield from (f"- Command: `{' '.join(record.overrides or [])}`.", f"- {dropout}")


def _card_row(phase: PhaseRecord) -> str:
    best = phase.best
    cells = (
        f"{(phase.index or 0) + 1} {phase.name}",
        str(phase.layers),
        ", ".join(str(layer + 1) for layer in phase.new_layers or []) or "none",
        str(len([part for part in phase.frozen or [] if part.startswith("layers.")]))
        + " layers"
        + "".join(f", {part}" for part in phase.frozen or [] if not part.startswith("layers.")),
        str(phase.epochs),
        "" if best.validation_loss is None else f"{best.validation_loss:.4f}",
        "" if best.validation_perplexity is None else f"{best.validation_perplexity:.2f}",
    )
    return f"| {' | '.join(cells)} |"
