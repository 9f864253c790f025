"""Models that are made: untrained ones, those of a file, and grown ones.

The one place that knows every kind of model, and draws their weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proglayer.training.architecture import Architecture, CausalLM
from proglayer.training.growth import OPERATORS, layer_sources
from proglayer.training.model import Model, Tied
from proglayer.training.plan import TrainSpec
from proglayer.training.transformer import Transformer


def stream(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator fixed by the run's seed, what it is for, and where in the run it is used.

    Different arguments give independent streams, so drawing more numbers for one purpose never
    moves another.
    """
    name = f"{seed}/{purpose}/" + "/".join(map(str, position))
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def build(spec: TrainSpec, checkpoint: Path | None = None) -> Model:
    """The model that the first phase of a plan starts with, on the CPU: untrained, or that in the
    folder `checkpoint`.

    Embedding, head and each layer draw from streams of their own, so models of different depth
    share what they have in common.
    """
    if checkpoint is not None:
        from proglayer.training.causal_lm import loaded  # its library takes seconds

        assert isinstance(spec.architecture, CausalLM)
        return loaded(spec.architecture, spec.layers, checkpoint)
    assert spec.checkpoint_sha256 is None, "the weights that it starts with lie in a folder"
    model = _empty(spec.architecture, spec.layers)
    for name, part in model.named_children():
        if name != "layers":
            model.initialize(part, stream(spec.seed, name, spec.index))
    for number, layer in enumerate(model.layers):
        model.initialize(layer, stream(spec.seed, "layer", spec.index, number))
    return model


def restored(layers: int, architecture: Mapping[str, Any], state: Mapping[str, Tensor]) -> Model:
    """The model whose tensors are those of `state`, not copies of them.

    `architecture` is an `Architecture` as plain data. Raises RuntimeError where the tensors are not
    this model's.
    """
    model = on_meta(architecture, layers)
    model.load_state_dict(state, assign=True)
    return model.settle()


@torch.no_grad()
def grow(model: Model, spec: TrainSpec) -> Model:
    """The model that a phase starts with: `model` with the phase's growth, as new tensors.

    What is preserved is said by each of `growth.OPERATORS`. `growth.noise` mixes each matrix of a
    copy with normal noise of the same root mean square: (1 - noise) w + noise n. At 0 nothing is
    drawn (Du et al. 2024, section 5.2).

    No tensor of the grown model shares storage with another or with `model`; a layer that has the
    tensors of another (`growth.share`) has none itself.
    """
    growth = spec.growth
    if growth is None:
        return model
    device = model.head_weight.device
    grown = _empty(spec.architecture, spec.layers).to(device)
    for name, part in model.named_children():
        if name != "layers":
            grown.get_submodule(name).load_state_dict(part.state_dict())
    sources = layer_sources(len(model.layers), growth)
    added = 0
    for layer, source in zip(grown.layers, sources, strict=True):
        if isinstance(layer, Tied):
            continue
        if source.layer is not None:
            old = model.layers[source.layer]
            layer.load_state_dict((old.of[0] if isinstance(old, Tied) else old).state_dict())
        else:
            grown.initialize(layer.cpu(), stream(spec.seed, "layer", spec.index, added))
            layer.to(device)
        if source.new:
            if growth.noise:
                _add_noise(layer, growth.noise, stream(spec.seed, "noise", spec.index, added))
            OPERATORS[growth.init].start(grown, layer)
            added += 1
    return grown


def _add_noise(layer: nn.Module, share: float, generator: torch.Generator) -> None:
    """Mix the layer's matrices with noise of their own scale; gains and biases stay."""
    for weight in layer.parameters():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            scale = weight.square().mean().sqrt()
            weight.mul_(1 - share).add_(noise * scale, alpha=share)


def _empty(architecture: Architecture | CausalLM, layers: int) -> Model:
    """A model on the CPU whose weights are not set yet."""
    return on_meta(asdict(architecture), layers).to_empty(device="cpu").settle()


def on_meta(architecture: Mapping[str, Any], layers: int) -> Model:
    """A model without room for its tensors, so that nothing is drawn twice."""
    if "family" in architecture:
        # Importing the library takes seconds, so who does not ask for it does not.
        from proglayer.training import causal_lm

        return causal_lm.on_meta(architecture, layers)
    with torch.device("meta"):
        return Transformer(layers, Architecture(**architecture))
