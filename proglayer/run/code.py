"""The state of the code: the checkout that it lies in."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

from proglayer.run.record import GitState

PACKAGE = Path(__file__).resolve().parent.parent


@functools.lru_cache(maxsize=1)
def git_state() -> GitState | None:
    """The checkout this package lies in: its commit, whether files differ from it, and a hash of
    that difference. None outside a checkout.
    """
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
