"""Sources: files of many kinds, data sets, the documentation of Python; what is no text."""

from __future__ import annotations

import gzip
import json
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
    "content",
    [
        "so many words".encode("utf-16-le"),
        "<!DOCTYPE html>\n<html><body>so many words",
        '<?xml version="1.0"?>\n<!-- a page -->\n<HTML xmlns="x">so many words',
        "{\\rtf1\\ansi so many words}",
        b"PK\x03\x04\x14\0\x08",
        gzip.compress(b"words " * 99),
        b"words \xe6\xbc",
        "wörter und so \n".encode() * 30 + b"caf\xe9 noir\n",
    ],
    # What gzip packs holds the time.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_text_in_utf8_is_refused_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"a.txt is no plain text in UTF-8") as error:
        open_corpus(text(tmp_path / "a.txt", cache_dir=str(tmp_path / "cache")))
    one_line(error)


def test_files_of_rows_are_read_by_their_column(tmp_path):
    import pandas as pd

    bodies = [f"w{n}" for n in range(40)]
    frame = pd.DataFrame({"n": range(40), "body": bodies})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "b.json", orient="records", lines=True)
    frame.to_csv(tmp_path / "c.csv", index=False)
    frame.to_parquet(tmp_path / "d.parquet")
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
        ("text", {"files": ["none.txt"]}, "data.files=none.txt: there is no such file"),
        ("text", {"files": ["folder"]}, "data.files=folder: there is no such file"),
        ("wikitext2", {"path": "none"}, "data.path=none can't be loaded"),
        ("wikitext2", {"path": "half"}, "half/wiki.valid.raw can't be read"),
        ("hub", {"path": "folder"}, "data.path=folder can't be loaded"),
        ("hub", {"repository": "folder"}, "data.path=folder can't be loaded"),
        ("hub", {"repository": "a/b/c"}, "data.repository=a/b/c can't be loaded"),
    ],
)
def test_text_that_is_not_there(tmp_path, monkeypatch, source, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "wiki.train.raw").touch()
    with pytest.raises(ConfigError, match=message) as error:
        open_corpus(data_config(source, **changes, cache_dir=str(tmp_path / "cache")))
    one_line(error)


COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


def rows(content: str) -> list[str]:
    return content.splitlines(keepends=True)


def hub_cache(home: Path) -> Path:
    """The cache of `datasets` after a download of WikiText-2."""
    import datasets

    files = {}
    for split, content in {"train": TRAIN, "validation": VALIDATION, "test": TEST}.items():
        files[split] = str(home / f"{split}.parquet")
        datasets.Dataset.from_dict({"text": rows(content)}).to_parquet(files[split])
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
        split: datasets.Dataset.from_dict({"text": rows(content)})
        for split, content in {"train": TRAIN, "validation": VALIDATION, "test": TEST}.items()
    }
    datasets.DatasetDict(splits).save_to_disk(
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
        "no such split": {"validation_split": "dev"},
        "half": {"train_split": "train[:50%]", "validation_split": "train[50%:]"},
    }
    asked = [changed(cached, **changes) for changes in variants.values()]
    process = start(tmp_path, asked, HF_HOME=str(hub_cache(home)), HF_HUB_OFFLINE="1")
    hub = dict(zip(variants, answers(process), strict=True))
    for name in ("pinned", "whatever"):
        assert hub[name]["fingerprint"] == expected.fingerprint, name
        assert hub[name]["test"] == expected.test_fingerprint, name
    for name in ("other revision", "not downloaded"):
        assert "can't be loaded" in hub[name]["error"], name
    assert 'Unknown split "dev"' in hub["no such split"]["error"]
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
