"""Where text comes from: the documentation of Python, local files, data sets.

Every source gives the same thing, a `TextSource`: pieces of text for "train" and for "validation",
of a data set that has one also for "test", and a key that tells one text from another. How text
becomes words is `corpus`'s business; it only splits on white space, so a source may cut its text at
any white space, and nowhere else.

Data sets are loaded with the `datasets` library, imported when the text is needed and not before.
Plain text files are read here: its "text" builder would copy them to Arrow first, and can't say at
which byte a file stops being UTF-8.
"""

from __future__ import annotations

import ast
import glob
import hashlib
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

from proglayer.config import DataConfig, DataSource, shortened
from proglayer.errors import DISK_FULL, ConfigError, first_line

# Part of the key of pydocs: raise it when other text is taken from the standard library.
PYDOCS_FORMAT = 1
# Folders within the standard library that say little about it, or belong to other people.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "turtledemo", "_bundled"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages"}

OTHER_DATA_SET = "choose another data.train_split, data.validation_split or data.text_column"

# What a split is called in the file names of the WikiText releases.
RELEASE_SPLITS = {"train": "train", "validation": "valid", "test": "test"}

# Files are read in pieces of this size, which bounds the memory they take.
PIECE_BYTES = 2**20
WHITE_SPACE = (b" ", b"\n", b"\t", b"\r", b"\v", b"\f")
# Without a bound a file without white space would be taken into memory.
LONGEST_WORD_BYTES = 2**24
# Files that are no plain text, by their first bytes: what is read, and what is named to the user.
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
OTHER_FILES = {
    b"\xff\xfe\0\0": "UTF-32 (byte order mark): convert it, iconv -f utf-32 -t utf-8",
    b"\xff\xfe": "UTF-16 (byte order mark): convert it, iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "UTF-16 (byte order mark): convert it, iconv -f utf-16 -t utf-8",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"BZh": "compressed by bzip2: unpack it (gzip and zstd are read as they are)",
    b"\xfd7zXZ": "compressed by xz: unpack it (gzip and zstd are read as they are)",
    b"%PDF": "a PDF: take its text out, for example with pdftotext",
    b"PAR1": "Parquet: load it with `datasets`, save_to_disk, and take data=hub data.path=FOLDER",
}


@dataclass(frozen=True)
class TextSource:
    """A text before it is cut into words.

    `key`, plain data, is equal where the text is equal and is had without loading the text;
    `pieces` gives the text of "train" or "validation", cut at white space only, and may use the
    folder it is given, which is deleted afterwards. With `may_test` it also gives that of "test",
    which is nothing where a data set of the hub turns out to have none. `label` names the text as
    the user did, and `more` says what to set for more of it; both are for error messages.
    """

    name: str
    label: str
    key: dict[str, Any]
    pieces: Callable[[str, Path], Iterable[str]]
    more: str
    may_test: bool = False


def open_source(data: DataConfig) -> TextSource:
    """The text that `data` names.

    Raises ConfigError where it can't be found, or a setting is not for this kind of source. What
    goes wrong while reading is a ConfigError of `pieces`.
    """
    data_sets = (DataSource.wikitext2, DataSource.hub)
    readers = dict.fromkeys(("path", "repository", "configuration", "revision"), data_sets)
    for setting, sources in {**readers, "files": (DataSource.text,)}.items():
        given = getattr(data, setting)
        if given and data.source not in sources:
            wanted = " or ".join(f"data={source.name}" for source in sources)
            raise ConfigError(
                f"data.{setting}={shortened(given)} is not for data={data.source.name}: it needs "
                f"{wanted}"
            )
    if data.source is DataSource.pydocs:
        return _pydocs(data)
    if data.source is DataSource.text:
        return _text(data)
    return _data_set(data)


# ---------------------------------------------------------------------------------------------
# pydocs: the English that every Python carries


def _pydocs(data: DataConfig) -> TextSource:
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
        ends = list(accumulate(len(text) for _, text in documents))
        kept = bisect(ends, (1 - data.held_out) * ends[-1])
        for _, text in documents[:kept] if split == "train" else documents[kept:]:
            yield text + "\n"

    return TextSource(
        name="pydocs",
        label=f"the documentation of Python {platform.python_version()}",
        key=key,
        pieces=pieces,
        more="take another data.held_out, or another corpus (data=wikitext2, data=text)",
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
        if not isinstance(child, ast.expr):
            yield from _docstrings(child)


# ---------------------------------------------------------------------------------------------
# text: local files


def _text(data: DataConfig) -> TextSource:
    paths = _matching_files(data.files)
    digests = [_file_sha256(path, "data.files") for path in paths]

    def pieces(split: str, scratch: Path) -> Iterator[str]:
        for path in paths:
            plain = _unpacked(path, scratch)
            cut = _held_out_from(plain, data.held_out)
            start, end = (0, cut) if split == "train" else (cut, plain.stat().st_size)
            yield from _file_pieces(plain, start, end, f"data.files: {path}")

    return TextSource(
        name="text",
        label=f"data.files ({len(paths)} file{'s' if len(paths) > 1 else ''})",
        key={"source": "text", "files": digests, "held_out": data.held_out},
        pieces=pieces,
        more="give data.files more text, or take another data.held_out (words are what white space "
        "separates: Chinese, for example, has to be cut into words first)",
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
    return [Path(file) for file in sorted(found)]


def _unpacked(path: Path, scratch: Path) -> Path:
    """The file itself, or where it is compressed, its content as a file in `scratch`."""
    with open(path, "rb") as file:
        start = file.read(4)
    compression = next((name for mark, name in COMPRESSED.items() if start.startswith(mark)), None)
    if compression is None:
        return path
    import pyarrow

    plain = scratch / hashlib.sha256(os.fsencode(path)).hexdigest()
    if not plain.exists():  # unpacked for the other split
        try:
            with pyarrow.input_stream(str(path), compression) as packed, open(plain, "xb") as file:
                while block := packed.read(PIECE_BYTES):
                    file.write(block)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise ConfigError(
                f"data.files: {path} can't be unpacked ({compression}: {first_line(error)})"
            ) from error
    return plain


def _held_out_from(path: Path, held_out: float) -> int:
    """The byte at which the held-out part of a file begins: just after a line end or a space.

    After other white space where there is neither.
    """
    start = end = int((1 - held_out) * path.stat().st_size)
    for ends in (rb"[\n ]", rb"\s"):
        with open(path, "rb") as file:
            end = file.seek(start)
            while block := file.read(PIECE_BYTES):
                if found := re.search(ends, block):
                    return end + found.end()
                end += len(block)
    return end


def _file_pieces(path: Path, start: int, end: int, label: str) -> Iterator[str]:
    """The text of a UTF-8 file from byte `start` to `end`, cut at white space.

    Raises ConfigError, which begins with `label`, where that is no such text or can't be read.
    """
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
                cut = len(block) if last else 1 + max(map(block.rfind, WHITE_SPACE))
                if cut == 0 and len(block) > LONGEST_WORD_BYTES:
                    raise ConfigError(
                        f"{label} has no white space in {len(block):,} bytes from offset {start}, "
                        "and words are what white space separates: cut it into words first"
                    )
                if (zero := block.find(0, 0, cut)) >= 0:
                    raise ConfigError(f"{label} {_no_text(path, 0, start + zero)}")
                yield block[:cut].decode("utf-8")
                start, rest = start + cut, block[cut:]
                if last:
                    break
    except UnicodeDecodeError as error:
        reason = _no_text(path, error.object[error.start], start + error.start)
        raise ConfigError(f"{label} {reason}") from error
    except OSError as error:
        raise ConfigError(f"{label} can't be read ({error.strerror})") from error


def _no_text(path: Path, byte: int, offset: int) -> str:
    """What a file is that is no text in UTF-8, and how to make it one."""
    with open(path, "rb") as file:
        start = file.read(1000)
    for mark, what in OTHER_FILES.items():
        if start.startswith(mark):
            return f"is {what}"
    if byte == 0 and 3 * start.count(0) > len(start):
        order = "le" if start[1::2].count(0) > start[::2].count(0) else "be"
        return f"is UTF-16 without a byte order mark: convert it, iconv -f utf-16{order} -t utf-8"
    cure = "tr -d '\\000' removes them" if byte == 0 else "iconv -f latin1 -t utf-8"
    return f"is not UTF-8 (byte 0x{byte:02x} at offset {offset}): convert it, for example {cure}"


def _file_sha256(path: Path, setting: str) -> str:
    """The hash of a file's content."""
    if path.exists() and not path.is_file():  # reading it might never end
        raise ConfigError(f"{setting}: {path} is a pipe or a device: write its content to a file")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} can't be read ({error.strerror})") from error


# ---------------------------------------------------------------------------------------------
# wikitext2 and hub: data sets, from a folder or from the hub


def _data_set(data: DataConfig) -> TextSource:
    if data.path is None:
        return _hub(data)
    folder = Path(os.path.expanduser(data.path))
    if not folder.exists():
        raise ConfigError(f"data.path={data.path}: there is no such folder in {os.getcwd()}")
    if not folder.is_dir():
        raise ConfigError(
            f"data.path={data.path} is a file, not a folder: give the folder of a data set, or "
            f"read the file with data=text 'data.files=[{data.path}]'"
        )
    if data.source is DataSource.wikitext2 and (folder / "wiki.train.raw").exists():
        return _release(data, folder)
    if (folder / "state.json").exists() or any(folder.glob("*/state.json")):
        return _saved_data_set(data, folder)
    raise ConfigError(f"data.path={data.path} is not {_wanted_folder(data)}")


def _wanted_folder(data: DataConfig) -> str:
    if data.source is DataSource.wikitext2:
        return "a folder with wiki.train.raw and wiki.valid.raw or one that save_to_disk wrote"
    return "a folder that save_to_disk wrote"


def _release(data: DataConfig, folder: Path) -> TextSource:
    """The layout of the WikiText releases, `wiki.train.raw` and so on."""
    names = _split_names(data, sorted(RELEASE_SPLITS))
    if _may_test(data) and (folder / "wiki.test.raw").exists():
        names["test"] = "test"
    files = {split: folder / f"wiki.{RELEASE_SPLITS[name]}.raw" for split, name in names.items()}
    digests = {split: _file_sha256(path, "data.path") for split, path in files.items()}

    def pieces(split: str, scratch: Path) -> Iterator[str]:
        path = files[split]
        return _file_pieces(path, 0, path.stat().st_size, f"data.path: {path}")

    return TextSource(
        name=_data_set_name(data),
        label=f"data.path={data.path}",
        key={"source": "release", "files": digests},
        pieces=pieces,
        more=OTHER_DATA_SET,
        may_test="test" in files,
    )


def _may_test(data: DataConfig) -> bool:
    """Whether a split called "test" is no part of what is trained and validated on."""
    return "test" not in f"{data.train_split} {data.validation_split}"


def _split_names(data: DataConfig, known: list[str]) -> dict[str, str]:
    """The names that the settings give to both splits, once they are among the known ones."""
    names = {"train": data.train_split, "validation": data.validation_split}
    for split, name in names.items():
        if name not in known:
            raise ConfigError(
                f"data.{split}_split={name}: the splits in data.path={data.path} are "
                + ", ".join(known)
            )
    return names


def _saved_data_set(data: DataConfig, folder: Path) -> TextSource:
    """What `DatasetDict.save_to_disk` or `Dataset.save_to_disk` wrote.

    The latter has a single split, of which the last share of the rows is held out.
    """
    single = (folder / "state.json").exists()
    if single:
        folders = {"train": folder, "validation": folder}
    else:
        names = _split_names(
            data, sorted(state.parent.name for state in folder.glob("*/state.json"))
        )
        folders = {split: folder / name for split, name in names.items()}
        if _may_test(data) and any((folder / "test").glob("*.arrow")):
            folders["test"] = folder / "test"
    for split, split_folder in folders.items():
        if not any(split_folder.glob("*.arrow")):  # `datasets` can't load what it saved of no rows
            raise ConfigError(f"data.path={data.path} has no rows for {split}: {OTHER_DATA_SET}")
    digests = [
        _file_sha256(path, "data.path")
        for split_folder in dict.fromkeys(folders.values())
        for path in sorted(split_folder.iterdir())
        if path.suffix == ".arrow" or path.name == "state.json"
    ]

    def pieces(split: str, scratch: Path) -> Iterator[str]:
        datasets = _quiet_datasets()
        try:
            rows = datasets.Dataset.load_from_disk(str(folders[split]))
            if single:
                kept = int((1 - data.held_out) * len(rows))
                rows = rows.select(range(kept) if split == "train" else range(kept, len(rows)))
            yield from _rows(rows, data.text_column)
        except ConfigError:
            raise
        except Exception as error:  # the many ways in which its files can be amiss
            raise ConfigError(
                f"data.path={data.path} can't be loaded: {first_line(error)}"
            ) from error

    return TextSource(
        name=_data_set_name(data),
        label=f"data.path={data.path}",
        key={
            "source": "saved",
            "files": digests,
            "column": data.text_column,
            "held_out": data.held_out if single else None,
        },
        pieces=pieces,
        more=OTHER_DATA_SET,
        may_test="test" in folders,
    )


def _hub(data: DataConfig) -> TextSource:
    assert data.repository, "to_config refuses it"
    if os.path.isdir(data.repository):
        # It would be cached under its name, whatever became of its content.
        raise ConfigError(
            f"data.repository={data.repository} is a local folder: give it as data.path"
        )

    names = {"train": data.train_split, "validation": data.validation_split, "test": "test"}

    @cache
    def rows(split: str) -> Any:
        return _load_from_hub(data, names[split])

    def pieces(split: str, scratch: Path) -> Iterator[str]:
        if split != "test" or "test" in (rows("train").info.splits or {}):
            yield from _rows(rows(split), data.text_column)

    return TextSource(
        name=_data_set_name(data),
        label=_hub_label(data),
        key={
            "source": "hub",
            "repository": data.repository,
            "configuration": data.configuration,
            "revision": data.revision,
            "train_split": data.train_split,
            "validation_split": data.validation_split,
            "column": data.text_column,
        },
        pieces=pieces,
        more=OTHER_DATA_SET,
        may_test=_may_test(data),
    )


def _data_set_name(data: DataConfig) -> str:
    if data.source is DataSource.hub and data.repository:
        return data.repository.rsplit("/", 1)[-1]
    return data.source.name


def _hub_label(data: DataConfig) -> str:
    parts = [f"data.repository={data.repository}"]
    if data.configuration:
        parts.append(f"data.configuration={data.configuration}")
    if data.revision:
        parts.append(f"data.revision={data.revision}")
    return " ".join(parts)


def _rows(rows: Any, column: str) -> Iterator[str]:
    """The text of a column of a `datasets.Dataset`, some rows at a time."""
    if column not in rows.column_names:
        raise ConfigError(
            f"data.text_column={column}: the columns of the data set are "
            f"{', '.join(rows.column_names)}"
        )
    kind = getattr(rows.features[column], "dtype", "no plain value")
    if "string" not in kind:
        raise ConfigError(f"data.text_column={column} is no column of text ({kind})")
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=100):
        texts = batch.column(0).to_pylist()
        yield "\n".join(text for text in texts if text is not None) + "\n"


def _load_from_hub(data: DataConfig, split: str) -> Any:
    """The split of this name, a `datasets.Dataset`, online or from its cache.

    Raises:
        ConfigError: the data set can't be had, read, or is not of the wanted revision.
        OSError: the disk is full.
    """
    datasets = _quiet_datasets()
    assert data.repository is not None
    try:
        rows = datasets.load_dataset(
            data.repository, data.configuration, revision=data.revision, split=split
        )
    except ConnectionError as error:
        raise ConfigError(_unreachable(data)) from error
    except Exception as error:  # the many ways in which a data set of others can be amiss
        for cause in _causes(error):
            if isinstance(cause, OSError) and cause.errno in DISK_FULL:
                raise cause from error
        raise ConfigError(f"{_hub_label(data)} can't be loaded: {first_line(error)}") from error
    # Without a network `datasets` takes what its cache has under that name, of whatever revision;
    # the folder of its files is named after the commit.
    commit = data.revision if re.fullmatch("[0-9a-f]{40}", data.revision or "") else None
    if commit and any(commit not in Path(file["filename"]).parts for file in rows.cache_files):
        raise ConfigError(_unreachable(data))
    return rows


def _quiet_datasets() -> Any:
    """The library `datasets`, its progress bars and warnings kept out of a run's own output."""
    import datasets
    import huggingface_hub.utils

    for library in (datasets.utils, huggingface_hub.utils):
        library.disable_progress_bars()
        library.logging.set_verbosity_error()
    return datasets


def _unreachable(data: DataConfig) -> str:
    return (
        f"{_hub_label(data)}: the Hugging Face hub can't be reached and the cache of `datasets` "
        f"does not hold this; set data.path to {_wanted_folder(data)}, or take another corpus "
        "(data=pydocs needs no network)"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
