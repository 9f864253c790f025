"""Text to token windows: the sources, the vocabulary, the cache on disk, the fingerprint.

Every source gives the same thing, a `Corpus`. Text becomes words by one rule: lower-case it (a
setting), split on white space. Line ends are white space like any other and there is no token for
them, so the words of a split form one stream, however its text was cut into lines, rows or files.
The vocabulary is `<unk>` = 0, `<pad>` = 1, then every word of train and then of validation in
order of first appearance; rare words can be left out of it (`min_count`, `max_vocab`). Or text
becomes subwords, which is `subwords`'s business.

The two streams are stored once, as int32 arrays, in a cache that depends on the text and the
tokenisation only. Beside them lies how many bytes of text each token of validation stands for, so
that losses of different tokenizers compare as bits per byte. Windows are a view of the
memory-mapped stream, so `seq_len` and `samples` cost nothing to change, and opening a stored corpus
imports neither `datasets` nor pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from proglayer import files
from proglayer.config import WORDS, DataConfig
from proglayer.data import subwords
from proglayer.data.sources import TextSource, open_source
from proglayer.data.subwords import TOKENIZER_FILE, Subwords, open_subwords
from proglayer.errors import ConfigError, file_problem, first_line

Notify = Callable[[str], None]

UNK = 0
SPECIAL_WORDS = ("<unk>", "<pad>")

# Part of every cache key: raise it when the tokenisation or the files of an entry change.
CACHE_FORMAT = 1
# The content hashes of an entry are checked whenever it is opened, up to this size (hashing it
# takes some 50 ms); above, sizes and headers have to do.
CHECKED_BYTES = 64 * 2**20
# More of the held-out text than this in the training text, in passages of so many words or
# subwords, is warned of. WikiText-2 has none, pydocs 6 % of phrases that docstrings repeat.
NOTED_OVERLAP = 0.1
PASSAGE_WORDS, PASSAGE_SUBWORDS = 16, 64
# Stored tokens are gone through in pieces of this many.
PIECE_TOKENS = 2**18
# A word with the white space before it, which is split off otherwise.
SPACED_WORD = re.compile(r"\s*\S+")
SECONDS_BETWEEN_NOTES = 5.0
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
    of their text.
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

    @property
    def tokenizer_file(self) -> Path | None:
        """The `tokenizer.json` that made the tokens, None of words."""
        return None if self.tokenizer == WORDS else self.folder / TOKENIZER_FILE

    def words(self) -> list[str]:
        """The vocabulary; an entry's place is its id."""
        if self.tokenizer_file is not None:
            content = self.tokenizer_file.read_bytes()
            tokenizer = subwords.load_tokenizer(content, str(self.tokenizer_file))
            return [tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        content = (self.folder / VOCABULARY_FILE).read_bytes()
        return content.decode("utf-8", "surrogatepass").split("\n")


def open_corpus(data: DataConfig, notify: Notify = _silent) -> Corpus:
    """The corpus that `data` describes, from the cache, where it is prepared first if need be.

    However many processes ask for the same corpus at once, one prepares it and the others wait.
    `notify` is given a line of plain text now and then while that takes long.

    Raises ConfigError where the text can't be had or read, is too short for what is asked of it,
    or the cache can't be written.
    """
    source = open_source(data)
    chosen = open_subwords(data)
    folder = _cache_folder(data) / "corpora" / _entry_name(source, data, chosen)
    with _cache_errors(folder.parent):
        entry = _read_entry(folder, source, notify)
        if entry is None:
            entry = _prepare_once(folder, source, data, chosen, notify)
    for split in ("validation", "test"):
        if share := entry.meta.get(f"{split}_in_train"):
            notify(
                f"warning: {source.label}: {share:.0%} of the {split} text is training text, too: "
                "its loss says less about new text, so choose splits or files that do not overlap"
            )
    return _take_windows(entry, source, data)


# ---------------------------------------------------------------------------------------------
# Windows


def _take_windows(entry: _Entry, source: TextSource, data: DataConfig) -> Corpus:
    """The windows that the settings ask for, or a ConfigError that says how many there are."""
    length, meta, streams = data.seq_len + 1, entry.meta, entry.streams
    words = data.tokenizer == WORDS

    def windows(split: str, wanted: int | None, asked: str) -> np.ndarray:
        """The first `wanted` windows of a split, a view of its stream; None: all of them."""
        stream, unit = streams[split], _unit(data)
        available = len(stream) // length
        if available == 0:
            raise ConfigError(
                f"data.seq_len={data.seq_len} needs {length} {unit} for one window, but "
                f"{source.label} has {len(stream)} for {split}: take a smaller data.seq_len, or "
                f"{source.more}"
            )
        if wanted is not None and wanted > available:
            setting = "data.samples" if split == "train" else "data.validation_samples"
            raise ConfigError(
                f"{asked} asks for {wanted} windows, but {source.label} has {available} for "
                f"{split} ({len(stream)} {unit} in windows of {length}): set {setting}={available} "
                f"or fewer, or {source.more}"
            )
        return _first_windows(stream, length, available if wanted is None else wanted)

    asked = f"data.samples={data.samples}"
    train = windows("train", data.samples, asked)
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
    validation = windows("validation", wanted, asked)
    sizes = streams["validation_bytes"]
    if len(streams.get("test", ())) >= length:
        rest, rest_sizes = streams["test"], streams["test_bytes"]
        of_test = meta["test"]["sha256"]
    else:  # it follows from what the fingerprint holds
        rest, rest_sizes = streams["validation"][validation.size :], sizes[validation.size :]
        of_test = None
    count = min(len(rest) // length, MOST_TEST_SHARE * len(validation))

    def bytes_of(sizes: np.ndarray, count: int) -> int:
        return int(_first_windows(sizes, length, count)[:, 1:].sum(dtype=np.int64))

    identity = {
        "train": meta["train"]["sha256"],
        "validation": meta["validation"]["sha256"],
        "vocabulary": meta["vocabulary"]["sha256"],
        "seq_len": data.seq_len,
        "windows": [len(train), len(validation)],
    }
    return Corpus(
        name=source.name,
        train=train,
        validation=validation,
        vocab_size=meta["vocabulary"]["entries"],
        fingerprint=_hash_json(identity),
        folder=entry.folder,
        test=_first_windows(rest, length, count) if count else None,
        tokenizer=data.tokenizer,
        validation_bytes=bytes_of(sizes, len(validation)),
        test_bytes=bytes_of(rest_sizes, count) if count else None,
        validation_unknown=int((validation[:, 1:] == UNK).sum()) if words else None,
        test_fingerprint=of_test,
    )


def _first_windows(stream: np.ndarray, length: int, count: int) -> np.ndarray:
    """The first `count` windows of a stream, a view of it."""
    return stream[: count * length].reshape(count, length)


def _unit(data: DataConfig) -> str:
    return "words" if data.tokenizer == WORDS else "tokens"


# ---------------------------------------------------------------------------------------------
# The cache: one folder for each text and tokenisation, holding train.npy, validation.npy,
# validation_bytes.npy (the bytes of each token of validation), of a data set that has one also
# test.npy and test_bytes.npy, vocabulary.txt (one word a line, a word's line is its id) or
# tokenizer.json, and meta.json, which is written last.

VOCABULARY_FILE = "vocabulary.txt"
ENTRY_FORM = r"(train|(validation|test)(_bytes)?)\.npy|vocabulary\.txt|(tokenizer|meta)\.json"


@dataclass(frozen=True)
class _Entry:
    """A stored corpus: its meta data and the memory-mapped streams by name."""

    folder: Path
    meta: dict[str, Any]
    streams: dict[str, np.ndarray]


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


def _entry_name(source: TextSource, data: DataConfig, chosen: Subwords | None) -> str:
    """The name for reading, then a hash of all that the streams depend on."""
    identity = {"format": CACHE_FORMAT, "text": source.key}
    if chosen is None:
        identity |= {
            "lowercase": data.lowercase,
            "min_count": data.min_count,
            "max_vocab": data.max_vocab,
        }
    else:
        identity["tokenizer"] = chosen.key
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', source.name)}-{_hash_json(identity)[:24]}"


def _read_entry(folder: Path, source: TextSource, notify: Notify) -> _Entry | None:
    """The stored corpus; None where there is none, or not all of it as stored (which is noted)."""
    if not folder.exists():
        return None
    try:
        signed = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta = signed["meta"]
        if signed["sha256"] != _hash_json(meta):
            raise ValueError("meta.json does not match its own hash")
        names = ["train", "validation", "validation_bytes"]
        if source.may_test and meta["test"] is not None:
            names += ["test", "test_bytes"]
        streams = {name: _read_stream(folder / f"{name}.npy", **meta[name]) for name in names}
        vocabulary = folder / meta["vocabulary"].get("file", VOCABULARY_FILE)
        if hashlib.sha256(vocabulary.read_bytes()).hexdigest() != meta["vocabulary"]["sha256"]:
            raise ValueError(f"{vocabulary.name} does not match its hash")
    except PermissionError:
        raise  # nothing wrong with it, but it belongs to someone else
    except Exception as error:  # the many ways in which NumPy and json object to damage
        notify(
            f"the cached corpus in {folder} is damaged, or of an earlier version "
            f"({first_line(error)}): preparing it again"
        )
        return None
    return _Entry(folder, meta, streams)


def _read_stream(path: Path, words: int, sha256: str) -> np.ndarray:
    """The memory-mapped values of a stream. Raises ValueError where they are not those stored."""
    stream: np.memmap = np.load(path, mmap_mode="r", max_header_size=1000)
    if stream.dtype != np.dtype("<i4") or stream.shape != (words,):
        raise ValueError(f"{path.name} has the wrong header")
    if path.stat().st_size != stream.offset + stream.nbytes:
        raise ValueError(f"{path.name} has the wrong size")
    checked = stream.nbytes <= CHECKED_BYTES
    if checked and hashlib.sha256(stream.data).hexdigest() != sha256:
        raise ValueError(f"{path.name} does not match its hash")
    return stream


def _prepare_once(
    folder: Path, source: TextSource, data: DataConfig, chosen: Subwords | None, notify: Notify
) -> _Entry:
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
        # Whoever holds the lock is alone with this name, so what lies there was left by a kill.
        for leftover in folder.parent.glob(f"{partial_name}-*"):
            if re.fullmatch(rf"{re.escape(partial_name)}-[0-9a-f]{{16}}", leftover.name):
                files.delete_folder(leftover, files.everything)
        entry = _read_entry(folder, source, _silent)
        if entry is not None:
            return entry
        with files.new_folder(folder.parent, partial_name) as partial_folder:
            _prepare(partial_folder, source, data, chosen, notify)
            if not files.delete_folder(folder, files.named(ENTRY_FORM)):
                raise ConfigError(
                    f"data.cache_dir: the cached corpus in {folder} is damaged, and other files "
                    "lie in it, which are left as they are: move them"
                )
            files.put_in_place(partial_folder, folder)
    finally:
        lock.release()
    entry = _read_entry(folder, source, notify)
    if entry is None:
        raise ConfigError(f"data.cache_dir: {folder} can't be read back after writing it")
    return entry


def _prepare(
    folder: Path, source: TextSource, data: DataConfig, chosen: Subwords | None, notify: Notify
) -> None:
    """Write an entry into the empty `folder`, holding the vocabulary and a piece in memory."""
    started = time.monotonic()
    notify(f"{source.name}: preparing {source.label}")
    scratch = folder / "scratch"
    scratch.mkdir()
    text = partial(_text, source, scratch, notify)
    if chosen is None:
        # All words are numbered as they come; which of them stay is known at the end.
        ids: defaultdict[str, int] = defaultdict(None, {w: i for i, w in enumerate(SPECIAL_WORDS)})
        ids.default_factory = ids.__len__
        encode, ids_folder, passage = partial(_encode_words, ids, data), scratch, PASSAGE_WORDS
    else:
        content = chosen.content
        if content is None:
            assert chosen.size is not None
            notify(f"{source.name}: training a BPE of {chosen.size:,} entries")
            content = subwords.train_bpe(text("train"), chosen.size)
        tokenizer = subwords.load_tokenizer(content, chosen.label)
        encode, ids_folder, passage = partial(subwords.encode, tokenizer), folder, PASSAGE_SUBWORDS
    meta: dict[str, Any] = {}
    for split in ("train", "validation", "test") if source.may_test else ("train", "validation"):
        with_bytes = split != "train"
        paths = [ids_folder / f"{split}.npy", folder / f"{split}_bytes.npy"][: 1 + with_bytes]
        written = _write_streams(paths, encode(text(split), with_bytes=with_bytes))
        if written[split]["words"] == 0:
            if split != "test":
                raise ConfigError(f"{source.label} has no {_unit(data)} for {split}: {source.more}")
            written = dict.fromkeys(written)
            for path in paths:
                files.delete(path, files.everything)
        elif with_bytes:
            share = _overlap(ids_folder / "train.npy", paths[0], passage)
            if share > NOTED_OVERLAP:
                written[f"{split}_in_train"] = round(share, 3)
        meta |= written
    if chosen is None:
        kept = _kept_words(scratch, len(ids), data)
        new_ids = np.full(len(ids), UNK, "<i4")
        new_ids[kept] = np.arange(len(kept), dtype="<i4")
        for path in scratch.glob("*.npy"):
            renumbered = ([new_ids[piece]] for piece in _pieces(path))
            meta |= _write_streams([folder / path.name], renumbered)
        entries, words = len(kept), list(ids)
        # A docstring may hold half a surrogate pair, which strict UTF-8 can't express.
        content = "\n".join(words[i] for i in kept).encode("utf-8", "surrogatepass")
        vocabulary_file, own_file = VOCABULARY_FILE, {}
    else:
        entries = subwords.entries(tokenizer)
        vocabulary_file, own_file = TOKENIZER_FILE, {"file": TOKENIZER_FILE}
    digest = hashlib.sha256(content).hexdigest()
    meta["vocabulary"] = {"entries": entries, "bytes": len(content), "sha256": digest, **own_file}
    files.delete_folder(scratch, files.everything)
    signed = json.dumps({"meta": meta, "sha256": _hash_json(meta)}, indent=1).encode()
    for name, whole in ((vocabulary_file, content), ("meta.json", signed)):
        with open(folder / name, "xb") as file:
            file.write(whole)  # checked by its hash whenever it is opened
    notify(
        f"{source.name}: {meta['train']['words']:,} training and {meta['validation']['words']:,} "
        f"validation {_unit(data)}, {entries:,} vocabulary entries, "
        f"prepared in {time.monotonic() - started:.1f} s"
    )


def _text(source: TextSource, scratch: Path, notify: Notify, split: str) -> Iterator[str]:
    """The text of a split, with a line end where a piece lacks one: what ends without any ends its
    document. Says now and then how much was read.
    """
    characters, due = 0, time.monotonic() + SECONDS_BETWEEN_NOTES
    for piece in source.pieces(split, scratch):
        yield piece if not piece or piece[-1].isspace() else piece + "\n"
        characters += len(piece)
        if time.monotonic() >= due:
            notify(f"{source.name}: {split}: {characters:,} characters read")
            due = time.monotonic() + SECONDS_BETWEEN_NOTES


def _encode_words(
    ids: Mapping[str, int], data: DataConfig, pieces: Iterable[str], with_bytes: bool
) -> Iterator[list[np.ndarray]]:
    """The ids of the words of each piece; and where asked, how many bytes of text, in UTF-8, each
    word takes with the white space before it.
    """
    before = 0
    for piece in pieces:
        words = (piece.lower() if data.lowercase else piece).split()
        arrays = [np.fromiter(map(ids.__getitem__, words), "<i4", len(words))]
        if with_bytes:
            spaced = SPACED_WORD.findall(piece)
            sizes = [len(word.encode("utf-8", "surrogatepass")) for word in spaced]
            after = len(piece.encode("utf-8", "surrogatepass")) - sum(sizes)
            if sizes:
                sizes[0] += before
                before = 0
            before += after
            arrays.append(np.array(sizes, "<i4"))
        yield arrays


def _kept_words(streams: Path, count: int, data: DataConfig) -> np.ndarray:
    """Ids of the words that stay, of `count`: the special ones, then by first appearance."""
    counts = np.zeros(count, np.int64)
    for split in ("train", "validation"):
        for piece in _pieces(streams / f"{split}.npy"):
            counts += np.bincount(piece, minlength=count)
    special = np.arange(len(SPECIAL_WORDS))
    counts[special] = 0
    ids = np.flatnonzero(counts >= data.min_count)
    if data.max_vocab is not None:
        most_frequent = np.argsort(-counts[ids], kind="stable")
        ids = np.sort(ids[most_frequent[: data.max_vocab - len(special)]])
    return np.concatenate([special, ids])


def _write_streams(paths: Sequence[Path], parts: Iterable[Sequence[np.ndarray]]) -> dict[str, Any]:
    """Write one-dimensional int32 .npy files in step, part by part.

    Written and not memory-mapped: a full disk is then an error and no signal.

    Returns:
        by the stem of each path the length, as `words`, and the hash of the values.
    """
    count, digests = 0, [hashlib.sha256() for _ in paths]

    def write_header(file: BinaryIO) -> None:  # NumPy leaves room in it for a length of any size
        about = {"descr": "<i4", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, about)

    with ExitStack() as stack:
        opened = [stack.enter_context(open(path, "xb")) for path in paths]
        for file in opened:
            write_header(file)
        for arrays in parts:
            count += len(arrays[0])
            for file, digest, values in zip(opened, digests, arrays, strict=True):
                file.write(values.tobytes())
                digest.update(values.tobytes())
        for file in opened:
            file.seek(0)
            write_header(file)
            file.flush()
            os.fsync(file.fileno())
    return {
        path.stem: {"words": count, "sha256": digest.hexdigest()}
        for path, digest in zip(paths, digests, strict=True)
    }


def _pieces(path: Path, more: int = 0) -> Iterator[np.ndarray]:
    """The tokens of a stream file, piece by piece, each with so many `more` of the next."""
    stream = np.load(path, mmap_mode="r")
    for first in range(0, len(stream), PIECE_TOKENS):
        yield stream[first : first + PIECE_TOKENS + more]


def _overlap(train: Path, held_out: Path, length: int) -> float:
    """The share of a thousand held-out passages of `length` tokens that train has as well.

    By hashes of all passages of train, which takes a tenth of the time of preparing the text.
    """
    stream = np.load(held_out, mmap_mode="r")
    if len(stream) < length:
        return 0.0
    starts = np.unique(np.linspace(0, len(stream) - length, 1000, dtype=np.int64))
    passages = np.unique(_hashes(sliding_window_view(stream, length)[starts]))
    seen = np.zeros(len(passages), bool)
    for piece in _pieces(train, more=length - 1):
        if len(piece) >= length:
            hashes = _hashes(sliding_window_view(piece, length))
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


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Turn what a file system may object to into one clear line."""
    try:
        yield
    except OSError as error:
        named = OSError(error.errno, error.strerror or str(error), str(folder))
        advice = "set data.cache_dir to a folder that can be written"
        raise ConfigError(file_problem(named, advice)) from error


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
