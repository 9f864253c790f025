"""The code as it was when jobs were submitted, kept for the jobs to run from.

A job in a queue starts in a process of its own, maybe days later. By then the checkout may be on
another branch, and an edit half done. So the package is copied into the folder of its sweep. The
copy is named by its content: submitting again leaves what earlier jobs wait to run from, and adds
a copy only if something changed.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from proglayer import files
from proglayer.errors import ConfigError, raised_as

PACKAGE = Path(__file__).resolve().parent.parent
COMPILED = "__pycache__"


def snapshot_code(sweep: Path, package: Path = PACKAGE) -> Path:
    """Copy this package into a sweep's folder, and return the folder to import it from.

    Raises ConfigError where that cannot be written.
    """
    mend = ": make room, or set hydra.sweep.dir"
    with raised_as(ConfigError, f"cannot keep the code in {sweep}", OSError, then=mend):
        there = sweep / f".code-{digest(package)[:12]}"
        if not there.is_dir():
            with files.new_folder(sweep, f".tmp-{there.name}") as temporary:
                ignore = shutil.ignore_patterns(COMPILED, ".*")
                shutil.copytree(package, temporary / package.name, ignore=ignore)
                files.put_in_place(temporary, there)
    return there


def digest(package: Path) -> str:
    """Return a hash of all files of a package; empty where it cannot be read."""
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        parts = path.relative_to(package).parts
        if path.is_file() and not any(part == COMPILED or part[0] == "." for part in parts):
            content = path.read_bytes()
            whole.update(f"{'/'.join(parts)}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()
