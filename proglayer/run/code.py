"""The state of the code: the checkout it lies in, or the copy that was made for a job."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from proglayer.run.record import GitState

ORIGIN = "origin.json"
PACKAGE = Path(__file__).resolve().parent.parent


def origin(package: Path = PACKAGE) -> dict[str, Any] | None:
    """Where the code that runs was copied from: its `git` state and `folders` (name -> path).

    None where it is no copy.
    """
    try:
        return json.loads((package.parent / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=1)
def git_state() -> GitState | None:
    """The checkout this package lies in: its commit, whether files differ from it, and a hash of
    that difference. None outside a checkout. Of a copy made for a job, what it was copied from.
    """
    made_from = origin()
    if made_from is not None:
        return GitState(**made_from["git"]) if made_from["git"] else None
    commit = _git("rev-parse", "HEAD").strip()
    if not commit or not _git("ls-files", "--", ".").strip():
        return None
    difference = git_difference()
    digest = hashlib.sha256(difference.encode()).hexdigest()[:12] if difference else None
    return GitState(commit=commit, changed=bool(difference), difference=digest)


@functools.lru_cache(maxsize=1)
def git_difference() -> str:
    """How the tracked files of the checkout differ from its commit; empty outside a checkout."""
    return _git("diff", "HEAD", "--binary")


def _git(*arguments: str) -> str:
    """What git prints about this package's folder; nothing where it fails."""
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout
