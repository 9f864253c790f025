"""Sources to documents: the documentation of Python, files of one's own, data sets of `datasets`.

Every source is a `Text`. Data sets and files of rows (`.jsonl`, `.csv`, `.parquet`) are read by
`datasets`. Plain text is read here: its "text" builder changes line ends, counts no
bytes, by which a file is split, and copies the whole to Arrow first.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import glob
import hashlib
import mmap
import os
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from proglayer.config import DataConfig
from proglayer.errors import ConfigError, raised_as

# Part of the key of pydocs: raise it when other text is taken from the standard library.
PYDOCS_FORMAT = 1
# Folders within the standard library that say little about it, or belong to other people.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "turtledemo", "_bundled"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages"}

# What a split is called in the file names of the WikiText releases.
RELEASE_SPLITS = {"train": "train", "validation": "valid", "test": "test"}

# Files are read in blocks of this size, which bounds the memory they take.
BLOCK_BYTES = 2**20
# Files of rows, and the builders of `datasets` that read them.
ROW_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# How files begin that are text to a decoder, and markup to a reader.
MARKUP = re.compile(
    r"(?is)(?>\s+|<\?xml(?>.*?\?>)|<!--(?>.*?-->))*+(<!doctype html|<html|\{\\rtf|%pdf-)"
)


@dataclass(frozen=True)
class Text:
    """A text before it is cut into tokens.

    label: how the user named it, for messages.
    key: plain data that is equal where the text is equal, and is had without loading the text.
    read: returns the text of "train", "validation" or "test", in pieces that are cut anywhere; a
        document ends with white space. Of "test" it gives nothing where there is none. It may use
        the folder that it is given, which is deleted afterwards.
    """

    name: str
    label: str
    key: dict[str, Any]
    read: Callable[[str, Path], Iterable[str]]


def open_text(data: DataConfig) -> Text:
    """Return the text that `data` names.

    Raises ConfigError where it can't be found. So does `read` for what goes wrong while reading.
    """
    if data.source == "pydocs":
        return _pydocs(data)
    if data.source == "text":
        return _files(data)
    folder = Path(data.path or data.repository or "").expanduser()
    if data.path is None and not folder.is_dir():
        return _hub(data)
    if data.source == "wikitext2" and (folder / "wiki.train.raw").exists():
        return _release(data, folder)
    return _saved(data, folder)


# ---------------------------------------------------------------------------------------------
# pydocs: the English that every Python carries


def _pydocs(data: DataConfig) -> Text:
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

    def read(split: str, scratch: Path) -> Iterator[str]:
        documents = shuffled()
        ends = list(accumulate(len(text) for _, text in documents))
        kept = bisect(ends, (1 - data.held_out) * ends[-1])
        parts = {"train": documents[:kept], "validation": documents[kept:]}
        for _, text in parts.get(split, ()):
            yield text + "\n"

    return Text("pydocs", f"the documentation of Python {platform.python_version()}", key, read)


def pydocs() -> list[tuple[str, str]]:
    """Return name and text of each document: a module's docstrings, or a topic of Python's help().

    The modules are parsed, never imported. Sorted by name; the same for the same Python.
    Raises ConfigError if this Python came without the topics.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(f"data=pydocs: {error}: take data=text") from error
    texts = [(name, "\n\n".join(_docstrings(_parsed(path)))) for name, path in _modules(folder)]
    documents = [(name, text) for name, text in texts if text]
    documents += [(f"pydoc_data.topics:{name}", text) for name, text in topics.items()]
    return sorted(documents)


def _modules(folder: Path, package: str = "") -> Iterator[tuple[str, Path]]:
    """Yield dotted name and file of every module below `folder`."""
    for path in folder.iterdir():
        if path.suffix == ".py" and path.is_file():
            yield package + path.stem, path
        elif path.name.isidentifier() and path.name not in SKIPPED_FOLDERS and path.is_dir():
            yield from _modules(path, f"{package}{path.name}.")


def _parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a source file; an empty one if it isn't in this Python's syntax."""
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:
            warnings.simplefilter("ignore")  # invalid escapes, in a library that isn't ours
            return ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _docstrings(child)


# ---------------------------------------------------------------------------------------------
# text: files of one's own, and the files of the WikiText release


def _files(data: DataConfig) -> Text:
    paths = _matching_files(data.files)
    builders = [ROW_FILES.get(path.suffix.lower()) for path in paths]

    def read(split: str, scratch: Path) -> Iterator[str]:
        if split == "test":
            return
        for path, builder in zip(paths, builders, strict=True):
            if builder:
                rows = _rows_of_file(path, builder, scratch)
                yield from _documents(_held_out(rows, split, data), data, str(path))
            else:
                cut = _train_bytes(path, data.held_out)
                yield from _decoded(path, *((0, cut) if split == "train" else (cut, None)))

    key = {
        "source": "text",
        "files": [[each, sha256_of(path)] for path, each in zip(paths, builders, strict=True)],
        "held_out": data.held_out,
        "column": data.text_column if any(builders) else None,
    }
    return Text("text", f"data.files ({len(paths)} file{'s' * (len(paths) > 1)})", key, read)


def _matching_files(patterns: Iterable[str]) -> list[Path]:
    """Return the files that names, folders and globs stand for, each once, sorted by name."""
    every: set[str] = set()
    for pattern in patterns:
        wanted = os.path.expanduser(pattern)
        if os.path.isdir(wanted):
            wanted = os.path.join(glob.escape(wanted), "**")
        # A name that exists means itself, even with brackets in it.
        matches = [wanted] if os.path.exists(wanted) else glob.glob(wanted, recursive=True)
        files = {os.path.abspath(match) for match in matches if not os.path.isdir(match)}
        if not files:
            raise ConfigError(f"data.files={pattern}: there is no such file in {os.getcwd()}")
        every |= files
    return [Path(file) for file in sorted(every)]


def _reading(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turn what can go wrong with a file into one line."""
    return raised_as(ConfigError, f"{path} can't be read", OSError)


def sha256_of(path: Path) -> str:
    """Return the hash of a file's content. Raises ConfigError."""
    with _reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _train_bytes(path: Path, held_out: float) -> int:
    """Return the byte at which the held-out part of a file begins.

    It is the first after a line end or a space; after other white space, or at any character, where
    neither leaves something to hold out.
    """
    size = path.stat().st_size
    if size:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            for boundary in (rb"[\n ]", rb"\s", rb"(?=[^\x80-\xbf])"):
                match = re.compile(boundary).search(content, int((1 - held_out) * size))
                if match and match.end() < size:
                    return match.end()
    return size


def _decoded(path: Path, first: int, end: int | None) -> Iterator[str]:
    """Yield the text of a UTF-8 file from one byte to another, and a line end where it lacks one.

    Raises ConfigError where it is no such text or can't be read.
    """
    # A byte order mark is no part of the first word.
    decoder = codecs.getincrementaldecoder("utf-8" if first else "utf-8-sig")()
    last, block = " ", b" "
    with _reading(path), open(path, "rb") as file:
        file.seek(first)
        while block:
            rest = BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - file.tell())
            block = file.read(rest)
            with raised_as(ConfigError, f"{path} is no plain text in UTF-8", UnicodeError):
                piece = decoder.decode(block, final=not block)
                if "\0" in piece:
                    raise UnicodeError("it is binary, or in another encoding")
                if file.tell() == len(block) and MARKUP.match(piece):
                    raise UnicodeError("it is HTML, RTF or PDF")
            last = piece[-1:] or last
            yield piece
    if not last.isspace():
        yield "\n"


def _release(data: DataConfig, folder: Path) -> Text:
    """Return what lies in the files of the WikiText releases, `wiki.train.raw` and so on."""
    files = {split: folder / f"wiki.{name}.raw" for split, name in RELEASE_SPLITS.items()}
    files = {split: path for split, path in files.items() if split != "test" or path.exists()}

    def read(split: str, scratch: Path) -> Iterable[str]:
        return _decoded(files[split], 0, None) if split in files else ()

    key = {"source": "release", "files": {split: sha256_of(path) for split, path in files.items()}}
    return Text(data.source, f"data.path={folder}", key, read)


# ---------------------------------------------------------------------------------------------
# data sets of `datasets`: from a folder or from the hub


def _splits(data: DataConfig) -> dict[str, str]:
    """Return the names of the splits to read: "test" is one where it is no part of the others."""
    names = {"train": data.train_split, "validation": data.validation_split}
    return names if "test" in "".join(names.values()) else names | {"test": "test"}


def _data_set(
    data: DataConfig, label: str, key: dict[str, Any], load: Callable[[str, str], Any]
) -> Text:
    """Return a data set, whose splits `load` returns: of train, validation or test, by name."""

    def read(split: str, scratch: Path) -> Iterable[str]:
        rows = load(split, _splits(data)[split]) if split in _splits(data) else None
        return () if rows is None else _documents(rows, data, label)

    name = Path((data.source == "hub" and data.repository) or data.source).name
    return Text(name, label, {**key, "column": data.text_column, "splits": _splits(data)}, read)


def _saved(data: DataConfig, folder: Path) -> Text:
    """Return what `save_to_disk` wrote of a data set, whole or of one split."""
    label = f"data.path={folder}"
    written = [path for path in folder.rglob("*") if path.suffix in (".arrow", ".json")]

    @cache
    def loaded() -> Any:
        with _loading(label) as datasets:
            return datasets.load_from_disk(str(folder))

    def load(split: str, name: str) -> Any:
        rows = loaded()
        if not hasattr(rows, "keys"):
            return None if split == "test" else _held_out(rows, split, data)
        if name not in rows and split != "test":
            raise ConfigError(f"data.{split}_split={name}: {label} has {', '.join(rows)}")
        return rows.get(name)

    files = sorted([str(path.relative_to(folder)), sha256_of(path)] for path in written)
    key = {"source": "saved", "files": files, "held_out": data.held_out}
    return _data_set(data, label, key, load)


def _hub(data: DataConfig) -> Text:
    given = {name: getattr(data, name) for name in ("repository", "configuration", "revision")}
    label = " ".join(f"data.{name}={value}" for name, value in given.items() if value)

    @cache
    def loaded(name: str) -> Any:
        with _loading(label) as datasets:
            rows = datasets.load_dataset(
                data.repository, data.configuration, revision=data.revision, split=name
            )
            # Without a network `datasets` takes what its cache has under that name, of whatever
            # revision; the folder of its files is named after the commit.
            folders = [Path(file["filename"]).parts for file in rows.cache_files]
            pinned = re.fullmatch("[0-9a-f]{40}", data.revision or "")
            if pinned and not all(data.revision in parts for parts in folders):
                raise ConnectionError("its cache holds another revision")
            return rows

    def load(split: str, name: str) -> Any:
        if split == "test" and name not in (loaded(data.train_split).info.splits or {}):
            return None
        return loaded(name)

    return _data_set(data, label, {"source": "hub", **given}, load)


def _rows_of_file(path: Path, builder: str, scratch: Path) -> Any:
    """Load a file of rows. `datasets` keeps its copy in `scratch`."""
    with _loading(str(path)) as datasets:
        return datasets.load_dataset(
            builder, data_files=[glob.escape(str(path))], split="train", cache_dir=str(scratch)
        )


def _held_out(rows: Any, split: str, data: DataConfig) -> Any:
    """Return the first rows for training, the last share for validation."""
    kept = int((1 - data.held_out) * len(rows))
    return rows.select(range(kept) if split == "train" else range(kept, len(rows)))


def _documents(rows: Any, data: DataConfig, label: str) -> Iterator[str]:
    """Yield the text of a column of a `datasets.Dataset`, some rows at a time."""
    column = data.text_column
    if "string" not in str(getattr(rows.features.get(column), "dtype", None)):
        names = ", ".join(rows.column_names)
        raise ConfigError(f"data.text_column={column}: no column of text, {label} has {names}")
    with _loading(label):
        for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=100):
            texts = batch.column(0).to_pylist()
            yield "\n".join(text for text in texts if text is not None) + "\n"


@contextlib.contextmanager
def _loading(label: str) -> Iterator[Any]:
    """Hand out the library `datasets`, quiet, and turn whatever it raises into one line."""
    import datasets
    import huggingface_hub.utils

    for library in (datasets.utils, huggingface_hub.utils):
        library.disable_progress_bars()
        library.logging.set_verbosity_error()
    # A data set of others can be amiss in many ways.
    with raised_as(ConfigError, f"{label} can't be loaded", Exception):
        yield datasets
