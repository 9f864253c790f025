"""Files that are there whole or not at all, and folders that are ours to write in."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from filelock import FileLock, Timeout

from proglayer.errors import ConfigError, StoreError, raised_as

# The beginning of a file's name until it is whole.
TEMPORARY = ".tmp-"
LOCK = ".lock"
# How the record of a run or of a sweep begins.
RECORD = re.compile(rb'\{\s*"format":')


# The one file of state of a run, and that of a sweep: see `proglayer.run.record`.
RUN_FILE = "run.json"
SWEEP_FILE = "sweep.json"


class FolderKind(Enum):
    """What a folder is for: the file that marks it, and the setting that names it."""

    run = RUN_FILE, "hydra.run.dir"
    sweep = SWEEP_FILE, "hydra.sweep.dir"
    store = ".proglayer-store", "store.dir"

    def __init__(self, mark: str, setting: str) -> None:
        self.mark = mark
        self.setting = setting


def claim_folder(folder: Path, kind: FolderKind) -> None:
    """Make a folder, unless it is there and is empty or marked as one of its kind.

    Whoever claims it writes the mark. Raises ConfigError for any other folder, and where none can
    be made.
    """
    with raised_as(ConfigError, f"{kind.setting}={folder}: name another", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        names = os.listdir(folder)
    # A process that was killed before it wrote the mark may have left these.
    others = [name for name in names if name != LOCK and not name.startswith(TEMPORARY)]
    if others and not _is_marked(folder / kind.mark, kind):
        raise ConfigError(
            f"{kind.setting}={folder}: the folder holds other files and no {kind.mark} of ours, so "
            "nothing is written there: name another, or an empty one"
        )


def _is_marked(mark: Path, kind: FolderKind) -> bool:
    """Whether a mark is there, and one that we wrote: others call files run.json, too."""
    with contextlib.suppress(OSError):
        if mark.is_file() and not mark.is_symlink():
            return kind is FolderKind.store or RECORD.match(mark.read_bytes()) is not None
    return False


def lock_folder(folder: Path, wait_s: float = 0.0) -> FileLock | None:
    """Become the only one at work in a folder; None if somebody else still is after `wait_s`.

    The operating system frees the lock when its holder ends, however it ends. Raises StoreError.
    """
    lock = FileLock(folder / LOCK)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=wait_s, poll_interval=0.05)
        except Timeout:
            return None
    # Nobody else writes here, so these are what killed processes left.
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            path.unlink()
    return lock


@contextlib.contextmanager
def sole_writer(folder: Path, kind: FolderKind, wait_s: float = 0.0) -> Iterator[None]:
    """Claim a folder, and hold its lock. Raises ConfigError where somebody else holds it."""
    claim_folder(folder, kind)
    lock = lock_folder(folder, wait_s)
    if lock is None:
        raise ConfigError(
            f"{kind.setting}={folder}: another command is at work in this folder: wait for it, or "
            "choose another"
        )
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash of the machine: then
    perhaps as it was before.

    It is a new file: links to an earlier one keep what they had. Raises StoreError.
    """
    with _put_at(path) as temporary, open(temporary, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link_or_copy(source: Path, path: Path) -> None:
    """Let `path` be the same file as `source` where links can be had, else a copy of it.

    Raises StoreError.
    """
    with _put_at(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        # Who edits one of two links edits the other, too.
        with contextlib.suppress(OSError):
            os.chmod(temporary, 0o444)


@contextlib.contextmanager
def _put_at(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes the place of `path` at the end of the block."""
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    with _writing(path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
        finally:
            # It is still there where `path` was the same file already.
            with contextlib.suppress(OSError):
                temporary.unlink()


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Turn what goes wrong with writing to a folder into StoreError."""
    mend = (
        ": make room there or name another folder; nothing stored so far is lost, the same command "
        "goes on from it"
    )
    return raised_as(StoreError, f"cannot write to {folder}", OSError, then=mend)


@contextlib.contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give a folder to fill, `<name>-<random>` in `parent`, which is gone after the block unless
    it was put into its place (`put_in_place`). Raises OSError.
    """
    folder = parent / f"{name}-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, final: Path) -> None:
    """Give a folder from `new_folder` its name. Raises OSError where something lies there.

    Its files are as open to others as the folder is: a library that writes by way of a temporary
    file leaves it to its owner alone.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
    folder.rename(final)  # onto an empty folder at most
