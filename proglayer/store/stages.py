"""The store of stages: trained phases on disk, each under the key of all it depends on.

A stage is a folder of files that are never changed once written:

    stage.<hash>.json                      what the stage is
    epoch-0003.<hash>.json                 metrics of one epoch
    exits-0002.<hash>.json                 every exit, evaluated at a selected epoch (0: the start)
    trained-0002.<hash>.json               the same, where the trained exits alone are asked for
    gradients-0001.<hash>.json             the new layers' part of the gradient right after a growth
    optimizer-0002.<hash>.safetensors      what the optimizer of a later phase takes over
    test-0002.<hash>.json                  the last exit on the test text, at a selected epoch
    test-0002-81985529216486.<hash>.json   the same on a test split, with a number of its own
    weights-0002.<hash>.safetensors        the model after an epoch that a stopping rule can select
    state-0003-000120.<hash>.safetensors   what training needs to go on from epoch 3, step 120
    used/1f3a9c2b4d5e.<hash>.json          a run that reads this stage

Every file is written to a temporary name, synced and renamed. The hash in its name is of FORMAT,
its stage, its name and its content, so what is damaged, cut short, or of another stage or version
shows when it is read. It is then set aside under `.damaged` and counts as not there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from proglayer import files
from proglayer.errors import StoreError
from proglayer.files import TEMPORARY_FORM
from proglayer.store.reading import read_json

log = logging.getLogger(__name__)

# Raise by hand whenever the same key would stand for different numbers, or a file's form changes.
FORMAT = 3
DAMAGED = ".damaged"
LOCK = "lock"
# What makes a folder a store, and what holds one that is private to a run: see `marker`.
MARKER = ".proglayer-store.json"
IN_USE = ".proglayer-store.lock"
SETTING = "stages.dir"
# Apart from the rest: a thousand runs may read a stage, and every look for a file lists its folder.
USED = "used"
# So long after a run began to read a stage, it no longer counts that the run might come back.
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
FORGET_AFTER_S = 30 * 86_400.0

# The whole names of ours.
KEY_FORM = r"[0-9a-f]{32}"
FILE_FORM = r"[a-z]+(?:-[0-9]+)*\.[0-9a-f]{32}\.(?:json|safetensors)"
NOTE_FORM = r"[0-9a-f]{12}\.[0-9a-f]{32}\.json"
# Every file of a store, by its path in it. What was set aside has a random ending.
STORED_FORM = re.compile(
    rf"{re.escape(MARKER)}|{re.escape(IN_USE)}|{TEMPORARY_FORM}"
    rf"|{KEY_FORM}/(?:{FILE_FORM}|{LOCK}|{TEMPORARY_FORM})"
    rf"|{KEY_FORM}/{USED}/(?:{NOTE_FORM}|{TEMPORARY_FORM})"
    rf"|{re.escape(DAMAGED)}/{KEY_FORM}/(?:{FILE_FORM}|{USED}/{NOTE_FORM})\.[0-9a-f]{{6}}"
)
# Every folder of a store, by its path in it.
STORED_FOLDER = re.compile(rf"{KEY_FORM}(?:/{USED})?|{re.escape(DAMAGED)}")

T = TypeVar("T")

# What a run and a sweep say of themselves in their folders: see `proglayer.run.record`.
RUN_FILE = "run.json"
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Machine:
    """What the bits of a result depend on besides the phase and the corpus."""

    device: str | None
    device_name: str | None
    threads: int | None
    torch: str | None


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
        # What was set aside, by name, and what could not be: that counts as not there.
        self.damaged: list[str] = []
        self._left_out: set[Path] = set()
        self._lock: FileLock | None = None

    # -- files ----------------------------------------------------------------------------------

    def names(self, prefix: str) -> list[str]:
        """The names, without hash and ending, of the files that start with `prefix`, sorted."""
        return sorted({path.name.split(".")[0] for path in self._files(prefix)})

    def path(self, name: str) -> Path | None:
        """The file called `name`, unverified; None if there is none."""
        found = [path for path in self._files(name) if path.name.split(".")[0] == name]
        return found[0] if found else None

    def read(self, name: str, form: Callable[[bytes], T] = bytes) -> T | None:
        """What `form` makes of the file called `name`, or None if there is none that is whole.

        Whatever `form` raises shows that the file is none of ours.
        """
        while (path := self.path(name)) is not None:
            try:
                content = path.read_bytes()
                if self._digest(name, content) == path.name.split(".")[1]:
                    return form(content)
                self._set_aside(path, "it is damaged, or of another stage or version")
            except OSError as error:
                # It may be whole: it stays, and a new one takes its place.
                if os.path.lexists(path):  # and was not deleted since
                    self._leave_out(path, f"it cannot be read ({error.strerror})")
            except MemoryError:
                raise
            except Exception as error:
                self._set_aside(path, f"it has another form ({type(error).__name__}: {error})")
        return None

    def read_json(self, name: str, form: Callable[[Any], T] = dict) -> T | None:
        """What `form` makes of the plain data in the file called `name`; see `read`."""
        return self.read(name, lambda content: form(json.loads(content)))

    def write(self, name: str, ending: str, content: bytes) -> Path:
        """Write a file under its name, its hash and `ending`, all or nothing.

        Raises StoreError when the disk is full or the folder cannot be written.
        """
        final = self.folder / f"{name}.{self._digest(name, content)}.{ending}"
        self._check_folders()
        files.write_atomically(final, content, SETTING, self._is_ours)
        self._left_out.discard(final)
        return final

    def write_json(self, name: str, content: dict[str, Any]) -> Path:
        """Write plain data."""
        data = json.dumps(content, indent=1, sort_keys=True).encode()
        return self.write(name, "json", data)

    @property
    def notes(self) -> Stage:
        """The folder of the notes of who reads this stage."""
        return Stage(self.store, f"{self.key}/{USED}")

    def mark_used(self, run: Path) -> None:
        """Note that the run in the folder `run` reads this stage, where that can be written.

        Without the note `prune` does not know of the run, which then trains again what is missing.
        """
        folder = str(run.resolve())
        name = hashlib.sha256(folder.encode()).hexdigest()[:12]
        try:
            self.notes.write_json(name, {"run": folder})
        except StoreError as error:
            # A store that holds everything may be read-only.
            if getattr(error.__cause__, "errno", None) not in READ_ONLY:
                raise

    def readers(self) -> Iterator[tuple[Path, float]]:
        """The folders of all runs that read this stage, and how many seconds ago they began to."""
        for note in self.notes._files(""):
            with contextlib.suppress(FileNotFoundError):
                run = read_unverified(note).get("run")
                if isinstance(run, str) and run and "\0" not in run:
                    yield Path(run), time.time() - note.stat().st_mtime

    @property
    def needed(self) -> bool:
        """Whether a run that reads it may come back for it, or a job of such a run's sweep may.

        A run that failed, that cannot be seen from this machine, or whose sweep has jobs without a
        record is given FORGET_AFTER_S.
        """
        sweeps = set()
        for run, age in self.readers():
            status = _status(run)
            if run.is_dir() and status not in ("completed", "failed", "pruned"):
                return True
            if age < FORGET_AFTER_S:
                if status != "completed":
                    return True
                sweeps.add(run.parent)
        return any(_has_jobs_left(sweep) for sweep in sweeps)

    def remove(self, name: str) -> None:
        """Delete the file called `name`, if it is there."""
        path = self.path(name)
        if path is not None:
            files.delete(path, self._is_ours)

    @property
    def description(self) -> dict[str, Any] | None:
        """What the stage is; None unless its key is the hash of that."""
        for path in self._files("stage."):
            description = read_unverified(path)
            with contextlib.suppress(ValueError):
                if description and stage_key(description) == self.key:
                    return description
        return None

    @property
    def is_proven(self) -> bool:
        """Whether its description, or a file by its hash, shows that the folder is the stage's."""
        if self.description is not None:
            return True
        for path in self._files(""):
            with contextlib.suppress(OSError):
                name, digest, _ = path.name.split(".")
                if self._digest(name, path.read_bytes()) == digest:
                    return True
        return False

    def _is_ours(self, path: Path) -> bool:
        form = NOTE_FORM if self.folder.name == USED else FILE_FORM
        return path.parent == self.folder and re.fullmatch(form, path.name) is not None

    def _check_folders(self) -> None:
        """Raises StoreError for a link in the place of a folder of the stage."""
        for folder in (self.folder, self.store / self.key.split("/")[0]):
            if folder.is_symlink():
                raise StoreError(
                    f"{folder} is a link, and no link is followed in a store: take it away, or "
                    f"point {SETTING} elsewhere"
                )

    def _digest(self, name: str, content: bytes) -> str:
        digest = hashlib.sha256(f"{FORMAT} {self.key} {name}\n".encode())
        digest.update(content)
        return digest.hexdigest()[:32]

    def _set_aside(self, path: Path, why: str) -> None:
        """Move a file that cannot be trusted out of the way, and say so."""
        aside = self.store / DAMAGED / self.key
        try:
            if (self.store / DAMAGED).is_symlink():
                raise OSError(errno.ELOOP, f"{DAMAGED} is a link")
            aside.mkdir(parents=True, exist_ok=True)
            files.move(path, aside / f"{path.name}.{secrets.token_hex(3)}", self._is_ours)
        except FileNotFoundError:  # set aside by another process
            return
        except OSError as error:
            self._leave_out(path, f"{why}, and it cannot be set aside ({error.strerror})")
        else:
            log.warning("%s: %s; set aside in %s, made again", path, why, aside)
        self.damaged.append(path.name)

    def _leave_out(self, path: Path, why: str) -> None:
        self._left_out.add(path)
        log.warning("%s: %s; it is made again", path, why)

    def _files(self, prefix: str) -> list[Path]:
        """The stage's own files, which no link leads to."""
        try:
            self._check_folders()
            with os.scandir(self.folder) as entries:
                found = [
                    Path(entry.path)
                    for entry in entries
                    if entry.name.startswith(prefix)
                    and self._is_ours(Path(entry.path))
                    and entry.is_file(follow_symlinks=False)
                ]
        except OSError:
            return []
        return sorted(path for path in found if path not in self._left_out)

    # -- the lock -------------------------------------------------------------------------------

    def lock(self, wait_s: float) -> bool:
        """Try for `wait_s` seconds to become the one process that writes this stage.

        The operating system frees the lock when its holder ends, however it ends.
        """
        if self._lock is not None:
            return True
        try:
            self._check_folders()
            self.folder.mkdir(parents=True, exist_ok=True)
            files.check_ours(self.folder / LOCK, files.named(LOCK), SETTING)
            lock = FileLock(self.folder / LOCK)
            lock.acquire(timeout=wait_s, poll_interval=0.05)
        except Timeout:
            return False
        except StoreError:
            raise
        except OSError as error:
            raise files.cannot_write(self.folder, error, SETTING) from error
        self._lock = lock
        files.delete_left_over(self.folder)
        # Notes are written without the lock.
        files.delete_left_over(self.notes.folder, older_than_s=86_400.0)
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


def is_stored(store: Path, path: Path) -> bool:
    """Whether a path in a store has the form of ours."""
    return STORED_FORM.fullmatch(path.relative_to(store).as_posix()) is not None


def read_unverified(path: Path | None) -> dict[str, Any]:
    """A file's plain data, for looking over a store: whatever cannot be read is empty."""
    with contextlib.suppress(OSError, ValueError):
        content = read_json(path) if path is not None else {}
        return content if isinstance(content, dict) else {}
    return {}


def _status(run: Path) -> str | None:
    """How a run stands; None without a record."""
    return read_unverified(run / RUN_FILE).get("state")


def _has_jobs_left(sweep: Path) -> bool:
    """Whether the folder lists jobs that did not begin; so, too, if its list cannot be read."""
    if not (sweep / SWEEP_FILE).exists():
        return False
    jobs = read_unverified(sweep / SWEEP_FILE).get("jobs")
    if not isinstance(jobs, list):
        return True
    return any(_status(sweep / job["folder"]) in (None, "waiting", "pending") for job in jobs)
