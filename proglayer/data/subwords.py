"""Subword tokens: a byte-level BPE of the corpus's own, or the tokenizer of a folder or of the hub.

The library `tokenizers` does the work; it is imported when a text is tokenized and not before. It
reads `tokenizer.json`, which every fast tokenizer of `transformers` has, and runs nobody's code.

A tokenizer is given the text as it is: case, white space and line ends stay. No token is added to
it, neither at the start nor between documents; a special token that the text itself spells out,
such as `<|endoftext|>`, becomes that token.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proglayer.config import BPE, MODEL, WORDS, DataConfig
from proglayer.errors import ConfigError, first_line, install_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
# The vocabulary of a byte-level BPE begins with all bytes.
ALL_BYTES = 256
# A pair of tokens that occurs once in all the text is no subword.
LEAST_PAIRS = 2
# The library works on so many parts of the text at once, which bounds the memory that takes.
PART_CHARACTERS = 2**14
PARTS_AT_ONCE = 32


@dataclass(frozen=True)
class Subwords:
    """A way to cut text into subwords, as the settings name it.

    `content` is that of its `tokenizer.json`, None for a BPE of `size` entries that is to be
    trained. `label` is for messages, `key` plain data that tells one tokenizer from another.
    """

    label: str
    content: bytes | None
    size: int | None = None

    @property
    def key(self) -> dict[str, Any]:
        """Equal where the tokens of a text are equal, wherever the tokenizer lay."""
        if self.content is None:
            return {"bpe": self.size}
        return {"sha256": hashlib.sha256(self.content).hexdigest()}


def open_subwords(data: DataConfig) -> Subwords | None:
    """What `data.tokenizer` names; None for words.

    Raises ConfigError where it can't be had, or other settings do not go with it.
    """
    name = data.tokenizer
    if name == WORDS:
        _refuse_revision(data)
        return None
    if name == MODEL:  # to_config has put the model's own in its place, if it has one
        raise ConfigError(
            "data.tokenizer=model takes the tokenizer of model.path, which is not set: take "
            "model=causal_lm, or another tokenizer"
        )
    if data.min_count > 1:
        raise ConfigError(
            f"data.min_count={data.min_count} changes nothing with data.tokenizer={name}: only "
            "data.tokenizer=words leaves rare words out"
        )
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError(f"data.tokenizer={name} needs the extra hf: {install_command('hf')}")
    if name == BPE:
        _refuse_revision(data)
        return Subwords("data.tokenizer=bpe", None, _bpe_size(data))
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        _refuse_revision(data)
        try:
            return Subwords(f"data.tokenizer={name}", (folder / TOKENIZER_FILE).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"data.tokenizer={name}: its {TOKENIZER_FILE} can't be read ({error.strerror}): "
                "save_pretrained of a fast tokenizer of transformers writes one"
            ) from error
    if name and folder.exists():
        raise ConfigError(
            f"data.tokenizer={name} is a file: give the folder that holds {TOKENIZER_FILE}"
        )
    return Subwords(f"data.tokenizer={name}", _from_hub(data))


def load_tokenizer(content: bytes, label: str) -> Tokenizer:
    """The tokenizer of this `tokenizer.json`. Raises ConfigError, which begins with `label`."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises no narrower one
        raise ConfigError(
            f"{label}: its {TOKENIZER_FILE} is damaged, or of no tokenizer ({first_line(error)})"
        ) from error
    # A text is encoded whole: these may be stored with a tokenizer, and cut or fill each part.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # It would add special tokens, and set the ends of tokens before their white space.
    tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def train_bpe(pieces: Iterable[str], size: int) -> bytes:
    """A byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of up to `size` entries.

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


def entries(tokenizer: Tokenizer) -> int:
    """How many ids there are, those without a token among them included."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def encode(
    tokenizer: Tokenizer, pieces: Iterable[str], with_bytes: bool = False
) -> Iterator[list[np.ndarray]]:
    """The ids of a text, some at a time, on all cores; and where asked, the bytes of each.

    These are the bytes from the end of the token before to its own end, in UTF-8: so they add up
    to the text, also where the tokenizer drops or changes characters. Of a character in several
    tokens all bytes count with the first.
    """
    before = 0
    source = parts(pieces)
    while batch := list(islice(source, PARTS_AT_ONCE)):
        run = tokenizer.encode_batch if with_bytes else tokenizer.encode_batch_fast
        encodings = run(batch, add_special_tokens=False)
        arrays = [np.concatenate([np.array(each.ids, "<i4") for each in encodings])]
        if with_bytes:
            sizes = []
            for text, each in zip(batch, encodings, strict=True):
                own, after = _bytes_of(text, each.offsets)
                if len(own):
                    own[0] += before
                    before = 0
                before += after
                sizes.append(own)
            arrays.append(np.concatenate(sizes))
        yield arrays


def _bytes_of(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """The bytes of each token of a text, and those that follow the last."""
    characters = np.frombuffer(text.encode("utf-32-le"), "<u4")
    width = 1 + sum((characters >= first).astype(np.int64) for first in (128, 2048, 65536))
    reached = np.concatenate([[0], np.cumsum(width)])
    ends = np.maximum.accumulate(np.array([0, *(end for _, end in offsets)]))
    return np.diff(reached[ends]).astype("<i4"), int(reached[-1] - reached[ends[-1]])


def parts(pieces: Iterable[str]) -> Iterator[str]:
    """The text of `pieces` in parts that can be encoded by themselves.

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
    """Where a part ends that begins at `start`."""
    end = start + PART_CHARACTERS
    for mark, kept in (("\n", 1), (" ", 0)):
        at = end
        while (at := text.rfind(mark, start + 1, at)) != -1:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + kept
    return end


def _encodable(text: str) -> str:
    """Text without halves of surrogate pairs: a docstring may hold some, UTF-8 has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _bpe_size(data: DataConfig) -> int:
    if data.max_vocab is None or data.max_vocab <= ALL_BYTES:
        given = "null" if data.max_vocab is None else data.max_vocab
        raise ConfigError(
            f"data.max_vocab={given} is no size for data.tokenizer=bpe, whose first {ALL_BYTES} "
            f"entries are the bytes: take {ALL_BYTES + 1} or more, for example 4096"
        )
    return data.max_vocab


def _refuse_revision(data: DataConfig) -> None:
    if data.tokenizer_revision is not None:
        raise ConfigError(
            f"data.tokenizer_revision={data.tokenizer_revision} is not for "
            f"data.tokenizer={data.tokenizer}: it needs the name of a tokenizer on the hub"
        )


def _from_hub(data: DataConfig) -> bytes:
    """The `tokenizer.json` of a repository of the hub, from its local cache where it is there."""
    import huggingface_hub

    label = f"data.tokenizer={data.tokenizer}"
    if data.tokenizer_revision is not None:
        label += f" data.tokenizer_revision={data.tokenizer_revision}"
    known = f"it is none of {WORDS}, {BPE}, {MODEL}, nor a folder in {os.getcwd()}"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.tokenizer):
        raise ConfigError(f"{label}: {known}, nor a name on the hub such as owner/name")
    try:
        # What is there already stays what it was, and needs no network.
        wanted, revision = (data.tokenizer, TOKENIZER_FILE), data.tokenizer_revision
        path = huggingface_hub.try_to_load_from_cache(*wanted, revision=revision)
        if not isinstance(path, str):
            huggingface_hub.utils.disable_progress_bars()
            path = huggingface_hub.hf_hub_download(*wanted, revision=revision)
        return Path(path).read_bytes()
    except Exception as error:  # of the network, the hub, its cache, the name
        raise ConfigError(
            f"{label}: {known}, and the hub gives no such tokenizer ({first_line(error)})"
        ) from error
