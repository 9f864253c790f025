"""Subwords: round trips, the same tokens wherever and however prepared, bytes, bad tokenizers."""

from __future__ import annotations

import collections
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proglayer.config import ConfigError, DataConfig
from proglayer.data import corpus as corpus_module
from proglayer.data import subwords
from proglayer.data.corpus import Corpus, open_corpus
from proglayer.data.sources import TextSource

from .test_corpus import (
    ROOT,
    TEXT,
    TRAIN,
    VALIDATION,
    answers,
    one_line,
    release,
    start,
    twin_words,
    write_release,
)

tokenizers = pytest.importorskip("tokenizers")


def bpe(folder: Path, size: int = 300, **changes: Any) -> DataConfig:
    return release(folder, tokenizer="bpe", max_vocab=size, **changes)


def tokenizer_folder(folder: Path, size: int = 280, text: str = TRAIN) -> Path:
    """A folder with a tokenizer, as `save_pretrained` leaves it."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(subwords.train_bpe([text], size))
    return folder


def stream(corpus: Corpus, name: str = "validation") -> np.ndarray:
    return np.load(corpus.folder / f"{name}.npy")


def decoded(corpus: Corpus, name: str) -> str:
    assert corpus.tokenizer_file is not None
    tokenizer = tokenizers.Tokenizer.from_file(str(corpus.tokenizer_file))
    return tokenizer.decode(stream(corpus, name).tolist(), skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("size", [257, 300, 5000])
def test_the_text_comes_back_to_the_byte(tmp_path: Path, size: int) -> None:
    """Case, spaces, line ends, bytes that no training text had: all of it."""
    train, validation = f"  {TRAIN}", f"\tÉ漢😀\r\n\n  {VALIDATION}\u2028x  "
    corpus = open_corpus(bpe(write_release(tmp_path / "text", train, validation), size))
    assert decoded(corpus, "train") == train
    assert decoded(corpus, "validation") == validation
    assert corpus.vocab_size <= size
    assert stream(corpus, "train").max() < corpus.vocab_size
    assert len(corpus.words()) == corpus.vocab_size
    assert corpus.words()[stream(corpus)[0]] == "ĉ"  # how a byte-level vocabulary writes a tab


def test_what_ends_without_white_space_ends_there(tmp_path: Path) -> None:
    """The last word of a document is not the beginning of the next one's first."""
    source = TextSource("x", "x", {}, lambda *_: ["one two", "three four"], "")
    text = "".join(corpus_module._text(source, tmp_path, print, "train"))
    assert text == "one two\nthree four\n"


@settings(max_examples=60, deadline=None)
@given(text=TEXT, cuts=st.lists(st.integers(1, 9), min_size=1), part=st.integers(1, 12))
def test_tokens_do_not_depend_on_the_pieces(text: str, cuts: list[int], part: int) -> None:
    pieces, at = [], 0
    while at < len(text):
        step = cuts[len(pieces) % len(cuts)]
        pieces.append(text[at : at + step])
        at += step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subwords, "PART_CHARACTERS", part)
        whole = list(subwords.parts([text]))
        assert list(subwords.parts(pieces)) == whole
    assert "".join(whole) == text


@pytest.mark.parametrize("part", [40, 200, 1000])
def test_parts_have_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """Where a part ends, a token ends, too, by GPT-2's rule and by that of Llama 3 and Qwen."""
    text = f"{TRAIN}{VALIDATION} \"Don't\",  she said;\n\n  it's 12345...\nyes (no)\nend " * 3
    gpt2 = subwords.load_tokenizer(subwords.train_bpe([text], 400), "x")
    llama = tokenizers.Tokenizer.from_str(gpt2.to_str())
    rule = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    own = tokenizers.pre_tokenizers
    llama.pre_tokenizer = own.Sequence(
        [own.Split(rule, "isolated"), own.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    monkeypatch.setattr(subwords, "PART_CHARACTERS", part)
    assert len(list(subwords.parts([text]))) > 3
    for tokenizer in (gpt2, llama):
        ids = np.concatenate(list(subwords.encode(tokenizer, [text])), axis=None)
        assert ids.tolist() == tokenizer.encode(text).ids


def test_half_a_surrogate_pair_is_a_question_mark() -> None:
    assert list(subwords.parts(["a \ud800 b"])) == ["a ? b"]


def test_the_same_text_gives_the_same_tokens_in_every_process(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "text")
    found = []
    for number, environment in enumerate(
        ({"RAYON_NUM_THREADS": "1"}, {"PYTHONHASHSEED": "7"}, {"TOKENIZERS_PARALLELISM": "false"})
    ):
        data = bpe(folder, cache_dir=str(tmp_path / f"cache{number}"))
        found += answers(start(tmp_path, [data], **environment))
    assert len({result["fingerprint"] for result in found}) == 1


def test_the_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "text")
    own = tokenizer_folder(tmp_path / "tokenizer")
    other = tokenizer_folder(tmp_path / "other", size=290)
    moved = shutil.copytree(own, tmp_path / "elsewhere" / "tokenizer")

    def fingerprint(**changes: Any) -> str:
        return open_corpus(release(folder, **changes)).fingerprint

    words = fingerprint()
    found = [
        words,
        open_corpus(bpe(folder, 280)).fingerprint,
        open_corpus(bpe(folder, 281)).fingerprint,
        fingerprint(tokenizer=str(other)),
    ]
    assert len(set(found)) == len(found)
    # What a tokenizer does to a text, not where it lay: this one is the BPE of that very text.
    assert fingerprint(tokenizer=str(own)) == fingerprint(tokenizer=str(moved)) == found[1]
    assert fingerprint() == words


def test_training_text_alone_makes_the_vocabulary(tmp_path: Path) -> None:
    first = open_corpus(bpe(write_release(tmp_path / "first")))
    second = open_corpus(bpe(write_release(tmp_path / "second", validation="zebra " * 200)))
    assert first.tokenizer_file is not None
    assert second.tokenizer_file is not None
    assert first.tokenizer_file.read_bytes() == second.tokenizer_file.read_bytes()
    assert np.array_equal(stream(first, "train"), stream(second, "train"))


def test_what_a_tokenizer_was_stored_with_cuts_and_adds_nothing(tmp_path: Path) -> None:
    plain = tokenizer_folder(tmp_path / "plain")
    own = tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json"))
    own.add_special_tokens(["<|endoftext|>"])
    mark = own.token_to_id("<|endoftext|>")
    own.enable_truncation(max_length=5)
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
    assert np.load(corpus.folder / "validation_bytes.npy")[0] == len("<|endoftext|>")


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
        release(folder, tokenizer="owner/name"),
        release(folder, tokenizer="owner/name", tokenizer_revision="a" * 40),
        release(folder, tokenizer="owner/name", tokenizer_revision="b" * 40),
        release(folder, tokenizer="owner/name", tokenizer_revision="c" * 40),
        release(folder, tokenizer="owner/other"),
    ]
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    newest, first, second, unknown, other = answers(start(tmp_path, asked, **environment))
    assert newest["fingerprint"] == second["fingerprint"] != first["fingerprint"]
    assert first["fingerprint"] == open_corpus(bpe(folder, 270)).fingerprint
    revision = f"data.tokenizer=owner/name data.tokenizer_revision={'c' * 40}: "
    assert unknown["error"].startswith(revision)
    assert other["error"].startswith("data.tokenizer=owner/other: it is none of words, bpe, ")
    assert "\n" not in unknown["error"] + other["error"]


# ---------------------------------------------------------------------------------------------
# Bytes


def test_bytes_of_bpe_tokens_are_their_own(tmp_path: Path) -> None:
    """In a byte-level vocabulary a token has as many characters as bytes."""
    validation = "".join(f" A {n} dog\r\n\tran .  \n" for n in range(60))
    folder = write_release(tmp_path / "text", validation=validation)
    data = bpe(folder, seq_len=6, validation_samples=9)
    corpus = open_corpus(data)
    names = corpus.words()
    assert corpus.validation_bytes == sum(
        len(names[token]) for window in corpus.validation for token in window[1:]
    )
    assert corpus.test is not None
    assert corpus.test_bytes == sum(
        len(names[token]) for window in corpus.test for token in window[1:]
    )
    assert corpus.validation_unknown is None
    every = np.load(corpus.folder / "validation_bytes.npy")
    assert every.tolist() == [len(names[token]) for token in stream(corpus)]
    assert every.sum() == len(validation.encode())


@settings(max_examples=60, deadline=None)
@given(text=TEXT, part=st.integers(1, 12))
def test_bytes_add_up_to_the_text_whatever_a_tokenizer_drops(text: str, part: int) -> None:
    """This one lower-cases, composes, drops white space and knows few words."""
    words = {"[UNK]": 0, "a": 1, "bé": 2}
    lossy = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    own = tokenizers.normalizers
    lossy.normalizer = own.Sequence([own.NFKD(), own.Lowercase(), own.StripAccents()])
    lossy.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    exact = subwords.load_tokenizer(subwords.train_bpe([TRAIN], 300), "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subwords, "PART_CHARACTERS", part)
        for tokenizer, all_of_it in ((lossy, False), (exact, True)):
            found = list(subwords.encode(tokenizer, [text, "a "], True))
            ids = np.concatenate([pair[0] for pair in found])
            sizes = np.concatenate([pair[1] for pair in found])
            plain = np.concatenate(list(subwords.encode(tokenizer, [text, "a "])), axis=None)
            assert ids.tolist() == plain.tolist()
            assert len(ids) == len(sizes)
            assert (sizes >= 0).all()
            whole = len(f"{text}a ".encode())
            # The white space at the very end belongs to no token that is to come.
            assert sizes.sum() == whole if all_of_it else sizes.sum() in (whole, whole - 1)


@settings(max_examples=60, deadline=None)
@given(text=TEXT, cuts=st.lists(st.integers(1, 9), min_size=1))
def test_bytes_of_words_are_those_up_to_their_end(text: str, cuts: list[int]) -> None:
    """Word for word: from the end of the one before to its own, however the text was cut."""
    text = f"{text} end"
    pieces, held = [], ""
    for character in text:
        held += character
        if character.isspace() and len(held) >= cuts[len(pieces) % len(cuts)]:
            pieces.append(held)
            held = ""
    ids = collections.defaultdict(int)
    parts = corpus_module._encode_words(ids, release(Path("x")), [*pieces, held], True)
    sizes = np.concatenate([part[1] for part in parts])
    expected, at = [], 0
    for word in text.split():
        end = text.index(word, at) + len(word)
        expected.append(len(text[at:end].encode()))
        at = end
    assert sizes.tolist() == expected


@pytest.mark.parametrize("lowercase", [True, False])
def test_bytes_and_unknown_words_of_windows(tmp_path: Path, lowercase: bool) -> None:
    validation = "The  cat\n\nsat , Ünd\tthe dog RAN . " * 8
    data = release(
        write_release(tmp_path / "text", validation=validation),
        seq_len=3,
        validation_samples=5,
        max_vocab=8,
        lowercase=lowercase,
    )
    corpus = open_corpus(data)
    spaced = subwords_of(validation)
    words = twin_words(validation, lowercase)
    assert len(spaced) == len(words)
    names = corpus.words()
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


def subwords_of(text: str) -> list[str]:
    """Each word with the white space before it."""
    spaced, held = [], ""
    for character in text:
        if character.isspace() and held.strip():
            spaced.append(held)
            held = ""
        held += character
    return spaced


# ---------------------------------------------------------------------------------------------
# The cache


STREAMED = """
import resource, sys
from proglayer.data import subwords
text = open(sys.argv[1], newline="").read()

def streamed(times):
    pieces = lambda: (text for _ in range(times))
    tokenizer = subwords.load_tokenizer(subwords.train_bpe(pieces(), 300), "x")
    tokens = sum(len(ids) for ids, in subwords.encode(tokenizer, pieces()))
    tokens += sum(len(ids) for ids, _ in subwords.encode(tokenizer, pieces(), True))
    return tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

few, many = streamed(100), streamed(400)
assert many[0] == 4 * few[0] > 800_000, (few, many)
print((many[1] - few[1]) // 1000)
"""


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """All that is resident, in MB, for much of it is not Python's. 400 times take 2 MB of text."""
    text = tmp_path / "text"
    text.write_text(TRAIN * 4)
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, str(text)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10


# ---------------------------------------------------------------------------------------------
# Bad tokenizers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "bpe"}, "data.max_vocab=null is no size for "),
        ({"tokenizer": "bpe", "max_vocab": 256}, "data.max_vocab=256 is no size for "),
        ({"tokenizer": "bpe", "max_vocab": 300, "min_count": 2}, "data.min_count=2 changes "),
        ({"tokenizer_revision": "main"}, "data.tokenizer_revision=main is not for "),
        (
            {"tokenizer": "{empty}"},
            "data.tokenizer={empty}: its tokenizer.json can't be read (No such file",
        ),
        ({"tokenizer": "{empty}/a.txt"}, "data.tokenizer={empty}/a.txt is a file: "),
        ({"tokenizer": "./nowhere"}, "data.tokenizer=./nowhere: it is none of words, bpe, "),
        ({"tokenizer": ""}, "data.tokenizer=: it is none of words, bpe, "),
        ({"tokenizer": "model"}, "data.tokenizer=model takes the tokenizer of model.path, "),
        ({"tokenizer": "{cut}"}, "data.tokenizer={cut}: its tokenizer.json is damaged, "),
        ({"tokenizer": "{other}"}, "data.tokenizer={other}: its tokenizer.json is damaged, "),
        ({"tokenizer": "{binary}"}, "data.tokenizer={binary}: its tokenizer.json is damaged, "),
    ],
)
def test_a_bad_tokenizer_is_one_clear_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folders = {name: tmp_path / name for name in ("empty", "cut", "other", "binary")}
    whole = (tokenizer_folder(tmp_path / "whole") / "tokenizer.json").read_bytes()
    contents = {"cut": whole[:-100], "other": b'{"model_type": "bert"}', "binary": b"\xff\xfe\0"}
    for name, folder in folders.items():
        folder.mkdir()
        if name in contents:
            (folder / "tokenizer.json").write_bytes(contents[name])
    (folders["empty"] / "a.txt").write_text("text")
    changes = {
        name: value.format(**folders) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    data = release(write_release(tmp_path / "text"), **changes)
    with pytest.raises(ConfigError) as error:
        open_corpus(data)
    assert one_line(error).startswith(message.format(**folders))
    assert not list(Path(data.cache_dir or "").glob("corpora/*/*"))


def test_too_little_text_is_told_in_tokens(tmp_path: Path) -> None:
    data = bpe(write_release(tmp_path / "text", validation="ab\n"), 257, seq_len=50)
    with pytest.raises(ConfigError, match="needs 51 tokens for one window, but .* has 3 for"):
        open_corpus(data)


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_release(tmp_path / "text")
    open_corpus(release(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    open_corpus(release(folder))
    with pytest.raises(ConfigError, match=r"data.tokenizer=bpe needs the extra hf: pip install"):
        open_corpus(bpe(folder))
