"""A checkpoint of transformers, grown in a run, and what the library makes of the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from proglayer import export_run, load_run
from proglayer.data.pretrained import open_pretrained
from proglayer.errors import ConfigError
from proglayer.results import load
from proglayer.run.__main__ import main
from proglayer.run.export import _card
from proglayer.run.record import RecordError, RunRecord, RunState, read_record, write_record
from proglayer.run.run import run

from ..helpers import ROOT, config

transformers = pytest.importorskip("transformers")

FILE = ROOT / "tests" / "fixtures" / "text.txt"
TEXT = (
    "data=text", f"data.files=[{FILE}]", "data.samples=24",
    "data.validation_samples=8", "data.seq_len=16", "data.held_out=0.3", "data.max_vocab=300",
    "phase.batch_size=8", "phase.max_epochs=1", "lr.base=0.01", "lr.factor.new=1", "report=false",
    "threads=1",
)  # fmt: skip


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny Llama with a tokenizer of its own, as transformers saves them."""
    from tokenizers import Tokenizer

    from proglayer.data.tokens import train_bpe

    text = FILE.read_text()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(train_bpe([text], 320).decode())
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        vocab_size=320, max_position_embeddings=64, initializer_range=0.3,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(settings)
    made.generation_config.eos_token_id = [2, 7]
    made.to(dtype).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n")
    return folder


def runs_to_its_end(folder: Path, *overrides: str) -> RunRecord:
    record = run(
        config(*TEXT, f"store.dir={folder / 'stages'}", *overrides),
        folder / "run",
        {"overrides": overrides},
    )
    assert record.state is RunState.completed, record.reason
    return record


def test_a_checkpoint_grows_without_a_shock_and_goes_back_to_the_library(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint")
    overrides = (
        "experiment=recipe/llama_pro_checkpoint", f"model.path={path}", "added_layers=3",
    )  # fmt: skip
    record = runs_to_its_end(tmp_path, *overrides)
    first, second = record.phases
    assert first.best_epoch == 0
    assert (first.layers, second.layers, second.new_layers) == (3, 6, [1, 3, 5])
    assert second.growth is not None
    assert second.growth.exit_losses_after[-1] == first.validation.loss
    assert second.validation.loss < first.validation.loss
    read = read_record(tmp_path / "run")
    assert read.checkpoint.layers == 3
    assert read.checkpoint.path == str(path)
    assert len(read.checkpoint.sha256) == 64
    frames = load(tmp_path / "run")
    assert list(frames.phases["epochs"]) == [0, 1]
    assert list(frames.epochs["epoch"]) == [0, 0, 1]

    to = export_run(tmp_path / "run", tmp_path / "grown")
    assert len({path.stat().st_mode for path in to.iterdir()}) == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    ours = load_run(tmp_path / "run")
    tokens = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours.logits(tokens))
    assert theirs.config.num_hidden_layers == 6
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    inputs = tokenizer("The trainer takes a", return_tensors="pt")
    assert inputs["input_ids"].shape[1] < 20
    made = theirs.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    assert made.shape[1] == inputs["input_ids"].shape[1] + 5
    with torch.no_grad():
        assert int(ours.logits(inputs["input_ids"])[0, -1].argmax()) == made[0, -5]
    card = (to / "README.md").read_text()
    for text in (
        "`checkpoint`", record.checkpoint.sha256, "growth.init=zero", "license: apache-2.0\n",
        "6 layers, 3 of them new: 1 epochs, new at 0.01; validation loss",
    ):  # fmt: skip
        assert text in card
    at = record.checkpoint.model_copy(update={"path": "owner/name", "revision": "0abc"})
    of_hub = _card(config(*TEXT, *overrides), record.model_copy(update={"checkpoint": at}),
                   open_pretrained(str(path), None))  # fmt: skip
    assert "base_model: owner/name\nlicense: apache-2.0\n" in of_hub
    assert str(tmp_path) not in card
    assert str(ROOT) not in card
    assert theirs.generation_config.eos_token_id == [2, 7]
    with pytest.raises(ConfigError, match="is there already"):
        export_run(tmp_path / "run", to)

    # The same command finds all of it stored.
    again = run(config(*TEXT, f"store.dir={tmp_path / 'stages'}", *overrides), tmp_path / "again")
    assert all(row.reused for row in again.epochs if row.epoch)
    assert again.weights_sha256 == record.weights_sha256


def test_a_bfloat16_checkpoint_stays_one(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint", torch.bfloat16)
    runs_to_its_end(
        tmp_path, "model=causal_lm", f"model.path={path}", "data.tokenizer=model",
        "initial_layers=null", "phase.initial.max_epochs=0", "growth=zero", "freeze=new_layers",
    )  # fmt: skip
    to = export_run(tmp_path / "run", tmp_path / "grown")
    grown, old = (transformers.AutoModelForCausalLM.from_pretrained(each) for each in (to, path))
    assert {p.dtype for p in grown.parameters()} == {torch.bfloat16}
    for name, tensor in old.state_dict().items():
        assert torch.equal(grown.state_dict()[name], tensor), name
    write_record(tmp_path / "run", read_record(tmp_path / "run").model_copy(update={"config": {}}))
    with pytest.raises(RecordError, match="has no settings of this version"):
        export_run(tmp_path / "run", tmp_path / "again")


def test_what_is_no_model_is_told_before_a_text_is_prepared_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for path, reason in (tmp_path, "family bert"), (tmp_path / "none", "is no folder"):
        settings = config(
            "model=causal_lm", f"model.path={path}", "data.tokenizer=model", "data=text",
            "data.files=[/no/such/text]", "report=false",
        )  # fmt: skip
        reason = rf"model\.path={path}.*{reason}"
        assert re.match(reason, run(settings, tmp_path / "run").reason or "")


def test_an_untrained_model_of_a_family_goes_to_the_library_with_its_bpe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = runs_to_its_end(
        tmp_path, "model=causal_lm", "model.family=gpt_neox", "model.dim=16", "model.num_heads=2",
        "initial_layers=2", "growth=stack", "data.tokenizer=bpe",
    )  # fmt: skip
    assert record.checkpoint is None
    assert main([str(tmp_path / "run"), "-o", str(tmp_path / "out" / "grown")]) == 0
    assert "grown" in capsys.readouterr().out
    to = tmp_path / "out" / "grown"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    text = "A report says what the data say."
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.decode(tokens[0]) == text
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, load_run(tmp_path / "run").logits(tokens))
    assert json.loads((to / "config.json").read_text())["num_hidden_layers"] == 3


def test_a_phase_without_epochs_is_one_of_our_own_model_too(tmp_path: Path) -> None:
    record = runs_to_its_end(
        tmp_path, "phase.initial.max_epochs=0", "model.dim=8", "model.num_heads=2",
        "initial_layers=2", "growth=gate", "growth.gate_steps=2", "freeze=none",
    )  # fmt: skip
    first, second = record.phases
    assert [row.epoch for row in record.epochs] == [0, 0, 1]
    assert second.growth.exit_losses_after[-1] == first.validation.loss
    with pytest.raises(ConfigError, match="the project's own model, which transformers does not"):
        export_run(tmp_path / "run", tmp_path / "grown")
