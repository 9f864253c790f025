"""The entry point: settings in, a run (or, with -m, a sweep of runs) out.

python train.py --help
"""

import sys

import hydra
from omegaconf import DictConfig

from proglayer import __version__
from proglayer.launch.ask import register
from proglayer.launch.job import train

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(settings: DictConfig) -> float | None:
    """One job. Gives the validation loss of the last phase, for sweepers that optimise."""
    from proglayer.launch.job import run_job

    return run_job(settings)


if __name__ == "__main__":
    if "--version" in sys.argv[1:]:  # Hydra would give its own
        print(f"proglayer {__version__}")
        sys.exit()
    sys.exit(train(main))
