"""Text to token windows: prepared once, memory-mapped from then on, known by a fingerprint.

The streams of a text's splits are stored as int32, in a cache that depends on the text and the
tokenization alone. Beside those that are held out lies how many bytes of text each token stands
for, so that losses of different tokenizers compare as bits per byte. Windows are a view of the
memory-mapped stream, so `seq_len` and `samples` cost nothing to change, and opening a stored corpus
imports neither `datasets` nor pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from proglayer.config import BYTES, WORDS, DataConfig
from proglayer.data.text import Text, open_text
from proglayer.data.tokens import TOKENIZER_FILE, UNK, Sized, Tokenization, open_tokenization
from proglayer.errors import ConfigError, first_line, raised_as

Notify = Callable[[str], None]

# Part of every cache key: raise it when the tokenization or the files of an entry change.
CACHE_FORMAT = 2
# The content of an entry is checked by its hashes whenever it is opened, up to this size (hashing
# it takes some 50 ms); above, by its sizes.
CHECKED_BYTES = 64 * 2**20
# The test text has at most so many windows for each of the validation text.
MOST_TEST_SHARE = 4


def _silent(line: str) -> None:
    """Take a note and pass it on to nobody."""


@dataclass(frozen=True)
class Corpus:
    """Token windows of a training, a validation and a test text.

    `train`, `validation` and `test` are int32 of shape (windows, seq_len + 1), memory-mapped and
    read-only: the input of a window is `[:-1]`, its target `[1:]`. The test windows, which no epoch
    is chosen by, are of the data set's own test split; where it has none, they are what follows the
    validation windows in the validation split, and None where those take it whole.

    `vocab_size` counts the entries of the vocabulary; of words, `<unk>` = 0 and `<pad>` = 1 are
    among them. `fingerprint` hashes both token streams, the vocabulary (or the tokenizer's file),
    the length and the number of windows: it is equal where the training data are equal, and knows
    nothing of where they lay. The test text is no part of it, for no training depends on that; its
    own split has the `test_fingerprint`, which is None of what follows the validation windows.

    `validation_bytes` and `test_bytes` count the bytes of text, in UTF-8, that the targets of those
    windows stand for: a word with the white space before it, a subword from the end of the one
    before to its own. `validation_unknown` counts the targets that are `<unk>`, which say nothing
    of their text. `tokenizer_revision` is the commit of a tokenizer from the hub.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    fingerprint: str
    folder: Path
    test: np.ndarray | None = None
    tokenizer: str = WORDS
    validation_bytes: int | None = None
    test_bytes: int | None = None
    validation_unknown: int | None = None
    test_fingerprint: str | None = None
    tokenizer_revision: str | None = None

    @property
    def tokenizer_file(self) -> Path | None:
        """The `tokenizer.json` that made the tokens, None of words and bytes."""
        return None if self.tokenizer in (WORDS, BYTES) else self.folder / TOKENIZER_FILE


def open_corpus(data: DataConfig, notify: Notify = _silent) -> Corpus:
    """Return the corpus that `data` describes, from the cache, where it is prepared first.

    However many processes ask for the same corpus at once, one prepares it and the others wait.
    `notify` is given a line of plain text where that takes long.

    Raises ConfigError where the text can't be had or read, is too short for what is asked of it,
    or the cache can't be written.
    """
    text, tokenization = open_text(data), open_tokenization(data)
    identity = {"format": CACHE_FORMAT, "text": text.key, **tokenization.key}
    name = re.sub(r"[^A-Za-z0-9.-]", "_", text.name)
    folder = _cache_folder(data) / "corpora" / f"{name}-{_hash_json(identity)[:24]}"
    mend = ": make room, or set data.cache_dir to another folder"
    with raised_as(ConfigError, f"cannot write to {folder.parent}", OSError, then=mend):
        entry = _read_entry(folder, notify) or _prepare_once(folder, text, tokenization, notify)
    return replace(_with_windows(entry, text, data), tokenizer_revision=tokenization.revision)


# ---------------------------------------------------------------------------------------------
# Windows


def _with_windows(entry: _Entry, text: Text, data: DataConfig) -> Corpus:
    """Return the windows that the settings ask for."""
    length, streams = data.seq_len + 1, entry.streams
    wanted = {"train": data.samples, "validation": _held_windows(data)}
    train, validation = (
        _windows(streams[split], length, _count(streams[split], split, count, text, data))
        for split, count in wanted.items()
    )
    split = streams.get("test", streams["train"][:0])
    if len(split) >= length:
        test, test_bytes, test_fingerprint = split, streams["test_bytes"], entry.sha256["test"]
    else:  # what follows the validation windows, which the fingerprint holds
        rest = slice(validation.size, None)
        test, test_bytes = streams["validation"][rest], streams["validation_bytes"][rest]
        test_fingerprint = None
    tests = min(len(test) // length, MOST_TEST_SHARE * len(validation))
    unknown = int((validation[:, 1:] == UNK).sum()) if data.tokenizer == WORDS else None
    identity = {name: entry.sha256[name] for name in ("train", "validation", "vocabulary")}
    windows = [len(train), len(validation)]
    return Corpus(
        name=text.name,
        train=train,
        validation=validation,
        vocab_size=entry.vocab_size,
        fingerprint=_hash_json({**identity, "seq_len": data.seq_len, "windows": windows}),
        folder=entry.folder,
        test=_windows(test, length, tests) if tests else None,
        tokenizer=data.tokenizer,
        validation_bytes=_target_bytes(streams["validation_bytes"], length, len(validation)),
        test_bytes=_target_bytes(test_bytes, length, tests) if tests else None,
        validation_unknown=unknown,
        test_fingerprint=test_fingerprint,
    )


def _held_windows(data: DataConfig) -> int | None:
    """Return how many windows validate, a fifth of those that train; None: all there are."""
    if data.validation_samples is not None or data.samples is None:
        return data.validation_samples
    return max(1, int(0.2 * data.samples))


def _count(stream: np.ndarray, split: str, wanted: int | None, text: Text, data: DataConfig) -> int:
    """Return how many windows a split gets: so many as wanted, all there are where that is None."""
    available = len(stream) // (data.seq_len + 1)
    there = f"{text.label} has {len(stream)} tokens, {available} windows, for {split}"
    if available < (wanted or 1):
        setting = "data.samples" if split == "train" else "data.validation_samples"
        raise ConfigError(f"{setting}={wanted} with data.seq_len={data.seq_len}: {there}")
    return available if wanted is None else wanted


def _windows(stream: np.ndarray, length: int, count: int) -> np.ndarray:
    """Return the first `count` windows of a stream, a view of it."""
    return stream[: count * length].reshape(count, length)


def _target_bytes(sizes: np.ndarray, length: int, count: int) -> int:
    return int(_windows(sizes, length, count)[:, 1:].sum(dtype=np.int64))


# ---------------------------------------------------------------------------------------------
# The cache: one folder for each text and tokenization, holding train.bin, validation.bin and
# validation_bytes.bin (the bytes of each of its tokens), of a data set that has one also test.bin
# and test_bytes.bin, all int32; vocabulary.txt (one entry a line, its line is its id) or
# tokenizer.json; and meta.json, which is written last.


@dataclass(frozen=True)
class _Entry:
    """A stored corpus: the memory-mapped streams by name, and the hashes of these."""

    folder: Path
    streams: dict[str, np.ndarray]
    sha256: dict[str, str]
    vocab_size: int


def _cache_folder(data: DataConfig) -> Path:
    chosen = data.cache_dir or os.environ.get("PROGLAYER_CACHE")
    if chosen is None:
        import platformdirs

        chosen = platformdirs.user_cache_dir("proglayer", appauthor=False)
    return Path(chosen).expanduser().absolute()


def _read_entry(folder: Path, notify: Notify) -> _Entry | None:
    """Return the stored corpus; None where there is none, or not all as stored (which is noted)."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta.pop("sha256") != _hash_json(meta):
            raise ValueError("meta.json does not match its hash")
        about, vocabulary = meta["streams"], meta["vocabulary"]
        streams = {name: _read_stream(folder, name, **about[name]) for name in about}
        content = (folder / vocabulary["file"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != vocabulary["sha256"]:
            raise ValueError(f"{vocabulary['file']} does not match its hash")
        parts = about | {"vocabulary": vocabulary}
        sha256 = {name: part["sha256"] for name, part in parts.items()}
        return _Entry(folder, streams, sha256, vocabulary["entries"])
    except Exception as error:  # the many ways in which files can be damaged
        notify(f"the cached corpus in {folder} is damaged ({first_line(error)}): preparing it anew")
        return None


def _read_stream(folder: Path, name: str, tokens: int, sha256: str) -> np.ndarray:
    """Return the values of a stream, memory-mapped. Raises ValueError where they are damaged."""
    stream = np.memmap(folder / f"{name}.bin", "<i4", "r")
    checked = stream.nbytes <= CHECKED_BYTES
    if len(stream) != tokens or (checked and hashlib.sha256(stream.data).hexdigest() != sha256):
        raise ValueError(f"{name}.bin does not match its size or hash")
    return stream


def _prepare_once(folder: Path, text: Text, tokenization: Tokenization, notify: Notify) -> _Entry:
    """Prepare the entry under a lock, unless another process did so in the meantime."""
    import filelock

    from proglayer.files import new_folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if (entry := _read_entry(folder, _silent)) is not None:
            return entry
        # Whoever holds the lock is alone with this name, so what lies there was left by a kill.
        for left_over in folder.parent.glob(f"{folder.name}.partial-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with new_folder(folder.parent, f"{folder.name}.partial") as scratch:
            (scratch / "entry").mkdir()
            _prepare(scratch / "entry", scratch, text, tokenization, notify)
            shutil.rmtree(folder, ignore_errors=True)  # one that is damaged
            (scratch / "entry").rename(folder)
    entry = _read_entry(folder, notify)
    assert entry is not None, "it was just written"
    return entry


def _prepare(
    entry: Path, scratch: Path, text: Text, tokenization: Tokenization, notify: Notify
) -> None:
    """Write an entry into an empty folder, holding the vocabulary and a piece in memory."""
    notify(f"{text.name}: preparing {text.label}")

    def read(split: str) -> Iterable[str]:
        return text.read(split, scratch)

    encoder = tokenization.fit(read)
    streams = _write_streams(entry, ["train"], ((ids,) for ids in encoder.ids(read("train"))))
    for split in ("validation", "test"):
        names = [split, f"{split}_bytes"]
        streams |= _write_streams(entry, names, _carried(encoder.sized(read(split))))
    for name in [name for name, stream in streams.items() if not stream["tokens"]]:
        if name in ("train", "validation"):
            raise ConfigError(f"{text.label} has no text for {name}")
        (entry / f"{name}.bin").unlink()
        del streams[name]
    (entry / encoder.file).write_bytes(encoder.content)
    digest = hashlib.sha256(encoder.content).hexdigest()
    vocabulary = {"file": encoder.file, "entries": encoder.entries, "sha256": digest}
    meta = {"streams": streams, "vocabulary": vocabulary}
    (entry / "meta.json").write_text(json.dumps({**meta, "sha256": _hash_json(meta)}, indent=1))
    counts = ", ".join(f"{streams[name]['tokens']:,} {name}" for name in ("train", "validation"))
    notify(f"{text.name}: {counts} tokens, {encoder.entries:,} vocabulary entries")


def _carried(parts: Iterable[Sized]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Count the bytes that follow the last token of a part with the first one after it."""
    before = 0
    for ids, sizes, after in parts:
        if len(sizes):
            sizes[0] += before
            before = 0
        before += after
        yield ids, sizes


def _write_streams(
    folder: Path, names: list[str], parts: Iterable[tuple[np.ndarray, ...]]
) -> dict[str, Any]:
    """Write int32 files in step, part by part, and return the length and the hash of each.

    Written and not memory-mapped: a full disk is then an error and no signal.
    """
    tokens, digests = 0, [hashlib.sha256() for _ in names]
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{name}.bin", "xb")) for name in names]
        for arrays in parts:
            tokens += len(arrays[0])
            for file, digest, values in zip(files, digests, arrays, strict=True):
                content = values.tobytes()
                file.write(content)
                digest.update(content)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    return {
        name: {"tokens": tokens, "sha256": digest.hexdigest()}
        for name, digest in zip(names, digests, strict=True)
    }


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
