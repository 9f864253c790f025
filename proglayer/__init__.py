"""Grow transformers layer by layer and measure what growing did.

`train.py` is the way to run it; from Python, `load_run(folder)` gives a finished run's model back,
and `export_run(folder, to)` writes one of `transformers` for that library.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proglayer.run.export import export_run
    from proglayer.run.run import load_run

__version__ = "0.1.0"

# How a thread of OpenMP waits for the others at the end of a parallel loop. libgomp (torch's wheels
# for Linux) spins for milliseconds, libomp and libiomp5 (macOS, conda) for 200 ms: on a core that
# the thread it waits for may need. Read when torch is loaded, so set before, and inherited by every
# process that a sweep starts. Figures: docs/performance.md.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(GOMP_SPINCOUNT="1000", KMP_BLOCKTIME="1")

__all__ = ["__version__", "export_run", "load_run"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay free of torch: `train.py --help` and the tables pay for it
    # otherwise. So what needs torch is fetched at first use (PEP 562).
    if name == "export_run":
        from proglayer.run.export import export_run

        return export_run
    if name == "load_run":
        from proglayer.run.run import load_run

        return load_run
    raise AttributeError(f"module 'proglayer' has no attribute {name!r}")
