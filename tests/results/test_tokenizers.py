"""Between tokenizers: bits per byte, in records, frames, the table and a search."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from proglayer.results import load
from proglayer.results.show import summary_table
from proglayer.run.record import CorpusRecord, Score

from ..helpers import SHORT, Command
from ..helpers import results as records
from ..synthetic import run


def test_bits_per_byte_by_hand() -> None:
    """100 windows of 8 targets, a bit each, over 200 bytes are 4 bits a byte."""
    corpus = CorpusRecord(
        name="a", fingerprint="f", vocab_size=9, seq_len=8, train_windows=1,
        validation_windows=100, validation_bytes=200, test_windows=50, test_bytes=800,
    )  # fmt: skip
    expected = {
        "validation_loss": math.log(2), "validation_perplexity": 2,
        "validation_accuracy_percent": 50, "validation_bits_per_byte": 4,
    }  # fmt: skip
    assert corpus.figures(Score(loss=math.log(2), accuracy=0.5)) == pytest.approx(expected)
    two = Score(loss=2 * math.log(2), accuracy=0.5)
    assert corpus.figures(two, "test")["test_bits_per_byte"] == pytest.approx(1)
    unknown = corpus.model_copy(update={"validation_bytes": None, "test_windows": None})
    assert unknown.figures(two)["validation_bits_per_byte"] is None
    assert unknown.figures(two, "test")["test_bits_per_byte"] is None


def test_a_run_records_every_loss_as_bits_per_byte(train: Command, tmp_path: Path) -> None:
    done = train(
        *SHORT, "data.tokenizer=bpe", "data.max_vocab=300", "hydra.run.dir=run",
        "objective=validation_bits_per_byte",
    )  # fmt: skip
    assert done.status == 0, done.err
    (record,) = records(tmp_path / "run")
    corpus = record["corpus"]
    assert corpus["tokenizer"] == "bpe"
    assert 256 < corpus["vocab_size"] <= 300
    # By hand: 32 windows of 32 targets for validation, the bytes of the text that they spell.
    tokens = 32 * 32
    assert tokens <= corpus["validation_bytes"] <= 20 * tokens
    per_nat = tokens / corpus["validation_bytes"] / math.log(2)
    last = record["phases"][-1]
    assert record["objective"] == pytest.approx(last["validation"]["loss"] * per_nat)
    frames = load(tmp_path / "run")
    for frame in (frames.epochs, frames.exits, frames.phases):
        losses = frame["validation_loss"].astype(float)
        bits = frame["validation_bits_per_byte"].tolist()
        assert bits == pytest.approx((losses * per_nat).tolist())
    assert frames.runs["last_validation_bits_per_byte"].tolist() == [record["objective"]]
    on_test = last["test"]["loss"] * 4 * tokens / corpus["test_bytes"] / math.log(2)
    assert frames.phases["test_bits_per_byte"].iloc[-1] == pytest.approx(on_test)
    # Epochs that are better than all before them are read on the test text, for a budget's end.
    epochs = frames.epochs[frames.epochs["epoch"] > 0]
    lowest = epochs["validation_loss"] == epochs.groupby("phase")["validation_loss"].cummin()
    assert (epochs["test_loss"].notna() == lowest).all()
    assert epochs.loc[epochs["best"], "test_loss"].tolist() == frames.phases["test_loss"].tolist()


def test_the_table_of_a_sweep_shows_them_where_tokenizers_differ(tmp_path: Path) -> None:
    for seed, tokenizer in enumerate(("words", "bpe", "bpe")):
        corpus = CorpusRecord(
            name="pydocs", fingerprint=tokenizer, vocab_size=8192, seq_len=32, train_windows=3000,
            validation_windows=500, tokenizer=tokenizer, validation_bytes=90_000,
        )  # fmt: skip
        own = f"data.tokenizer={tokenizer}"
        run(tmp_path / f"{seed}", "original", "standard", seed, own, corpus=corpus)

    def heads(*folders: str) -> str:
        out = Console(width=200, record=True, file=io.StringIO())
        out.print(summary_table(load(*(tmp_path / name for name in folders))).rich())
        return out.export_text()

    assert "bits/byte" in heads("0", "1")
    assert "bits/byte" not in heads("1", "2")
