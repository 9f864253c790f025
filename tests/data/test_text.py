"""Sources: files of many kinds, data sets, the documentation of Python; what is no text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import shutil
from pathlib import Path

import pytest

from proglayer.config import ConfigError
from proglayer.data import text as text_module
from proglayer.data.corpus import open_corpus

from ..helpers import config
from .made import (
    TEST,
    TRAIN,
    VALIDATION,
    answers,
    changed,
    data_config,
    held_words,
    one_line,
    release,
    same_tokens,
    start,
    text,
    twin_words,
    words_of,
    write_release,
)


def test_the_last_share_of_each_file_is_held_out(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{n:03}\n" for n in range(100)))
    (tmp_path / "c.md").write_text("no part of it")
    data = text(tmp_path / "*.txt", tmp_path / "a.txt", seq_len=1, cache_dir=str(tmp_path))
    train, validation = held_words(open_corpus(data))
    # 75 lines and the rest of the one that the cut falls on; files in the order of their names.
    assert train == [f"{name}{n:03}" for name in "ab" for n in range(76)]
    assert validation == [f"{name}{n:03}" for name in "ab" for n in range(76, 100)]


def test_byte_order_mark_is_no_part_of_a_word(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"hello world\n" * 20)
    corpus = open_corpus(text(tmp_path / "a.txt", cache_dir=str(tmp_path)))
    assert words_of(corpus) == ["<unk>", "<pad>", "hello", "world"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 noir\n", r"is no text in UTF-8 .*byte 0xe9 in position"),
        (b"a \0 b\n", r"is no text in UTF-8"),
    ],
)
def test_text_that_is_not_utf8_names_the_file_and_the_byte(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 64)
    good = "wörter und so \n".encode() * 30
    path = tmp_path / "latin.txt"
    path.write_bytes(good + content + good)
    with pytest.raises(ConfigError, match=f"latin.txt {message}") as error:
        open_corpus(text(path, cache_dir=str(tmp_path)))
    one_line(error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "so many words".encode("utf-16"), "no text in UTF-8"),
        ("a.txt", "so many words".encode("utf-16-le"), "no text in UTF-8"),
        ("a.txt", b"PK\x03\x04\x14\0\x08", "no text in UTF-8"),
        ("a.npy", b"\x93NUMPY\x01\0", "no text in UTF-8"),
        ("a.txt", gzip.compress(b"words " * 99), "no text in UTF-8"),
        ("a.tar.gz", gzip.compress(b"a.txt" + bytes(507) + b"words"), "no text in UTF-8"),
        ("a.txt", b"words \xe6\xbc", "unexpected end of data"),
        ("a.html", b"\n<!DOCTYPE html>\n<p>words", "HTML or RTF"),
        ("a.html.gz", gzip.compress(b"<html><p>words"), "HTML or RTF"),
        ("a.rtf", b"{\\rtf1 words}", "HTML or RTF"),
        ("a.txt.gz", gzip.compress(b"words " * 99)[:-9], "can't be read"),
        ("a.txt.xz", b"words", "can't be read"),
        ("a.txt.zst", b"words", "can't be read"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} .*{message}") as error:
        open_corpus(text(tmp_path / name, cache_dir=str(tmp_path / "cache")))
    one_line(error)


def zstd(content: bytes) -> bytes:
    import pyarrow

    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)],
)
def test_a_compressed_text_is_the_corpus_of_its_content(tmp_path, suffix, pack):
    plain, packed = tmp_path / "plain.txt", tmp_path / f"packed.txt.{suffix}"
    plain.write_text(TRAIN)
    # Two frames, as `cat a.gz b.gz` gives.
    half = len(TRAIN) // 2
    packed.write_bytes(b"".join(pack(part.encode()) for part in (TRAIN[:half], TRAIN[half:])))
    expected = open_corpus(text(plain, cache_dir=str(tmp_path / "cache")))
    corpus = open_corpus(text(packed, cache_dir=str(tmp_path / "cache")))
    assert corpus.fingerprint == expected.fingerprint


def test_files_of_rows_are_read_by_their_column(tmp_path):
    import pandas as pd

    bodies = [f"w{n}" for n in range(40)]
    frame = pd.DataFrame({"n": range(40), "body": bodies})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "b.json", orient="records", lines=True)
    frame.to_csv(tmp_path / "c.csv", index=False)
    frame.to_parquet(tmp_path / "d.parquet")
    for name in ("a.jsonl", "c.csv"):
        packed = gzip.compress((tmp_path / name).read_bytes())
        (tmp_path / f"packed-{name}.gz").write_bytes(packed)
    cache = str(tmp_path / "cache")
    for path in list(tmp_path.iterdir()):
        data = text(path, seq_len=1, text_column="body", cache_dir=cache)
        train, validation = held_words(open_corpus(data))
        assert train == bodies[:30], path
        assert validation == bodies[30:], path
    for column in ("text", "n"):
        data = text(tmp_path / "a.jsonl", text_column=column, cache_dir=cache)
        with pytest.raises(ConfigError, match=f"data.text_column={column}: no .* has n, body"):
            open_corpus(data)
    (tmp_path / "broken.jsonl").write_text("{no rows")
    with pytest.raises(ConfigError, match="broken.jsonl can't be loaded") as error:
        open_corpus(text(tmp_path / "broken.jsonl", cache_dir=cache))
    one_line(error)


def test_a_folder_is_all_files_in_it_and_a_glob_those_that_match(tmp_path):
    (tmp_path / "notes" / "more").mkdir(parents=True)
    for name, word in (("b.txt", "b"), ("more/a.md", "a"), (".hidden", "h"), ("a.txt", "c")):
        (tmp_path / "notes" / name).write_text(f"{word}\n" * 40)
    cache = str(tmp_path / "cache")
    data = text(tmp_path / "notes", seq_len=1, cache_dir=cache)
    assert words_of(open_corpus(data))[2:] == ["c", "b", "a"]
    data = text(tmp_path / "notes" / "*.txt", seq_len=1, cache_dir=cache)
    assert words_of(open_corpus(data))[2:] == ["c", "b"]


def test_a_single_file_needs_no_list():
    assert config("data=text", "data.files=notes.txt").data.files == ("notes.txt",)


def test_text_without_white_space_has_subwords(tmp_path):
    """Chinese, for example: held out at a character, also where the last byte ends a line."""
    pytest.importorskip("tokenizers")
    for end in ("", "\n"):
        (tmp_path / "a.txt").write_text("这是一个没有空格的句子。" * 50 + end)
        data = text(tmp_path / "a.txt", cache_dir=str(tmp_path / "cache"))
        corpus = open_corpus(changed(data, tokenizer="bpe", max_vocab=300))
        assert len(corpus.train) > 10
        assert len(corpus.validation) > 3
        with pytest.raises(ConfigError, match="data.seq_len=4: .* 0 windows, for"):
            open_corpus(data)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("text", {"files": ("{tmp}/none.txt",)}, r"data\.files=.*none\.txt: there is no such file"),
        ("text", {"files": ("{tmp}/*.none",)}, r"data\.files=.*there is no such file"),
        ("text", {"files": ("{tmp}/folder",)}, r"data\.files=.*there is no such file"),
        ("wikitext2", {"path": "{tmp}/none"}, r"data\.path=.*none is no folder"),
        ("wikitext2", {"path": "{tmp}/file"}, r"data\.path=.*file is no folder"),
        ("wikitext2", {"path": "{tmp}/folder"}, r"is no folder .*wrote or wiki\.train\.raw"),
        ("wikitext2", {"path": "{tmp}/half"}, r"wiki\.valid\.raw can't be read"),
        ("hub", {"path": "{tmp}/folder"}, r"is no folder that save_to_disk wrote"),
        ("hub", {"repository": "{tmp}/folder"}, r"is a folder: give it as data\.path"),
        ("hub", {"repository": "a/b/c"}, r"data\.repository=a/b/c can't be loaded"),
    ],
)
def test_text_that_is_not_there(tmp_path, source, changes, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "wiki.train.raw").touch()
    filled = {
        name: tuple(v.format(tmp=tmp_path) for v in value)
        if isinstance(value, tuple)
        else value.format(tmp=tmp_path)
        for name, value in changes.items()
    }
    with pytest.raises(ConfigError, match=message) as error:
        open_corpus(data_config(source, **filled, cache_dir=str(tmp_path / "cache")))
    one_line(error)


@pytest.mark.parametrize(
    ("source", "changes", "wanted"),
    [
        ("pydocs", {"path": "x"}, "data=wikitext2 or data=hub"),
        ("pydocs", {"files": ("x",)}, "data=text"),
        ("text", {"repository": "x/y"}, "data=wikitext2 or data=hub"),
        ("hub", {"files": ("x",)}, "data=text"),
        ("wikitext2", {"files": ("x",)}, "data=text"),
    ],
)
def test_a_setting_of_another_source_is_refused(source, changes, wanted):
    with pytest.raises(ConfigError, match=f"data.{next(iter(changes))}=.*it needs {wanted}"):
        open_corpus(data_config(source, **changes))


COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


def rows(content: str) -> list[str]:
    return content.splitlines(keepends=True)


def hub_cache(home: Path) -> Path:
    """The cache of `datasets` after a download of WikiText-2."""
    import datasets

    texts = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    built = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"text": rows(content)})
            for split, content in texts.items()
        }
    )
    for split in built:
        built[split].to_parquet(str(home / f"{split}.parquet"))
    files = {split: str(home / f"{split}.parquet") for split in built}
    prepared = datasets.load_dataset("parquet", data_files=files, cache_dir=str(home / "arrow"))
    kept = home / "datasets/Salesforce___wikitext/wikitext-2-raw-v1/0.0.0" / COMMIT
    shutil.copytree(Path(prepared["train"].cache_files[0]["filename"]).parent, kept)
    for path in kept.glob("*.arrow"):
        path.rename(path.with_name(path.name.replace("parquet-", "wikitext-")))
    info = json.loads((kept / "dataset_info.json").read_text())
    info |= {"config_name": "wikitext-2-raw-v1", "dataset_name": "wikitext"}
    (kept / "dataset_info.json").write_text(json.dumps(info))
    return home


def test_release_saved_folder_and_hub_are_the_same_corpus(tmp_path):
    import datasets

    (write_release(tmp_path / "text") / "wiki.test.raw").write_text(TEST)
    expected = open_corpus(release(tmp_path / "text"))
    assert expected.test_fingerprint
    splits = {
        "train": datasets.Dataset.from_dict({"text": rows(TRAIN)}),
        "validation": datasets.Dataset.from_dict({"text": rows(VALIDATION)}),
    }
    of_test = datasets.Dataset.from_dict({"text": rows(TEST)})
    datasets.DatasetDict(splits | {"test": of_test}).save_to_disk(
        str(tmp_path / "saved"), num_shards={"train": 3, "validation": 1, "test": 1}
    )
    saved = open_corpus(release(tmp_path / "saved"))
    assert same_tokens(saved, expected)
    assert saved.fingerprint == expected.fingerprint
    assert saved.test_fingerprint == expected.test_fingerprint
    home = tmp_path / "home"
    home.mkdir()
    cached = data_config("wikitext2", cache_dir=str(tmp_path / "cache"))
    variants = {
        "pinned": {},
        "whatever": {"revision": None},
        "other revision": {"revision": "0" * 40},
        "not downloaded": {"repository": "some/thing"},
        "other configuration": {"configuration": "wikitext-103-raw-v1"},
        "no such split": {"validation_split": "dev"},
        "no such column": {"text_column": "body"},
        "half": {"train_split": "train[:50%]", "validation_split": "train[50%:]"},
    }
    asked = [changed(cached, **changes) for changes in variants.values()]
    process = start(tmp_path, asked, HF_HOME=str(hub_cache(home)), HF_HUB_OFFLINE="1")
    hub = dict(zip(variants, answers(process), strict=True))
    for name in ("pinned", "whatever"):
        assert hub[name]["fingerprint"] == expected.fingerprint, name
        assert hub[name]["test"] == expected.test_fingerprint, name
    for name in ("other revision", "not downloaded"):
        assert re.search("can't be reached: give data.path", hub[name]["error"]), name
    assert "config 'wikitext-103-raw-v1'" in hub["other configuration"]["error"]
    assert 'Unknown split "dev"' in hub["no such split"]["error"]
    assert "data.text_column=body: no column of text" in hub["no such column"]["error"]
    assert hub["half"]["shape"][0] == len(twin_words("".join(rows(TRAIN)[:60]), True)) // 5


def test_single_saved_data_set_holds_out_its_last_rows(tmp_path):
    import datasets

    content = [f"w{n} x\n" if n % 7 else None for n in range(100)]
    datasets.Dataset.from_dict({"body": content, "n": list(range(100))}).save_to_disk(
        str(tmp_path / "one")
    )
    data = release(tmp_path / "one", seq_len=1, text_column="body", held_out=0.2)
    train, validation = held_words(open_corpus(data))
    assert train[::2] == [f"w{n}" for n in range(80) if n % 7]
    assert validation[::2] == [f"w{n}" for n in range(80, 100) if n % 7]
    other = changed(data, held_out=0.3)
    assert open_corpus(other).fingerprint != open_corpus(data).fingerprint
    for column, message in (
        ("text", "data.text_column=text: no column of text, .* body, n"),
        ("n", "data.text_column=n: no column of text"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_corpus(changed(data, text_column=column))


def test_damaged_saved_data_set_is_one_clear_error(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": rows(TRAIN)}).save_to_disk(str(tmp_path / "one"))
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    content = arrow.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"nonsense" * 100):
        arrow.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"data\.path=.* can't be loaded") as error:
            open_corpus(release(tmp_path / "one"))
        one_line(error)


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    return text_module.pydocs()


def test_pydocs_are_the_docstrings_and_topics_of_this_python(documents):
    named = dict(documents)
    assert len(named) == len(documents)
    # json is imported here, but the extraction reads it from its source.
    assert named["json.__init__"].startswith(
        "JSON (JavaScript Object Notation) <https://json.org> is a"
    )
    assert "Serialize ``obj`` to a JSON formatted ``str``." in named["json.__init__"]
    assert "pydoc_data.topics:lambda" in named
    assert not [name for name in named if "test" in name.split(".") or "idlelib" in name]
    words = sum(len(text.split()) for text in named.values())
    assert 280_000 < words < 360_000


def test_pydocs_split_by_document(documents, monkeypatch, tmp_path):
    monkeypatch.setattr(text_module, "pydocs", lambda: documents)
    data = config("data=pydocs").data
    notes: list[str] = []
    corpus = open_corpus(changed(data, cache_dir=str(tmp_path)), notes.append)
    assert corpus.name == "pydocs"
    assert corpus.train.shape == (data.samples, 33)
    assert corpus.validation.shape == (data.samples // 5, 33)
    assert corpus.vocab_size == data.max_vocab
    parts = text_module.open_text(data)
    train = list(parts.read("train", tmp_path))
    held = list(parts.read("validation", tmp_path))
    texts = [text + "\n" for _, text in documents]
    assert sorted(train + held) == sorted(texts)
    share = sum(map(len, held)) / sum(map(len, texts))
    assert data.held_out <= share < data.held_out + 0.05
    other = changed(data, held_out=0.2)
    assert text_module.open_text(other).key != parts.key
