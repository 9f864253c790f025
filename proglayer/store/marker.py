"""What makes a folder a store, and what in it is not ours.

A store holds MARKER, which the first run that uses it writes. In it, what does not carry all our
marks is foreign: a stage's folder is named by the hash of its description, and files are named as
`stages` says. What is foreign is never deleted, moved or followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from proglayer import files
from proglayer.errors import StoreError
from proglayer.store.stages import (
    DAMAGED,
    MARKER,
    SETTING,
    STORED_FOLDER,
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


def read_marker(store: Path) -> dict[str, Any] | None:
    """What makes a folder a store; None where it is none. Raises NotAStoreError.

    That is for a store of a later version, and for a file of this name that is none of ours.

    Returns:
        what MARKER says; `run` is the folder of the run that the store is private to, if it is.
    """
    path = store / MARKER
    if not os.path.lexists(path):
        return None
    content = read_unverified(path) if files.is_ours(path, files.everything) else {}
    form = content.get("format")
    if content.get("proglayer") != SAYS or type(form) is not int:
        raise NotAStoreError(
            f"{path} does not say that its folder is a store: move it, or point {SETTING} elsewhere"
        )
    if form > STORE_FORMAT:
        raise NotAStoreError(
            f"{store} is a store of a later version: update, or point {SETTING} elsewhere"
        )
    return content


def open_store(store: Path) -> None:
    """Make a folder ready for a run, which adds stages to it and changes nothing else there.

    A new or empty folder becomes a store, and so does one that holds nothing but stages, as earlier
    versions left it. One that holds other things, too, can be used, but is not made a store: no
    command deletes anything in it. Raises NotAStoreError.
    """
    marker = read_marker(store)
    if marker is not None and (run := marker.get("run")):
        raise NotAStoreError(
            f"{store} is private to the run in {run}, which deletes it at its end: point {SETTING} "
            "elsewhere"
        )
    is_free = store.is_dir() or not os.path.lexists(store)
    if marker is None and is_free and not foreign_in(store):
        # One that takes no marker takes no stages either, which is said then, or it needs none.
        with contextlib.suppress(StoreError):
            _write_marker(store)


def _write_marker(store: Path, **more: str) -> None:
    content = {"proglayer": SAYS, "format": STORE_FORMAT, **more}
    data = json.dumps(content, indent=1).encode() + b"\n"
    files.write_atomically(store / MARKER, data, SETTING, _is_marker)


def _is_marker(path: Path) -> bool:
    return read_unverified(path).get("proglayer") == SAYS


def foreign_in(store: Path) -> list[Path]:
    """What lies in a folder and is not a store's, sorted; of a foreign folder nothing in it."""
    foreign: set[Path] = set()

    def closed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            foreign.add(Path(error.filename))

    for parent, folders, names in os.walk(store, onerror=closed):
        paths = (Path(parent, name) for name in (*folders, *names))
        foreign.update(path for path in paths if not _is_of_store(store, path))
        folders[:] = [n for n in folders if n != DAMAGED and Path(parent, n) not in foreign]
    return sorted(foreign)


def _is_of_store(store: Path, path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:  # a sweep may be at work here
        return True
    if stat.S_ISREG(mode):
        return is_stored(store, path)
    if not stat.S_ISDIR(mode) or not STORED_FOLDER.fullmatch(path.relative_to(store).as_posix()):
        return False
    stage = Stage(store, path.name)
    return path.parent != store or not stage.names("") or stage.is_proven


def private_store(run: Path) -> Path:
    """The store of a run that reuses nothing, in its own folder.

    Its name is random, and it says whose it is, so nothing else is ever taken for it and deleted.
    One that an interrupted try of the same run left is used again.
    """
    owner = str(run.resolve())
    for folder in sorted(run.glob(f"{PRIVATE}-*")):
        with contextlib.suppress(StoreError):
            if files.is_folder(folder) and (read_marker(folder) or {}).get("run") == owner:
                return folder
    folder = run / f"{PRIVATE}-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise files.cannot_write(run, error, "hydra.run.dir or hydra.sweep.dir") from error
    _write_marker(folder, run=owner)
    return folder


def delete_private(folder: Path) -> None:
    """Delete what runs stored in it, and the folder unless something else lies there."""
    files.delete_folder(folder, lambda path: is_stored(folder, path))
