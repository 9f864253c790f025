"""Grow transformers layer by layer and measure what growing did.

`train.py` is the way to run it; from Python, `load_run(folder)` gives a finished run's model back,
and `export_run(folder, to)` writes one of `transformers` for that library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proglayer.run.export import export_run
    from proglayer.run.run import load_run

__version__ = "0.1.0"

__all__ = ["__version__", "export_run", "load_run"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay free of torch: `train.py --help` and the tables pay for it
    # otherwise. So what needs torch is fetched at first use (PEP 562).
    modules = {"export_run": "proglayer.run.export", "load_run": "proglayer.run.run"}
    if name in modules:
        return getattr(importlib.import_module(modules[name]), name)
    raise AttributeError(f"module 'proglayer' has no attribute {name!r}")
