"""From a command line to its jobs: what train.py does."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from proglayer.errors import ConfigError, UserError, run_command
from proglayer.launch.ask import check_arguments, in_one_line, register

# What `hydra.sweeper.design` says: modules beside this one.
DESIGNS = "single", "product", "settle", "search"


class Composed(BaseException):
    """Raised through Hydra once it has composed a command: it is done, and jobs are ours."""

    def __init__(self, master: DictConfig, loader: ConfigLoader, arguments: Sequence[str]) -> None:
        super().__init__()
        self.given = master, loader, arguments


def train(main: Callable[[], object]) -> int:
    """Run train.py, whose `main` is Hydra's, and return the exit status."""
    return run_command(lambda: start(*composed(main)))


def composed(main: Callable[[], object]) -> tuple[DictConfig, ConfigLoader, Sequence[str]]:
    """Return what Hydra makes of the command line. Raises ConfigError."""
    register()
    sys.argv[1:] = check_arguments(sys.argv[1:])
    # Hydra prints errors its own way unless it is asked to raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except Composed as end:
        return end.given
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(in_one_line(error, sys.argv[1:])) from error
    sys.exit()  # something was shown


def start(master: DictConfig, loader: ConfigLoader, arguments: Sequence[str]) -> int:
    """Run the jobs of a command that Hydra composed, and return the exit status."""
    from proglayer.launch.compose import Command
    from proglayer.launch.job import log_to_console

    log_to_console()
    design = master.hydra.sweeper.get("design")
    if design not in DESIGNS:
        raise ConfigError(f"hydra.sweeper.design={design}: it is one of {', '.join(DESIGNS)}")
    module: Any = importlib.import_module(f"proglayer.launch.{design}")
    return module.run(Command(master, loader, arguments))
