"""What a user asks for: the command line, and errors on the way to settings.

Hydra reads the grammar and composes. Here is what is checked before it does, and how what it raises
becomes one line. Nothing heavy is imported, so that `train.py --help` is quick.
"""

from __future__ import annotations

import difflib
import hashlib
import secrets
from collections.abc import Iterable, Sequence

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError
from yaml import MarkedYAMLError

from proglayer.errors import ConfigError, UserError, first_line

# What Hydra would take and nothing here reads, by how an override begins.
NO_EFFECT = (
    *("hydra.sweep.subdir", "hydra.job.env_set", "hydra.job.chdir", "hydra.output_subdir"),
    *("hydra.job_logging", "hydra/job_logging"),
)
OF_SWEEPS = (
    *("study=", "hydra.sweep.", "hydra.sweeper", "hydra/sweeper"),
    *("hydra.launcher", "hydra/launcher"),
)
NO_KEY = ConfigKeyError, ConfigAttributeError
# The groups of `conf/` whose choices are files.
GROUPS = ("model", "data", "phase", "growth", "freeze", "lr", "logger", "experiment")


def register() -> None:
    """Give Hydra the resolver that `conf/` uses. Safe to repeat."""
    # Cached, so that every job of a sweep sees the token that the sweep was given.
    OmegaConf.register_new_resolver(
        "unique_token", lambda: secrets.token_hex(3), replace=True, use_cache=True
    )


def short_hash(text: str) -> str:
    """Return six hexadecimal digits that stand for `text` in the name of a folder."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line by which Hydra hands over what it composed, of one run or a sweep.

    Options come first, as Hydra reads no override after one. A single run is a sweep to Hydra,
    which would make a run's folder and write there before anybody can look whose it is.

    Raises ConfigError for what Hydra would take for something else, answer with a traceback, or
    take without an effect.
    """
    parser = get_args_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        # Hydra would take -plan=true for -p lan=true, and train.
        if argument.startswith("-") and name not in flags:
            from proglayer.config import nearest_setting

            name = name.lstrip("-")
            near = nearest_setting(name) or name
            said = f"{near}={value if equals and near == name else '...'}"
            raise ConfigError(f"there is no option {argument}: a setting has no dashes: {said}")
    options = parser.parse_intermixed_args(list(arguments))
    if options.experimental_rerun:
        # Hydra would unpickle the file, which may run any code.
        raise ConfigError("--experimental-rerun is not taken: give the command of the run again")
    others = [argument for argument in arguments if argument not in options.overrides]
    shows = options.help, options.hydra_help, options.cfg, options.info, options.shell_completion
    sweeps = options.multirun or "hydra.mode=MULTIRUN" in options.overrides
    for override in parse(options.overrides):
        text = override.input_line or ""
        name = text.lstrip("+~")
        if override.key_or_group in ("hydra.launcher", "hydra.sweeper"):
            raise ConfigError(f"{text}: it is chosen with a slash: {text.replace('.', '/', 1)}")
        no_choice = isinstance(override.value(), (int, float, type(None)))
        if override.key_or_group in GROUPS and no_choice and not override.is_delete():
            hint = f"; did you mean lr.base={name[3:]}?" if name.startswith("lr=") else ""
            raise ConfigError(f"{text}: it takes one of conf/{override.key_or_group}{hint}")
        if override.key_or_group in GROUPS and override.is_add() and not override.package:
            raise ConfigError(f"{text}: the group has a choice already: leave out the +")
        if name.startswith(NO_EFFECT):
            raise ConfigError(f"{text} has no effect here: leave it out")
        if not sweeps and name.startswith(OF_SWEEPS):
            raise ConfigError(f"{text} is of sweeps: add -m")
        if sweeps and name.startswith("hydra.run."):
            raise ConfigError(f"{text} is of single runs: a sweep's folder is hydra.sweep.dir")
        if not sweeps and override.is_sweep_override():
            raise ConfigError(f"{text} has several values: add -m to run each")
    if any(shows) or sweeps:
        return [*others, *options.overrides]
    others = [option for option in others if option not in ("-r", "--run")]
    return ["-m", *others, *options.overrides, "hydra.mode=MULTIRUN", "hydra/sweeper=single"]


def parse(given: Iterable[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Return overrides as Hydra's grammar reads them, `glob` by a loader of configurations.

    Raises ConfigError.
    """
    try:
        return OverridesParser.create(config_loader=loader).parse_overrides(list(given))
    except OverrideParseException as error:
        raise ConfigError(_unreadable(error.override)) from None


def keyed(given: Iterable[str], loader: ConfigLoader | None = None) -> dict[str, Override]:
    """Return what is said last of each setting, by its name. Raises ConfigError."""
    return {each.get_key_element().lstrip("+~"): each for each in parse(given, loader)}


def setting(name: str, value: object) -> str:
    """Return an override that sets a text, whatever it holds, such as a path."""
    return f"{name}={QuotedString(str(value), Quote.single).with_quotes()}"


def _unreadable(override: str) -> str:
    return (
        f"{override}: Hydra cannot read this: a setting is name=value, and a text that holds more "
        "than letters, digits and / . - _ is quoted, as in 'data.path=\"~/a text\"'"
    )


def in_one_line(error: BaseException, overrides: Iterable[str] = ()) -> str:
    """Say what went wrong while Hydra composed settings: its first line, and the nearest name.

    overrides: those that it composed.
    """
    from proglayer.config import SYNONYMS, unknown_setting

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, NO_KEY) and cause.full_key:
            # Where a group is unknown, the key of the error is the group alone.
            asked = [text.partition("=")[0].lstrip("+~") for text in overrides]
            within = (name for name in asked if name.startswith(f"{cause.full_key}."))
            return unknown_setting(next(within, cause.full_key))
        if isinstance(cause, OverrideParseException):
            return _unreadable(cause.override)
        if isinstance(cause, MarkedYAMLError) and cause.problem_mark:
            return f"{cause.problem_mark.name}, line {cause.problem_mark.line + 1}: {cause.problem}"
        if isinstance(cause, UnicodeDecodeError):
            line = cause.object[: cause.end].splitlines()[-1].decode("latin-1")
            return f"a file of settings is not in UTF-8, in the line that begins with {line!r}"
        if isinstance(cause, MissingConfigException) and cause.options:
            group, _, choice = str(cause.missing_cfg_file).rpartition("/")
            close = difflib.get_close_matches(SYNONYMS.get(choice, choice), cause.options, 1)
            near = [*close, "recipe/..."] if group == "experiment" else close
            hint = f"; did you mean {group}={near[0]}?" if near else ""
            return f"{group} has no choice {choice}{hint} (choices: {', '.join(cause.options)})"
        cause = cause.__cause__ or cause.__context__
    said = first_line(error)
    if isinstance(error, MissingConfigException):  # the folder is in a line of its own
        said = " ".join(str(error).partition("\n\n")[0].split())
    return f"the settings cannot be composed: {said}"
