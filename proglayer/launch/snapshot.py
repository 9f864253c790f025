"""The code and `conf/` as they were when jobs were submitted, kept for the jobs to run from.

A job in a queue starts in a process of its own, maybe days later. By then the checkout may be on
another branch, and an edit half done. So what the jobs of a submission run is copied into the
folder of their sweep. The copy is named by its content: submitting again leaves what earlier jobs
wait to run from, and adds a copy only if something changed.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from proglayer import files
from proglayer.errors import StoreError
from proglayer.run.code import ORIGIN, PACKAGE, origin
from proglayer.store.record import GitState, to_dict

# What Hydra reads in a folder of settings; anything else there may be large.
SETTINGS = (".yaml", ".yml")
PLUGINS = "hydra_plugins"


def take(into: Path, conf: Mapping[str, Path], plugins: Path, git: GitState | None) -> Path:
    """Copy this package, our modules in `plugins` and the settings' folders `conf`.

    `conf` names each folder; its copy lies under that name in the folder that is given back, which
    is below `into`. `git` is the state of the code. Raises StoreError.
    """
    folders = {PACKAGE.name: PACKAGE, plugins.name: plugins, **conf}
    copied = {name: str(folder) for name, folder in folders.items()}
    origin = {"git": to_dict(git), "folders": copied}
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode())
    try:
        contents = {
            f"{name}/{path}": (folder / path).read_bytes()
            for name, folder in folders.items()
            for path in _files(name, folder)
        }
        for name, content in sorted(contents.items()):
            digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
        there = into / f"code-{digest.hexdigest()[:12]}"
        if there.is_dir():
            return there
        contents[ORIGIN] = json.dumps(origin, indent=1).encode() + b"\n"
        with files.new_folder(into, f".{there.name}") as temporary:
            for name, content in contents.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                files.write_over(temporary / name, content, files.everything, "hydra.sweep.dir")
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                files.put_in_place(temporary, there)
    except OSError as error:
        raise StoreError(
            f"cannot keep the code beside the sweep ({error.filename}: {error.strerror}): make "
            "room, or set hydra.sweep.dir"
        ) from error
    return there


def changes(package: Path = PACKAGE, code: bool = True) -> list[str]:
    """The files that are no longer what a copy was made from, by name; of settings alone unless
    `code`. Empty where it is no copy.
    """
    made_from = origin(package)
    changed = []
    for name, source in (made_from or {"folders": {}})["folders"].items():
        if not code and name in (PACKAGE.name, PLUGINS):
            continue
        folder, copy = Path(source), package.parent / name
        now, then = set(_files(name, folder)), set(_files(name, copy))
        changed += [
            f"{folder.name}/{path}"
            for path in sorted(now | then)
            if path not in now or path not in then or not _equal(folder / path, copy / path)
        ]
    return changed


def _equal(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return filecmp.cmp(one, other, shallow=False)
    return False


def _files(name: str, folder: Path) -> Iterator[str]:
    """What of a folder is copied, as paths in it."""
    if name == PLUGINS:
        # Installed packages have their plugins in folders beside our files.
        yield from (path.name for path in folder.glob("*.py"))
        return
    for path, folders, names in os.walk(folder):
        folders[:] = [below for below in folders if not below.startswith((".", "__pycache__"))]
        for file in names:
            if name == PACKAGE.name or file.endswith(SETTINGS):
                yield os.path.relpath(os.path.join(path, file), folder)
