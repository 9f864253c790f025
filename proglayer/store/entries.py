"""The store: what phases gave in training, on disk, each under the key of all it depends on.

An entry is a folder, named by its key, of files that are never changed once written:

    trajectory.<hash>.json                 what the key stands for
    epoch-0003.<hash>.json                 metrics of one epoch
    exits-0002.<hash>.json                 every exit, evaluated at a selected epoch (0: the start)
    trained-0002.<hash>.json               the same, where the trained exits alone are asked for
    gradients-0001.<hash>.json             the new layers' part of the gradient right after a growth
    test-0002.<hash>.json                  the last exit on the test text, at a selected epoch
    test-0002-81985529216486.<hash>.json   the same on a test split, with a number of its own
    weights-0002.<hash>.safetensors        the model after an epoch that a stopping rule can select
    optimizer-0002.<hash>.safetensors      what the optimizer of a later phase takes over
    state-0003-000120.<hash>.safetensors   what training needs to go on from epoch 3, step 120
    used/1f3a9c2b4d5e                      a run that reads this entry: the path of its folder

The hash in a file's name is of FORMAT, the key, its name and its content. So what is damaged, cut
short, or of another entry or version shows when it is read: it is deleted, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from proglayer import files
from proglayer.files import RUN_FILE, SWEEP_FILE, FolderKind
from proglayer.training.architecture import later

log = logging.getLogger(__name__)

# Raise by hand whenever the same key would stand for different numbers, or a file's form changes.
FORMAT = 4
KEY_FORM = re.compile(r"[0-9a-f]{32}")
FILE_FORM = re.compile(r"[a-z]+(?:-[0-9]+)*\.[0-9a-f]{32}\.(?:json|safetensors)")
# Apart from the rest: a thousand runs may read an entry, and a look for a file lists its folder.
USED = "used"
# How runs stand that do not come back: see `proglayer.run.record`.
ENDED = ("completed", "failed", "pruned")
MARK = b"The trained phases of proglayer: a cache. `python -m proglayer.store prune` makes room.\n"


@dataclass(frozen=True)
class Machine:
    """What the bits of a result depend on besides the phase and the corpus.

    processes: those that share each batch out, on a device each.
    nodes: of GPUs, the machines that these are on.
    """

    device: str | None
    device_name: str | None
    threads: int | None
    torch: str | None
    processes: int = later(1)
    nodes: int = later(1)


def open_store(store: Path) -> None:
    """Make a folder a store, or see that it is one. Raises ConfigError for a folder of others."""
    files.claim_folder(store, FolderKind.store)
    if not (mark := store / FolderKind.store.mark).exists():
        files.write_atomically(mark, MARK)


def is_store(folder: Path) -> bool:
    return (folder / FolderKind.store.mark).is_file()


def entries_of(store: Path) -> list[Entry]:
    """Give every entry of a store, and nothing that only a link leads to."""
    with os.scandir(store) as there:
        keys = sorted(
            folder.name
            for folder in there
            if KEY_FORM.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False)
        )
    return [Entry(store, key) for key in keys]


def key_of(description: dict[str, Any]) -> str:
    """Hash everything in `description`, which JSON can hold."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Entry:
    """The folder of one trajectory. Reading needs no lock; writing does (see `lock`)."""

    def __init__(self, store: Path, key: str) -> None:
        self.key = key
        self.folder = store / key
        self._lock: FileLock | None = None

    # -- files ----------------------------------------------------------------------------------

    def names(self, prefix: str) -> list[str]:
        """List the names, without hash and ending, of the files that start with `prefix`."""
        return sorted({path.name.split(".")[0] for path in self.files(prefix)})

    def path(self, name: str) -> Path | None:
        """Find the file called `name`, unverified."""
        return next(iter(self.files(f"{name}.")), None)

    def read(self, name: str) -> bytes | None:
        """Read the file called `name`; None if there is none that is whole."""
        for path in self.files(f"{name}."):
            try:
                content = path.read_bytes()
            except OSError:  # removed meanwhile, or not to be read: it is made again
                continue
            if path.name.split(".")[1] == self._digest(name, content):
                return content
            log.warning("%s is damaged, or of another entry or version: it is made again", path)
            with contextlib.suppress(OSError):
                path.unlink()
        return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read plain data; see `read`."""
        content = self.read(name)
        return None if content is None else json.loads(content)

    def write(self, name: str, content: bytes, ending: str = "safetensors") -> Path:
        """Write a file, whole or not at all. Raises StoreError."""
        path = self.folder / f"{name}.{self._digest(name, content)}.{ending}"
        files.write_atomically(path, content)
        return path

    def write_json(self, name: str, content: dict[str, Any]) -> Path:
        """Write plain data. Raises StoreError."""
        return self.write(name, json.dumps(content, indent=1, sort_keys=True).encode(), "json")

    def remove(self, name: str) -> None:
        """Delete the file called `name`, if it is there."""
        for path in self.files(f"{name}."):
            path.unlink(missing_ok=True)

    def files(self, prefix: str = "") -> list[Path]:
        """List the files that start with `prefix`."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        ours = (name for name in names if name.startswith(prefix) and FILE_FORM.fullmatch(name))
        return sorted(self.folder / name for name in ours)

    def _digest(self, name: str, content: bytes) -> str:
        digest = hashlib.sha256(f"{FORMAT} {self.key} {name}\n".encode())
        digest.update(content)
        return digest.hexdigest()[:32]

    # -- the lock -------------------------------------------------------------------------------

    def lock(self, wait_s: float = 0.0) -> bool:
        """Try for `wait_s` seconds to become the one process that writes here."""
        if self._lock is None:
            self._lock = files.lock_folder(self.folder, wait_s)
        return self._lock is not None

    @property
    def locked(self) -> bool:
        """Tell whether this process is the writer."""
        return self._lock is not None

    def unlock(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # -- who needs it ---------------------------------------------------------------------------

    def mark_used(self, run: Path) -> None:
        """Note that the run in the folder `run` reads this, where that can be written.

        Without the note `prune` does not know of the run, which then trains again what is missing.
        """
        folder = str(run.resolve())
        note = self.folder / USED / hashlib.sha256(folder.encode()).hexdigest()[:12]
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(folder, encoding="utf-8")

    def users(self) -> list[Path]:
        """List the folders of the runs that read this and are still there."""
        notes = sorted((self.folder / USED).glob("*"))
        runs = (Path(note.read_text(encoding="utf-8")) for note in notes)
        return [run for run in runs if run.is_dir()]

    def is_needed(self) -> bool:
        """Tell whether a run that reads this has not ended, or another job of its sweep."""
        return any(_is_unfinished(run) for run in self.users())

    def delete(self) -> bool:
        """Delete the entry, unless a process is writing it or a run needs it. Raises OSError."""
        if not self.lock():
            return False
        try:
            if self.is_needed():
                return False
            # So that nobody finds half of it, and who comes now begins a new one.
            gone = self.folder.with_suffix(".pruned")
            shutil.rmtree(gone, ignore_errors=True)
            self.folder.rename(gone)
            shutil.rmtree(gone)
        finally:
            self.unlock()
        return True


def _is_unfinished(run: Path) -> bool:
    """Tell whether a run has not ended, or another job of its sweep."""
    sweep = run.parent
    jobs = [run]
    if (sweep / SWEEP_FILE).exists():
        jobs = [record.parent for record in sweep.glob(f"*/{RUN_FILE}")]
    return any(_state(job) not in ENDED for job in jobs)


def _state(run: Path) -> str | None:
    try:
        return json.loads((run / RUN_FILE).read_bytes()).get("state")
    except (OSError, ValueError):
        return None
