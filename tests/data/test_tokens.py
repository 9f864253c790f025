"""Words against their slow twin, subwords, the bytes of each token, bad tokenizers."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proglayer.config import ConfigError, DataConfig
from proglayer.data import corpus as corpus_module
from proglayer.data import text as text_module
from proglayer.data import tokens
from proglayer.data.corpus import Corpus, open_corpus

from ..helpers import config
from .made import (
    TRAIN,
    VALIDATION,
    answers,
    changed,
    one_line,
    release,
    start,
    stream,
    twin_words,
    words_of,
    write_release,
)

tokenizers = pytest.importorskip("tokenizers")


def twin_ids(
    train: str, validation: str, lowercase: bool, min_count: int, max_vocab: int | None
) -> tuple[list[int], list[int], list[str]]:
    streams = twin_words(train, lowercase), twin_words(validation, lowercase)
    counts = collections.Counter(streams[0] + streams[1])
    order = [word for word in dict.fromkeys(streams[0] + streams[1]) if word != "<unk>"]
    kept = [word for word in order if counts[word] >= min_count]
    if max_vocab is not None:
        frequent = sorted(kept, key=lambda word: (-counts[word], order.index(word)))
        kept = [word for word in kept if word in frequent[: max_vocab - 2]]
    vocabulary = ["<unk>", "<pad>", *kept]
    ids = {word: i for i, word in enumerate(vocabulary)}
    first, second = ([ids.get(word, 0) for word in stream] for stream in streams)
    return first, second, vocabulary


# Letters of one to four bytes, some of which lower-case to more letters or by their neighbours;
# every kind of white space, line ends of other conventions, and what only looks like a space.
TEXT = st.lists(
    st.sampled_from(["a", "A", "bé", "É", "İ", "ΑΣ", "σß", "漢", "😀", "<unk>", "\ufeff", "\u200b"])
    | st.sampled_from([" ", "\n", "\t", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85"])
    | st.sampled_from(["\xa0", "\u2028", "\u2029", "\u3000"]),
    max_size=40,
).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    train=TEXT,
    validation=TEXT,
    lowercase=st.booleans(),
    min_count=st.integers(1, 3),
    max_vocab=st.none() | st.integers(3, 9),
    piece=st.integers(1, 20),
)
def test_streams_equal_the_rule_read_slowly(
    tmp_path_factory, train, validation, lowercase, min_count, max_vocab, piece
):
    train, validation = f"x A {train}", f"y A {validation}"
    folder = write_release(tmp_path_factory.mktemp("twin") / "text", train, validation)
    data = release(folder, seq_len=1, lowercase=lowercase, min_count=min_count, max_vocab=max_vocab)
    with pytest.MonkeyPatch.context() as patch:
        # Pieces end within words and within the bytes of a letter.
        patch.setattr(text_module, "BLOCK_BYTES", piece)
        patch.setattr(os, "fsync", lambda descriptor: None)
        corpus = open_corpus(data)
    *streams, vocabulary = twin_ids(train, validation, lowercase, min_count, max_vocab)
    for windows, ids in zip((corpus.train, corpus.validation), streams, strict=True):
        assert windows.shape == (len(ids) // 2, 2)
        assert windows.reshape(-1).tolist() == ids[: windows.size]
    assert words_of(corpus) == vocabulary
    assert corpus.vocab_size == len(vocabulary)


def test_wikitext2_has_the_ids_that_are_known_of_it(wikitext2_folder, tmp_path):
    data = config("data=wikitext2", f"data.path={wikitext2_folder}").data
    corpus = open_corpus(changed(data, cache_dir=str(tmp_path)))
    first = [2, 3, 4, 5, 2, 6, 7, 3, 8, 9, 10, 4, 11, 12, 9, 13, 14, 15, 16, 3]
    held = [2, 26921, 26922, 2, 26921, 26922, 14, 405, 24, 18, 6655, 26923]
    assert corpus.train[0, :20].tolist() == first
    assert corpus.validation[0, :12].tolist() == held
    assert corpus.vocab_size == 33_448
    assert corpus.train.shape == (10_000, 33)
    assert corpus.validation.shape == (2_000, 33)


def bpe(folder: Path, size: int = 300, **changes: Any) -> DataConfig:
    return release(folder, tokenizer="bpe", max_vocab=size, **changes)


def tokenizer_folder(folder: Path, size: int = 280, text: str = TRAIN) -> Path:
    """A folder with a tokenizer, as `save_pretrained` leaves it."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(tokens.train_bpe([text], size))
    return folder


def decoded(corpus: Corpus, name: str) -> str:
    assert corpus.tokenizer_file is not None
    tokenizer = tokenizers.Tokenizer.from_file(str(corpus.tokenizer_file))
    return tokenizer.decode(stream(corpus, name).tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("size", [257, 300, 5000])
def test_the_text_comes_back_to_the_byte(tmp_path: Path, size: int) -> None:
    """Case, spaces, line ends, bytes that no training text had: all of it."""
    train, validation = f"  {TRAIN}", f"\tÉ漢😀\r\n\n  {VALIDATION}\u2028x  "
    corpus = open_corpus(bpe(write_release(tmp_path / "text", train, validation), size))
    assert decoded(corpus, "train") == train
    assert decoded(corpus, "validation") == validation
    assert corpus.vocab_size <= size
    assert stream(corpus, "train").max() < corpus.vocab_size
    assert len(words_of(corpus)) == corpus.vocab_size
    assert words_of(corpus)[stream(corpus)[0]] == "ĉ"  # how a byte-level vocabulary writes a tab


@pytest.mark.parametrize("part", [40, 200, 1000])
def test_parts_have_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """Where a part ends, a token ends, too, by GPT-2's rule and by that of Llama 3 and Qwen."""
    text = f"{TRAIN}{VALIDATION} \"Don't\",  she said;\n\n  it's 12345...\nyes (no)\nend " * 3
    gpt2 = tokenizers.Tokenizer.from_str(tokens.train_bpe([text], 400).decode())
    llama = tokenizers.Tokenizer.from_str(gpt2.to_str())
    rule = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    own = tokenizers.pre_tokenizers
    llama.pre_tokenizer = own.Sequence(
        [own.Split(rule, "isolated"), own.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    monkeypatch.setattr(tokens, "PART_CHARACTERS", part)
    assert len(list(tokens.parts([text]))) > 3
    pieces = re.findall(r"(?s).{1,7}", text)
    for tokenizer in (gpt2, llama):
        for read in ([text], pieces):
            ids = np.concatenate(list(subwords(tokenizer).ids(read)))
            assert ids.tolist() == tokenizer.encode(text).ids


def test_the_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "text")
    own = tokenizer_folder(tmp_path / "tokenizer")
    other = tokenizer_folder(tmp_path / "other", size=290)
    moved = shutil.copytree(own, tmp_path / "elsewhere" / "tokenizer")

    def fingerprint(**changes: Any) -> str:
        return open_corpus(release(folder, **changes)).fingerprint

    own_bpe = [open_corpus(bpe(folder, size)).fingerprint for size in (280, 281)]
    found = [fingerprint(), *own_bpe, fingerprint(tokenizer=str(other))]
    assert len(set(found)) == len(found)
    # What a tokenizer does to a text, not where it lay: this one is the BPE of that very text.
    assert fingerprint(tokenizer=str(own)) == fingerprint(tokenizer=str(moved)) == found[1]


def test_what_a_tokenizer_was_stored_with_cuts_and_adds_nothing(tmp_path: Path) -> None:
    plain = tokenizer_folder(tmp_path / "plain")
    own = tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json"))
    own.add_special_tokens(["<|endoftext|>"])
    mark = own.token_to_id("<|endoftext|>")
    own.enable_truncation(max_length=5)
    own.model.dropout = 0.5  # another text each time
    own.enable_padding(length=100, pad_id=mark, pad_token="<|endoftext|>")
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", mark)]
    )
    other = tmp_path / "other"
    other.mkdir()
    own.save(str(other / "tokenizer.json"))
    folder = write_release(tmp_path / "text")
    first, second = (open_corpus(release(folder, tokenizer=str(each))) for each in (plain, other))
    assert np.array_equal(stream(first), stream(second))
    assert np.array_equal(stream(first, "train"), stream(second, "train"))
    # One that the text spells out is that token.
    marked = write_release(tmp_path / "marked", validation=f"<|endoftext|>{VALIDATION}")
    corpus = open_corpus(release(marked, tokenizer=str(other)))
    assert stream(corpus)[0] == mark
    assert corpus.vocab_size == mark + 1
    assert stream(corpus, "validation_bytes")[0] == len("<|endoftext|>")


def test_a_name_on_the_hub_is_read_from_its_cache_at_its_revision(tmp_path: Path) -> None:
    """Without a network, as `huggingface_hub` lays a download out."""
    folder = write_release(tmp_path / "text")
    repository = tmp_path / "hub" / "models--owner--name"
    commits = {"a" * 40: 270, "b" * 40: 280}
    for commit, size in commits.items():
        tokenizer_folder(repository / "snapshots" / commit, size)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    asked = [
        release(folder, tokenizer="owner/name", tokenizer_revision=revision)
        for revision in (None, "a" * 40, "c" * 40)
    ]
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    newest, first, unknown = answers(start(tmp_path, asked, **environment))
    assert newest["fingerprint"] == open_corpus(bpe(folder, 280)).fingerprint
    assert first["fingerprint"] == open_corpus(bpe(folder, 270)).fingerprint
    assert (newest["revision"], first["revision"]) == ("b" * 40, "a" * 40)
    revision = f"data.tokenizer=owner/name at revision {'c' * 40} "
    assert unknown["error"].startswith(revision)


def subwords(tokenizer: Any) -> tokens.Subwords:
    return tokens.Subwords(tokenizer.to_str().encode(), "x")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXT, piece=st.integers(1, 20))
def test_bytes_are_those_of_the_text(tmp_path_factory, text: str, piece: int) -> None:
    """Each has a place, and counts as one; the vocabulary says which is which."""
    folder = write_release(tmp_path_factory.mktemp("bytes") / "text", f"{text}xy", f"xy{text} ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "BLOCK_BYTES", piece)
        patch.setattr(os, "fsync", lambda descriptor: None)
        corpus = open_corpus(release(folder, tokenizer="bytes", seq_len=1))
    for name, there in (("train", f"{text}xy"), ("validation", f"xy{text} ")):
        values = [int(words_of(corpus)[id], 16) for id in stream(corpus, name)]
        assert bytes(values).decode().strip() == there.removeprefix("\ufeff").strip()
    assert corpus.vocab_size == 256
    assert corpus.validation_bytes == len(corpus.validation)  # of each window one is a target
    assert corpus.validation_unknown is None


def test_bytes_tell_half_a_surrogate_pair() -> None:
    (ids,) = tokens.Bytes().ids(["a\ud800"])
    assert bytes(ids.tolist()).decode("utf-8", "surrogatepass") == "a\ud800"


@settings(max_examples=60, deadline=None)
@given(text=TEXT, part=st.integers(1, 12))
def test_bytes_add_up_to_the_text_whatever_a_tokenizer_drops(text: str, part: int) -> None:
    """This one lower-cases, composes, drops white space and knows few words."""
    words = {"[UNK]": 0, "a": 1, "bé": 2}
    lossy = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    own = tokenizers.normalizers
    lossy.normalizer = own.Sequence([own.NFKD(), own.Lowercase(), own.StripAccents()])
    lossy.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    exact = tokens.Subwords(tokens.train_bpe([TRAIN], 300), "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PART_CHARACTERS", part)
        for encoder, all_of_it in ((subwords(lossy), False), (exact, True)):
            found = list(corpus_module._carried(encoder.sized([text, "a "])))
            ids = np.concatenate([pair[0] for pair in found])
            sizes = np.concatenate([pair[1] for pair in found])
            plain = np.concatenate(list(encoder.ids([text, "a "])))
            assert ids.tolist() == plain.tolist()
            assert len(ids) == len(sizes)
            assert (sizes >= 0).all()
            whole = len(f"{text}a ".encode())
            # The white space at the very end belongs to no token that is to come.
            assert sizes.sum() == whole if all_of_it else sizes.sum() in (whole, whole - 1)


@pytest.mark.parametrize("lowercase", [True, False])
def test_bytes_and_unknown_words_of_windows(tmp_path: Path, lowercase: bool) -> None:
    validation = "The  cat\n\nsat , Ünd\tthe dog RAN . " * 8
    folder = write_release(tmp_path / "text", validation=validation)
    sizes = {"seq_len": 3, "validation_samples": 5, "max_vocab": 8}
    corpus = open_corpus(release(folder, **sizes, lowercase=lowercase))
    spaced = re.findall(r"\s*\S+", validation)
    words = twin_words(validation, lowercase)
    assert len(spaced) == len(words)
    names = words_of(corpus)
    counted = {"validation": [0, 0], "test": [0, 0]}
    for place, (text, word) in enumerate(zip(spaced, words, strict=True)):
        window, at = divmod(place, 4)
        part = "validation" if window < 5 else "test"
        if at == 0 or window >= 5 + len(corpus.test if corpus.test is not None else ()):
            continue
        counted[part][0] += len(text.encode())
        counted[part][1] += word not in names
    assert corpus.validation_bytes == counted["validation"][0]
    assert corpus.test_bytes == counted["test"][0]
    assert corpus.validation_unknown == counted["validation"][1] > 0


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("bpe", "data.max_vocab=None: bpe takes "),
        ("./nowhere", "data.tokenizer=./nowhere is no folder"),
        ("model", "data.tokenizer=model is that of model.path, "),
        ("empty", "empty/tokenizer.json can't be read (No such file"),
        ("cut", "data.tokenizer=cut: its tokenizer.json is damaged, "),
        ("panic", "data.tokenizer=panic: its tokenizer.json is damaged, "),
        ("unknown", "data.tokenizer=unknown: its tokenizer.json is damaged, or cannot cut this"),
    ],
)
def test_a_bad_tokenizer_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = tokens.train_bpe([TRAIN], 280)
    content = json.loads(whole)
    panic = content | {"model": content["model"] | {"vocab": {}}}
    unknown = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}))
    contents = {"cut": whole[:-100], "panic": json.dumps(panic).encode()}
    contents |= {"unknown": unknown.to_str().encode()}
    (tmp_path / "empty").mkdir()
    for name, damaged in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes(damaged)
    data = release(write_release(tmp_path / "text"), tokenizer=tokenizer)
    with pytest.raises(ConfigError) as error:
        open_corpus(data)
    assert one_line(error).startswith(message)
    assert not list(Path(data.cache_dir or "").glob("corpora/*/*"))
