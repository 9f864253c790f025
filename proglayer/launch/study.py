"""Where a search keeps its study, and what its trials tell it while they run.

A study is in a file (`sqlite:///path` or `journal:///path`, four slashes before an absolute path),
on a database server (any URL of SQLAlchemy's), or nowhere (null). A file lets one command at a time
search; the study's own trials report to it from wherever they run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from proglayer import files
from proglayer.config import flat_settings
from proglayer.console import counted
from proglayer.errors import ConfigError, StoreError, first_line
from proglayer.launch.ask import short_hash
from proglayer.results import NOT_THE_EXPERIMENT
from proglayer.run.record import METRICS_COLUMNS, STUDY

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
JOURNAL = "journal:///"
Prune = Callable[[dict[str, Any]], str | None]
NO_PRUNER = "optuna.pruners.NopPruner"
# The attribute of a study that holds what its trials have in common.
SHARED = "proglayer:shared"
# Of what a study and a search do not share, so many settings are named.
MOST_NAMED = 3


def file_of(storage: str) -> Path | None:
    """The file of a storage, None if it is none."""
    for kind in (SQLITE, JOURNAL):
        if storage.startswith(kind):
            return Path(storage.removeprefix(kind))
    return None


def open_storage(storage: str) -> BaseStorage:
    """Open a storage, made if it is not there.

    Raises ConfigError for one that cannot be opened, or that another version of Optuna made.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    place = f"hydra.sweeper.storage={storage}"
    try:
        if not storage:
            return optuna.storages.InMemoryStorage()
        if storage.startswith(JOURNAL):
            return optuna.storages.JournalStorage(JournalFileBackend(str(file_of(storage))))
        # Trials of several processes write to a file one after the other.
        patience = {"connect_args": {"timeout": 60}} if storage.startswith(SQLITE) else {}
        return optuna.storages.RDBStorage(storage, engine_kwargs=patience)
    except RuntimeError as error:  # tables of another layout
        raise ConfigError(
            f"{place} was made by an older Optuna, and its studies cannot be gone on with: move "
            "it away, or name another storage"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ConfigError(f"{place} is no journal of Optuna's") from error
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise ConfigError(f"{place}: {first_line(error)}") from error


@contextlib.contextmanager
def alone(storage: str, study: str) -> Iterator[bool]:
    """Keep other commands off a study that is in a file. Gives whether that can be had.

    Raises ConfigError where one is at work on it.
    """
    file = file_of(storage)
    if file is None:
        yield False
        return
    lock = FileLock(file.with_name(f".{file.name}-{short_hash(study)}.lock"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"study {study} is being searched by another command: wait for it, or give this one "
            "a hydra.sweeper.study_name of its own"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"hydra.sweeper.storage={storage} cannot be written ({error.strerror})"
        ) from error
    try:
        yield True
    finally:
        lock.release()


def absolute(storage: str) -> str:
    """The same storage, named so that a process in any folder finds it."""
    file = file_of(storage)
    return storage if file is None else storage.removesuffix(str(file)) + str(file.absolute())


def made(what: str, settings: DictConfig) -> Any:
    """Optuna's object that the settings `sampler` or `pruner` describe. Raises ConfigError."""
    try:
        return instantiate(settings)
    except HydraException as error:
        cause = f"{type(error.__cause__).__name__}: {first_line(error.__cause__ or error)}"
        raise ConfigError(f"hydra.sweeper.{what}: {cause}") from error


def shared_settings(
    composed: DictConfig, searched: Iterable[str], direction: str
) -> dict[str, Any]:
    """What all trials of a study have in common: the settings that are not searched, by name.

    Where and how a run works is none of it.
    """
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    plain: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    own = {*searched, *NOT_THE_EXPERIMENT} - {"objective"}
    settings = {
        key: value
        for key, value in flat_settings(plain)
        if not any(key == name or key.startswith(f"{name}.") for name in own)
    }
    return {"searched": ",".join(sorted(searched)), "direction": direction} | settings


def keep_shared(study: optuna.Study, shared: dict[str, Any]) -> None:
    """Keep in a study what its trials share.

    Raises ConfigError where it has trials that share something else.
    """
    name = study.study_name
    other = "give this search a hydra.sweeper.study_name of its own"
    before = study.user_attrs.get(SHARED)
    if before is None and study.get_trials(deepcopy=False):
        raise ConfigError(f"study {name} holds trials that are not of such a search: {other}")
    if before is not None and before != shared:
        keys = [key for key in {**before, **shared} if before.get(key) != shared.get(key)]
        if "searched" in keys:  # what follows from it says less
            keys = ["searched"]
        then = ", ".join(f"{key}={before.get(key)}" for key in keys[:MOST_NAMED])
        now = ", ".join(f"{key}={shared.get(key)}" for key in keys[:MOST_NAMED])
        raise ConfigError(f"study {name} has trials with {then}, not {now}: {other}")
    study.set_user_attr(SHARED, shared)


def write_study(folder: Path, study: optuna.Study, objective: str) -> None:
    """Keep the trials of a study, and how far each setting explains the objective, in `study.json`.

    That it cannot be written is no reason to end a search.
    """
    import optuna

    importances: dict[str, float] = {}
    # There have to be a few trials, with values that differ.
    with contextlib.suppress(ValueError, RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importances = optuna.importance.get_param_importances(study)
    content = {
        "study": study.study_name,
        "direction": study.direction.name.lower(),
        "objective": objective,
        "importances": importances,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "value": trial.value if trial.state.name == "COMPLETE" else None,
                "params": trial.params,
            }
            for trial in study.get_trials(deepcopy=False)
        ],
    }
    text = json.dumps(content, indent=1).encode()
    with contextlib.suppress(OSError, StoreError):
        files.write_atomically(folder / STUDY, text)


def pruning(sweeper: DictConfig, objective: str, number: int) -> Prune | None:
    """What a trial calls after each epoch: it reports to the study and asks the pruner.

    It is given a row of `metrics.csv`. Steps are the epochs of all phases so far. What is compared
    is the column that `objective` ends with; where it names none the validation loss, as something
    to minimize. It gives the reason to end the trial, or None. A study that cannot be reached
    prunes nothing.

    Args:
        sweeper: Hydra's settings of the search.
        number: that of the trial in its study.
    """
    settings = sweeper.pruner
    if settings.get("_target_") == NO_PRUNER:
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    column = objective.rpartition(".")[2]
    sign = 1
    if column not in METRICS_COLUMNS:
        column, sign = "validation_loss", -1 if sweeper.direction == "maximize" else 1
    try:
        pruner = made("pruner", settings)
        # No sampler is asked for anything here.
        study = optuna.load_study(
            study_name=sweeper.study_name,
            storage=open_storage(sweeper.storage),
            sampler=optuna.samplers.RandomSampler(),
            pruner=pruner,
        )
        known = study.get_trials(deepcopy=False)[number]
        trial = optuna.trial.Trial(study, known._trial_id)
        reported = known.intermediate_values
    except Exception as error:
        log.warning("no epoch is reported to the study (%s)", first_line(error))
        return None
    step = 0

    def prune(row: dict[str, Any]) -> str | None:
        nonlocal step
        step += 1
        try:
            # A trial that is gone on with begins by reporting what it reported before.
            if step not in reported:
                trial.report(sign * row[column], step)
            if step < max(reported, default=0) or not trial.should_prune():
                return None
        except Exception as error:
            log.warning("epoch not reported to the study (%s)", first_line(error))
            return None
        name = settings._target_.rpartition(".")[2]
        epochs = counted(step, "epoch")
        return f"pruned by {name} after {epochs}, with a {column} of {row[column]:.6g}"

    return prune
