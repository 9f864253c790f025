"""Text to tokens: words, bytes, a byte-level BPE of the corpus's own, the tokenizers of others.

Words: lower-case the text (a setting), split it on white space. Line ends are white space like any
other and there is no token for them. The vocabulary is `<unk>` = 0, `<pad>` = 1, then every word of
train and then of validation in order of first appearance; rare words can be left out (`min_count`,
`max_vocab`).

Bytes: those of the text in UTF-8, as it is. A byte's value is its id.

Subwords: the library `tokenizers` does the work. It reads `tokenizer.json`, which every fast
tokenizer of `transformers` has, and runs nobody's code. It is given the text as it is: case, white
space and line ends stay. No token is added, neither at the start nor between documents; a special
token that the text itself spells out, such as `<|endoftext|>`, becomes that token.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from proglayer.config import BPE, BYTES, MODEL, WORDS, DataConfig
from proglayer.data.pretrained import folder_or_hub
from proglayer.data.text import sha256_of
from proglayer.errors import ConfigError, first_line, install_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNK = 0
SPECIAL_WORDS = ("<unk>", "<pad>")
# A word with the white space before it, which is split off otherwise.
SPACED_WORD = re.compile(r"\s*\S+")

TOKENIZER_FILE = "tokenizer.json"
# The vocabulary of a byte-level BPE begins with all bytes.
ALL_BYTES = 256
# A pair of tokens that occurs once in all the text is no subword.
LEAST_PAIRS = 2
# The library works on so many parts of the text at once, which bounds the memory that takes.
PART_CHARACTERS = 2**14
PARTS_AT_ONCE = 32

# Returns the text of a split, in pieces that are cut anywhere.
ReadSplit = Callable[[str], Iterable[str]]
# Ids; of each id the bytes of text, in UTF-8, from the end of the one before; the bytes after all.
Sized = tuple[np.ndarray, np.ndarray, int]


@dataclass(frozen=True)
class Tokenization:
    """A way to cut text, as the settings name it.

    key: plain data that is equal where the tokens of a text are equal.
    fit: returns the encoder, made from the text where it takes its vocabulary from there.
    revision: the commit, of one from the hub.
    """

    key: dict[str, Any]
    fit: Callable[[ReadSplit], Words | Bytes | Subwords]
    revision: str | None = None


def open_tokenization(data: DataConfig) -> Tokenization:
    """Return what `data.tokenizer` names. Raises ConfigError where it can't be had."""
    name = data.tokenizer
    label = f"data.tokenizer={name}"
    if name == WORDS:
        key = {key: getattr(data, key) for key in ("lowercase", "min_count", "max_vocab")}
        return Tokenization(key, lambda read: fit_words(read, data))
    if name == BYTES:
        return Tokenization({"bytes": ALL_BYTES}, lambda read: Bytes())
    if name == MODEL:  # the model's own stands in its place, if it has one
        raise ConfigError(f"{label} is that of model.path, which is not set")
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError(f"{label} needs the extra hf: {install_command('hf')}")
    if name == BPE:
        size = data.max_vocab or 0
        if size <= ALL_BYTES:
            raise ConfigError(f"data.max_vocab={data.max_vocab}: bpe takes {ALL_BYTES + 1} or more")
        return Tokenization(
            {"bpe": size}, lambda read: Subwords(train_bpe(read("train"), size), label)
        )
    revision = data.tokenizer_revision
    folder, commit = folder_or_hub("data.tokenizer", name, revision, [TOKENIZER_FILE])
    key = {"sha256": sha256_of(folder / TOKENIZER_FILE)}
    content = (folder / TOKENIZER_FILE).read_bytes()
    return Tokenization(key, lambda read: Subwords(content, label), commit)


# ---------------------------------------------------------------------------------------------
# Words


class Words:
    """Words between white space, by their place in a list.

    content: what is stored of it in `file`, by which it is known.
    entries: how many ids there are.
    """

    file = "vocabulary.txt"

    def __init__(self, words: Sequence[str], lowercase: bool) -> None:
        self.content = utf8("\n".join(words))
        self.entries = len(words)
        self._ids = {word: id for id, word in enumerate(words)}
        self._lowercase = lowercase

    def ids(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of the words of each piece."""
        for _, words in _words(pieces, self._lowercase):
            yield self._encoded(words)

    def sized(self, pieces: Iterable[str]) -> Iterator[Sized]:
        """Yield the same with the bytes of each word and the white space before it."""
        for text, words in _words(pieces, self._lowercase):
            sizes = np.array([len(utf8(word)) for word in SPACED_WORD.findall(text)], "<i4")
            yield self._encoded(words), sizes, len(utf8(text)) - int(sizes.sum())

    def _encoded(self, words: list[str]) -> np.ndarray:
        return np.fromiter((self._ids.get(word, UNK) for word in words), "<i4", len(words))


def fit_words(read: ReadSplit, data: DataConfig) -> Words:
    """Return the words of train and validation by first appearance, without those too rare."""
    counts: Counter[str] = Counter()  # in order of first appearance, as every dict
    for split in ("train", "validation"):
        for _, words in _words(read(split), data.lowercase):
            counts.update(words)
    for word in SPECIAL_WORDS:
        counts.pop(word, None)
    kept = [word for word, count in counts.items() if count >= data.min_count]
    if data.max_vocab is not None:
        by_count = sorted(kept, key=lambda word: -counts[word])
        frequent = set(by_count[: data.max_vocab - len(SPECIAL_WORDS)])
        kept = [word for word in kept if word in frequent]
    return Words([*SPECIAL_WORDS, *kept], data.lowercase)


def _words(pieces: Iterable[str], lowercase: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield text and its words, cut anew so that no word is in two pieces."""
    rest = ""
    for piece in pieces:
        text = rest + piece
        rest = "" if text[-1:].isspace() else "".join(text.rsplit(maxsplit=1)[-1:])
        text = text.removesuffix(rest)
        yield text, (text.lower() if lowercase else text).split()
    if rest:
        yield rest, [rest.lower() if lowercase else rest]


def utf8(text: str) -> bytes:
    """Return text in UTF-8, also half a surrogate pair, which a docstring may hold."""
    return text.encode("utf-8", "surrogatepass")


class Bytes:
    """The bytes of a text, with the same attributes as `Words`. The vocabulary is hexadecimal."""

    file = "vocabulary.txt"
    content = "\n".join(f"{value:02x}" for value in range(ALL_BYTES)).encode()
    entries = ALL_BYTES

    def ids(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the bytes of each piece."""
        for piece in pieces:
            yield np.frombuffer(utf8(piece), np.uint8).astype("<i4")

    def sized(self, pieces: Iterable[str]) -> Iterator[Sized]:
        """Yield the same, each the one byte that it is."""
        for ids in self.ids(pieces):
            yield ids, np.ones_like(ids), 0


# ---------------------------------------------------------------------------------------------
# Subwords


class Subwords:
    """What a `tokenizer.json` says, with the same attributes as `Words`.

    Raises ConfigError, which begins with `label`, whatever the library raises.
    """

    file = TOKENIZER_FILE

    def __init__(self, content: bytes, label: str) -> None:
        self.content = content
        self._label = label
        with self._library_errors():
            self._tokenizer = _loaded(content)
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.entries = 1 + max(ids, default=-1)  # ids without a token among them included

    def ids(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text, some at a time, on all cores."""
        for _, encodings in self._encodings(pieces, self._tokenizer.encode_batch_fast):
            yield np.concatenate([np.array(each.ids, "<i4") for each in encodings])

    def sized(self, pieces: Iterable[str]) -> Iterator[Sized]:
        """Yield the same with the bytes from the end of the token before to its own end.

        So they add up to the text, also where the tokenizer drops or changes characters. Of a
        character in several tokens all bytes count with the first.
        """
        for batch, encodings in self._encodings(pieces, self._tokenizer.encode_batch):
            for text, each in zip(batch, encodings, strict=True):
                yield np.array(each.ids, "<i4"), *_bytes_of(text, each.offsets)

    def _encodings(
        self, pieces: Iterable[str], encode: Callable[..., list[Any]]
    ) -> Iterator[tuple[list[str], list[Any]]]:
        source = parts(pieces)
        while batch := list(islice(source, PARTS_AT_ONCE)):
            with self._library_errors():
                encodings = encode(batch, add_special_tokens=False)
            yield batch, encodings

    @contextlib.contextmanager
    def _library_errors(self) -> Iterator[None]:
        """Turn whatever the library raises into one line. Its panics are no `Exception`s."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            what = f"its {TOKENIZER_FILE} is damaged, or cannot cut this text"
            raise ConfigError(f"{self._label}: {what} ({first_line(error)})") from error


def _loaded(content: bytes) -> Tokenizer:
    import tokenizers

    stored = json.loads(content)
    stored["model"].pop("dropout", None)  # it would cut a text by lot
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
    # A text is encoded whole: these may be stored with a tokenizer, and cut or fill each part.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # It would add special tokens, and set the ends of tokens before their white space.
    tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def train_bpe(pieces: Iterable[str], size: int) -> bytes:
    """Train a byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of up to `size` entries.

    Words are first set apart by GPT-2's rule. What memory it takes grows with the different words
    of the text alone. The same text gives the same file.

    Returns:
        the content of its `tokenizer.json`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=LEAST_PAIRS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(parts(pieces), trainer)
    return tokenizer.to_str(pretty=True).encode()


def _bytes_of(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Return the bytes of each token of a text, and those that follow the last."""
    characters = np.frombuffer(text.encode("utf-32-le"), "<u4")
    width = 1 + sum((characters >= first).astype(np.int64) for first in (128, 2048, 65536))
    reached = np.concatenate([[0], np.cumsum(width)])
    ends = np.maximum.accumulate(np.array([0, *(end for _, end in offsets)]))
    return np.diff(reached[ends]).astype("<i4"), int(reached[-1] - reached[ends[-1]])


def parts(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the text of `pieces` in parts that can be encoded by themselves.

    Where it is cut follows from the text alone, however `pieces` cut it. A part begins with a line
    or, where no line ends, with a space before a word: there the rules of GPT-2, Llama 3 and their
    like end a token, too.
    """
    text, held, length = "", [], 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length > PART_CHARACTERS:
            text, start = "".join(held), 0
            while len(text) - start > PART_CHARACTERS:
                cut = _cut(text, start)
                yield _encodable(text[start:cut])
                start = cut
            held, length = [text[start:]], len(text) - start
    if length:
        yield _encodable("".join(held))


def _cut(text: str, start: int) -> int:
    """Return where a part ends that begins at `start`."""
    end = start + PART_CHARACTERS
    for mark, kept in (("\n", 1), (" ", 0)):
        at = end
        while (at := text.rfind(mark, start + 1, at)) != -1:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + kept
    return end


def _encodable(text: str) -> str:
    """Return text without halves of surrogate pairs: a docstring may hold some, UTF-8 has none."""
    return text.encode("utf-8", "replace").decode()
