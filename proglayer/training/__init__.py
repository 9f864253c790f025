"""The science: from settings to phases, and from a phase to trained weights.

`plan` turns settings into phases, `model` says what a model is here and `transformer` is ours,
`growth` makes one deeper, `loss` reads its exits, `optim` says what trains at which rate, and
`trainer` is the loop. Nothing here knows of files, runs or sweeps. Only `plan` is handed on: all
else needs torch, and is imported where it is used.
"""

from proglayer.training.plan import Phase, plan

__all__ = ["Phase", "plan"]
