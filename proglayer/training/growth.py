"""A shallow model becomes a deeper one: untrained models, and the growth operators.

To add an operator: a name in `config.GrowthInit`, where its layers come from in
`plan.layer_sources`, what it changes in `grow`, and a test of what it preserves.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from proglayer.config import GrowthInit
from proglayer.training.architecture import CausalLM
from proglayer.training.build import empty
from proglayer.training.model import Model
from proglayer.training.plan import Growth, Phase, layer_sources
from proglayer.training.streams import stream


def build(phase: Phase) -> Model:
    """The model that the first phase of a plan starts with, on the CPU: untrained, or a checkpoint.

    Embedding, head and each layer draw from streams of their own, so models of different depth
    share what they have in common.
    """
    if phase.checkpoint_folder is not None:
        from proglayer.training.causal_lm import loaded  # its library takes seconds

        assert isinstance(phase.architecture, CausalLM)
        return loaded(phase.architecture, phase.layers, Path(phase.checkpoint_folder))
    model = empty(phase.architecture, phase.layers)
    for name, part in model.named_children():
        if name != "layers":
            model.initialize(part, stream(phase.seed, name, phase.index))
    for number, layer in enumerate(model.layers):
        model.initialize(layer, stream(phase.seed, "layer", phase.index, number))
    return model


@torch.no_grad()
def grow(model: Model, phase: Phase) -> Model:
    """The model that `phase` starts with: `model` with the phase's growth, as new tensors.

    Embedding, head, final norm and old layers keep their values bit for bit, and the old layers
    their order; every exit below the lowest new layer computes what it did. What else is kept:

    - random: nothing. The draw comes from a stream of its own.
    - copy: nothing; the layer below once more (Chang et al. 2018, interleaved).
    - stack: exit 2L of L layers is the old layers applied to the old last exit (Gong et al. 2019;
      Du et al. 2024, "G_stack").
    - middle: nothing; a block of the middle is repeated (Saunshi et al. 2024, "MIDAS").
    - zero: copies whose branches give 0, as their attention output `o` and `w2` are 0 (Wu et al.
      2024, "LLaMA Pro"). Pre-norm: every function, bit for bit, in every position. Post-norm: such
      a layer is x / rms(x), so on top of the model every token's most likely next word stays and
      only the loss's temperature moves; its gains start at 1 for that. Their first gradient is 0
      but at `o`, `w2` and, post-norm, at the gains.
    - gate: copies behind a gate g, hidden state = g layer(h) + (1 - g) h (after Yao et al. 2024,
      "Masked structural growth"). At g = 0 every function, bit for bit, in both norms and every
      position; at g = 1 it is the model without a gate. `gate_value` says how g moves.

    `growth.noise` mixes each matrix of a copy with normal noise of the same root mean square:
    (1 - noise) w + noise n. At 0 nothing is drawn (Du et al. 2024, section 5.2).

    No tensor of the grown model shares storage with another or with `model`.
    """
    growth = phase.growth
    if growth is None:
        return model
    device = model.head_weight.device
    grown = empty(phase.architecture, phase.layers).to(device)
    for name, part in model.named_children():
        if name != "layers":
            grown.get_submodule(name).load_state_dict(part.state_dict())
    sources = layer_sources(len(model.layers), growth)
    added = 0
    for layer, source in zip(grown.layers, sources, strict=True):
        if source.layer is not None:
            layer.load_state_dict(model.layers[source.layer].state_dict())
        else:
            draw = stream(phase.seed, "layer", phase.index, added)
            grown.initialize(layer.cpu(), draw)
            layer.to(device)
        if source.new:
            if growth.noise:
                _add_noise(layer, growth.noise, stream(phase.seed, "noise", phase.index, added))
            if growth.init is GrowthInit.zero:
                grown.silence(layer)
            added += 1
    return grown


def gate_value(growth: Growth | None, step: int) -> float | None:
    """The gate of a phase's new layers at optimizer step `step`, counted from 0.

    It rises from 0 by equal parts to 1, which it has reached after `gate_steps` steps; from then
    on, and where there is no gate, the result is None.
    """
    if growth is None or growth.init is not GrowthInit.gate or step >= growth.gate_steps:
        return None
    return step / growth.gate_steps


def _add_noise(layer: nn.Module, share: float, generator: torch.Generator) -> None:
    """Mix the layer's matrices with noise of their own scale; gains and biases stay."""
    for weight in layer.parameters():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            scale = weight.square().mean().sqrt()
            weight.mul_(1 - share).add_(noise * scale, alpha=share)
