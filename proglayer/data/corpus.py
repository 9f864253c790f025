"""Text to token windows: the sources, the vocabulary, the cache on disk, the fingerprint.

Every source gives the same thing, a `Corpus`. Text becomes words by one rule: lower-case it (a
setting), split on white space. Line ends are white space like any other and there is no token for
them, so the words of a split form one stream, however its text was cut into lines, rows or files.
The vocabulary is `<unk>` = 0, `<pad>` = 1, then every word of train and then of validation in
order of first appearance; rare words can be left out of it (`min_count`, `max_vocab`).

The two streams are stored once, as int32 arrays, in a cache that depends on the text and the
tokenisation only. Windows are a view of the memory-mapped stream, so `seq_len` and `samples` cost
nothing to change, and opening a stored corpus imports neither `datasets` nor pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from proglayer import files
from proglayer.config import DataConfig
from proglayer.data.sources import TextSource, open_source
from proglayer.errors import DISK_FULL, ConfigError, first_line

Notify = Callable[[str], None]

UNK = 0
SPECIAL_WORDS = ("<unk>", "<pad>")
SPLITS = ("train", "validation")

# Part of every cache key: raise it when the tokenisation or the files of an entry change.
CACHE_FORMAT = 1
# The content hashes of an entry are checked whenever it is opened, up to this size (hashing it
# takes some 50 ms); above, sizes and headers have to do.
CHECKED_BYTES = 64 * 2**20
# More of the validation text than this in the training text, in passages of so many words, is
# warned of. WikiText-2 has none, pydocs 6 % of phrases that docstrings repeat.
NOTED_OVERLAP = 0.1
PASSAGE = 16
# Stored tokens are gone through in pieces of this many.
PIECE_TOKENS = 2**18
SECONDS_BETWEEN_NOTES = 5.0
# The test text has at most so many windows for each of the validation text.
MOST_TEST_SHARE = 4


@dataclass(frozen=True)
class Corpus:
    """Token windows of a training, a validation and a test text.

    `train`, `validation` and `test` are int32 of shape (windows, seq_len + 1), memory-mapped and
    read-only: the input of a window is `[:-1]`, its target `[1:]`. The test windows are what
    follows the validation windows in the validation split, so that no epoch is chosen by them;
    None where those take the whole split.

    `vocab_size` counts the entries of the vocabulary, `<unk>` = 0 and `<pad>` = 1 included.
    `fingerprint` hashes both token streams, the vocabulary, the length and the number of windows:
    it is equal where the training data are equal, and knows nothing of where they lay.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    fingerprint: str
    folder: Path
    test: np.ndarray | None = None

    def words(self) -> list[str]:
        """The vocabulary; a word's place is its id."""
        text = (self.folder / "vocabulary.txt").read_bytes().decode("utf-8", "surrogatepass")
        return text.split("\n")


def open_corpus(data: DataConfig, notify: Notify | None = None) -> Corpus:
    """The corpus that `data` describes, from the cache, where it is prepared first if need be.

    However many processes ask for the same corpus at once, one prepares it and the others wait.
    `notify` is given a line of plain text now and then while that takes long.

    Raises ConfigError where the text can't be had or read, is too short for what is asked of it,
    or the cache can't be written.
    """
    notify = notify or _silent
    cache = _cache_folder(data)
    source = open_source(data, cache / "hashes")
    folder = cache / "corpora" / _entry_name(source, data)
    with _cache_errors(folder.parent):
        entry = _read_entry(folder, notify) or _prepare_once(folder, source, data, notify)
    if share := entry.meta.get("validation_in_train"):
        notify(
            f"warning: {source.label}: {share:.0%} of the validation text is training text, too: "
            "its loss says less about new text, so choose splits or files that do not overlap"
        )
    return _take_windows(entry, source, data)


# ---------------------------------------------------------------------------------------------
# Windows


def _take_windows(entry: _Entry, source: TextSource, data: DataConfig) -> Corpus:
    """The windows that the settings ask for, or a ConfigError that says how many there are."""
    length = data.seq_len + 1
    asked = f"data.samples={data.samples}"
    train = _windows(entry.train, length, data.samples, asked, "train", source)
    wanted = data.validation_samples
    if wanted is not None:
        asked = f"data.validation_samples={wanted}"
    elif data.samples is not None:
        wanted = int(0.2 * data.samples)
        asked += ", a fifth of it for validation,"
        if wanted == 0:
            raise ConfigError(
                f"data.samples={data.samples} leaves no window for validation, which gets a fifth "
                "of it: raise it, or set data.validation_samples"
            )
    validation = _windows(entry.validation, length, wanted, asked, "validation", source)
    # They follow from the split and the number of validation windows, which the fingerprint holds.
    rest = entry.validation[len(validation) * length :]
    count = min(len(rest) // length, MOST_TEST_SHARE * len(validation))
    identity = {
        "train": entry.meta["train"]["sha256"],
        "validation": entry.meta["validation"]["sha256"],
        "vocabulary": entry.meta["vocabulary"]["sha256"],
        "seq_len": data.seq_len,
        "windows": [len(train), len(validation)],
    }
    return Corpus(
        name=source.name,
        train=train,
        validation=validation,
        vocab_size=entry.meta["vocabulary"]["entries"],
        fingerprint=_hash_json(identity),
        folder=entry.folder,
        test=rest[: count * length].reshape(count, length) if count else None,
    )


def _windows(
    stream: np.ndarray, length: int, wanted: int | None, asked: str, split: str, source: TextSource
) -> np.ndarray:
    """The first `wanted` windows of `length` tokens, a view of the stream; None: all of them."""
    available = len(stream) // length
    if available == 0:
        raise ConfigError(
            f"data.seq_len={length - 1} needs {length} words for one window, but {source.label} "
            f"has {len(stream)} for {split}: take a smaller data.seq_len, or {source.more[split]}"
        )
    if wanted is None:
        wanted = available
    if wanted > available:
        setting = "data.samples" if split == "train" else "data.validation_samples"
        raise ConfigError(
            f"{asked} asks for {wanted} windows, but {source.label} has {available} for {split} "
            f"({len(stream)} words in windows of {length}): set {setting}={available} or fewer, "
            f"or {source.more[split]}"
        )
    return stream[: wanted * length].reshape(wanted, length)


# ---------------------------------------------------------------------------------------------
# The cache: one folder for each text and tokenisation, holding train.npy, validation.npy,
# vocabulary.txt (one word a line, a word's line is its id) and meta.json, which is written last.

ENTRY_FORM = r"(train|validation)\.npy|vocabulary\.txt|meta\.json"


@dataclass(frozen=True)
class _Entry:
    """A stored corpus: its meta data and the two memory-mapped streams."""

    folder: Path
    meta: dict[str, Any]
    train: np.ndarray
    validation: np.ndarray


def _cache_folder(data: DataConfig) -> Path:
    chosen = data.cache_dir or os.environ.get("PROGLAYER_CACHE")
    try:
        if chosen is None:
            import platformdirs

            chosen = platformdirs.user_cache_dir("proglayer", appauthor=False)
        return Path(chosen).expanduser().absolute()
    except RuntimeError as error:  # no HOME, and a user without a name, as in containers
        raise ConfigError(
            "data.cache_dir: prepared text is kept in the user's home folder, which is not known "
            "here: set data.cache_dir=FOLDER, or PROGLAYER_CACHE"
        ) from error


def _entry_name(source: TextSource, data: DataConfig) -> str:
    """The name for reading, then a hash of all that the streams depend on."""
    identity = {
        "format": CACHE_FORMAT,
        "text": source.key,
        "lowercase": data.lowercase,
        "min_count": data.min_count,
        "max_vocab": data.max_vocab,
    }
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', source.name)}-{_hash_json(identity)[:24]}"


def _read_entry(folder: Path, notify: Notify) -> _Entry | None:
    """The stored corpus, or None where there is none or it is damaged (which is noted)."""
    if not folder.exists():
        return None
    try:
        signed = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta = signed["meta"]
        if signed["sha256"] != _hash_json(meta):
            raise ValueError("meta.json does not match its own hash")
        streams = {split: _read_stream(folder, split, meta) for split in SPLITS}
        vocabulary = (folder / "vocabulary.txt").read_bytes()
        if hashlib.sha256(vocabulary).hexdigest() != meta["vocabulary"]["sha256"]:
            raise ValueError("vocabulary.txt does not match its hash")
    except PermissionError:
        raise  # nothing wrong with it, but it belongs to someone else
    except Exception as error:  # the many ways in which NumPy and json object to damage
        notify(
            f"the cached corpus in {folder} is damaged ({first_line(error)}): preparing it again"
        )
        return None
    return _Entry(folder, meta, **streams)


def _read_stream(folder: Path, split: str, meta: dict[str, Any]) -> np.ndarray:
    """The memory-mapped tokens of a split. Raises ValueError where they are not those stored."""
    path, words = folder / f"{split}.npy", meta[split]["words"]
    stream: np.memmap = np.load(path, mmap_mode="r", max_header_size=1000)
    if stream.dtype != np.dtype("<i4") or stream.shape != (words,):
        raise ValueError(f"{path.name} has the wrong header")
    if path.stat().st_size != stream.offset + stream.nbytes:
        raise ValueError(f"{path.name} has the wrong size")
    checked = stream.nbytes <= CHECKED_BYTES
    if checked and hashlib.sha256(stream.data).hexdigest() != meta[split]["sha256"]:
        raise ValueError(f"{path.name} does not match its hash")
    return stream


def _prepare_once(folder: Path, source: TextSource, data: DataConfig, notify: Notify) -> _Entry:
    """Prepare the entry under a lock, unless another process did so in the meantime."""
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        notify(f"{source.name}: another process is preparing the corpus, waiting for it")
        lock.acquire()
    partial_name = f"{folder.name}.partial"
    try:
        entry = _read_entry(folder, _silent)
        if entry is not None:
            return entry
        # Whoever holds the lock is alone with this name, so what lies there was left by a kill.
        for leftover in folder.parent.glob(f"{partial_name}-*"):
            if re.fullmatch(rf"{re.escape(partial_name)}-[0-9a-f]{{16}}", leftover.name):
                files.delete_folder(leftover, files.everything)
        with files.new_folder(folder.parent, partial_name) as partial:
            _prepare(partial, source, data, notify)
            if not files.delete_folder(folder, files.named(ENTRY_FORM)):
                raise ConfigError(
                    f"data.cache_dir: the cached corpus in {folder} is damaged, and other files "
                    "lie in it, which are left as they are: move them"
                )
            files.put_in_place(partial, folder)
        _sync_folder(folder.parent)
    finally:
        lock.release()
    entry = _read_entry(folder, notify)
    if entry is None:
        raise ConfigError(f"data.cache_dir: {folder} can't be read back after writing it")
    return entry


def _prepare(folder: Path, source: TextSource, data: DataConfig, notify: Notify) -> None:
    """Write an entry into the empty `folder`, holding the vocabulary and a piece in memory."""
    started = time.monotonic()
    notify(f"{source.name}: preparing {source.label}")
    scratch = folder / "scratch"
    scratch.mkdir()
    ids = _growing_vocabulary()
    meta: dict[str, Any] = {}
    for split in SPLITS:
        note = _Notes(notify, f"{source.name}: {split}")

        def tokens(split: str = split, note: _Notes = note) -> Iterator[np.ndarray]:
            total = 0
            for piece in source.pieces(split, scratch):
                words = (piece.lower() if data.lowercase else piece).split()
                yield np.fromiter(map(ids.__getitem__, words), "<i4", len(words))
                total += len(words)
                note(f"{total:,} words")

        meta[split] = _write_stream(folder / f"{split}.npy", tokens())
        if meta[split]["words"] == 0:
            raise ConfigError(f"{source.label} has no words for {split}: {source.more[split]}")
    seen = _share_in_train(folder / "train.npy", folder / "validation.npy")
    overlap = {"validation_in_train": round(seen, 3)} if seen > NOTED_OVERLAP else {}

    vocabulary = list(ids)
    if data.min_count > 1 or data.max_vocab is not None:
        counts = np.zeros(len(vocabulary), np.int64)
        for split in SPLITS:
            for piece in _stream_pieces(folder / f"{split}.npy"):
                counts += np.bincount(piece, minlength=len(vocabulary))
        kept = _kept_words(counts, data.min_count, data.max_vocab)
        new_ids = np.full(len(vocabulary), UNK, "<i4")
        new_ids[kept] = np.arange(len(kept), dtype="<i4")
        for split in SPLITS:
            all_words = scratch / f"{split}.npy"
            files.move(folder / all_words.name, all_words, files.everything)
            renumbered = (new_ids[piece] for piece in _stream_pieces(all_words))
            meta[split] = _write_stream(folder / all_words.name, renumbered)
        vocabulary = [vocabulary[i] for i in kept]
    files.delete_folder(scratch, files.everything)

    # A docstring may hold half a surrogate pair, which strict UTF-8 can't express.
    encoded = "\n".join(vocabulary).encode("utf-8", "surrogatepass")
    meta["vocabulary"] = {
        "entries": len(vocabulary),
        "bytes": len(encoded),
        "sha256": hashlib.sha256(encoded).hexdigest(),
    }
    _write_file(folder / "vocabulary.txt", encoded)
    meta |= overlap
    signed = {"meta": meta, "sha256": _hash_json(meta)}
    _write_file(folder / "meta.json", json.dumps(signed, indent=1).encode())
    _sync_folder(folder)
    notify(
        f"{source.name}: {meta['train']['words']:,} training and {meta['validation']['words']:,} "
        f"validation words, {len(vocabulary):,} vocabulary entries, "
        f"prepared in {time.monotonic() - started:.1f} s"
    )


def _growing_vocabulary() -> dict[str, int]:
    """A dict that gives each unseen word the next id."""
    ids: defaultdict[str, int] = defaultdict()
    ids.default_factory = ids.__len__
    for word in SPECIAL_WORDS:
        ids[word]  # looked up, hence numbered
    return ids


def _kept_words(counts: np.ndarray, min_count: int, max_vocab: int | None) -> np.ndarray:
    """Ids of the words that stay, in order of first appearance, the special ones in front."""
    ids = np.arange(len(SPECIAL_WORDS), len(counts))
    ids = ids[counts[ids] >= min_count]
    if max_vocab is not None:
        most_frequent = np.argsort(-counts[ids], kind="stable")
        ids = np.sort(ids[most_frequent[: max_vocab - len(SPECIAL_WORDS)]])
    return np.concatenate([np.arange(len(SPECIAL_WORDS)), ids])


def _write_stream(path: Path, pieces: Iterable[np.ndarray]) -> dict[str, Any]:
    """Write a one-dimensional int32 .npy file; gives its words and the hash of its tokens.

    Written and not memory-mapped: a full disk is then an error and no signal.
    """
    words, digest = 0, hashlib.sha256()

    def header() -> None:  # NumPy leaves room in it for a length of any size
        about = {"descr": "<i4", "fortran_order": False, "shape": (words,)}
        np.lib.format.write_array_header_1_0(file, about)

    with open(path, "xb") as file:
        header()
        for piece in pieces:
            tokens = piece.tobytes()
            file.write(tokens)
            digest.update(tokens)
            words += len(piece)
        file.seek(0)
        header()
        _flush(file)
    return {"words": words, "sha256": digest.hexdigest()}


def _stream_pieces(path: Path) -> Iterator[np.ndarray]:
    """The tokens of a stream file, piece by piece."""
    stream = np.load(path, mmap_mode="r")
    for first in range(0, len(stream), PIECE_TOKENS):
        yield stream[first : first + PIECE_TOKENS]


def _share_in_train(train: Path, validation: Path) -> float:
    """The share of a thousand passages of validation, PASSAGE words each, that train has as well.

    By hashes of all passages of train, which takes a tenth of the time of preparing the text.
    """
    held = np.load(validation, mmap_mode="r")
    if len(held) < PASSAGE:
        return 0.0
    starts = np.unique(np.linspace(0, len(held) - PASSAGE, 1000, dtype=np.int64))
    passages = np.unique(_hashes(sliding_window_view(held, PASSAGE)[starts]))
    seen = np.zeros(len(passages), bool)
    rest = np.empty(0, "<i4")
    for piece in _stream_pieces(train):
        tokens = np.concatenate([rest, piece])
        rest = tokens[1 - PASSAGE :]
        if len(tokens) >= PASSAGE:
            hashes = _hashes(sliding_window_view(tokens, PASSAGE))
            place = np.searchsorted(passages, hashes).clip(max=len(passages) - 1)
            seen[place[passages[place] == hashes]] = True
    return float(seen.mean())


def _hashes(passages: np.ndarray) -> np.ndarray:
    """A hash of each row of ids."""
    hashes = np.zeros(len(passages), np.uint64)
    for ids in passages.T:
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += ids.astype(np.uint64) + np.uint64(1)
    return hashes


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a crash, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Turn what a file system may object to into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ConfigError(
                f"no space left to store the corpus in {folder}: make room (a word takes four "
                "bytes), or set data.cache_dir to a folder with more"
            ) from error
        raise ConfigError(
            f"the corpus can't be kept in {folder} ({error.strerror or error}): "
            "set data.cache_dir to a folder that can be written"
        ) from error


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _silent(line: str) -> None:
    """Take a note and tell nobody."""


class _Notes:
    """Passes on a note at most every few seconds."""

    def __init__(self, notify: Notify, prefix: str) -> None:
        self._notify, self._prefix = notify, prefix
        self._due: float | None = None

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if self._due is not None and now >= self._due:
            self._notify(f"{self._prefix}: {text}")
        if self._due is None or now >= self._due:
            self._due = now + SECONDS_BETWEEN_NOTES
