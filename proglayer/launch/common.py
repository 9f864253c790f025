"""What the launchers of a sweep have in common, wherever their jobs run.

How many jobs there are at once and how many threads each has, what a job's folder is called, and
the copy of the code and of the settings that a job of a queue or a cluster runs from.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from proglayer.launch import snapshot
from proglayer.run.code import git_state


class HydraLauncher(Protocol):
    """What a launcher of Hydra's has once it is set up."""

    @property
    def config(self) -> DictConfig | None: ...

    @property
    def hydra_context(self) -> HydraContext | None: ...

    @property
    def task_function(self) -> TaskFunction | None: ...


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def jobs_at_once(launcher: Mapping[str, Any]) -> int:
    """How many jobs a launcher with these settings runs at once on one machine, as far as it says.

    joblib's `n_jobs` counts back from the number of cores when it is negative.
    """
    jobs = launcher.get("n_jobs") or 1
    return jobs if jobs > 0 else max(1, cores() + 1 + jobs)


def threads_per_job(launcher: Mapping[str, Any]) -> int | None:
    """The cores that a launcher with these settings gives to a job; None where it does not say.

    joblib's jobs share this machine's; Slurm and Ray are asked for a number of them.
    """
    of_ray = (launcher.get("ray") or {}).get("remote") or {}
    asked = launcher.get("cpus_per_task") or of_ray.get("num_cpus")
    if asked:
        return max(1, int(asked))
    at_once = jobs_at_once(launcher)
    return max(1, cores() // at_once) if at_once > 1 else None


def folder_name(launcher: HydraLauncher, overrides: Iterable[str], number: int) -> str:
    """The name of a job's folder in that of its sweep."""
    assert launcher.config is not None
    assert launcher.hydra_context is not None
    overrides = list(overrides)
    for override in overrides:
        if override.startswith("hydra.sweep.subdir="):
            return override.partition("=")[2].strip("'")
    loader = launcher.hydra_context.config_loader
    config = loader.load_sweep_config(launcher.config, overrides)
    with open_dict(config.hydra.job):
        config.hydra.job.num = number
    return str(config.hydra.sweep.subdir)


def freeze(launcher: HydraLauncher, into: Path) -> tuple[DictConfig, HydraContext, Path]:
    """Copy the code and the settings' files below `into`.

    Gives the sweep's configuration and Hydra's context for a job that composes its settings from
    the copy, and the folder from which it is to import. Raises StoreError.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

    assert launcher.config is not None
    assert launcher.hydra_context is not None
    config = launcher.config
    loader: Any = launcher.hydra_context.config_loader
    elements = loader.get_search_path().get_path()
    named = [str(path) for path in config.hydra.searchpath or []]
    folders = {
        path: Path(path.removeprefix("file://")).absolute()
        for path in [*(element.path for element in elements), *named]
        if path and ("://" not in path or path.startswith("file://"))
    }
    names = {path: f"conf-{number}" for number, path in enumerate(folders)}
    conf = {names[path]: folder for path, folder in folders.items()}
    plugins = Path(inspect.getfile(type(launcher))).parent
    code = snapshot.take(into, conf, plugins, git_state())

    moved = {path: f"file://{code / name}" for path, name in names.items()}
    search_path = ConfigSearchPathImpl()
    for element in elements:
        path = element.path or ""
        search_path.append(element.provider or "", moved.get(path, path))
    if named:
        # Hydra reads this one from the file of the settings, unless it is told another.
        quoted = ",".join(_quoted(moved.get(path, path)) for path in named)
        config = copy.deepcopy(config)
        with read_write(config), open_dict(config):
            config.hydra.overrides.hydra = [
                f"hydra.searchpath=[{quoted}]",
                *(o for o in config.hydra.overrides.hydra if not o.startswith("hydra.searchpath=")),
            ]
    context = HydraContext(
        config_loader=ConfigLoaderImpl(search_path), callbacks=launcher.hydra_context.callbacks
    )
    return config, context, code


def _quoted(text: str) -> str:
    """As Hydra's grammar reads it back."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
