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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from proglayer import files
from proglayer.config import WORDS, DataConfig
from proglayer.data import subwords
from proglayer.data.sources import TextSource, open_source
from proglayer.data.subwords import TOKENIZER_FILE, Subwords, open_subwords
from proglayer.errors import DISK_FULL, ConfigError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
# Such a passage in bytes, for tokens that are shorter.
PASSAGE_BYTES = 96
# A word with the white space before it, which is split off otherwise.
SPACED_WORD = re.compile(r"\s*\S+")
# Stored tokens are gone through in pieces of this many.
PIECE_TOKENS = 2**18
SECONDS_BETWEEN_NOTES = 5.0
# The test text has at most so many windows for each of the validation text.
MOST_TEST_SHARE = 4


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
    before to its own. None where a text prepared by an earlier version is no longer to be had.
    `validation_unknown` counts the targets that are `<unk>`, which say nothing of their text.
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
        return _words_of(self.folder)


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
    chosen = open_subwords(data)
    folder = cache / "corpora" / _entry_name(source, data, chosen)
    with _cache_errors(folder.parent):
        entry = _read_entry(folder, notify)
        if entry is None:
            entry = _prepare_once(folder, source, data, chosen, notify)
        elif _lacking(entry.meta, source):
            entry = _complete_once(entry, source, data, notify)
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
    length = data.seq_len + 1
    asked = f"data.samples={data.samples}"
    unit = _unit(data)
    train = _windows(entry.train, length, data.samples, asked, "train", source, unit)
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
    validation = _windows(entry.validation, length, wanted, asked, "validation", source, unit)
    if entry.test is not None and len(entry.test) >= length:
        rest, rest_bytes, of_test = entry.test, entry.test_bytes, entry.meta["test"]["sha256"]
    else:  # it follows from what the fingerprint holds
        rest, of_test = entry.validation[validation.size :], None
        rest_bytes = None if entry.bytes is None else entry.bytes[validation.size :]
    count = min(len(rest) // length, MOST_TEST_SHARE * len(validation))
    test = rest[: count * length].reshape(count, length) if count else None
    words = data.tokenizer == WORDS

    def bytes_of(windows: np.ndarray | None, sizes: np.ndarray | None) -> int | None:
        if sizes is None or windows is None:
            return None
        return int(sizes[: windows.size].reshape(windows.shape)[:, 1:].sum(dtype=np.int64))

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
        test=test,
        tokenizer=data.tokenizer,
        validation_bytes=bytes_of(validation, entry.bytes),
        test_bytes=bytes_of(test, rest_bytes),
        validation_unknown=int((validation[:, 1:] == UNK).sum()) if words else None,
        test_fingerprint=of_test,
    )


def _unit(data: DataConfig) -> str:
    return "words" if data.tokenizer == WORDS else "tokens"


def _windows(
    stream: np.ndarray,
    length: int,
    wanted: int | None,
    asked: str,
    split: str,
    source: TextSource,
    unit: str,
) -> np.ndarray:
    """The first `wanted` windows of `length` tokens, a view of the stream; None: all of them."""
    available = len(stream) // length
    if available == 0:
        raise ConfigError(
            f"data.seq_len={length - 1} needs {length} {unit} for one window, but {source.label} "
            f"has {len(stream)} for {split}: take a smaller data.seq_len, or {source.more[split]}"
        )
    if wanted is None:
        wanted = available
    if wanted > available:
        setting = "data.samples" if split == "train" else "data.validation_samples"
        raise ConfigError(
            f"{asked} asks for {wanted} windows, but {source.label} has {available} for {split} "
            f"({len(stream)} {unit} in windows of {length}): set {setting}={available} or fewer, "
            f"or {source.more[split]}"
        )
    return stream[: wanted * length].reshape(wanted, length)


# ---------------------------------------------------------------------------------------------
# The cache: one folder for each text and tokenisation, holding train.npy, validation.npy,
# validation_bytes.npy (the bytes of each token of validation), of a data set that has one also
# test.npy and test_bytes.npy, vocabulary.txt (one word a line, a word's line is its id) or
# tokenizer.json, and meta.json, which is written last.

VOCABULARY_FILE = "vocabulary.txt"
ENTRY_FORM = r"(train|(validation|test)(_bytes)?)\.npy|vocabulary\.txt|(tokenizer|meta)\.json"


@dataclass(frozen=True)
class _Entry:
    """A stored corpus: its meta data and the memory-mapped streams."""

    folder: Path
    meta: dict[str, Any]
    train: np.ndarray
    validation: np.ndarray
    bytes: np.ndarray | None = None
    test: np.ndarray | None = None
    test_bytes: np.ndarray | None = None


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
        for name in ("validation_bytes", "test", "test_bytes"):
            if meta.get(name):
                stream = _read_stream(folder, name, meta)
                streams["bytes" if name == "validation_bytes" else name] = stream
        vocabulary = folder / meta["vocabulary"].get("file", VOCABULARY_FILE)
        if hashlib.sha256(vocabulary.read_bytes()).hexdigest() != meta["vocabulary"]["sha256"]:
            raise ValueError(f"{vocabulary.name} does not match its hash")
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


@contextmanager
def _alone(folder: Path, source: TextSource, notify: Notify) -> Iterator[str]:
    """Hold the lock of an entry. Gives the name of folders for what is not yet part of it."""
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
        yield partial_name
    finally:
        lock.release()


def _prepare_once(
    folder: Path, source: TextSource, data: DataConfig, chosen: Subwords | None, notify: Notify
) -> _Entry:
    """Prepare the entry under a lock, unless another process did so in the meantime."""
    with _alone(folder, source, notify) as partial_name:
        entry = _read_entry(folder, _silent)
        if entry is not None:
            return entry
        with files.new_folder(folder.parent, partial_name) as partial:
            _prepare(partial, source, data, chosen, notify)
            if not files.delete_folder(folder, files.named(ENTRY_FORM)):
                raise ConfigError(
                    f"data.cache_dir: the cached corpus in {folder} is damaged, and other files "
                    "lie in it, which are left as they are: move them"
                )
            files.put_in_place(partial, folder)
        _sync_folder(folder.parent)
    entry = _read_entry(folder, notify)
    if entry is None:
        raise ConfigError(f"data.cache_dir: {folder} can't be read back after writing it")
    return entry


def _lacking(meta: dict[str, Any], source: TextSource) -> list[str]:
    """The streams that an entry of an earlier version was not asked for."""
    wanted = ["validation_bytes", *(["test", "test_bytes"] if source.may_test else [])]
    return [name for name in wanted if name not in meta]


def _complete_once(entry: _Entry, source: TextSource, data: DataConfig, notify: Notify) -> _Entry:
    """The entry that an earlier version prepared, with the streams that it lacks.

    Who has prepared a text keeps it: the entry stays without them where the text is no longer to be
    had, which it then says, or where nobody may write there.
    """
    folder, meta = entry.folder, dict(entry.meta)
    ours = files.named(r"meta\.json")
    try:
        with _alone(folder, source, notify) as partial_name:
            now = _read_entry(folder, _silent)
            if now is None or not (lacking := _lacking(now.meta, source)):
                return now or entry
            notify(f"{source.name}: reading its text again, of which an earlier version kept less")
            with files.new_folder(folder.parent, partial_name) as partial:
                new: dict[str, Any] = dict.fromkeys(lacking)

                def text(split: str) -> Iterator[str]:
                    return _ending_in_white_space(source.pieces(split, partial))

                try:
                    if "validation_bytes" in lacking:
                        counted = _bytes_of_words(text("validation"))
                        stream = _write_stream(partial / "validation_bytes.npy", counted)
                        if stream["words"] != meta["validation"]["words"]:
                            raise ConfigError("its text is another one now")
                        new["validation_bytes"] = stream
                    if "test" in lacking:
                        new |= _write_test(partial, folder, text, data)
                except ConfigError as error:
                    without = [name for name, stream in new.items() if stream is None]
                    notify(f"{source.name}: {_without(without)} ({first_line(error)})")
                for name in [name for name, stream in new.items() if stream is not None]:
                    files.delete(folder / f"{name}.npy", files.everything)
                    files.move(partial / f"{name}.npy", folder / f"{name}.npy", files.everything)
            meta |= new
            files.write_atomically(folder / "meta.json", _signed(meta), "data.cache_dir", ours)
        return _read_entry(folder, notify) or entry
    except OSError as error:
        notify(f"{source.name}: {_without(_lacking(meta, source))} ({first_line(error)})")
        return entry


def _without(streams: Iterable[str]) -> str:
    """What an entry does without that lacks these streams."""
    words = {"validation_bytes": "bits per byte", "test": "test text of its own"}
    return "no " + " and no ".join(words[name] for name in streams if name in words)


def _prepare(
    folder: Path, source: TextSource, data: DataConfig, chosen: Subwords | None, notify: Notify
) -> None:
    """Write an entry into the empty `folder`, holding the vocabulary and a piece in memory."""
    started = time.monotonic()
    notify(f"{source.name}: preparing {source.label}")
    scratch = folder / "scratch"
    scratch.mkdir()

    def text(split: str) -> Iterator[str]:
        return _ending_in_white_space(source.pieces(split, scratch))

    if chosen is None:
        meta = _prepare_words(folder, scratch, text, source, data, notify)
    else:
        meta = _prepare_subwords(folder, text, source, chosen, notify)
    if source.may_test:
        meta |= _write_test(folder, folder, text, data)
    files.delete_folder(scratch, files.everything)
    _write_file(folder / "meta.json", _signed(meta))
    _sync_folder(folder)
    notify(
        f"{source.name}: {meta['train']['words']:,} training and {meta['validation']['words']:,} "
        f"validation {_unit(data)}, {meta['vocabulary']['entries']:,} vocabulary entries, "
        f"prepared in {time.monotonic() - started:.1f} s"
    )


def _prepare_words(
    folder: Path,
    scratch: Path,
    text: Callable[[str], Iterator[str]],
    source: TextSource,
    data: DataConfig,
    notify: Notify,
) -> dict[str, Any]:
    """Write the streams and the vocabulary of words. Returns what meta.json says of them."""
    ids = _growing_vocabulary()
    meta: dict[str, Any] = {}
    for split in SPLITS:
        note = _Notes(notify, f"{source.name}: {split}")

        def tokens(split: str = split) -> Iterator[np.ndarray]:
            for piece in text(split):
                words = (piece.lower() if data.lowercase else piece).split()
                yield np.fromiter(map(ids.__getitem__, words), "<i4", len(words))

        meta[split] = _write_stream(folder / f"{split}.npy", _noted(tokens(), note, "words"))
        _check_not_empty(meta, split, "words", source)
    in_bytes = _bytes_of_words(text("validation"))
    meta["validation_bytes"] = _write_stream(folder / "validation_bytes.npy", in_bytes)
    meta |= _overlap(folder / "train.npy", folder / "validation.npy", PASSAGE)
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
    # A docstring may hold half a surrogate pair, which strict UTF-8 can't express.
    encoded = "\n".join(vocabulary).encode("utf-8", "surrogatepass")
    meta["vocabulary"] = _write_vocabulary(folder / VOCABULARY_FILE, encoded, len(vocabulary))
    return meta


def _prepare_subwords(
    folder: Path,
    text: Callable[[str], Iterator[str]],
    source: TextSource,
    chosen: Subwords,
    notify: Notify,
) -> dict[str, Any]:
    """Write the streams and the tokenizer of subwords. Returns what meta.json says of them."""
    content = chosen.content
    if content is None:
        assert chosen.size is not None
        notify(f"{source.name}: training a BPE of {chosen.size:,} entries")
        content = subwords.train_bpe(text("train"), chosen.size)
    tokenizer = subwords.load_tokenizer(content, chosen.label)
    meta: dict[str, Any] = {}
    for split, stream in (
        ("train", subwords.encode(tokenizer, text("train"))),
        ("validation", _with_bytes(folder, "validation", tokenizer, text, meta)),
    ):
        note = _Notes(notify, f"{source.name}: {split}")
        meta[split] = _write_stream(folder / f"{split}.npy", _noted(stream, note, "tokens"))
        _check_not_empty(meta, split, "text", source)
    passage = _passage(meta["validation"], folder / "validation_bytes.npy")
    meta |= _overlap(folder / "train.npy", folder / "validation.npy", passage)
    size = subwords.entries(tokenizer)
    meta["vocabulary"] = _write_vocabulary(folder / TOKENIZER_FILE, content, size)
    return meta


def _with_bytes(
    folder: Path,
    split: str,
    tokenizer: Tokenizer,
    text: Callable[[str], Iterator[str]],
    meta: dict[str, Any],
) -> Iterator[np.ndarray]:
    """The subwords of a split; their bytes are written as they come, so that it is read once."""
    with _StreamFile(folder / f"{split}_bytes.npy") as sizes:
        for ids, size in subwords.encode_with_bytes(tokenizer, text(split)):
            sizes.write(size)
            yield ids
    meta[f"{split}_bytes"] = sizes.meta


def _write_test(
    folder: Path, entry: Path, text: Callable[[str], Iterator[str]], data: DataConfig
) -> dict[str, Any]:
    """Write the streams of the data set's own test text into `folder`, in the tokens of `entry`.

    A word that the vocabulary lacks is `<unk>`. Returns what meta.json says of them: None of each
    where there is no such text.
    """
    meta: dict[str, Any] = {}
    stream, counted = folder / "test.npy", folder / "test_bytes.npy"
    if data.tokenizer == WORDS:
        ids = {word: place for place, word in enumerate(_words_of(entry))}

        def tokens() -> Iterator[np.ndarray]:
            for piece in text("test"):
                words = (piece.lower() if data.lowercase else piece).split()
                yield np.fromiter((ids.get(word, UNK) for word in words), "<i4", len(words))

        meta["test"] = _write_stream(stream, tokens())
        meta["test_bytes"] = _write_stream(counted, _bytes_of_words(text("test")))
    else:
        content = (entry / TOKENIZER_FILE).read_bytes()
        tokenizer = subwords.load_tokenizer(content, str(entry / TOKENIZER_FILE))
        meta["test"] = _write_stream(stream, _with_bytes(folder, "test", tokenizer, text, meta))
    if meta["test"]["words"] == 0:
        for path in (stream, counted):
            files.delete(path, files.everything)
        return dict.fromkeys(meta)
    passage = PASSAGE if data.tokenizer == WORDS else _passage(meta["test"], counted)
    return meta | _overlap(entry / "train.npy", stream, passage)


def _words_of(folder: Path) -> list[str]:
    """The vocabulary of an entry of words; an entry's place is its id."""
    text = (folder / VOCABULARY_FILE).read_bytes().decode("utf-8", "surrogatepass")
    return text.split("\n")


def _passage(stream: dict[str, Any], counted: Path) -> int:
    """How many tokens of a stream a passage has, by the bytes that each stands for."""
    mean = np.load(counted, mmap_mode="r").mean() if stream["words"] else 1
    return max(PASSAGE, round(PASSAGE_BYTES / max(1, mean)))


def _noted(stream: Iterable[np.ndarray], note: _Notes, unit: str) -> Iterator[np.ndarray]:
    """The same parts of a stream, with a note of how much of it there was after each."""
    total = 0
    for ids in stream:
        yield ids
        total += len(ids)
        note(f"{total:,} {unit}")


def _check_not_empty(meta: dict[str, Any], split: str, what: str, source: TextSource) -> None:
    if meta[split]["words"] == 0:
        raise ConfigError(f"{source.label} has no {what} for {split}: {source.more[split]}")


def _ending_in_white_space(pieces: Iterable[str]) -> Iterator[str]:
    """The text with a line end where it lacks one: what ends without any ends its document."""
    for piece in pieces:
        yield piece if not piece or piece[-1].isspace() else piece + "\n"


def _bytes_of_words(pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """How many bytes of text, in UTF-8, each word takes with the white space before it."""
    before = 0
    for piece in pieces:
        words = SPACED_WORD.findall(piece)
        sizes = [len(word.encode("utf-8", "surrogatepass")) for word in words]
        total = len(piece.encode("utf-8", "surrogatepass"))
        after = total - sum(sizes)
        if sizes:
            sizes[0] += before
            before = 0
        before += after
        yield np.array(sizes, "<i4")


def _write_vocabulary(path: Path, content: bytes, entries: int) -> dict[str, Any]:
    """Write the vocabulary's file; gives what meta.json says of it."""
    _write_file(path, content)
    about = {
        "entries": entries,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return about if path.name == VOCABULARY_FILE else about | {"file": path.name}


def _signed(meta: dict[str, Any]) -> bytes:
    """The content of meta.json, with a hash of its own."""
    return json.dumps({"meta": meta, "sha256": _hash_json(meta)}, indent=1).encode()


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


class _StreamFile:
    """A one-dimensional int32 .npy file in the writing; afterwards `meta` says what it holds.

    Written and not memory-mapped: a full disk is then an error and no signal.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115
        self._count, self._digest = 0, hashlib.sha256()
        self._header()

    def _header(self) -> None:  # NumPy leaves room in it for a length of any size
        about = {"descr": "<i4", "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, about)

    def write(self, piece: np.ndarray) -> None:
        tokens = piece.tobytes()
        self._file.write(tokens)
        self._digest.update(tokens)
        self._count += len(piece)

    @property
    def meta(self) -> dict[str, Any]:
        return {"words": self._count, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> _StreamFile:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._header()
                _flush(self._file)


def _write_stream(path: Path, pieces: Iterable[np.ndarray]) -> dict[str, Any]:
    """Write a stream of int32; gives its length, as `words`, and the hash of its values."""
    with _StreamFile(path) as file:
        for piece in pieces:
            file.write(piece)
    return file.meta


def _stream_pieces(path: Path) -> Iterator[np.ndarray]:
    """The tokens of a stream file, piece by piece."""
    stream = np.load(path, mmap_mode="r")
    for first in range(0, len(stream), PIECE_TOKENS):
        yield stream[first : first + PIECE_TOKENS]


def _overlap(train: Path, held_out: Path, length: int) -> dict[str, float]:
    """The share of a thousand held-out passages that train has as well, if that is much.

    A passage has `length` tokens. By hashes of all passages of train, which takes a tenth of the
    time of preparing the text.
    """
    held = np.load(held_out, mmap_mode="r")
    if len(held) < length:
        return {}
    starts = np.unique(np.linspace(0, len(held) - length, 1000, dtype=np.int64))
    passages = np.unique(_hashes(sliding_window_view(held, length)[starts]))
    seen = np.zeros(len(passages), bool)
    rest = np.empty(0, "<i4")
    for piece in _stream_pieces(train):
        tokens = np.concatenate([rest, piece])
        rest = tokens[1 - length :]
        if len(tokens) >= length:
            hashes = _hashes(sliding_window_view(tokens, length))
            place = np.searchsorted(passages, hashes).clip(max=len(passages) - 1)
            seen[place[passages[place] == hashes]] = True
    share = float(seen.mean())
    return {f"{held_out.stem}_in_train": round(share, 3)} if share > NOTED_OVERLAP else {}


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
