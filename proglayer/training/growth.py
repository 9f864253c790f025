"""A shallow model becomes a deeper one.

Layers of the old model keep their weights; the new ones are drawn or copied. None of this keeps
the function of the model: in a post-norm layer the norm follows the residual sum, so even a layer
with all branches at zero rescales its input to unit mean square times its gain. What each operator
does preserve is stated at it.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from proglayer.training.model import Transformer, initialize
from proglayer.training.plan import Architecture, GrowthInit, Phase, placements
from proglayer.training.streams import stream


def build(phase: Phase) -> Transformer:
    """An untrained model for the first phase of a plan, on the CPU.

    Embedding, head and each layer draw from streams of their own, so models of different depth
    share what they have in common.
    """
    model = _empty(phase.architecture, phase.layers)
    dim = phase.architecture.dim
    initialize(model.embedding, dim, stream(phase.seed, "embedding", phase.index))
    initialize(model.head, dim, stream(phase.seed, "head", phase.index))
    for number, layer in enumerate(model.layers):
        initialize(layer, dim, stream(phase.seed, "layer", phase.index, number))
    return model


@torch.no_grad()
def grow(model: Transformer, phase: Phase) -> Transformer:
    """The model that `phase` starts with: `model` with the phase's growth, as new tensors.

    Embedding, head and old layers keep their values bit for bit, and the old layers their order.
    With position `top`, every exit of the old model computes what it did before; with `bottom`
    and `interleave` only the exits below the lowest new layer do. `random` preserves nothing
    further; `copy` starts a new layer with the values of the old layer below it (at the bottom:
    above it), in storage of its own.
    """
    growth = phase.growth
    if growth is None:
        return model
    old_layers = len(model.layers)
    positions = placements(old_layers, growth)
    grown = _empty(phase.architecture, phase.layers).to(model.head.weight.device)
    grown.embedding.load_state_dict(model.embedding.state_dict())
    grown.head.load_state_dict(model.head.state_dict())
    old = 0
    for number, layer in enumerate(grown.layers):
        if number not in positions:
            layer.load_state_dict(model.layers[old].state_dict())
            old += 1
        elif growth.init is GrowthInit.copy:
            layer.load_state_dict(model.layers[max(0, old - 1)].state_dict())
        else:
            cpu_layer = layer.cpu()
            draw = stream(phase.seed, "layer", phase.index, positions.index(number))
            initialize(cpu_layer, phase.architecture.dim, draw)
            layer.to(model.head.weight.device)
    return grown


def _empty(architecture: Architecture, layers: int) -> Transformer:
    """A model whose weights are not set yet (made on `meta`, so that nothing is drawn twice)."""
    with torch.device("meta"):
        model = Transformer(layers=layers, **asdict(architecture))
    return model.to_empty(device="cpu")
