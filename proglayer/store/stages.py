"""The store of stages: trained phases on disk, each under the key of all it depends on.

A stage is a folder of files that are never changed once written:

    stage.<hash>.json                      what the stage is
    epoch-0003.<hash>.json                 metrics of one epoch
    exits-0002.<hash>.json                 every exit, evaluated at a selected epoch
    weights-0002.<hash>.safetensors        the model after an epoch that a stopping rule can select
    state-0003-000120.<hash>.safetensors   what training needs to go on from epoch 3, step 120
    used/1f3a9c2b4d5e.<hash>.json          a run that reads this stage

Every file is written to a temporary name, synced and renamed. The hash in its name is of FORMAT,
its stage, its name and its content, so what is damaged, cut short, or of another stage or version
shows when it is read. It is then set aside under `.damaged` and counts as not there.

    python -m proglayer.stages list | verify | prune      what is there, is it whole, make room
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# Raise by hand whenever the same key would stand for different numbers, or a file's form changes.
FORMAT = 2
DAMAGED = ".damaged"
TEMPORARY = ".tmp-"
# Apart from the rest: a thousand runs may read a stage, and every look for a file lists its folder.
USED = "used"
# So long after a run began to read a stage, it no longer counts that the run might come back.
FORGET_AFTER_S = 30 * 86_400.0

T = TypeVar("T")


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
        write_atomically(final, content, "stages.dir")
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
        """Note that the run in the folder `run` reads this stage."""
        folder = str(run.resolve())
        name = hashlib.sha256(folder.encode()).hexdigest()[:12]
        self.notes.write_json(name, {"run": folder})

    def readers(self) -> Iterator[tuple[Path, float]]:
        """The folders of all runs that read this stage, and how many seconds ago they began to."""
        for note in self.notes._files(""):
            with contextlib.suppress(FileNotFoundError):
                if run := _unverified(note).get("run"):
                    yield Path(run), time.time() - note.stat().st_mtime

    def users(self) -> list[Path]:
        """The folders of the runs that read this stage and are still there."""
        return [run for run, _ in self.readers() if run.is_dir()]

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
            path.unlink(missing_ok=True)

    def _digest(self, name: str, content: bytes) -> str:
        digest = hashlib.sha256(f"{FORMAT} {self.key} {name}\n".encode())
        digest.update(content)
        return digest.hexdigest()[:32]

    def _set_aside(self, path: Path, why: str) -> None:
        """Move a file that cannot be trusted out of the way, and say so."""
        aside = self.store / DAMAGED / self.key
        try:
            aside.mkdir(parents=True, exist_ok=True)
            os.replace(path, aside / f"{path.name}.{secrets.token_hex(3)}")
        except FileNotFoundError:  # set aside by another process
            return
        except OSError as error:
            self._leave_out(path, f"{why}, and it cannot be set aside ({error.strerror})")
        else:
            log.warning("%s: %s; set aside in %s, made anew", path, why, aside)
        self.damaged.append(path.name)

    def _leave_out(self, path: Path, why: str) -> None:
        self._left_out.add(path)
        log.warning("%s: %s; it is made anew", path, why)

    def _files(self, prefix: str) -> list[Path]:
        return sorted(
            path
            for path in self.folder.glob(f"{prefix}*")
            if path.name.count(".") == 2
            and not path.name.startswith(TEMPORARY)
            and path not in self._left_out
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


# ---------------------------------------------------------------------------------------------
# python -m proglayer.stages


@dataclass(frozen=True)
class Kept:
    """A stage as the store lists it: `size` in bytes, `age` in seconds since its last writing."""

    stage: Stage
    description: dict[str, Any]
    epochs: int
    size: int
    age: float
    users: tuple[Path, ...]

    @property
    def title(self) -> str:
        """What it is, for people."""
        phase = self.description.get("phase")
        if not phase:
            return "(not described)"
        parts = [
            f"phase {phase['index'] + 1}",
            f"{phase['layers']} layers",
            f"seed {phase['seed']}",
        ]
        parts.append(f"dim {phase['architecture']['dim']}")
        trained = sum(weight > 0 for weight in phase["exit_weights"])
        parts.append("1 exit" if trained == 1 else f"{trained} exits")
        return ", ".join(parts)


def stages_in(store: Path) -> Iterator[Kept]:
    """Every stage of a store, in no order."""
    for folder in store.iterdir() if store.is_dir() else ():
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        stage = Stage(store, folder.name)
        with contextlib.suppress(FileNotFoundError):  # a sweep may be at work here
            files = [*os.scandir(folder)]
            if stage.notes.folder.is_dir():
                files += os.scandir(stage.notes.folder)
            stats = [entry.stat() for entry in files if entry.is_file()]
            if not stage.names(""):
                continue
            yield Kept(
                stage,
                _unverified(stage.path("stage")),
                len(stage.names("epoch-")),
                sum(stat.st_size for stat in stats),
                time.time() - max((stat.st_mtime for stat in stats), default=time.time()),
                tuple(stage.users()),
            )


def prunable(stages: Sequence[Kept], max_bytes: int | None, max_age_s: float | None) -> list[Kept]:
    """The stages to delete, oldest first, so that the rest keep to both limits.

    What an unfinished run reads stays, and so does every stage that it grew from.
    """
    by_key = {kept.stage.key: kept for kept in stages}
    needed: set[str] = set()
    for kept in stages:
        key: str | None = kept.stage.key if kept.stage.needed else None
        while key in by_key and key not in needed:
            needed.add(key)
            parent = by_key[key].description.get("parent")
            key = parent["key"] if isinstance(parent, dict) else None
    total = sum(kept.size for kept in stages)
    chosen = []
    for kept in sorted(stages, key=lambda kept: -kept.age):
        too_old = max_age_s is not None and kept.age > max_age_s
        too_much = max_bytes is not None and total > max_bytes
        if kept.stage.key not in needed and (too_old or too_much):
            chosen.append(kept)
            total -= kept.size
    return chosen


def verify(stage: Stage) -> list[str]:
    """Read every file of a stage; the names of those that were damaged, now set aside.

    A job at work may take files away meanwhile: they are no damage.
    """
    parts = (stage, stage.notes)
    for part in parts:
        for name in part.names(""):
            part.read(name)
    return [name for part in parts for name in part.damaged]


def delete(stage: Stage) -> bool:
    """Delete a stage's files, unless a process is writing it right now or a run came to need it.

    The lock's file stays: others may be waiting at it, and must meet at the same one.
    """
    if not stage.lock(0):
        return False
    try:
        if stage.needed:
            return False
        for part in (stage, stage.notes):
            for path in part._files(""):
                path.unlink(missing_ok=True)
    finally:
        stage.unlock()
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Gives the exit status: 1 if files were damaged, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.stages", description="Trained phases."
    )
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(os.environ.get("PROGLAYER_STAGES") or "multirun/.stages"),
        help="the store (default: $PROGLAYER_STAGES, else multirun/.stages)",
    )
    parser.add_argument("--max-size", type=_bytes, help="prune: keep at most this much, as in 20GB")
    parser.add_argument(
        "--max-age", type=_seconds, help="prune: keep nothing older, as in 30d, 12h"
    )
    parser.add_argument("--dry-run", action="store_true", help="prune: say what would go")
    options = parser.parse_args(arguments)
    if not options.dir.is_dir():
        print(f"error: no store at {options.dir}: name one with --dir", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    stages = sorted(stages_in(options.dir), key=lambda kept: kept.age)
    if options.action == "list":
        _print(stages)
        return 0
    if options.action == "verify":
        ours = [kept for kept in stages if kept.description.get("format", FORMAT) == FORMAT]
        damaged = sum(len(verify(kept.stage)) for kept in ours)
        print(f"{len(ours)} stages read, {damaged} damaged files set aside")
        if len(ours) < len(stages):
            print(f"{len(stages) - len(ours)} stages of another version left unread")
        return int(damaged > 0)
    if options.max_size is None and options.max_age is None:
        parser.error("prune needs --max-size or --max-age")
    freed = 0
    for kept in prunable(stages, options.max_size, options.max_age):
        if options.dry_run or delete(kept.stage):
            freed += kept.size
            print(
                f"{'would delete' if options.dry_run else 'deleted'} {kept.stage.key}: {kept.title}"
            )
    print(f"{freed / 1e6:,.1f} MB {'would be freed' if options.dry_run else 'freed'}")
    return 0


def _print(stages: Sequence[Kept]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("stage", "what", "epochs", "MB", "age", "used by"):
        table.add_column(name, justify="right" if name in ("epochs", "MB", "age") else "left")
    for kept in stages:
        days, seconds = divmod(int(kept.age), 86_400)
        age = f"{days} d" if days else f"{seconds // 3600} h {seconds % 3600 // 60} min"
        users = ", ".join(sorted("/".join(run.parts[-2:]) for run in kept.users))
        row = (kept.stage.key[:12], kept.title, str(kept.epochs), f"{kept.size / 1e6:,.1f}", age)
        table.add_row(*row, users or "nothing")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    total = sum(kept.size for kept in stages)
    console.print(f"{len(stages)} stages, {total / 1e6:,.1f} MB")


def _unverified(path: Path | None) -> dict[str, Any]:
    """A file's plain data, for looking over a store: whatever cannot be read is empty."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text()) if path is not None else {}
        return content if isinstance(content, dict) else {}
    return {}


def _status(run: Path) -> str | None:
    """How a run ended; None without a record."""
    return _unverified(run / "result.json").get("status")


def _has_jobs_left(sweep: Path) -> bool:
    """Whether the folder lists jobs that have no record."""
    return any(
        not (sweep / job / "result.json").exists() for job in _unverified(sweep / "jobs.json")
    )


def _bytes(text: str) -> int:
    units = {"": 1, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000, "T": 1_000_000_000_000}
    match = re.fullmatch(r"([0-9.]+) *([KMGT]?)B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no size: write 500MB, 20GB")
    return int(float(match[1]) * units[match[2]])


def _seconds(text: str) -> float:
    units = {"d": 86_400, "h": 3_600, "m": 60}
    match = re.fullmatch(r"([0-9.]+) *([dhm])", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no age: write 30d, 12h, 5m")
    return float(match[1]) * units[match[2]]
