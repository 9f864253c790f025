"""Windows, splits, the fingerprint, and the cache under stress."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proglayer.config import ConfigError, DataConfig
from proglayer.data.corpus import open_corpus

from .made import (
    SCRIPT,
    TEST,
    TRAIN,
    VALIDATION,
    answers,
    changed,
    entry_folder,
    one_line,
    release,
    same_tokens,
    start,
    twin_words,
    words_of,
    write_release,
)


def test_windows_follow_each_other_and_the_rest_is_dropped(tmp_path):
    folder = write_release(tmp_path / "text", "a b c d e f g h i j k", "a b c d e f")
    corpus = open_corpus(release(folder))
    words = words_of(corpus)
    assert [[words[i] for i in window] for window in corpus.train] == [list("abcde"), list("fghij")]
    assert [[words[i] for i in window] for window in corpus.validation] == [list("abcde")]


def test_validation_gets_a_fifth_of_the_samples_unless_told(tmp_path):
    folder = write_release(tmp_path / "text")
    assert len(open_corpus(release(folder, samples=19)).validation) == 3
    assert len(open_corpus(release(folder, samples=19, validation_samples=7)).validation) == 7
    every = open_corpus(release(folder))
    assert len(every.validation) == len(twin_words(VALIDATION, True)) // 5
    assert len(open_corpus(release(folder, samples=19)).train) == 19


def test_the_test_windows_follow_the_validation_windows_and_change_nothing_else(tmp_path):
    """What no epoch is selected by: after validation, at most four times as much, else nothing."""
    folder = write_release(tmp_path / "release")
    stream = open_corpus(release(folder)).validation.reshape(-1)
    assert open_corpus(release(folder)).test is None  # validation takes all
    for count in (2, 5, 20):
        found = open_corpus(release(folder, validation_samples=count))
        assert np.array_equal(found.validation.reshape(-1), stream[: 5 * count])
        rest = stream[5 * count :][: 4 * 5 * count]
        assert found.test is not None
        assert np.array_equal(found.test.reshape(-1), rest)
        assert found.test.shape[1] == 5
        assert not found.test.flags.writeable


def test_the_test_windows_are_of_the_release_s_own_test_file_where_it_has_one(tmp_path):
    without = open_corpus(release(write_release(tmp_path / "a"), validation_samples=5))
    folder = write_release(tmp_path / "text")
    (folder / "wiki.test.raw").write_text(TEST)
    corpus = open_corpus(release(folder))
    place = {word: place for place, word in enumerate(words_of(corpus))}
    ids = [place.get(word, 0) for word in twin_words(TEST, True)]
    assert 0 in ids
    assert corpus.test is not None
    assert corpus.test.reshape(-1).tolist() == ids[: len(ids) // 5 * 5]
    assert not corpus.test.flags.writeable
    spaced = re.findall(r"\s*\S+", TEST)
    targets = [word for place, word in enumerate(spaced[: corpus.test.size]) if place % 5]
    assert corpus.test_bytes == len("".join(targets).encode())
    # what is trained and validated on, and so every key that holds it, is as without it
    few = open_corpus(release(folder, validation_samples=5))
    assert same_tokens(few, without)
    assert few.fingerprint == without.fingerprint
    assert few.test is not None
    assert without.test is not None
    assert few.test.shape == without.test.shape == (20, 5)
    assert few.test.reshape(-1).tolist() == ids[:100]
    assert few.test_fingerprint == corpus.test_fingerprint is not None
    assert without.test_fingerprint is None


def test_seq_len_and_samples_share_one_cache_entry(tmp_path):
    folder = write_release(tmp_path / "text")
    notes: list[str] = []
    for changes in ({}, {"seq_len": 9}, {"samples": 5}, {"validation_samples": 2}):
        open_corpus(release(folder, **changes), notes.append)
    assert len([note for note in notes if "preparing" in note]) == 1
    assert entry_folder(release(folder))  # asserts that there is one


def test_fingerprint_changes_with_whatever_changes_the_training_data(tmp_path):
    def fingerprint(train: str = TRAIN, validation: str = VALIDATION, **changes: Any) -> str:
        folder = write_release(tmp_path / "text", train, validation)
        return open_corpus(release(folder, **changes)).fingerprint

    fingerprints = [
        fingerprint(),
        fingerprint(train=TRAIN.replace("Title 7", "Titel 7")),
        fingerprint(validation=VALIDATION.replace("of 7", "off 7")),
        # The same ids, but of other words.
        fingerprint(train=TRAIN.replace("cats", "rats")),
        fingerprint(seq_len=5),
        fingerprint(samples=20, validation_samples=5),
        fingerprint(samples=21, validation_samples=5),
        fingerprint(samples=20, validation_samples=6),
        fingerprint(lowercase=False),
        fingerprint(min_count=5),
        fingerprint(max_vocab=10),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in fingerprints)


def test_fingerprint_knows_nothing_of_places_and_layout(tmp_path):
    here = open_corpus(release(write_release(tmp_path / "here")))
    there = open_corpus(release(write_release(tmp_path / "else" / "where"), samples=None))
    other_lines = TRAIN.replace(" sat", "\r\nsat").replace("\n\n", "\n \n\n")
    wrapped = open_corpus(release(write_release(tmp_path / "wrapped", other_lines)))
    assert here.fingerprint == there.fingerprint == wrapped.fingerprint
    assert same_tokens(here, there)
    assert same_tokens(here, wrapped)


BPE = {"tokenizer": "bpe", "max_vocab": 300}


all_tokenizers = pytest.mark.parametrize(
    "tokens", [{}, BPE, {"tokenizer": "bytes"}], ids=["words", "bpe", "bytes"]
)


def cut_by(folder: Path, tokens: dict[str, Any], **changes: Any) -> DataConfig:
    if tokens == BPE:
        pytest.importorskip("tokenizers")
    return release(folder, **tokens, **changes)


def test_processes_at_once_prepare_once(tmp_path):
    data = release(write_release(tmp_path / "text", TRAIN * 500), samples=100)
    gate = tmp_path / "open"
    wait = f"while not Path({str(gate)!r}).exists(): time.sleep(0.001)\n"
    script = SCRIPT.replace("for settings", wait + "for settings", 1)
    processes = [start(tmp_path, [data], script) for _ in range(4)]
    time.sleep(1.0)
    gate.touch()
    results = [result for process in processes for result in answers(process)]
    assert len({result["fingerprint"] for result in results}) == 1
    preparations = [note for r in results for note in r["notes"] if "preparing data" in note]
    assert len(preparations) == 1
    beside = [path.suffix for path in entry_folder(data).parent.iterdir() if path.is_file()]
    assert beside == [".lock"]


def test_killed_preparation_leaves_nothing_in_the_way(tmp_path):
    data = release(write_release(tmp_path / "text", TRAIN * 3_000))
    cache = Path(data.cache_dir or "") / "corpora"
    process = start(tmp_path, [data])
    while not list(cache.glob("*.partial-*/entry/train.bin")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(cache.glob("*.partial-*"))) == 1
    corpus = open_corpus(data)
    other = open_corpus(changed(data, cache_dir=str(tmp_path / "other")))
    assert corpus.fingerprint == other.fingerprint
    name = entry_folder(data).name
    assert {path.name for path in cache.iterdir()} == {name, f"{name}.lock"}


@all_tokenizers
def test_damaged_entry_is_noted_and_prepared_again(tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    data = cut_by(write_release(tmp_path / "text"), tokens)
    sound = open_corpus(data)
    folder = entry_folder(data)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    vocabulary = "tokenizer.json" if tokens == BPE else "vocabulary.txt"
    assert before.keys() > {"validation_bytes.bin", vocabulary}
    for name, content in before.items():
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        for damaged in (None, b"", content[:-1], content + b"more", flipped):
            (folder / name).unlink()
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            notes: list[str] = []
            assert open_corpus(data, notes.append).fingerprint == sound.fingerprint
            assert any("damaged" in note for note in notes)
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    open_corpus(data, pytest.fail)


def test_stored_corpus_is_opened_without_heavy_imports(tmp_path):
    data = cut_by(write_release(tmp_path / "text"), BPE)
    expected = open_corpus(data).fingerprint
    script = SCRIPT + "print(json.dumps(sorted(sys.modules)))"
    result, modules = answers(start(tmp_path, [data], script))
    assert result["fingerprint"] == expected
    heavy = "datasets pyarrow pandas torch filelock tokenizers transformers huggingface_hub"
    assert not set(heavy.split()) & set(modules)


def test_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="or set data.cache_dir to another folder"):
        open_corpus(release(write_release(tmp_path / "a"), cache_dir=str(tmp_path / "file")))
    data = release(write_release(tmp_path / "text", TRAIN * 100))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"make room, or set data\.cache_dir") as error:
            open_corpus(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(error)
    assert data.cache_dir is not None
    assert [path.suffix for path in (Path(data.cache_dir) / "corpora").iterdir()] == [".lock"]
    assert len(open_corpus(data).train) > 0


def test_fewer_windows_than_asked_for_says_how_many(tmp_path):
    folder = write_release(tmp_path / "text")
    train, validation = len(twin_words(TRAIN, True)) // 5, len(twin_words(VALIDATION, True)) // 5
    for changes, message in (
        ({"samples": train + 1}, f"data.samples={train + 1} .* {train} windows, for train"),
        ({"samples": 10, "validation_samples": 999}, f"{validation} windows, for validation"),
        ({"seq_len": 9_999}, "data.seq_len=9999: .* 0 windows, for train"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            open_corpus(release(folder, **changes))
        one_line(error)
    open_corpus(release(folder, samples=train, validation_samples=validation))
