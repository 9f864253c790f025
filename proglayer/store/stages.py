"""The store of stages: trained phases on disk, each under the key of all it depends on.

A stage is a folder of files that are never changed once written:

    stage.<hash>.json                      what the stage is
    epoch-0003.<hash>.json                 metrics of one epoch
    exits-0002.<hash>.json                 every exit, evaluated at a selected epoch (0: the start)
    gradients-0001.<hash>.json             the new layers' part of the gradient right after a growth
    optimizer-0002.<hash>.safetensors      what the optimizer of a later phase takes over
    test-0002.<hash>.json                  the last exit on the test text, at a selected epoch
    weights-0002.<hash>.safetensors        the model after an epoch that a stopping rule can select
    state-0003-000120.<hash>.safetensors   what training needs to go on from epoch 3, step 120
    used/1f3a9c2b4d5e.<hash>.json          a run that reads this stage

Every file is written to a temporary name, synced and renamed. The hash in its name is of FORMAT,
its stage, its name and its content, so what is damaged, cut short, or of another stage or version
shows when it is read. It is then set aside under `.damaged` and counts as not there.

A store is a folder that says so: it holds MARKER, which the first run that uses it writes. In it,
what does not carry all our marks is foreign: a stage's folder is named by the hash of its
description, and files are named as above. What is foreign is never deleted, moved or followed.

    python -m proglayer.store list | verify | prune      what is there, is it whole, make room
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from proglayer import files
from proglayer.errors import StoreError
from proglayer.files import TEMPORARY, TEMPORARY_FORM
from proglayer.store.record import JOBS, RESULT, read_jobs

log = logging.getLogger(__name__)

# Raise by hand whenever the same key would stand for different numbers, or a file's form changes.
FORMAT = 2
DAMAGED = ".damaged"
LOCK = "lock"
# What makes a folder a store, and the form of what lies in it: raise the number by hand.
MARKER = ".proglayer-store.json"
STORE_FORMAT = 1
SAYS = "a store of trained phases"
SETTING = "stages.dir"
# Apart from the rest: a thousand runs may read a stage, and every look for a file lists its folder.
USED = "used"
# So long after a run began to read a stage, it no longer counts that the run might come back.
FORGET_AFTER_S = 30 * 86_400.0
# A run that reuses nothing has a store of its own in its folder, of this and a random name.
PRIVATE = ".stages"
IN_USE = ".proglayer-store.lock"
# So many names of what is not ours are printed.
MOST_NAMED = 20

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

T = TypeVar("T")


class NotAStoreError(StoreError):
    """A folder that is no store, or not this run's: the message says which and what to do."""


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
            files.delete(path, self._is_ours)

    @property
    def description(self) -> dict[str, Any] | None:
        """What the stage is; None unless its key is the hash of that."""
        for path in self._files("stage."):
            description = _unverified(path)
            with contextlib.suppress(ValueError):
                if description and stage_key(description) == self.key:
                    return description
        return None

    @property
    def is_proven(self) -> bool:
        """Whether a file shows by its hash that the folder is of this stage, if not all do."""
        for path in self._files(""):
            with contextlib.suppress(OSError):
                name, digest, _ = path.name.split(".")
                if self._digest(name, path.read_bytes()) == digest:
                    return True
        return False

    def foreign(self) -> list[Path]:
        """What lies in the folder and is not ours."""
        found = []
        for part in (self.folder, self.notes.folder):
            if not files.is_folder(part):
                continue
            for entry in list(os.scandir(part)):
                path = Path(entry.path)
                if path == self.notes.folder and entry.is_dir(follow_symlinks=False):
                    continue
                if not (entry.is_file(follow_symlinks=False) and is_stored(self.store, path)):
                    found.append(path)
        return found

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
            log.warning("%s: %s; set aside in %s, made anew", path, why, aside)
        self.damaged.append(path.name)

    def _leave_out(self, path: Path, why: str) -> None:
        self._left_out.add(path)
        log.warning("%s: %s; it is made anew", path, why)

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
        for left_over in self.folder.glob(f"{TEMPORARY}*"):
            files.delete(left_over, files.named(TEMPORARY_FORM))
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


# ---------------------------------------------------------------------------------------------
# What makes a folder a store


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
    content = _unverified(path) if files.is_ours(path, files.everything) else {}
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
        # One that takes no marker takes no stages either, which is told then, or it needs none.
        with contextlib.suppress(StoreError):
            _write_marker(store)


def _write_marker(store: Path, **more: str) -> None:
    content = {"proglayer": SAYS, "format": STORE_FORMAT, **more}
    data = json.dumps(content, indent=1).encode() + b"\n"
    files.write_atomically(store / MARKER, data, SETTING, _is_marker)


def _is_marker(path: Path) -> bool:
    return _unverified(path).get("proglayer") == SAYS


def _holds_stages_alone(store: Path) -> bool:
    """Whether nothing in a folder is foreign; so for one that is not there."""
    if not store.is_dir():
        return not os.path.lexists(store)
    try:
        entries = list(os.scandir(store))
        return not any(True for entry in entries for _ in _foreign(store, entry))
    except OSError:
        return False


def _foreign(store: Path, entry: os.DirEntry[str]) -> Iterator[Path]:
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
    def is_described(self) -> bool:
        """Whether its key is the hash of its description: else nothing of it is deleted."""
        return bool(self.description)

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


@dataclass
class Contents:
    """What lies in a store: stages, and what is not ours."""

    stages: list[Kept] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)


def look_over(store: Path) -> Contents:
    """Every stage of a store, in no order, and everything foreign in it."""
    contents = Contents()
    for entry in list(os.scandir(store)) if store.is_dir() else ():
        foreign: list[Path] = []
        with contextlib.suppress(FileNotFoundError):  # a sweep may be at work here
            foreign = list(_foreign(store, entry))
            is_stage = re.fullmatch(KEY_FORM, entry.name) and Path(entry.path) not in foreign
            if is_stage and (kept := _kept(Stage(store, entry.name))):
                contents.stages.append(kept)
        contents.foreign += foreign
    contents.foreign.sort()
    return contents


def stages_in(store: Path) -> list[Kept]:
    """Every stage of a store, in no order."""
    return look_over(store).stages


def _kept(stage: Stage) -> Kept | None:
    """A stage as the store lists it; None for what is left of a deleted one."""
    own = stage._files("")
    if not own:
        return None
    stats = [path.stat() for path in [*own, *stage.notes._files("")]]
    return Kept(
        stage,
        stage.description or {},
        len(stage.names("epoch-")),
        sum(stat.st_size for stat in stats),
        time.time() - max(stat.st_mtime for stat in stats),
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
        if kept.is_described and kept.stage.key not in needed and (too_old or too_much):
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

    The lock's file stays: others may be waiting at it, and must meet at the same one. So does what
    is not ours.
    """
    if stage.description is None or not stage.lock(0):
        return False
    try:
        if stage.needed:
            return False
        for part in (stage, stage.notes):
            for path in part._files(""):
                files.delete(path, part._is_ours)
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
    if options.action == "prune" and options.max_size is None and options.max_age is None:
        parser.error("prune needs --max-size or --max-age")
    if not options.dir.is_dir():
        print(f"error: no store at {options.dir}: name one with --dir", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if options.action != "list":
        try:
            if read_marker(options.dir) is None:
                raise NotAStoreError(
                    f"{options.dir} does not say that it is a store (it has no {MARKER}), so "
                    "nothing in it is changed: name a store with --dir; a run marks the one that "
                    "it uses, if nothing else is in it"
                )
        except NotAStoreError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    contents = look_over(options.dir)
    stages = sorted(contents.stages, key=lambda kept: kept.age)
    if options.action == "list":
        _print(stages)
        _print_foreign(contents.foreign)
        return 0
    if options.action == "verify":
        ours = [kept for kept in stages if kept.description.get("format", FORMAT) == FORMAT]
        damaged = sum(len(verify(kept.stage)) for kept in ours)
        print(f"{len(ours)} stages read, {damaged} damaged files set aside")
        if len(ours) < len(stages):
            print(f"{len(stages) - len(ours)} stages of another version left unread")
        _print_foreign(contents.foreign)
        return int(damaged > 0)
    freed = 0
    for kept in prunable(stages, options.max_size, options.max_age):
        if options.dry_run or delete(kept.stage):
            freed += kept.size
            print(
                f"{'would delete' if options.dry_run else 'deleted'} {kept.stage.key}: {kept.title}"
            )
    print(f"{freed / 1e6:,.1f} MB {'would be freed' if options.dry_run else 'freed'}")
    _print_foreign(contents.foreign)
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


def _print_foreign(foreign: Sequence[Path]) -> None:
    from proglayer.console import one_line

    if foreign:
        print(f"{len(foreign)} foreign files and folders, left as they are:")
    for path in foreign[:MOST_NAMED]:
        print(f"  {one_line(str(path))}")
    if len(foreign) > MOST_NAMED:
        print(f"  and {len(foreign) - MOST_NAMED} more")


def _unverified(path: Path | None) -> dict[str, Any]:
    """A file's plain data, for looking over a store: whatever cannot be read is empty."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text()) if path is not None else {}
        return content if isinstance(content, dict) else {}
    return {}


def _status(run: Path) -> str | None:
    """How a run ended; None without a record."""
    return _unverified(run / RESULT).get("status")


def _has_jobs_left(sweep: Path) -> bool:
    """Whether the folder lists jobs that have no record; so, too, if its list cannot be read."""
    if not (sweep / JOBS).exists():
        return False
    try:
        return any(not (sweep / job.folder / RESULT).exists() for job in read_jobs(sweep))
    except (OSError, ValueError):
        return True


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
