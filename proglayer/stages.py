"""The store of stages: trained phases on disk, each under the key of all it depends on.

A stage is a folder of files that are never changed once written:

    stage.<hash>.json                      what the stage is
    epoch-0003.<hash>.json                 metrics of one epoch
    exits-0002.<hash>.json                 every exit, evaluated at a selected epoch
    weights-0002.<hash>.safetensors        the model after an epoch that a stopping rule can select
    state-0003-000120.<hash>.safetensors   what training needs to go on from epoch 3, step 120

Every file is written to a temporary name, synced and renamed, and carries the hash of its content
in its name, so whatever is damaged or cut short shows when it is read. It is then set aside under
`.damaged` and counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# Raise by hand whenever the same key would stand for different numbers, or a file's form changes.
FORMAT = 1
DAMAGED = ".damaged"
TEMPORARY = ".tmp-"


class StoreError(OSError):
    """The store cannot be written: the message says where, why and which setting moves it."""


def stage_key(description: dict[str, Any]) -> str:
    """The key of a stage: a hash of everything in `description`, which JSON can hold."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Stage:
    """One stage's folder. Reading needs no lock; writing does (see `lock`)."""

    def __init__(self, store: Path, key: str) -> None:
        self.store = store
        self.key = key
        self.folder = store / key
        self._lock: FileLock | None = None

    # -- files ----------------------------------------------------------------------------------

    def names(self, prefix: str) -> list[str]:
        """The names, without hash and ending, of the files that start with `prefix`, sorted."""
        return sorted({path.name.split(".")[0] for path in self._files(prefix)})

    def path(self, name: str) -> Path | None:
        """The file called `name`, unverified; None if there is none."""
        found = [path for path in self._files(name) if path.name.split(".")[0] == name]
        return found[0] if found else None

    def read(self, name: str) -> bytes | None:
        """The content of the file called `name`, or None if it is not there or damaged."""
        path = self.path(name)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError as error:
            log.warning("cannot read %s (%s): it is made anew", path, error.strerror)
            return None
        if _digest(content) != path.name.split(".")[1]:
            self.set_aside(name, "its content does not match its hash")
            return None
        return content

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The file called `name` as plain data, or None if it is not there or damaged."""
        content = self.read(name)
        return None if content is None else json.loads(content)

    def write(self, name: str, ending: str, content: bytes) -> Path:
        """Write a file under its name, the hash of its content and `ending`, all or nothing.

        Raises StoreError when the disk is full or the folder cannot be written.
        """
        final = self.folder / f"{name}.{_digest(content)}.{ending}"
        write_atomically(final, content, "stages.dir")
        return final

    def write_json(self, name: str, content: dict[str, Any]) -> Path:
        """Write plain data; a no-op if it is there already with the same content."""
        data = json.dumps(content, indent=1, sort_keys=True).encode()
        return self.write(name, "json", data)

    def remove(self, name: str) -> None:
        """Delete the file called `name`, if it is there."""
        path = self.path(name)
        if path is not None:
            path.unlink(missing_ok=True)

    def set_aside(self, name: str, why: str) -> None:
        """Move a file that cannot be trusted out of the way, and say so."""
        path = self.path(name)
        if path is None:
            return
        aside = self.store / DAMAGED / self.key
        aside.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, aside / f"{path.name}.{secrets.token_hex(3)}")
            log.warning("%s: %s; set aside in %s, made anew", path, why, aside)

    def _files(self, prefix: str) -> list[Path]:
        return sorted(
            path
            for path in self.folder.glob(f"{prefix}*")
            if path.name.count(".") == 2 and not path.name.startswith(TEMPORARY)
        )

    # -- the lock -------------------------------------------------------------------------------

    def lock(self, wait_s: float) -> bool:
        """Try for `wait_s` seconds to become the one process that writes this stage.

        The operating system frees the lock when its holder ends, however it ends.
        """
        if self._lock is not None:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock")
            lock.acquire(timeout=wait_s, poll_interval=0.05)
        except Timeout:
            return False
        except OSError as error:
            raise StoreError(_cannot_write(self.folder, error, "stages.dir")) from error
        self._lock = lock
        for left_over in self.folder.glob(f"{TEMPORARY}*"):
            left_over.unlink(missing_ok=True)
        return True

    @property
    def locked(self) -> bool:
        """Whether this process is the writer."""
        return self._lock is not None

    def unlock(self) -> None:
        """Let others write this stage."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def write_atomically(final: Path, content: bytes, setting: str) -> None:
    """Write a file so that it is there whole or not at all, also after a crash of the machine.

    Raises StoreError naming `setting` when the disk is full or the folder cannot be written.
    """
    temporary = final.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(_cannot_write(final.parent, error, setting)) from error


def _cannot_write(folder: Path, error: OSError, setting: str) -> str:
    return (
        f"cannot write to {folder} ({error.strerror}): make room there or point {setting} "
        "elsewhere; nothing stored so far is lost, the same command goes on from it"
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
