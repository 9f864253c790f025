"""Corpora: the tokenisation against its slow twin, the cache under stress, and bad texts."""

from __future__ import annotations

import bz2
import collections
import json
import lzma
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proglayer.config import ConfigError, DataConfig
from proglayer.data import corpus as corpus_module
from proglayer.data import sources
from proglayer.data.corpus import Corpus, open_corpus

from ..helpers import ROOT, config

TRAIN = "".join(f" = Title {n} = \n\nThe {n % 7} cats\tof {n} sat , on Mats .\n" for n in range(40))
VALIDATION = "".join(f"A {n % 5} dog of {n} ran .\n" for n in range(40))


def data_config(source: str, **changes: Any) -> DataConfig:
    """The settings of conf/data/<source>.yaml, small and without windows cut off."""
    settings = {"samples": None, "max_vocab": None, "seq_len": 4, **changes}
    files = "data.files=[unused]" if source == "text" else "data.files=[]"
    base = config(f"data={source}", files, "data.repository=x/y").data
    if source in ("pydocs", "text"):
        base = base.model_copy(update={"repository": None})
    elif source == "wikitext2":
        base = base.model_copy(update={"repository": "Salesforce/wikitext"})
    return base.model_copy(update=settings)


def write_release(folder: Path, train: str = TRAIN, validation: str = VALIDATION) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wiki.train.raw").write_bytes(train.encode())
    (folder / "wiki.valid.raw").write_bytes(validation.encode())
    return folder


def release(folder: Path, **changes: Any) -> DataConfig:
    """A release in `folder`, cached beside it."""
    cache = str(folder.with_name(f"{folder.name}-cache"))
    return data_config("wikitext2", **{"path": str(folder), "cache_dir": cache, **changes})


def entry_folder(data: DataConfig) -> Path:
    """The only entry in the cache of `data`."""
    assert data.cache_dir is not None
    (folder,) = [path for path in (Path(data.cache_dir) / "corpora").iterdir() if path.is_dir()]
    return folder


def same_tokens(first: Corpus, second: Corpus) -> bool:
    return (
        np.array_equal(first.train, second.train)
        and np.array_equal(first.validation, second.validation)
        and first.words() == second.words()
    )


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------
# Words and windows


def twin_words(text: str, lowercase: bool) -> list[str]:
    """The rule word for word, as slowly as it reads."""
    words = []
    for line in text.split("\n"):
        line = line.strip()
        if not line:
            continue
        if lowercase:
            line = line.lower()
        words.extend(line.split())
    return words


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
        patch.setattr(sources, "PIECE_BYTES", piece)
        patch.setattr(corpus_module, "PIECE_TOKENS", piece)
        patch.setattr(os, "fsync", lambda descriptor: None)
        corpus = open_corpus(data)
    *streams, vocabulary = twin_ids(train, validation, lowercase, min_count, max_vocab)
    for windows, ids in zip((corpus.train, corpus.validation), streams, strict=True):
        assert windows.shape == (len(ids) // 2, 2)
        assert windows.reshape(-1).tolist() == ids[: windows.size]
    assert corpus.words() == vocabulary
    assert corpus.vocab_size == len(vocabulary)


def test_wikitext2_has_the_ids_that_are_known_of_it(wikitext2_folder, tmp_path):
    data = config("data=wikitext2", f"data.path={wikitext2_folder}").data
    corpus = open_corpus(data.model_copy(update={"cache_dir": str(tmp_path)}))
    first = [2, 3, 4, 5, 2, 6, 7, 3, 8, 9, 10, 4, 11, 12, 9, 13, 14, 15, 16, 3]
    held = [2, 26921, 26922, 2, 26921, 26922, 14, 405, 24, 18, 6655, 26923]
    assert corpus.train[0, :20].tolist() == first
    assert corpus.validation[0, :12].tolist() == held
    assert corpus.vocab_size == 33_448
    assert corpus.train.shape == (10_000, 33)
    assert corpus.validation.shape == (2_000, 33)


def test_windows_follow_each_other_and_the_rest_is_dropped(tmp_path):
    folder = write_release(tmp_path / "text", "a b c d e f g h i j k", "a b c d e f")
    corpus = open_corpus(release(folder))
    words = corpus.words()
    assert [[words[i] for i in window] for window in corpus.train] == [list("abcde"), list("fghij")]
    assert [[words[i] for i in window] for window in corpus.validation] == [list("abcde")]


def test_windows_are_read_only_views_of_a_file(tmp_path):
    corpus = open_corpus(release(write_release(tmp_path / "text")))
    for windows in (corpus.train, corpus.validation):
        assert isinstance(windows, np.memmap)
        assert windows.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            windows[0, 0] = 1


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


TEST = "".join(f"A {n % 3} dog and {n} unheard-of birds .\n" for n in range(30))


def own_test_ids(corpus: Corpus) -> list[int]:
    """The test text by the rule read slowly: what the vocabulary lacks is <unk>."""
    ids = {word: place for place, word in enumerate(corpus.words())}
    return [ids.get(word, 0) for word in twin_words(TEST, True)]


def test_the_test_windows_are_of_the_release_s_own_test_file_where_it_has_one(tmp_path):
    without = open_corpus(release(write_release(tmp_path / "a"), validation_samples=5))
    folder = write_release(tmp_path / "text")
    (folder / "wiki.test.raw").write_text(TEST)
    notes: list[str] = []
    corpus = open_corpus(release(folder), notes.append)
    assert not [note for note in notes if note.startswith("warning: ")]
    ids = own_test_ids(corpus)
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


def test_a_test_split_that_is_trained_or_validated_on_is_no_test_text(tmp_path):
    folder = write_release(tmp_path / "text")
    (folder / "wiki.test.raw").write_text(TEST)
    for changes in ({"train_split": "test"}, {"validation_split": "test"}):
        corpus = open_corpus(release(folder, validation_samples=5, **changes))
        assert corpus.test_fingerprint is None
        assert corpus.test is not None


def test_a_test_file_without_a_window_leaves_what_follows_the_validation_windows(tmp_path):
    folder = write_release(tmp_path / "text")
    for content in ("", "\n", "a b c"):
        (folder / "wiki.test.raw").write_text(content)
        corpus = open_corpus(release(folder, validation_samples=5))
        assert corpus.test_fingerprint is None
        assert corpus.test is not None
        assert corpus.test_bytes


def test_another_test_file_is_another_test_text_of_the_same_training(tmp_path):
    found = []
    for content in (TEST, TEST + TEST.upper()):
        folder = write_release(tmp_path / "text")
        (folder / "wiki.test.raw").write_text(content)
        found.append(open_corpus(release(folder)))
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].test_fingerprint != found[1].test_fingerprint


def test_test_text_that_is_training_text_is_warned_of(tmp_path):
    folder = write_release(tmp_path / "text", TRAIN + TEST)
    (folder / "wiki.test.raw").write_text(TEST)
    notes: list[str] = []
    open_corpus(release(folder), notes.append)
    [warning] = [note for note in notes if note.startswith("warning: ")]
    assert "100% of the test text is training text, too" in warning


def test_seq_len_and_samples_share_one_cache_entry(tmp_path):
    folder = write_release(tmp_path / "text")
    notes: list[str] = []
    for changes in ({}, {"seq_len": 9}, {"samples": 5}, {"validation_samples": 2}):
        open_corpus(release(folder, **changes), notes.append)
    assert len([note for note in notes if "preparing" in note]) == 1
    assert entry_folder(release(folder))  # asserts that there is one


# ---------------------------------------------------------------------------------------------
# The fingerprint


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


# ---------------------------------------------------------------------------------------------
# The cache


SCRIPT = """
import json, sys, time
from pathlib import Path
from proglayer.config import ConfigError, DataConfig, DataSource
from proglayer.data.corpus import open_corpus
for settings in json.loads(Path(sys.argv[1]).read_text()):
    settings["source"] = DataSource[settings["source"]]
    notes, started = [], time.monotonic()
    try:
        corpus = open_corpus(DataConfig(**settings), notes.append)
        answer = {"fingerprint": corpus.fingerprint, "shape": corpus.train.shape}
        answer["test"] = corpus.test_fingerprint
    except ConfigError as error:
        answer = {"error": str(error)}
    answer["seconds"] = time.monotonic() - started
    print(json.dumps(answer | {"notes": notes}))
"""


def start(
    tmp_path: Path, settings: list[DataConfig], script: str = SCRIPT, **environment: str
) -> subprocess.Popen[str]:
    """A fresh process that opens these corpora and prints one line of JSON for each."""
    arguments = tmp_path / "settings.json"
    arguments.write_text(json.dumps([data.model_dump(mode="json") for data in settings]))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


BPE = {"tokenizer": "bpe", "max_vocab": 300}
both_tokenizers = pytest.mark.parametrize("tokens", [{}, BPE], ids=["words", "bpe"])


def bpe_or_words(folder: Path, tokens: dict[str, Any], **changes: Any) -> DataConfig:
    if tokens:
        pytest.importorskip("tokenizers")
    return release(folder, **tokens, **changes)


@both_tokenizers
def test_processes_at_once_prepare_once(tmp_path, tokens):
    data = bpe_or_words(write_release(tmp_path / "text", TRAIN * 500), tokens, samples=100)
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
    assert [path.suffix for path in entry_folder(data).parent.iterdir() if path.is_file()] == [
        ".lock"
    ]


@both_tokenizers
def test_killed_preparation_leaves_nothing_in_the_way(tmp_path, tokens):
    data = bpe_or_words(write_release(tmp_path / "text", TRAIN * 3_000), tokens)
    cache = Path(data.cache_dir or "") / "corpora"
    process = start(tmp_path, [data])
    while not list(cache.glob("*.partial-*/train.npy")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(cache.glob("*.partial-*"))) == 1
    corpus = open_corpus(data)
    other = open_corpus(data.model_copy(update={"cache_dir": str(tmp_path / "other")}))
    assert corpus.fingerprint == other.fingerprint
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        [entry_folder(data).name, f"{entry_folder(data).name}.lock"]
    )


def damages(folder: Path) -> dict[str, Any]:
    """Ways to spoil an entry."""
    spoilers: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        spoilers[f"{path.name} missing"] = path.unlink
        for size in (0, 5, 100, len(content) // 2, len(content) - 1):
            spoilers[f"{path.name} cut to {size}"] = lambda p=path, c=content, s=size: (
                p.write_bytes(c[:s])
            )
        spoilers[f"{path.name} longer"] = lambda p=path, c=content: p.write_bytes(c + b"more")
        for at in (9, 60, 127, len(content) // 2, len(content) - 2):
            flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
            spoilers[f"{path.name} flipped at {at}"] = lambda p=path, f=flipped: p.write_bytes(f)
    spoilers["meta of a stranger"] = lambda: (folder / "meta.json").write_text("[]")
    spoilers["empty folder"] = lambda: [path.unlink() for path in folder.iterdir()]
    return spoilers


@both_tokenizers
def test_damaged_entry_is_noted_and_prepared_again(tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    data = bpe_or_words(write_release(tmp_path / "text"), tokens)
    sound = open_corpus(data)
    folder = entry_folder(data)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"validation_bytes.npy", "tokenizer.json" if tokens else "vocabulary.txt"} < set(before)
    spoilers = damages(folder)
    assert len(spoilers) > 40
    for what, spoil in spoilers.items():
        spoil()
        notes: list[str] = []
        again = open_corpus(data, notes.append)
        assert any("damaged" in note for note in notes), what
        assert again.fingerprint == sound.fingerprint
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, what
    open_corpus(data, pytest.fail)


def test_an_entry_of_an_earlier_version_gets_what_it_lacks(tmp_path):
    folder = write_release(tmp_path / "text")
    (folder / "wiki.test.raw").write_text(TEST)
    data = release(folder, validation_samples=5)
    now = open_corpus(data)
    entry = entry_folder(data)
    for lacking in (["test", "test_bytes"], ["validation_bytes"]):
        meta = json.loads((entry / "meta.json").read_text())["meta"]
        for name in lacking:
            (entry / f"{name}.npy").unlink()
            del meta[name]
        signed = {"meta": meta, "sha256": corpus_module._hash_json(meta)}
        (entry / "meta.json").write_text(json.dumps(signed))
        again = open_corpus(data)
        assert again.fingerprint == now.fingerprint
        assert again.test_fingerprint == now.test_fingerprint
        assert again.validation_bytes == now.validation_bytes


def test_damage_to_a_large_entry_is_found_by_its_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHECKED_BYTES", 0)
    data = release(write_release(tmp_path / "text"))
    sound = open_corpus(data)
    for name in ("train.npy", "validation.npy", "vocabulary.txt"):
        path = entry_folder(data) / name
        path.write_bytes(path.read_bytes()[:-1])
        assert same_tokens(open_corpus(data), sound)


@both_tokenizers
def test_stored_corpus_is_opened_fast_and_without_heavy_imports(tmp_path, tokens):
    data = bpe_or_words(write_release(tmp_path / "text"), tokens)
    expected = open_corpus(data).fingerprint
    script = (
        "import numpy, time; cpu = time.process_time()\n"
        + SCRIPT
        + ("print(json.dumps([time.process_time() - cpu, sorted(sys.modules)]))")
    )
    result, (seconds, modules) = answers(start(tmp_path, [data], script))
    assert result["fingerprint"] == expected
    assert seconds < 0.3
    heavy = {"datasets", "pyarrow", "pandas", "torch", "filelock"}
    heavy |= {"tokenizers", "transformers", "huggingface_hub"}
    assert not heavy & set(modules)


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 2**14)
    monkeypatch.setattr(corpus_module, "PIECE_TOKENS", 2**12)

    def peak_bytes(times: int) -> int:
        folder = write_release(tmp_path / str(times), TRAIN * times)
        data = release(folder, min_count=2)
        tracemalloc.start()
        open_corpus(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(1)  # what is imported on the way
    small, large = peak_bytes(100), peak_bytes(400)
    assert (tmp_path / "400" / "wiki.train.raw").stat().st_size > 500_000
    assert large < small + 50_000


def test_cache_is_where_it_is_said_to_be(tmp_path, monkeypatch):
    folder = write_release(tmp_path / "text")
    monkeypatch.setenv("PROGLAYER_CACHE", str(tmp_path / "of the environment"))
    open_corpus(release(folder, cache_dir=None))
    assert len(list((tmp_path / "of the environment").glob("corpora/*/train.npy"))) == 1
    open_corpus(release(folder, cache_dir=str(tmp_path / "of the setting")))
    assert len(list((tmp_path / "of the setting").glob("corpora/*/train.npy"))) == 1
    monkeypatch.delenv("PROGLAYER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of the user"))
    monkeypatch.setenv("HOME", str(tmp_path / "of the user"))
    open_corpus(release(folder, cache_dir=None))
    assert len(list((tmp_path / "of the user").rglob("corpora/*/train.npy"))) == 1


@pytest.mark.parametrize("mode", [0o555, 0o000, None])
def test_folder_that_is_not_ours_is_one_clear_error(mode):
    # Outside tmp_path, which only its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        folder = write_release(Path(name) / "text")
        closed = Path(name) / "closed"
        if mode is None:
            closed.touch()  # a file where the folder should be
        else:
            closed.mkdir(mode)
        Path(name).chmod(0o755)
        user = os.geteuid()
        if user == 0 and mode is not None:
            os.seteuid(65534)  # permissions don't hold back root
        try:
            with pytest.raises(ConfigError, match="to a folder that can be written") as error:
                open_corpus(release(folder, cache_dir=str(closed)))
        finally:
            os.seteuid(user)
        closed.chmod(0o755)
    assert mode is None or "Permission denied" in one_line(error)


def test_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    data = release(write_release(tmp_path / "text", TRAIN * 100))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"no space left .* data\.cache_dir") as error:
            open_corpus(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(error)
    assert data.cache_dir is not None
    assert [path.suffix for path in (Path(data.cache_dir) / "corpora").iterdir()] == [".lock"]
    assert len(open_corpus(data).train) > 0


# ---------------------------------------------------------------------------------------------
# Local text


def text(*files: Path | str, **changes: Any) -> DataConfig:
    settings = {"held_out": 0.25, **changes}
    return data_config("text", files=tuple(map(str, files)), **settings)


def held_words(corpus: Corpus) -> tuple[list[str], list[str]]:
    words = corpus.words()
    first, second = (
        [words[i] for i in windows.reshape(-1)] for windows in (corpus.train, corpus.validation)
    )
    return first, second


def test_the_last_share_of_each_file_is_held_out(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{n:03}\n" for n in range(100)))
    (tmp_path / "c.md").write_text("no part of it")
    data = text(tmp_path / "*.txt", tmp_path / "a.txt", seq_len=1, cache_dir=str(tmp_path))
    train, validation = held_words(open_corpus(data))
    # 75 lines and the rest of the one that the cut falls on; files in the order of their names.
    assert train == [f"{name}{n:03}" for name in "ab" for n in range(76)]
    assert validation == [f"{name}{n:03}" for name in "ab" for n in range(76, 100)]


def test_a_file_of_one_line_is_split_between_words(tmp_path):
    (tmp_path / "text8").write_text(" ".join(f"w{n}" for n in range(101)))
    train, validation = held_words(
        open_corpus(text(tmp_path / "text8", seq_len=1, cache_dir=str(tmp_path)))
    )
    assert 20 <= len(validation) <= 30
    assert train == [f"w{n}" for n in range(len(train))]
    first = int(validation[0][1:])
    assert first - len(train) in (0, 1)  # a window has two words, and there may be one left
    assert validation == [f"w{n}" for n in range(first, first + len(validation))]


def test_byte_order_mark_is_no_part_of_a_word(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"hello world\n" * 20)
    corpus = open_corpus(text(tmp_path / "a.txt", cache_dir=str(tmp_path)))
    assert corpus.words() == ["<unk>", "<pad>", "hello", "world"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 noir\n", r"is not UTF-8 \(byte 0xe9 at offset 483\): .* iconv -f latin1"),
        (b"a \0 b\n", r"is not UTF-8 \(byte 0x00 at offset 482\): .* tr -d '\\000'"),
    ],
)
def test_text_that_is_not_utf8_names_the_file_and_the_byte(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    good = "wörter und so \n".encode() * 30
    path = tmp_path / "latin.txt"
    path.write_bytes(good + content + good)
    with pytest.raises(ConfigError, match=f"data.files: .*latin.txt {message}") as error:
        open_corpus(text(path, cache_dir=str(tmp_path)))
    one_line(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("so many words".encode("utf-16"), r"UTF-16 \(byte order mark\): .*iconv -f utf-16 "),
        (b"\xfe\xff" + "words".encode("utf-16-be"), r"UTF-16 \(byte order mark\)"),
        ("so many words".encode("utf-32"), r"UTF-32 .*iconv -f utf-32 "),
        ("so many words".encode("utf-16-le"), "UTF-16 without a byte order mark.*utf-16le"),
        ("so many words".encode("utf-16-be"), "UTF-16 without a byte order mark.*utf-16be"),
        (b"PK\x03\x04\x14\0\x08", "a zip archive"),
        (b"%PDF-1.7\n\xbf\xf7", "a PDF"),
        (b"PAR1\x15\x04\x15\x80", "Parquet"),
        (lzma.compress(b"words " * 99), "compressed by xz"),
        (bz2.compress(b"words " * 99), "compressed by bzip2"),
    ],
    ids=str,
)
def test_a_file_that_is_no_plain_text_is_named_for_what_it_is(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=f"data.files: .*a.txt is {message}") as error:
        open_corpus(text(tmp_path / "a.txt", cache_dir=str(tmp_path)))
    one_line(error)


def compressed(content: bytes, compression: str) -> bytes:
    import pyarrow

    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, compression) as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_compressed_text_is_the_corpus_of_its_content(tmp_path, compression):
    plain, packed = tmp_path / "plain.txt", tmp_path / "packed.txt"
    plain.write_text(TRAIN)
    # Two frames, as `cat a.gz b.gz` gives.
    half = len(TRAIN) // 2
    frames = [compressed(part.encode(), compression) for part in (TRAIN[:half], TRAIN[half:])]
    packed.write_bytes(b"".join(frames))
    expected = open_corpus(text(plain, cache_dir=str(tmp_path / "cache")))
    data = text(packed, cache_dir=str(tmp_path / "cache"))
    corpus = open_corpus(data)
    assert corpus.fingerprint == expected.fingerprint
    assert same_tokens(corpus, expected)
    assert {path.name for path in corpus.folder.iterdir()} == {
        path.name for path in expected.folder.iterdir()
    }
    packed.write_bytes(frames[0][:-9])
    with pytest.raises(ConfigError, match=f"packed.txt can't be unpacked .{compression}") as error:
        open_corpus(data)
    one_line(error)


def test_a_pipe_or_a_device_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    folder = write_release(tmp_path / "text")
    (folder / "wiki.valid.raw").unlink()
    os.mkfifo(folder / "wiki.valid.raw")
    for data in (
        text(tmp_path / "pipe", cache_dir=str(tmp_path)),
        text("/dev/zero", cache_dir=str(tmp_path)),
        release(folder),
    ):
        with pytest.raises(ConfigError, match="is a pipe or a device") as error:
            open_corpus(data)
        one_line(error)


@pytest.mark.parametrize("white_space", ["\t", "\r", "\x0b", "\x0c"])
def test_words_between_white_space_of_one_kind(tmp_path, monkeypatch, white_space):
    monkeypatch.setattr(sources, "PIECE_BYTES", 16)
    (tmp_path / "a.txt").write_text(white_space.join(f"w{n}" for n in range(101)), newline="")
    data = text(tmp_path / "a.txt", seq_len=1, cache_dir=str(tmp_path))
    train, validation = held_words(open_corpus(data))
    assert 20 <= len(validation) <= 30
    # A window has two words, and of each split one may be left.
    assert [word for word in (f"w{n}" for n in range(101)) if word in {*train, *validation}] == (
        train + validation
    )
    assert len(train + validation) >= 99


def test_text_without_white_space_says_what_words_are(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("这是一个没有空格的句子。" * 50)
    data = text(tmp_path / "a.txt", cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="no words for validation.*white space") as error:
        open_corpus(data)
    one_line(error)
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    monkeypatch.setattr(sources, "LONGEST_WORD_BYTES", 1000)
    with pytest.raises(ConfigError, match="no white space in 1,0.. bytes from offset 0"):
        open_corpus(data)


def test_validation_text_that_is_training_text_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_TOKENS", 7)
    train = " ".join(f"w{n}" for n in range(500))
    for validation, share in (
        (train, "100%"),
        (" ".join(f"w{n}" for n in range(400, 600)), r"4\d%"),
        (" ".join(f"v{n}" for n in range(100)), None),
        ("w1 w2", None),
    ):
        data = release(write_release(tmp_path / "text", train, validation), seq_len=1, max_vocab=9)
        for _ in range(2):  # prepared, then cached
            notes: list[str] = []
            open_corpus(data, notes.append)
            warnings = [note for note in notes if note.startswith("warning: ")]
            assert len(warnings) == (share is not None)
            if share:
                assert re.search(f"{share} of the validation text is training text", warnings[0])
    same = release(tmp_path / "text", seq_len=1, validation_split="train")
    notes = []
    open_corpus(same, notes.append)
    assert "100% of the validation text" in notes[-1]


def test_no_home_folder_names_the_setting(tmp_path, monkeypatch):
    folder = write_release(tmp_path / "text")
    for name in ("HOME", "PROGLAYER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*PROGLAYER_CACHE") as error:
        open_corpus(release(folder, cache_dir=None))
    one_line(error)
    with pytest.raises(ConfigError, match=r"data\.path=~/x: there is no such folder"):
        open_corpus(release(folder, path="~/x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has no words for train: give data\.files more text"),
        (" \n\n\t ", "has no words for train"),
        ("word", "has no words for validation"),
        ("one two three four five six", r"data\.seq_len=4 needs 5 words for one window"),
    ],
)
def test_too_little_text(tmp_path, content, message):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        open_corpus(text(tmp_path / "a.txt", cache_dir=str(tmp_path)))
    one_line(error)


def test_fewer_windows_than_asked_for_says_how_many(tmp_path):
    folder = write_release(tmp_path / "text")
    train, validation = len(twin_words(TRAIN, True)) // 5, len(twin_words(VALIDATION, True)) // 5
    for changes, message in (
        ({"samples": train + 1}, f"set data.samples={train} or fewer"),
        ({"samples": 10, "validation_samples": 999}, f"set data.validation_samples={validation}"),
        ({"samples": 1}, "data.samples=1 leaves no window for validation"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            open_corpus(release(folder, **changes))
        one_line(error)
    open_corpus(release(folder, samples=train, validation_samples=validation))
    short = write_release(tmp_path / "short", TRAIN, "a b c d e f")
    with pytest.raises(ConfigError, match="a fifth of it for validation, asks for 2 windows"):
        open_corpus(release(short, samples=10))


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("text", {"files": ("{tmp}/none.txt",)}, r"data\.files=.*none\.txt: there is no such file"),
        ("text", {"files": ("{tmp}/*.none",)}, r"data\.files=.*there is no such file"),
        ("text", {"files": ("{tmp}/folder",)}, r"is a folder: name the files .*folder/\*\.txt"),
        ("wikitext2", {"path": "{tmp}/none"}, r"data\.path=.*none: there is no such folder"),
        ("wikitext2", {"path": "{tmp}/file"}, r"data\.path=.* is a file, .*data=text"),
        ("wikitext2", {"path": "{tmp}/folder"}, r"is not a folder with wiki\.train\.raw"),
        ("wikitext2", {"path": "{tmp}/half"}, r"wiki\.valid\.raw can't be read"),
        ("hub", {"path": "{tmp}/folder"}, r"is not a folder that save_to_disk wrote"),
        ("hub", {"repository": "{tmp}/folder"}, r"local folder: give it as data\.path"),
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


# ---------------------------------------------------------------------------------------------
# Data sets: saved folders, and what `datasets` keeps of an earlier download

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
    for split, dataset in splits.items():  # Dataset.save_to_disk, one split at a time
        dataset.save_to_disk(str(tmp_path / "apart" / split))
    apart = open_corpus(release(tmp_path / "apart"))
    assert (apart.fingerprint, apart.test_fingerprint) == (expected.fingerprint, None)

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
    asked = [cached.model_copy(update=changes) for changes in variants.values()]
    process = start(tmp_path, asked, HF_HOME=str(hub_cache(home)), HF_HUB_OFFLINE="1")
    hub = dict(zip(variants, answers(process), strict=True))
    for name in ("pinned", "whatever"):
        assert hub[name]["fingerprint"] == expected.fingerprint, name
        assert hub[name]["test"] == expected.test_fingerprint, name
    for name in ("other revision", "not downloaded"):
        assert re.search("can't be reached .*data.path.*data=pydocs", hub[name]["error"]), name
    assert "config 'wikitext-103-raw-v1'" in hub["other configuration"]["error"]
    assert 'Unknown split "dev"' in hub["no such split"]["error"]
    assert "data.text_column=body: the columns" in hub["no such column"]["error"]
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
    other = data.model_copy(update={"held_out": 0.3})
    assert open_corpus(other).fingerprint != open_corpus(data).fingerprint
    for column, message in (
        ("text", "data.text_column=text: the columns of the data set are body, n"),
        ("n", "data.text_column=n is no column of text"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_corpus(data.model_copy(update={"text_column": column}))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_saved_data_set_without_rows_is_one_clear_error(tmp_path, split):
    import datasets

    splits = {"train": rows(TRAIN), "validation": rows(VALIDATION)} | {split: []}
    saved = {name: datasets.Dataset.from_dict({"text": text}) for name, text in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    saved[split].save_to_disk(str(tmp_path / "one"))
    for name in ("saved", "one"):
        with pytest.raises(
            ConfigError, match=f"has no rows for {'train' if name == 'one' else split}"
        ):
            open_corpus(release(tmp_path / name))


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


# ---------------------------------------------------------------------------------------------
# pydocs


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    return sources.pydocs()


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
    monkeypatch.setattr(sources, "pydocs", lambda: documents)
    data = config("data=pydocs").data
    notes: list[str] = []
    corpus = open_corpus(data.model_copy(update={"cache_dir": str(tmp_path)}), notes.append)
    assert corpus.name == "pydocs"
    assert corpus.train.shape == (data.samples, 33)
    assert corpus.validation.shape == (data.samples // 5, 33)
    assert corpus.vocab_size == data.max_vocab
    parts = sources.open_source(data)
    train = list(parts.pieces("train", tmp_path))
    held = list(parts.pieces("validation", tmp_path))
    texts = [text + "\n" for _, text in documents]
    assert sorted(train + held) == sorted(texts)
    share = sum(map(len, held)) / sum(map(len, texts))
    assert data.held_out <= share < data.held_out + 0.05
    other = data.model_copy(update={"held_out": 0.2})
    assert sources.open_source(other).key != parts.key


def test_pydocs_of_a_python_without_sources_or_topics(tmp_path, monkeypatch):
    data = data_config("pydocs", cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(ConfigError, match=r"no source files .* data=text") as error:
            open_corpus(data)
        one_line(error)
        (tmp_path / "module.py").write_text('"""Words."""\ndef f():\n    "More."\n')
        (tmp_path / "broken.py").write_text("print 1")
        assert sources.pydocs()[0] == ("module", "Words.\n\nMore.")
        patch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(ConfigError, match=r"without pydoc_data\.topics"):
            open_corpus(data)
