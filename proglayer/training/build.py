"""From an architecture, which is plain data, to the model of it: the place that knows them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from proglayer.training.architecture import Architecture, CausalLM
from proglayer.training.model import Model
from proglayer.training.transformer import Transformer


def empty(architecture: Architecture | CausalLM, layers: int) -> Model:
    """A model on the CPU whose weights are not set yet."""
    return _on_meta(asdict(architecture), layers).to_empty(device="cpu").settle()


def restored(layers: int, architecture: Mapping[str, Any], state: Mapping[str, Tensor]) -> Model:
    """The model whose tensors are those of `state`, not copies of them.

    `architecture` is an `Architecture` as plain data. Raises RuntimeError where the tensors are not
    this model's.
    """
    model = _on_meta(architecture, layers)
    model.load_state_dict(state, assign=True)
    return model.settle()


def _on_meta(architecture: Mapping[str, Any], layers: int) -> Model:
    """Without room for its tensors, so that nothing is drawn twice."""
    if "family" in architecture:
        # Importing the library takes seconds, so who does not ask for it does not.
        from proglayer.training.causal_lm import on_meta

        return on_meta(architecture, layers)
    with torch.device("meta"):
        return Transformer(layers=layers, **architecture)
