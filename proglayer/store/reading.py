"""Reading files that anybody may have written: regular files only, of bounded size and depth."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

# A record of 200 layers, each added by a phase of its own, takes 4 MB.
MOST_BYTES = 16_000_000
# Levels in YAML. Settings have five at most.
MOST_LEVELS = 50


def read_regular(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a file, or of the one that a link points to.

    Raises OSError, also for a device or a pipe, which might never end, and for more bytes.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EINVAL, f"it is larger than {most_bytes / 1e6:.0f} MB", str(path))
    return content


def read_json(path: Path) -> Any:
    """The plain data in a file of JSON. Raises ValueError where it holds none, or OSError."""
    try:
        return json.loads(read_regular(path).decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml(path: Path) -> Any:
    """The plain data in a file of YAML. Raises ValueError where it holds none, or OSError.

    Aliases are refused, as a short file can stand for billions of values with them.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = read_regular(path).decode()
    level = 0
    try:
        for event in yaml.parse(text, loader):
            level += isinstance(event, yaml.CollectionStartEvent)
            level -= isinstance(event, yaml.CollectionEndEvent)
            if level > MOST_LEVELS or isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases, or is nested too deeply")
        return yaml.load(text, loader)
    # The last three are what PyYAML raises for a wrong `!!timestamp`, `!!bool` and the like.
    except (yaml.YAMLError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(str(error)) from error
