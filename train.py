"""The entry point: settings in, a run (or, with -m, a sweep of runs) out.

python train.py --help
"""

import sys

import hydra

from proglayer import __version__
from proglayer.errors import ConfigError
from proglayer.launch.main import train


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(_: object) -> None:
    """Compose the settings: Hydra hands them to `proglayer.launch.main.start`, not to this."""
    raise ConfigError(
        "hydra/sweeper: this one runs jobs by itself, unchecked: take one of proglayer, settle, "
        "optuna"
    )


if __name__ == "__main__":
    if "--version" in sys.argv[1:]:  # Hydra would give its own
        print(f"proglayer {__version__}")
        sys.exit()
    sys.exit(train(main))
