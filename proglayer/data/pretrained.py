"""A model that others trained, in the files of `transformers`: where it lies, and what it is.

A folder, or a name of the hub at one commit. Its weights are safetensors; code that it may carry is
never run.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proglayer.data.text import sha256_of
from proglayer.errors import ConfigError, raised_as

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILES = "*.safetensors"
# What is fetched from the hub: the weights, and what says how to read them and the text.
FETCHED = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")


@dataclass(frozen=True)
class Pretrained:
    """A folder of `transformers`.

    revision: the commit, of one from the hub.
    config: the content of its `config.json`.
    """

    folder: Path
    revision: str | None
    config: dict[str, Any]

    @property
    def weights(self) -> list[Path]:
        """The files of its weights."""
        return sorted(self.folder.glob(WEIGHTS_FILES))

    def sha256(self) -> str:
        """Return a hash of its settings and weights, wherever they lie. Raises ConfigError."""
        # What says which weights lie in which file is part of them.
        paths = [*self.weights, *sorted(self.folder.glob("*.safetensors.index.json"))]
        hashes = [_hash_once(path, path.stat().st_mtime_ns) for path in paths]
        identity = json.dumps([self.config, hashes], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()


def open_pretrained(path: str, revision: str | None, weights: bool = True) -> Pretrained:
    """Find the model that `model.path` names, in a folder or on the hub.

    weights: whether they are needed; without them nothing large is fetched.

    Raises ConfigError where there is none.
    """
    few = [CONFIG_FILE, GENERATION_FILE, "README.md"]
    wanted = [*FETCHED, WEIGHTS_FILES] if weights else few
    folder, commit = folder_or_hub("model.path", path, revision, wanted)
    label = f"model.path={path}"
    said = f"{label}: its {CONFIG_FILE} cannot be read"
    with raised_as(ConfigError, said, OSError, TypeError, ValueError):
        config = dict(json.loads((folder / CONFIG_FILE).read_bytes()))
    pretrained = Pretrained(folder, commit, config)
    if weights and not pretrained.weights:
        raise ConfigError(f"{label} holds no {WEIGHTS_FILES}: other forms can run code")
    return pretrained


def folder_or_hub(
    setting: str, name: str, revision: str | None, patterns: Sequence[str]
) -> tuple[Path, str | None]:
    """Return a folder, or the snapshot of the hub of this name with its commit, fetched or cached.

    setting: what names it, for messages. patterns: the files that are wanted of the hub.

    Raises ConfigError where the hub gives no such repository.
    """
    if (folder := Path(name).expanduser()).is_dir():
        return folder, None
    label = f"{setting}={name}" + (f" at revision {revision}" if revision else "")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    said = f"{label} is no folder, and cannot be had from the hub"
    with raised_as(ConfigError, said, Exception):  # the library raises many kinds
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    return folder, folder.name


@functools.cache
def _hash_once(path: Path, modified: int) -> str:
    """Return the hash of a file as it was at this time."""
    return sha256_of(path)
