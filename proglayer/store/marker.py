"""What makes a folder a store, and what in it is not ours.

A store holds MARKER, which the first run that uses it writes. In it, what does not carry all our
marks is foreign: a stage's folder is named by the hash of its description, and files are named as
`stages` says. What is foreign is never deleted, moved or followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from proglayer import files
from proglayer.errors import StoreError
from proglayer.store.stages import (
    DAMAGED,
    IN_USE,
    KEY_FORM,
    MARKER,
    SETTING,
    Stage,
    is_stored,
    read_unverified,
)

# Raise by hand when older readers would misread what lies in a store.
STORE_FORMAT = 1
SAYS = "a store of trained phases"
# A run that reuses nothing has a store of its own in its folder, of this and a random name.
PRIVATE = ".stages"


class NotAStoreError(StoreError):
    """A folder that is no store, or not this run's: the message says which and what to do."""


@dataclass(frozen=True)
class Marker:
    """What MARKER says; `run` is the folder of the run that the store is private to, if it is."""

    format: int
    run: str | None = None


def read_marker(store: Path) -> Marker | None:
    """What makes a folder a store; None where it is none. Raises NotAStoreError.

    That is for a store of a later version, and for a file of this name that is none of ours.
    """
    path = store / MARKER
    if not os.path.lexists(path):
        return None
    content = read_unverified(path) if files.is_ours(path, files.everything) else {}
    form, run = content.get("format"), content.get("run")
    if content.get("proglayer") != SAYS or type(form) is not int:
        raise NotAStoreError(
            f"{path} does not say that its folder is a store: move it, or point {SETTING} elsewhere"
        )
    if form > STORE_FORMAT:
        raise NotAStoreError(
            f"{store} is a store of a later version: update, or point {SETTING} elsewhere"
        )
    return Marker(form, run if isinstance(run, str) else None)


def open_store(store: Path) -> None:
    """Make a folder ready for a run, which adds stages to it and changes nothing else there.

    A new or empty folder becomes a store, and so does one that holds nothing but stages, as earlier
    versions left it. One that holds other things, too, can be used, but is not made a store: no
    command deletes anything in it. Raises NotAStoreError.
    """
    marker = read_marker(store)
    if marker is not None and marker.run is not None:
        raise NotAStoreError(
            f"{store} is private to the run in {marker.run}, which deletes it at its end: point "
            f"{SETTING} elsewhere"
        )
    if marker is None and _holds_stages_alone(store):
        # One that takes no marker takes no stages either, which is said then, or it needs none.
        with contextlib.suppress(StoreError):
            _write_marker(store)


def _write_marker(store: Path, **more: str) -> None:
    content = {"proglayer": SAYS, "format": STORE_FORMAT, **more}
    data = json.dumps(content, indent=1).encode() + b"\n"
    files.write_atomically(store / MARKER, data, SETTING, _is_marker)


def _is_marker(path: Path) -> bool:
    return read_unverified(path).get("proglayer") == SAYS


def _holds_stages_alone(store: Path) -> bool:
    """Whether nothing in a folder is foreign; so for one that is not there."""
    if not store.is_dir():
        return not os.path.lexists(store)
    try:
        entries = list(os.scandir(store))
        return not any(True for entry in entries for _ in foreign_in(store, entry))
    except OSError:
        return False


def foreign_in(store: Path, entry: os.DirEntry[str]) -> Iterator[Path]:
    """What is foreign of an entry of a store's folder: itself, or something in it."""
    path = Path(entry.path)
    if entry.is_file(follow_symlinks=False) and is_stored(store, path):
        return
    if not entry.is_dir(follow_symlinks=False):
        yield path
    elif re.fullmatch(KEY_FORM, entry.name):
        stage = Stage(store, entry.name)
        if stage.names("") and stage.description is None and not stage.is_proven:
            yield path
        else:
            yield from stage.foreign()
    elif entry.name != DAMAGED:
        yield path


class PrivateStore:
    """The store of a run that reuses nothing, in its own folder; `folder` is where.

    Its name is random, and it says whose it is, so nothing else is ever taken for it and deleted.
    One that an interrupted try of the same run left is used again, unless another process is at it.
    """

    def __init__(self, run: Path) -> None:
        self._run = str(run.resolve())
        for folder in sorted(run.glob(f"{PRIVATE}-*")):
            if self._belongs(folder) and self._take(folder):
                return
        folder = run / f"{PRIVATE}-{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise files.cannot_write(run, error, "hydra.run.dir or hydra.sweep.dir") from error
        _write_marker(folder, run=self._run)
        if not self._take(folder):
            raise StoreError(f"{folder} was taken by another process just now: start again")

    def __enter__(self) -> PrivateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def delete(self) -> None:
        """Delete what runs stored in it, and the folder unless something else lies there."""
        files.delete_folder(self.folder, lambda path: is_stored(self.folder, path))

    def _belongs(self, folder: Path) -> bool:
        with contextlib.suppress(StoreError):
            marker = read_marker(folder) if files.is_folder(folder) else None
            return marker is not None and marker.run == self._run
        return False

    def _take(self, folder: Path) -> bool:
        lock = FileLock(folder / IN_USE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        if not self._belongs(folder):  # deleted meanwhile
            lock.release()
            files.delete_folder(folder, files.named(re.escape(IN_USE)))
            return False
        self.folder, self._lock = folder, lock
        return True
