"""A model that others trained, in the files of `transformers`: where it lies, and what it is.

A folder, or a name of the hub at one commit. Its weights are safetensors; code that it may carry is
never run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proglayer.errors import ConfigError, first_line

CONFIG_FILE = "config.json"
WEIGHTS_FILES = "*.safetensors"
# What is fetched from the hub: the weights, and what says how to read them and the text.
FETCHED = ("*.json", "*.txt", "*.model", "*.jinja")
NAME_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
        """A hash of its settings and weights, wherever they lie. Raises ConfigError."""
        try:
            stats = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in self.weights]
            hashes = [_hash_of_file(*each) for each in stats]
        except OSError as error:
            raise ConfigError(
                f"model.path={self.folder}: its weights cannot be read ({error.strerror})"
            ) from error
        identity = json.dumps([self.config, hashes], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()


def open_pretrained(path: str, revision: str | None, weights: bool = True) -> Pretrained:
    """Find the model that `model.path` names, in a folder or on the hub.

    weights: whether they are needed; without them nothing large is fetched.

    Raises ConfigError where there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"model.revision={revision} is of the hub, and model.path={path} is a folder: "
                "leave it null"
            )
        commit = None
    elif folder.exists():
        raise ConfigError(f"model.path={path} is a file: give the folder that holds {CONFIG_FILE}")
    else:
        folder, commit = _from_hub(path, revision, weights)
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        found = Pretrained(folder, commit, dict(config))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.path={path}: its {CONFIG_FILE} cannot be read ({first_line(error)}): "
            "save_pretrained of transformers writes one"
        ) from error
    if weights and not found.weights:
        raise ConfigError(
            f"model.path={path} holds no {WEIGHTS_FILES}: weights in other forms can run code and "
            "are not read"
        )
    return found


def _from_hub(name: str, revision: str | None, weights: bool) -> tuple[Path, str]:
    """The folder of a snapshot of the hub, fetched or of its cache, and its commit."""
    if not NAME_ON_HUB.fullmatch(name):
        raise ConfigError(f"model.path={name} is no folder, nor a name of the hub (owner/name)")
    from huggingface_hub import snapshot_download

    wanted = [*FETCHED, WEIGHTS_FILES] if weights else [CONFIG_FILE]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the library raises many kinds
        at = "" if revision is None else f" at model.revision={revision}"
        raise ConfigError(
            f"model.path={name} is no folder, and cannot be had from the hub{at} "
            f"({first_line(error)})"
        ) from error
    return folder, folder.name


@functools.cache
def _hash_of_file(path: Path, modified: int, size: int) -> str:
    """The hash of a file's content. The other arguments tell when it has to be read anew."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
