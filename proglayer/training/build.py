"""From an architecture, which is plain data, to the model of it: the place that knows them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from proglayer.training.model import Model
from proglayer.training.plan import Architecture
from proglayer.training.transformer import Transformer


def empty(architecture: Architecture, layers: int) -> Model:
    """A model on the CPU whose weights are not set yet."""
    return _on_meta(asdict(architecture), layers).to_empty(device="cpu")


def restored(layers: int, architecture: Mapping[str, Any], state: Mapping[str, Tensor]) -> Model:
    """The model whose tensors are those of `state`, not copies of them.

    `architecture` is an `Architecture` as plain data. Raises RuntimeError where the tensors are not
    this model's.
    """
    model = _on_meta(architecture, layers)
    model.load_state_dict(state, assign=True)
    return model


def _on_meta(architecture: Mapping[str, Any], layers: int) -> Model:
    """Without room for its tensors, so that nothing is drawn twice."""
    with torch.device("meta"):
        return Transformer(layers=layers, **architecture)
