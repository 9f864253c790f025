"""The command line's overrides, checked before Hydra composes anything from them.

What Hydra accepts without an effect, gives different meanings in a run and in a sweep, or answers
with a traceback is refused here, with what to write in its place.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import OverrideParseException

from proglayer.config import nearest_setting, setting_names
from proglayer.errors import ConfigError

# Hydra's parser takes 17 s for a text of 1 MB, and 20 ms for a further override.
MOST_OVERRIDES = 500
LONGEST_OVERRIDE = 32_768
# How none of a group is chosen.
NONE = {"logger": "write 'logger=[]'", "experiment": "leave it out"}
# Groups of Hydra that are easily written like settings.
HYDRA_GROUPS = ("launcher", "sweeper", "job_logging", "hydra_logging")
# Names of other tools, in small letters.
ALIASES = {
    "learning_rate": "lr.base",
    "lr": "lr.base",
    "epochs": "phase.max_epochs",
    **dict.fromkeys(("heads", "n_heads", "n_head", "num_heads"), "model.num_heads"),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "width"), "model.dim"),
    **dict.fromkeys(("layers", "n_layers", "n_layer", "num_layers", "depth"), "initial_layers"),
    **dict.fromkeys(("gpu", "gpus", "cuda"), "device"),
    **dict.fromkeys(("output", "output_dir", "out_dir", "dir"), "hydra.run.dir"),
}


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Check the command line. Raises ConfigError.

    Returns it with its options first, as Hydra reads no override after one.
    """
    options, unknown = get_args_parser().parse_known_intermixed_args(list(arguments))
    if options.multirun and (options.cfg or options.info):
        raise ConfigError("-m shows nothing of --cfg or --info: leave out one of them")
    if options.experimental_rerun:
        # Hydra would unpickle the file, which may run any code.
        raise ConfigError("--experimental-rerun is not taken: give the command of the run again")
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        setting = f"{name}={value or '...'}"
        near = f": a setting has no dashes: {setting}" if name in {*KNOWN, *ALIASES} else ""
        raise ConfigError(
            f"there is no option {unknown[0]}{near or ': see python train.py --help'}"
        )
    given = list(options.overrides)
    if len(given) > MOST_OVERRIDES:
        raise ConfigError(
            f"{len(given)} overrides are more than {MOST_OVERRIDES}: put settings into a file of "
            "conf/experiment"
        )
    if (longest := max(given, key=len, default="")) and len(longest) > LONGEST_OVERRIDE:
        raise ConfigError(
            f"{longest[:40]}... has {len(longest):,} characters, more than {LONGEST_OVERRIDE:,}"
        )
    conf = [Path(sys.argv[0]).absolute().parent / "conf"]
    if options.config_dir:
        conf.append(Path(options.config_dir).absolute())
    check_overrides(parse(given), groups_of(conf))
    others = list(arguments)
    for override in given:
        others.remove(override)
    return [*others, *given]


def parse(given: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Overrides as Hydra's grammar reads them, those of `glob` by a loader of configurations.

    Raises ConfigError with a form that it does read.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for text in given:
        try:
            parsed += parser.parse_overrides([text])
        except OverrideParseException:
            raise ConfigError(unreadable(text)) from None
    return parsed


def unreadable(override: str) -> str:
    """What to write for an override that Hydra's grammar does not read; only what it does read."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip() or not value.strip():
        return f"{override}: a setting is given as name=value, without blanks around ="
    name = re.sub(r"\[(\d+)\]", r".\1", key.strip().rstrip(":"))
    plain = value.lstrip("= ").strip()
    candidates = [f"{name}={plain}"]
    if override[0] in "'\"" and override[-1] == override[0]:  # of a shell that keeps them
        candidates.insert(0, override[1:-1])
    if plain.endswith(","):
        candidates.append(f"{name}={plain.rstrip(',')}")
    if plain.startswith("(") and plain.endswith(")"):
        candidates.append(f"{name}=[{plain[1:-1]}]")
    if plain.startswith("[") and plain.endswith("]"):
        items = (item.strip().strip("'\"") for item in plain[1:-1].split(","))
        candidates.append(f"{name}=[{','.join(map(_quoted, items))}]")
    else:
        candidates.append(f"{name}={_quoted(plain)}")
    for candidate in candidates:
        with contextlib.suppress(OverrideParseException):
            OverridesParser.create().parse_overrides([candidate])
            return f"{override}: Hydra cannot read this; write {shlex.quote(candidate)}"
    return f"{override}: Hydra cannot read this"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def groups_of(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The groups of settings in folders like conf/, and the choices in each."""
    found: dict[str, list[str]] = {}
    for file in sorted(file for folder in folders for file in folder.glob("*/*.yaml")):
        found.setdefault(file.parent.name, []).append(file.stem)
    found.pop("hydra", None)
    return found


def check_overrides(overrides: Sequence[Override], groups: dict[str, list[str]]) -> None:
    """Raise ConfigError with a line for each override that has no meaning here."""
    problems = [line for override in overrides for line in _problems(override, groups)]
    problems += _repeated(overrides, groups)
    if problems:
        raise ConfigError("\n".join(problems))


def _problems(override: Override, groups: dict[str, list[str]]) -> Iterator[str]:
    key, text = override.key_or_group, override.input_line or ""
    value = override.value()
    if key.split("/")[0].split(".")[0] == "hydra":
        group = key.removeprefix("hydra.")
        if group in HYDRA_GROUPS and isinstance(value, (str, QuotedString)):
            yield f"{text}: a launcher or sweeper is chosen with a slash: hydra/{group}={value}"
        return
    is_group, is_setting = key in groups or key == "local", key in KNOWN
    if override.package is not None:
        yield f"{text}: a group cannot be put elsewhere: write {key}={plain(value)}"
    elif override.is_delete():
        yield f"{text}: nothing can be deleted: leave it out, or give it another value"
    elif not is_group and not is_setting and (override.is_add() or override.is_force_add()):
        yield unknown_setting(key)
    elif override.is_add():
        yield f"{text}: {key} is there already: write {text.lstrip('+')}"
    elif value == {}:
        yield f"{text} sets nothing: leave it out"
    elif key == "local":
        yield f"{text}: conf/local/default.yaml is read wherever there is one: leave this out"
    elif is_group and not override.is_sweep_override():
        yield from _choice_problems(key, text, value, groups[key])


def _choice_problems(key: str, text: str, value: object, choices: list[str]) -> Iterator[str]:
    if isinstance(value, dict):
        return
    chosen = value if isinstance(value, list) else [value]
    for each in map(plain, chosen or ([] if key == "logger" else [None])):
        if isinstance(each, str):
            stem = each.rsplit("/", 1)[-1].removesuffix(".yaml")
            if stem != each and stem in choices:
                yield f"{text}: a choice is the name of a file alone: write {key}={stem}"
        elif each is None and key in NONE:
            yield f"{text}: for no {key} {NONE[key]}"
        else:
            number = isinstance(each, (int, float)) and key in ALIASES
            near = f", or {ALIASES[key]}={each}" if number else ""
            yield f"{text}: {key} takes one of its choices ({', '.join(choices)}){near}"


def plain(value: object) -> object:
    """A value of an override as Python has it: text without its quotes."""
    return value.text if isinstance(value, QuotedString) else value


def _repeated(overrides: Sequence[Override], groups: dict[str, list[str]]) -> Iterator[str]:
    """Settings that are given twice where it is not plain that the last one holds: Hydra would
    merge mappings in a run and not in a sweep.
    """
    seen: dict[str, Override] = {}
    for override in overrides:
        key = override.get_key_element().lstrip("+~")
        before = seen.get(key)
        seen[key] = override
        if before is None or (key.startswith("hydra.") and not override.is_sweep_override()):
            continue
        if (
            key in groups
            or before.is_sweep_override()
            or isinstance(before.value(), dict)
            or isinstance(override.value(), dict)
        ):
            yield f"{key} is given twice ({before.input_line}, {override.input_line}): keep one"


def unknown_setting(name: str) -> str:
    """That there is no such setting, with the nearest that there is."""
    if name.startswith(("hydra.launcher.", "hydra.sweeper.")):
        part = name.split(".")[1]
        return f"there is no setting {name} with the {part} that is chosen (hydra/{part}=...)"
    if name.startswith("hydra."):
        return f"there is no setting {name}: to add it, write +{name}"
    plain = name.lower().replace("-", "_")
    near = plain if plain in KNOWN else ALIASES.get(plain) or nearest_setting(name)
    return f"there is no setting {name}" + (f"; did you mean {near}?" if near else "")


def no_match(override: str, choices: Sequence[str]) -> str:
    """That a sweep over a setting, or over the choices of a group, has no values."""
    if not choices:
        return f"{override} gives no value"
    if "/" in override:
        return f"{override} matches no choice: a glob looks into no folder, so name each choice"
    return f"{override} matches no choice (choices: {', '.join(choices)})"


KNOWN = frozenset(
    ".".join(name.split(".")[: depth + 1])
    for name in setting_names()
    for depth in range(name.count(".") + 1)
)
