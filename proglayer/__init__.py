"""Grow transformers layer by layer and measure what growing did.

`train.py` is the way to run it; from Python, `load_run(folder)` gives a finished run's model back.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proglayer.run.experiment import load_run

__version__ = "0.1.0"

__all__ = ["__version__", "load_run"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay free of torch: `train.py --help` and the tables pay for it
    # otherwise. So what needs torch is fetched at first use (PEP 562).
    if name == "load_run":
        from proglayer.run.experiment import load_run

        return load_run
    raise AttributeError(f"module 'proglayer' has no attribute {name!r}")
