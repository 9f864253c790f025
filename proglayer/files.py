"""The only way by which files are written over, moved or deleted.

Runs, stores and reports lie in folders that a user names, beside files that are not ours. So every
function here is given how ours are known, and leaves alone what is not: a file that does not look
so, and whatever is no regular file. A link is never followed. No other module of the package
changes a file that is there; a test holds that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from proglayer.errors import StoreError

# Beside the file that it becomes. `TEMPORARY_FORM` is its whole name.
TEMPORARY = ".tmp-"
TEMPORARY_FORM = r"\.tmp-[0-9]+-[0-9a-f]{8}"
# So much of a file's beginning is looked at to know it.
BEGINNING_BYTES = 512

# Whether a regular file is one of ours, by its name, its place or its content.
Ours = Callable[[Path], bool]


class NotOursError(StoreError):
    """In the place of a file of ours lies something else, which was left as it is."""


# --- what is ours ---------------------------------------------------------------------------------


def begins_with(*starts: bytes) -> Ours:
    """Knows a file by its first bytes, spaces and line breaks apart. An empty one is nobody's."""
    known = tuple(b"".join(start.split()) for start in starts)

    def ours(path: Path) -> bool:
        with open(path, "rb") as file:
            beginning = b"".join(file.read(BEGINNING_BYTES).split())
        return not beginning or beginning.startswith(known)

    return ours


def named(form: str) -> Ours:
    """Knows a file by its whole name, a regular expression: for names that hold a hash of ours."""
    return lambda path: re.fullmatch(form, path.name) is not None


def everything(_: Path) -> bool:
    """For a folder that was just made, under a name that nobody else can have given."""
    return True


def is_ours(path: Path, ours: Ours) -> bool:
    """Whether there is a regular file that `ours` knows. What cannot be looked at is none."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode) and ours(path)
    except OSError:
        return False


def check_ours(path: Path, ours: Ours, setting: str) -> None:
    """Raise NotOursError, naming `setting`, where `path` is taken by something that is not ours."""
    if os.path.lexists(path) and not is_ours(path, ours):
        raise NotOursError(
            f"{path} is there and was not written by proglayer, so it is left as it is: move it, "
            f"or choose another folder with {setting}"
        )


def is_folder(path: Path) -> bool:
    """Whether there is a folder, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


# --- writing --------------------------------------------------------------------------------------


def write_atomically(final: Path, content: bytes, setting: str, ours: Ours) -> None:
    """Write a file so that it is there whole or not at all, also after a crash of the machine.

    Raises StoreError naming `setting` when the disk is full or the folder cannot be written;
    NotOursError where a file that is not ours lies in its place.
    """
    check_ours(final, ours, setting)
    temporary = _temporary(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
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
            os.unlink(temporary)
        raise cannot_write(final.parent, error, setting) from error


def write_over(path: Path, content: bytes, ours: Ours, setting: str) -> None:
    """Write a file in its place, for what may be lost: a reader may find it empty in between.

    Raises OSError; NotOursError, which names `setting`, where a file that is not ours lies there.
    """
    check_ours(path, ours, setting)
    path.write_bytes(content)


def link_or_copy(source: Path, final: Path, setting: str, ours: Ours) -> None:
    """Let `final` be the same file as `source` where links can be had, else a copy of it.

    Raises StoreError naming `setting`; NotOursError where a file that is not ours lies there.
    """
    check_ours(final, ours, setting)
    temporary = _temporary(final)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        # Who edits one of two links edits the other, too.
        with contextlib.suppress(OSError):
            os.chmod(temporary, 0o444)
        os.replace(temporary, final)
    except OSError as error:
        raise cannot_write(final.parent, error, setting) from error
    finally:
        # It is still there where `final` was the same file already.
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def point_to(link: Path, target: str) -> None:
    """Make a link, in place of one that is there. Raises OSError, also for a file in its place."""
    if link.is_symlink():
        os.unlink(link)
    link.symlink_to(target)


def cannot_write(folder: Path, error: OSError, setting: str) -> StoreError:
    """What tells a user that nothing can be written in a folder, and how to go on."""
    return StoreError(
        f"cannot write to {folder} ({error.strerror}): make room there or point {setting} "
        "elsewhere; nothing stored so far is lost, the same command goes on from it"
    )


# --- moving and deleting --------------------------------------------------------------------------


def move(path: Path, to: Path, ours: Ours) -> None:
    """Move a file of ours to a name that is free. Raises OSError; where it is not ours, too."""
    if not os.path.lexists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not is_ours(path, ours) or os.path.lexists(to):
        raise OSError(errno.EPERM, "it is no file of ours, or there is another", str(path))
    os.replace(path, to)


def delete(path: Path, ours: Ours) -> bool:
    """Delete a file of ours; whether that was done. Raises OSError where it cannot be."""
    if not is_ours(path, ours):
        return False
    path.unlink(missing_ok=True)
    return True


def delete_folder(folder: Path, ours: Ours) -> bool:
    """Delete the files of ours in and below a folder, then each folder that is empty.

    Returns:
        whether the folder is gone. It stays with all that is not ours, or cannot be deleted.
    """
    if is_folder(folder):
        for parent, _, names in os.walk(folder, topdown=False):
            for name in names:
                with contextlib.suppress(OSError):
                    delete(Path(parent, name), ours)
            delete_if_empty(Path(parent))
    return not os.path.lexists(folder)


def delete_left_over(folder: Path, older_than_s: float = 0.0) -> None:
    """Delete the temporary files in a folder that processes which were killed left there.

    older_than_s: how old they are to be where others may be writing there now.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - os.lstat(path).st_ctime >= older_than_s:
                delete(path, named(TEMPORARY_FORM))


def delete_if_empty(folder: Path) -> None:
    """Delete a folder that holds nothing."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


@contextlib.contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder to fill, `<name>-<random>` in `parent`; deleted at the end of the block unless it
    was put into its place (`put_in_place`). Raises OSError.
    """
    folder = parent / f"{name}-{secrets.token_hex(8)}"
    parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        delete_folder(folder, everything)


def put_in_place(folder: Path, final: Path) -> None:
    """Give a folder from `new_folder` its name. Raises OSError where something lies there.

    Its files are as open to others as the folder is: a library that writes by way of a temporary
    file leaves it to its owner alone.
    """
    mode = os.stat(folder).st_mode & 0o666
    for path in folder.rglob("*"):
        if is_ours(path, everything):
            os.chmod(path, mode)
    os.rename(folder, final)  # onto an empty folder at most


def _temporary(final: Path) -> Path:
    return final.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
