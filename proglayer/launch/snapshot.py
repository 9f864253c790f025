"""The code as it was when jobs were submitted, kept for the jobs to run from.

A job in a queue starts in a process of its own, maybe days later. By then the checkout may be on
another branch, and an edit half done. So the code of a submission is copied into the folder of its
sweep. The copy is named by its content: submitting again leaves what earlier jobs wait to run
from, and adds a copy only if something changed.
"""

from __future__ import annotations

import filecmp
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from proglayer import files
from proglayer.errors import ConfigError
from proglayer.run.code import ORIGIN, PACKAGE, git_state, origin

PLUGINS = "hydra_plugins"
# In the folder of a sweep: the code that its jobs run from.
SUBMITTED = ".submitted"


def snapshot_code(into: Path) -> Path:
    """Copy this package and its plugins of Hydra.

    Returns the copy's folder below `into`, to import from. Raises ConfigError where it cannot be
    written.
    """
    folders = {PACKAGE.name: PACKAGE, PLUGINS: PACKAGE.parent / PLUGINS}
    copied = {name: str(path) for name, path in folders.items()}
    git = git_state()
    made_from = {"git": git and git.model_dump(), "folders": copied}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode())
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
        contents[ORIGIN] = json.dumps(made_from, indent=1).encode() + b"\n"
        with files.new_folder(into, f".{there.name}") as temporary:
            for name, content in contents.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
            try:
                files.put_in_place(temporary, there)
            except OSError:
                if not there.is_dir():  # else somebody submitted the same meanwhile
                    raise
    except OSError as error:
        raise ConfigError(
            f"cannot keep the code beside the sweep ({error.filename}: {error.strerror}): make "
            "room, or set hydra.sweep.dir"
        ) from error
    return there


def changed_files(package: Path = PACKAGE) -> list[str]:
    """The files of which the package in a copy is no longer like its source; none where the package
    is no copy.
    """
    changed = []
    for name, source in (origin(package) or {"folders": {}})["folders"].items():
        folder, copy = Path(source), package.parent / name
        paths = sorted({*_files(name, folder), *_files(name, copy)})
        _, *others = filecmp.cmpfiles(folder, copy, paths, shallow=False)
        changed += [f"{name}/{path}" for path in sorted(itertools.chain(*others))]
    return changed


def _files(name: str, folder: Path) -> Iterator[str]:
    """What of a folder is copied, as paths in it."""
    if name == PLUGINS:
        # Installed packages have their plugins in folders beside our files.
        yield from (path.name for path in folder.glob("*.py"))
        return
    for path, folders, names in os.walk(folder):
        folders[:] = [below for below in folders if not below.startswith((".", "__pycache__"))]
        yield from (os.path.relpath(os.path.join(path, name), folder) for name in names)
