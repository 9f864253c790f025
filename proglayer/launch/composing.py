"""What went wrong while Hydra composed settings, in one line that names the cause.

Hydra's own errors about files are tracebacks, or name the consequence: a file without its package
line ends in "Key 'experiment' is not in struct". So the files are looked at once an error is there.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml.parser import ParserError

from proglayer.errors import ConfigError, first_line
from proglayer.launch.overrides import KNOWN, unknown_setting, unreadable

HEADER = "# @package _global_"
# Groups whose files set what they like, at the top level.
GLOBAL_GROUPS = ("experiment", "local")
# What OmegaConf says of a setting that there is not.
UNKNOWN = re.compile(r"Key '[^']+' (?:is not in struct|not in '[^']*')\s+full_key: (\S+)")
FILE_ERRORS = (yaml.YAMLError, UnicodeDecodeError, RecursionError)
# What composing raises, but for OSError. OverflowError: an integer that no float can hold.
COMPOSING_ERRORS = (HydraException, OmegaConfBaseException, OverflowError, *FILE_ERRORS)


def in_one_line(error: BaseException) -> str:
    """What composing raised, with the nearest setting where a name is unknown."""
    whole = f"{error}\n{error.__cause__ or ''}"
    first = " ".join(first_line(error).split())
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        if problem := file_problem(cause):
            return problem
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    if unknown := UNKNOWN.search(whole):
        return _unknown_in_file(unknown[1])
    missing = re.search(
        r"Could not find '([^']+)/([^'/]+)'.*Available options in [^\n]+\n(.*)Config search path",
        whole,
        re.DOTALL,
    )
    if missing:
        group, choice, options = missing[1], missing[2], missing[3].split()
        below = [path.parent.name for path in (_conf() / group).glob(f"*/{choice}.yaml")]
        close = [f"{folder}/{choice}" for folder in below]
        close = close or difflib.get_close_matches(choice, options, n=1)
        near = f"; did you mean {group}={close[0]}?" if close else ""
        return f"{group} has no choice {choice}{near} (choices: {', '.join(options)})"
    if first.startswith("Ambiguous value"):
        return f"{first}: to sweep over several values, add -m"
    if absolute := re.search(r"Could not override '[^'/]+/([^'@/]+)@", whole):
        return f"{first} Write it with a slash: override /{absolute[1]}"
    if (key := getattr(error, "full_key", None)) and key not in first:
        first = f"{key}: {first}"
    if error.__cause__ is not None:
        return f"{first}: {first_line(error.__cause__)}"
    if first.endswith(":"):  # what was wrong stands in the lines below
        return " ".join(str(error).split())
    return first


def _unknown_in_file(name: str) -> str:
    """What to write for a name that is no setting where it stands."""
    if name in GLOBAL_GROUPS:
        return f"{name} is chosen in the list of defaults: - override /{name}: ..."
    if name in KNOWN:
        nested = name.replace(".", ": {") + ": ..." + "}" * name.count(".")
        return f"{name} is written in a file as {nested}"
    return unknown_setting(name)


def file_problem(error: BaseException) -> str | None:
    """Say which file of settings is to blame for an error while composing, and how to mend it.

    Returns None where no file is found to be.
    """
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {_yaml_problem(error)}"
    if isinstance(error, UnicodeDecodeError):
        return next(filter(None, map(_not_utf8, _files())), None)
    if isinstance(error, RecursionError):
        return _circle()
    unknown = UNKNOWN.search(str(error))
    group = unknown[1].split(".")[0] if unknown else None
    if group not in GLOBAL_GROUPS:
        return None
    return next(filter(None, map(_header_problem, _files(group))), None)


def _content(path: Path) -> Any:
    """What a file of settings holds; None where it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        return "a tab, which YAML takes for no indentation: use spaces"
    if duplicate := re.fullmatch(r"found duplicate key (.*)", problem):
        return f"{duplicate[1]} is given twice: keep one"
    if isinstance(error, ParserError) and error.context_mark is not None:
        return f"{problem} ({error.context}, begun in line {error.context_mark.line + 1})"
    return problem


def _files(group: str = "**") -> Iterator[Path]:
    """The files of settings of a group, or all, beside the script that runs."""
    yield from sorted(_conf().glob(f"{group}/*.yaml"))


def _conf() -> Path:
    return Path(sys.argv[0]).absolute().parent / "conf"


def _not_utf8(path: Path) -> str | None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        return f"{path}, line {line}: this is not UTF-8: save the file as UTF-8"
    return None


def _header_problem(path: Path) -> str | None:
    """What keeps a file of a global group from setting anything at the top level."""
    named = path.parent.name == "local" or any(
        re.search(rf"\b{re.escape(path.stem)}\b|\*", argument)
        for argument in sys.argv[1:]
        if path.parent.name in argument
    )
    text = path.read_text(encoding="utf-8", errors="replace")
    if not named or text.startswith(HEADER):
        return None
    if text.startswith("\ufeff"):
        return f"{path} starts with a byte order mark: save it as UTF-8 without one"
    what = "is empty" if not text.strip() else f"does not begin with {HEADER!r}"
    return f"{path} {what}: write {HEADER!r} as its first line, and settings below it"


def _circle() -> str | None:
    """The files whose defaults name each other in a circle."""
    names = {f"{path.parent.name}/{path.stem}": path for path in _files()}
    arrows: dict[str, set[str]] = {}
    for name, path in names.items():
        content = _content(path)
        defaults = content.get("defaults") if isinstance(content, dict) else None
        for entry in defaults if isinstance(defaults, list) else ():
            chosen = entry if isinstance(entry, dict) else {path.parent.name: entry}
            arrows.setdefault(name, set()).update(
                f"{str(group).split('/')[-1]}/{choice}" for group, choice in chosen.items()
            )
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        return f"{names[error.args[1][0]]} includes itself ({circle}): take it out of its defaults"
    return None
