"""A run's model of `transformers` as a folder that the library loads by itself: no code of ours."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from proglayer import __version__, files
from proglayer.config import BPE, BYTES, WORDS, Config
from proglayer.data.corpus import open_corpus
from proglayer.data.pretrained import (
    FETCHED,
    GENERATION_FILE,
    Pretrained,
    folder_or_hub,
    open_pretrained,
)
from proglayer.errors import ConfigError, raised_as
from proglayer.run.record import RunRecord, read_record
from proglayer.run.run import load_run
from proglayer.training.causal_lm import CausalModel, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = "README.md"


def export_run(folder: str | Path, to: str | Path) -> Path:
    """Write the model of a completed run of `model=causal_lm` for `transformers`.

    What is written is what `AutoModelForCausalLM.from_pretrained(to)` reads: weights, settings, the
    tokenizer where the text was cut by one, and a model card that says how the model was grown. A
    grown checkpoint keeps how it generates, and the dtype that its files have.

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
    if to.exists():
        raise ConfigError(f"{to} is there already: name a folder that is not")
    config = record.settings
    to.parent.mkdir(parents=True, exist_ok=True)
    with files.new_folder(to.parent, f"{to.name}.partial") as partial:
        found = None
        if config.model.path is not None:
            found = open_pretrained(config.model.path, config.model.revision, weights=False)
        with quiet():
            _as_it_was(model.pretrained(), found).save_pretrained(partial)
        _write_tokenizer(config, partial)
        with open(partial / CARD, "x", encoding="utf-8") as card:
            card.write(_card(config, record, found))
        files.put_in_place(partial, to)
    return to


def _as_it_was(inner: PreTrainedModel, found: Pretrained | None) -> PreTrainedModel:
    """Give a model the dtype and the settings for generating of the checkpoint it began with."""
    from transformers import GenerationConfig

    if found is None:
        return inner
    if (found.folder / GENERATION_FILE).exists():
        inner.generation_config = GenerationConfig.from_pretrained(found.folder)
    kept = getattr(torch, str(found.config.get("dtype") or found.config.get("torch_dtype")), None)
    if isinstance(kept, torch.dtype):
        narrower = min(kept, inner.dtype, key=lambda dtype: dtype.itemsize)
        torch.nn.Module.to(inner, dtype=narrower)
    return inner


def _write_tokenizer(config: Config, folder: Path) -> None:
    """Put the tokenizer of the run's text there, with what its own folder says of it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = config.data.tokenizer
    if name in (WORDS, BYTES):
        return
    said = f"data.tokenizer={name} cannot be had any more"
    with raised_as(ConfigError, said, Exception), quiet():  # the library raises many kinds
        if name == BPE:
            file = open_corpus(config.data).tokenizer_file
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            revision = config.data.tokenizer_revision
            theirs, _ = folder_or_hub("data.tokenizer", name, revision, FETCHED)
            tokenizer = AutoTokenizer.from_pretrained(theirs, trust_remote_code=False)
        tokenizer.save_pretrained(folder)


def _card(config: Config, record: RunRecord, found: Pretrained | None) -> str:
    """Return the model card: where the model comes from, without a path of this machine."""
    at, corpus = record.checkpoint, record.corpus
    began = f"an untrained model of the family {config.model.family}"
    kept = ""
    if at is not None and found is not None:
        name = at.path if at.revision else Path(at.path).name
        revision = f" at revision `{at.revision}`" if at.revision else ""
        began = f"the first {at.layers} layers of `{name}`{revision} (SHA-256 `{at.sha256}`)"
        card = found.folder / CARD
        said = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
        licence = re.search(r"\A---\n(?:.*\n)*?(license: .*\n)(?:.*\n)*?---\n", said)
        kept = (f"base_model: {name}\n" if at.revision else "") + (licence[1] if licence else "")
    phases = "\n".join(
        f"- {phase.layers} layers, {len(phase.new_layers)} of them new: {phase.best_epoch} epochs, "
        + ", ".join(f"{role} at {rate:g}" for role, rate in asdict(phase.rates).items() if rate)
        + f"; validation loss {phase.validation.loss:.4f} nats per token"
        for phase in record.phases
    )
    command = re.sub(r"(?<![\w.*])[~/][^,'\"\]]*/", "", " ".join(record.overrides))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{kept}tags: [proglayer, progressive-layer-training]
---

# A language model grown in depth

proglayer {__version__} grew it (`growth.init={config.growth.init}`) from {began}, on the text
{corpus and corpus.name} with the tokenizer `{Path(config.data.tokenizer).name}` and seed
{config.seed}:

{phases}

Command: `{command}`. Dropout is off, as it was in training.
"""
