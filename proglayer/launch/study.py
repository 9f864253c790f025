"""The study of a search, in a file that every trial can reach, wherever it runs."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proglayer.console import counted
from proglayer.errors import ConfigError, first_line, raised_as
from proglayer.run.record import RunRecord

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

JOURNAL = "optuna.journal"


def open_study(
    sweep: Path, direction: Any, sampler: Any = None, pruner: Any = None
) -> optuna.Study:
    """Open the study in a sweep's folder. Raises ConfigError where its journal is none."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = sweep / JOURNAL
    with raised_as(ConfigError, f"{path} cannot be read", OSError, ValueError, KeyError):
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
            study_name="search",
            direction=direction,
            load_if_exists=True,
            sampler=sampler or optuna.samplers.RandomSampler(),
            pruner=pruner,
        )


def trial_of(study: optuna.Study, known: Any) -> optuna.trial.Trial:
    """Return a trial that a study has already, to go on with."""
    import optuna

    return optuna.trial.Trial(study, known._trial_id)


def report_epoch(
    sweep: Path, number: int, pruner: Mapping[str, Any], direction: str, record: RunRecord
) -> str | None:
    """Report the last epoch of a trial to its study, from wherever it runs, and ask the pruner.

    Steps are the epochs of all phases so far. The validation loss is what is compared. A study that
    cannot be reached prunes nothing, nor is an epoch judged again that was reported before.

    Returns why the trial is to end, None for it to go on.
    """
    step = sum(epoch.epoch > 0 or epoch.best for epoch in record.epochs)
    loss = record.epochs[-1].validation.loss
    try:
        study = open_study(sweep, direction, pruner=made("pruner", pruner))
        known = study.get_trials(deepcopy=False)[number]
        trial = trial_of(study, known)
        if step in known.intermediate_values:
            return None
        trial.report(-loss if direction == "maximize" else loss, step)
        if not trial.should_prune():
            return None
    except Exception as error:
        log.warning("an epoch is not reported to the study (%s)", first_line(error))
        return None
    name = pruner["_target_"].rpartition(".")[2]
    return f"pruned by {name} after {counted(step, 'epoch')}, with a validation loss of {loss:.6g}"


def made(what: str, settings: Mapping[str, Any], **more: Any) -> Any:
    """Return the sampler or the pruner of `_target_`. Raises ConfigError."""
    arguments = dict(settings) | more
    wrong = ImportError, AttributeError, TypeError, ValueError
    with raised_as(ConfigError, f"hydra.sweeper.{what} cannot be made", *wrong):
        return pkgutil.resolve_name(str(arguments.pop("_target_", None)))(**arguments)
