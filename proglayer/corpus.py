"""Text to token windows: the sources, the vocabulary, the cache on disk, the fingerprint.

Every source gives the same thing, a `Corpus`. Text becomes words by one rule: lower-case it (a
setting), split on white space. Line ends are white space like any other and there is no token for
them, so the words of a split form one stream, however its text was cut into lines, rows or files.
The vocabulary is `<unk>` = 0, `<pad>` = 1, then every word of train and then of validation in
order of first appearance; rare words can be left out of it (`min_count`, `max_vocab`).

The two streams are stored once, as int32 arrays, in a cache that depends on the text and the
tokenisation only. Windows are a view of the memory-mapped stream, so `seq_len` and `samples` cost
nothing to change, and opening a stored corpus imports neither `datasets` nor pyarrow.

Data sets are loaded with the `datasets` library. Plain text files are read here: its "text"
builder would copy them to Arrow first, and can't say at which byte a file stops being UTF-8.
"""

from __future__ import annotations

import ast
import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from proglayer.config import ConfigError, DataConfig, DataSource

Notify = Callable[[str], None]

UNK, PAD = 0, 1
SPECIAL_WORDS = ("<unk>", "<pad>")

# Part of every cache key: raise it when the tokenisation or the files of an entry change.
CACHE_FORMAT = 1
# Part of the key of pydocs: raise it when other text is taken from the standard library.
PYDOCS_FORMAT = 1

# The content hashes of an entry are checked whenever it is opened, up to this size (hashing it
# takes some 50 ms); above, sizes and headers have to do.
CHECKED_BYTES = 64 * 2**20
# Text is read and tokens are remapped in pieces of this size; it bounds the memory of both.
PIECE_BYTES = 2**20
SECONDS_BETWEEN_NOTES = 5.0

# What a split is called in the file names of the WikiText releases.
RELEASE_SPLITS = {"train": "train", "validation": "valid", "test": "test"}


@dataclass(frozen=True)
class Corpus:
    """Token windows of a training and a validation text.

    `train` and `validation` are int32 of shape (windows, seq_len + 1), memory-mapped and
    read-only: the input of a window is `[:-1]`, its target `[1:]`.

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
    source = _source(data)
    folder = _cache_folder(data) / f"{source.name}-{_entry_key(source, data)}"
    entry = _read_entry(folder, notify)
    if entry is None:
        with _cache_errors(folder.parent):
            entry = _prepare_once(folder, source, data, notify)
    return _cut(entry, source, data)


# ---------------------------------------------------------------------------------------------
# Windows


def _cut(entry: _Entry, source: _Source, data: DataConfig) -> Corpus:
    """The windows that the settings ask for, or a ConfigError that says how many there are."""
    length = data.seq_len + 1
    validation_setting = f"data.validation_samples={data.validation_samples}"
    wanted = data.validation_samples
    if wanted is None and data.samples is not None:
        wanted = int(0.2 * data.samples)
        validation_setting = f"data.samples={data.samples} (a fifth of it for validation)"
        if wanted == 0:
            raise ConfigError(
                f"data.samples={data.samples} leaves no window for validation, which gets a fifth "
                "of it: raise it, or set data.validation_samples"
            )
    train = _windows(
        entry.train, length, data.samples, f"data.samples={data.samples}", "training", source
    )
    validation = _windows(
        entry.validation, length, wanted, validation_setting, "validation", source
    )
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
    )


def _windows(
    stream: np.ndarray, length: int, wanted: int | None, setting: str, split: str, source: _Source
) -> np.ndarray:
    """The first `wanted` windows of `length` tokens, a view of the stream."""
    available = len(stream) // length
    if available == 0:
        raise ConfigError(
            f"data.seq_len={length - 1} needs {length} words for one window, but the {split} text "
            f"of {source.label} has {len(stream)}: use more text or a smaller data.seq_len"
        )
    if wanted is not None and wanted > available:
        raise ConfigError(
            f"{setting} asks for {wanted} {split} windows, but {source.label} has {available} "
            f"({len(stream)} words in windows of {length}): {source.remedy(split, available)}"
        )
    count = available if wanted is None else wanted
    return stream[: count * length].reshape(count, length)


# ---------------------------------------------------------------------------------------------
# The cache: one folder for each text and tokenisation, holding train.npy, validation.npy,
# vocabulary.txt (one word a line, a word's line is its id) and meta.json, which is written last.


@dataclass(frozen=True)
class _Entry:
    """A stored corpus: its meta data and the two memory-mapped streams."""

    folder: Path
    meta: dict[str, Any]
    train: np.ndarray
    validation: np.ndarray


def _cache_folder(data: DataConfig) -> Path:
    chosen = data.cache_dir or os.environ.get("PROGLAYER_CACHE")
    if chosen is None:
        import platformdirs

        chosen = platformdirs.user_cache_dir("proglayer", appauthor=False)
    return Path(chosen).expanduser().absolute() / "corpora"


def _entry_key(source: _Source, data: DataConfig) -> str:
    """What the streams depend on: the text and how it is cut into words and ids."""
    tokenisation = {
        "lowercase": data.lowercase,
        "min_count": data.min_count,
        "max_vocab": data.max_vocab,
    }
    return _hash_json({"format": CACHE_FORMAT, "text": source.key, **tokenisation})[:24]


def _read_entry(folder: Path, notify: Notify) -> _Entry | None:
    """The stored corpus, or None where there is none or it is damaged (which is noted)."""
    if not folder.exists():
        return None
    try:
        signed = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta = signed["meta"]
        if signed["sha256"] != _hash_json(meta):
            raise ValueError("meta.json does not match its own hash")
        streams = {}
        for split in ("train", "validation"):
            path = folder / f"{split}.npy"
            stream = np.load(path, mmap_mode="r", allow_pickle=False)
            expected = (meta[split]["words"],)
            if stream.dtype != np.int32 or stream.shape != expected:
                raise ValueError(f"{path.name} is not {expected[0]} words of int32")
            if path.stat().st_size != _header_bytes() + stream.nbytes:
                raise ValueError(f"{path.name} has the wrong size")
            streams[split] = stream
        vocabulary = folder / "vocabulary.txt"
        if vocabulary.stat().st_size != meta["vocabulary"]["bytes"]:
            raise ValueError(f"{vocabulary.name} has the wrong size")
        _check_hashes(folder, meta)
    except PermissionError as error:
        raise ConfigError(f"the cache in data.cache_dir can't be read: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        notify(f"the cached corpus in {folder} is damaged ({error}) and is prepared anew")
        return None
    return _Entry(folder, meta, streams["train"], streams["validation"])


def _check_hashes(folder: Path, meta: dict[str, Any]) -> None:
    """Raise ValueError if a file's content changed; large entries are passed unread."""
    size = 4 * (meta["train"]["words"] + meta["validation"]["words"]) + meta["vocabulary"]["bytes"]
    if size > CHECKED_BYTES:
        return
    for name, key in (
        ("train.npy", "train"),
        ("validation.npy", "validation"),
        ("vocabulary.txt", "vocabulary"),
    ):
        with open(folder / name, "rb") as file:
            file.seek(_header_bytes() if name.endswith(".npy") else 0)
            if hashlib.file_digest(file, "sha256").hexdigest() != meta[key]["sha256"]:
                raise ValueError(f"{name} does not match its hash")


def _prepare_once(folder: Path, source: _Source, data: DataConfig, notify: Notify) -> _Entry:
    """Prepare the entry under a lock, unless another process did so in the meantime."""
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        notify(f"{source.name}: another process is preparing the corpus, waiting for it")
        lock.acquire()
    # Whoever holds the lock is alone with this name, so what lies there was left by a kill.
    partial = folder.with_name(f"{folder.name}.partial")
    discarded = folder.with_name(f"{folder.name}.discarded")
    try:
        entry = _read_entry(folder, _silent)
        if entry is not None:
            return entry
        for leftover in (partial, discarded):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        _prepare(partial, source, data, notify)
        if folder.exists():
            folder.rename(discarded)
        partial.rename(folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(discarded, ignore_errors=True)
        lock.release()
    entry = _read_entry(folder, notify)
    if entry is None:
        raise ConfigError(f"data.cache_dir: {folder} can't be read back after writing it")
    return entry


def _prepare(folder: Path, source: _Source, data: DataConfig, notify: Notify) -> None:
    """Write an entry into the empty `folder`, holding the vocabulary and a piece in memory."""
    started = time.monotonic()
    notify(f"{source.name}: preparing {source.label}")
    scratch = folder / "scratch"
    scratch.mkdir()
    ids = _growing_vocabulary()
    meta: dict[str, Any] = {}
    for split in ("train", "validation"):
        note = _Notes(notify, f"{source.name}: {split}")
        with _StreamWriter(folder / f"{split}.npy") as stream:
            for piece in source.pieces(split, scratch):
                words = (piece.lower() if data.lowercase else piece).split()
                stream.write(np.fromiter(map(ids.__getitem__, words), "<i4", len(words)))
                note(f"{stream.words:,} words")
        if stream.words == 0:
            raise ConfigError(source.empty(split))
        meta[split] = {"words": stream.words, "sha256": stream.sha256}
    shutil.rmtree(scratch)

    vocabulary = list(ids)
    if data.min_count > 1 or data.max_vocab is not None:
        counts = np.zeros(len(vocabulary), np.int64)
        for split in ("train", "validation"):
            for piece in _stream_pieces(folder / f"{split}.npy", meta[split]["words"]):
                counts += np.bincount(piece, minlength=len(vocabulary))
        kept = _kept_words(counts, data.min_count, data.max_vocab)
        new_ids = np.full(len(vocabulary), UNK, "<i4")
        new_ids[kept] = np.arange(len(kept), dtype="<i4")
        for split in ("train", "validation"):
            meta[split]["sha256"] = _remap(folder / f"{split}.npy", meta[split]["words"], new_ids)
        vocabulary = [vocabulary[i] for i in kept]

    # A docstring may hold half a surrogate pair, which strict UTF-8 can't express.
    encoded = "\n".join(vocabulary).encode("utf-8", "surrogatepass")
    meta["vocabulary"] = {
        "entries": len(vocabulary),
        "bytes": len(encoded),
        "sha256": hashlib.sha256(encoded).hexdigest(),
    }
    _write_file(folder / "vocabulary.txt", encoded)
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


class _StreamWriter:
    """A one-dimensional int32 .npy file that grows piece by piece."""

    def __init__(self, path: Path) -> None:
        self.words = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb")
        self._file.write(_header(0))

    @property
    def sha256(self) -> str:
        """Of the tokens, without the header."""
        return self._digest.hexdigest()

    def write(self, ids: np.ndarray) -> None:
        tokens = ids.tobytes()
        self._file.write(tokens)
        self._digest.update(tokens)
        self.words += len(ids)

    def __enter__(self) -> _StreamWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._file.write(_header(self.words))
                self._file.flush()
                os.fsync(self._file.fileno())


def _stream_pieces(path: Path, words: int) -> Iterator[np.ndarray]:
    """The tokens of a stream file, piece by piece."""
    with open(path, "rb") as file:
        file.seek(_header_bytes())
        while words:
            piece = np.fromfile(file, "<i4", min(words, PIECE_BYTES // 4))
            words -= len(piece)
            yield piece


def _remap(path: Path, words: int, new_ids: np.ndarray) -> str:
    """Replace every token by `new_ids[token]`, in place. Returns the hash of the new tokens."""
    digest = hashlib.sha256()
    with open(path, "r+b") as file:
        file.seek(_header_bytes())
        for piece in _stream_pieces(path, words):
            tokens = new_ids[piece].tobytes()
            file.write(tokens)
            digest.update(tokens)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(words: int) -> bytes:
    """The header of a one-dimensional int32 .npy file; its size does not depend on `words`."""
    text = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({words},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{text:117}\n".encode()


def _header_bytes() -> int:
    return 128


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConfigError(
                f"no space left to store the corpus in {folder}: make room (a word takes four "
                "bytes), or set data.cache_dir to a folder with more"
            ) from error
        raise ConfigError(
            f"the corpus can't be stored in {folder} ({error.strerror or error}): "
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
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_NOTES:
            self._last = time.monotonic()
            self._notify(f"{self._prefix}: {text}")


# ---------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class _Source:
    """A text before it is cut into words.

    `key` tells texts apart without reading the whole of them where that is possible. `pieces`
    gives the text of the split "train" or "validation", cut between words only; it may use the
    scratch folder, which is deleted afterwards. `more` says how to get more text of a split.
    """

    name: str
    label: str
    key: dict[str, Any]
    pieces: Callable[[str, Path], Iterable[str]]
    more: dict[str, str]

    def empty(self, split: str) -> str:
        return f"{self.label} has no words for {split}: {self.more[split]}"

    def remedy(self, split: str, available: int) -> str:
        setting = "data.samples" if split == "training" else "data.validation_samples"
        return f"set {setting}={available} or fewer, or {self.more[split]}"


def _source(data: DataConfig) -> _Source:
    open_source = {
        DataSource.pydocs: _pydocs,
        DataSource.wikitext2: _wikitext2,
        DataSource.text: _text,
        DataSource.hub: _hub,
    }
    readers = {
        "path": (DataSource.wikitext2, DataSource.hub),
        "files": (DataSource.text,),
        "repository": (DataSource.wikitext2, DataSource.hub),
        "configuration": (DataSource.wikitext2, DataSource.hub),
        "revision": (DataSource.wikitext2, DataSource.hub),
    }
    for setting, sources in readers.items():
        if getattr(data, setting) and data.source not in sources:
            wanted = " or ".join(f"data={source.name}" for source in sources)
            raise ConfigError(
                f"data.{setting} is not for data={data.source.name}, it needs {wanted}"
            )
    return open_source[data.source](data)


# pydocs: the English that every Python carries

# Folders of the standard library that hold no text about it: tests, other people's packages, data.
SKIPPED_FOLDERS = frozenset(
    "test tests idle_test idlelib turtledemo site-packages dist-packages _bundled __pycache__".split()
)


def _pydocs(data: DataConfig) -> _Source:
    # sys.version names the build as well, because distributions change their standard library.
    key = {
        "source": "pydocs",
        "format": PYDOCS_FORMAT,
        "implementation": platform.python_implementation(),
        "version": sys.version,
        "held_out": data.held_out,
    }

    @cache
    def shuffled() -> list[tuple[str, str]]:
        # The order is drawn from the names, so the first windows are a fair sample of the whole
        # and not its modules from a to f.
        return sorted(pydocs(), key=lambda d: hashlib.sha256(d[0].encode()).digest())

    def pieces(split: str, scratch: Path) -> Iterator[str]:
        documents = shuffled()
        ends = np.cumsum([len(text) for _, text in documents])
        kept = int(np.searchsorted(ends, (1 - data.held_out) * ends[-1], side="right"))
        for _, text in documents[:kept] if split == "train" else documents[kept:]:
            yield text + "\n"

    return _Source(
        name="pydocs",
        label=f"the documentation of Python {platform.python_version()}",
        key=key,
        pieces=pieces,
        more={
            "train": "take a smaller data.held_out, or another corpus (data=wikitext2, data=text)",
            "validation": "take a larger data.held_out, or another corpus",
        },
    )


def pydocs() -> list[tuple[str, str]]:
    """Name and text of each document: a module's docstrings, or a topic of Python's help().

    The modules are parsed, never imported. Sorted by name; the same for the same Python.
    Raises ConfigError if this Python came without the source of its library, or without the topics.
    """
    instead = "choose another corpus, for example data=text 'data.files=[notes/*.txt]'"
    folder = Path(sysconfig.get_path("stdlib"))
    documents = []
    if folder.is_dir():
        for name, path in _modules(folder):
            text = "\n\n".join(_docstrings(_parsed(path)))
            if text:
                documents.append((name, text))
    if not documents:
        raise ConfigError(
            f"data=pydocs: this Python has no source files of its library in {folder}: {instead}"
        )
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(
            f"data=pydocs: this Python came without pydoc_data.topics: {instead}"
        ) from error
    documents += [(f"pydoc_data.topics:{name}", text) for name, text in topics.items()]
    return sorted(documents)


def _modules(folder: Path, package: str = "") -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module below `folder`."""
    for path in folder.iterdir():
        if path.suffix == ".py" and path.is_file():
            yield package + path.stem, path
        elif path.name.isidentifier() and path.name not in SKIPPED_FOLDERS and path.is_dir():
            yield from _modules(path, f"{package}{path.name}.")


def _parsed(path: Path) -> ast.Module:
    """The syntax tree of a source file; an empty one if it isn't in this Python's syntax."""
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:
            warnings.simplefilter("ignore")  # invalid escapes, in a library that isn't ours
            return ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)


# text: local files


def _text(data: DataConfig) -> _Source:
    paths = _matching_files(data.files)
    digests = [_file_sha256(path, "data.files") for path in paths]

    def pieces(split: str, scratch: Path) -> Iterator[str]:
        for path in paths:
            cut = _held_out_from(path, data.held_out)
            start, end = (0, cut) if split == "train" else (cut, path.stat().st_size)
            yield from _file_pieces(path, start, end, "data.files")

    return _Source(
        name="text",
        label=f"data.files ({len(paths)} file{'s' if len(paths) > 1 else ''})",
        key={"source": "text", "files": digests, "held_out": data.held_out},
        pieces=pieces,
        more={
            "train": "give data.files more text, or take a smaller data.held_out",
            "validation": "give data.files more text, or take a larger data.held_out",
        },
    )


def _matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that names and globs stand for, each once, in the order of their names."""
    found: set[str] = set()
    for pattern in patterns:
        wanted = os.path.expanduser(pattern)
        # A name that exists means itself, even with brackets in it.
        matches = [wanted] if os.path.exists(wanted) else glob.glob(wanted, recursive=True)
        files = [match for match in matches if not os.path.isdir(match)]
        if matches and not files:
            raise ConfigError(
                f"data.files={pattern} is a folder: name the files in it, for example "
                f"'data.files=[{pattern.rstrip('/')}/*.txt]'"
            )
        if not files:
            raise ConfigError(f"data.files={pattern}: there is no such file in {os.getcwd()}")
        found.update(os.path.abspath(file) for file in files)
    if not found:
        raise ConfigError("data.files is empty: name text files, as in 'data.files=[notes/*.txt]'")
    return [Path(file) for file in sorted(found)]


def _held_out_from(path: Path, held_out: float) -> int:
    """The byte at which the held-out part of a file begins: just after a line end or a space."""
    with open(path, "rb") as file:
        start = int((1 - held_out) * path.stat().st_size)
        file.seek(start)
        while block := file.read(PIECE_BYTES):
            ends = [end for end in map(block.find, (b"\n", b" ")) if end >= 0]
            if ends:
                return start + min(ends) + 1
            start += len(block)
    return start


def _file_pieces(path: Path, start: int, end: int, setting: str) -> Iterator[str]:
    """The text of a UTF-8 file from byte `start` to `end`, cut at line ends and spaces."""
    try:
        with open(path, "rb") as file:
            if start == 0 and file.read(3) == b"\xef\xbb\xbf":
                start = 3  # a byte order mark is no part of the first word
            file.seek(start)
            rest = b""
            while start + len(rest) < end:
                block = file.read(min(PIECE_BYTES, end - start - len(rest)))
                last = not block or start + len(rest) + len(block) >= end
                block = rest + block
                cut = len(block) if last else max(block.rfind(b"\n"), block.rfind(b" ")) + 1
                yield block[:cut].decode("utf-8")
                start, rest = start + cut, block[cut:]
                if last:
                    break
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise ConfigError(
            f"{setting}: {path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset "
            f"{offset}): convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{setting}: {path} can't be read ({error.strerror})") from error


def _file_sha256(path: Path, setting: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} can't be read ({error.strerror})") from error


# wikitext2 and hub: data sets, from the hub or from a folder


def _wikitext2(data: DataConfig) -> _Source:
    if data.path is None:
        return _hub(data)
    folder = _data_folder(data.path)
    if not (folder / "wiki.train.raw").exists():
        return _saved_data_set(data, folder)
    files = {}
    for split, name in (("train", data.train_split), ("validation", data.validation_split)):
        if name not in RELEASE_SPLITS:
            raise ConfigError(
                f"data.{split}_split={name}: the release in data.path has {', '.join(RELEASE_SPLITS)}"
            )
        files[split] = folder / f"wiki.{RELEASE_SPLITS[name]}.raw"
    digests = [_file_sha256(path, "data.path") for path in files.values()]

    def pieces(split: str, scratch: Path) -> Iterator[str]:
        path = files[split]
        return _file_pieces(path, 0, path.stat().st_size, "data.path")

    more = f"check the files in data.path={data.path}"
    return _Source(
        name=data.source.name,
        label=f"data.path={data.path}",
        key={"source": "files", "files": digests},
        pieces=pieces,
        more={"train": more, "validation": more},
    )


def _data_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ConfigError(f"data.path={path}: there is no such folder in {os.getcwd()}")
    if not folder.is_dir():
        raise ConfigError(
            f"data.path={path} is a file, not a folder: give the folder of a data set, or read "
            f"the file with data=text 'data.files=[{path}]'"
        )
    return folder


def _saved_data_set(data: DataConfig, folder: Path) -> _Source:
    raise NotImplementedError


def _hub(data: DataConfig) -> _Source:
    raise NotImplementedError
