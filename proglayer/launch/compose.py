"""From what Hydra composed to jobs, which are plain data: here Hydra ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from pydantic import ValidationError

from proglayer.config import Config, Settings, problem_lines, to_config
from proglayer.errors import ConfigError
from proglayer.launch.ask import in_one_line
from proglayer.launch.job import Job
from proglayer.run.environment import git_state

S = TypeVar("S", bound=Settings)
# The groups whose choices say nothing about what a job trains.
ASIDE = ("hydra", "local", "logger", "study")


class Command:
    """What Hydra made of a command line. Composes its jobs, the only place that does.

    master: the settings without those that are swept over.
    arguments: the overrides, those of Hydra itself left out.
    """

    def __init__(self, master: DictConfig, loader: ConfigLoader, arguments: Sequence[str]) -> None:
        self.master = master
        self.loader = loader
        # A study says what is swept over; its jobs are none of it.
        self.arguments = tuple(text for text in arguments if not text.startswith("study="))
        self.cwd = Path.cwd()
        # `${hydra:...}` looks there; set_config would forbid later changes of it.
        HydraConfig.instance().cfg = master  # pyright: ignore[reportAttributeAccessIssue]

    def folder(self, of: str, name: str | None = None) -> Path:
        """Return the folder of the `run` or the `sweep`, absolute.

        name: what it is called where the command line does not say, so that the same command finds
            it again.
        """
        folder = Path(self.master.hydra[of].dir).absolute()
        overrides = self.master.hydra.overrides.hydra
        given = any(text.startswith(f"hydra.{of}.dir=") for text in overrides)
        return folder if name is None or given else folder.with_name(name)

    def settings(self, part: str, schema: type[S]) -> S:
        """Return the settings of `hydra.sweeper` or `hydra.launcher`. Raises ConfigError."""
        plain: Any = OmegaConf.to_container(self.master.hydra[part], resolve=True)
        try:
            return schema.model_validate({k: v for k, v in plain.items() if not k.startswith("_")})
        except ValidationError as error:
            raise ConfigError("\n".join(problem_lines(error, f"hydra.{part}."))) from error

    def job(
        self,
        folder: Path,
        overrides: tuple[str, ...] | None = None,
        number: int | None = None,
        threads_of: Callable[[Config], int | None] | None = None,
    ) -> Job:
        """Compose the job of these overrides; without them, that of the command itself.

        threads_of: gives those of each process of a job that does not say.

        Raises ConfigError.
        """
        try:
            composed = self.master
            if overrides is not None:
                launched = [*overrides, f"hydra.job.num={number}"]
                composed = self.loader.load_sweep_config(self.master, launched)
            with read_write(composed), open_dict(composed):
                composed.hydra.runtime.output_dir = str(folder)
            config = to_config(composed)
        except Exception as error:
            raise ConfigError(in_one_line(error, overrides or ())) from error
        if config.threads is None and threads_of is not None:
            config = config.model_copy(update={"threads": threads_of(config)})
        choices = composed.hydra.runtime.choices.items()
        return Job(
            config=config,
            folder=folder,
            overrides=self.arguments if overrides is None else overrides,
            choices={k: str(v) for k, v in choices if v is not None and not k.startswith(ASIDE)},
            cwd=self.cwd,
            git=git_state(),
        )
