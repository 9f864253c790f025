"""A phase's roles made real: what trains, in which parameter group, at which rate."""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict

import torch
from torch import Tensor

from proglayer.config import OptimizerConfig
from proglayer.training.architecture import Architecture, CausalLM
from proglayer.training.build import on_meta
from proglayer.training.growth import layer_sources
from proglayer.training.model import Model
from proglayer.training.plan import Role, TrainSpec

# Words in the names of a layer's parameters, of our model and the library's; the first that fits.
WORDS = {"norms": ("norm", "ln_"), "attention": ("attention", "attn"), "mlp": ("mlp", "ffn")}
# What AdamW remembers of a parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def role_of(name: str, spec: TrainSpec) -> Role:
    """The role of the parameter called `name`: the final norm's is that of the head."""
    part, _, rest = name.partition(".")
    if part == "layers":
        return Role.new if int(rest.split(".")[0]) in spec.new_layers else Role.existing
    return Role.embedding if part == "embedding" else Role.head


def kind_of(name: str) -> str | None:
    """The kind of a layer's parameter called `name`; None for a gain of a branch."""
    fits = (kind for kind, words in WORDS.items() if any(word in name for word in words))
    return next(fits, None)


@functools.cache
def held_in_layer(architecture: Architecture | CausalLM, kinds: tuple[str, ...]) -> tuple[int, int]:
    """Parameters of a layer that are of these kinds, and those of them that are of matrices."""
    layer = on_meta(asdict(architecture.grown([0])), 1).layers[0]
    held = [weight for name, weight in layer.named_parameters() if kind_of(name) in kinds]
    matrices = (weight.numel() for weight in held if weight.ndim > 1)
    return sum(weight.numel() for weight in held), sum(matrices)


def trains(name: str, spec: TrainSpec) -> bool:
    """Whether the parameter called `name` trains in the phase."""
    if name.startswith("layers."):
        return int(name.split(".")[1]) in spec.trained_layers and (
            not spec.frozen_kinds or kind_of(name) not in spec.frozen_kinds
        )
    return getattr(spec.rates, role_of(name, spec)) is not None


def set_trainable(model: Model, spec: TrainSpec) -> dict[str, Tensor]:
    """Mark what trains in the phase, drop left-over gradients; gives the trainable set by name."""
    trainable = {}
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(trains(name, spec))
        if parameter.requires_grad:
            trainable[name] = parameter
    return trainable


def decayed(name: str, parameter: Tensor, settings: OptimizerConfig) -> bool:
    """Whether weight decay acts on the parameter called `name`: gains and biases are vectors."""
    if name.startswith("embedding."):
        return settings.decay_embedding
    return settings.decay_norms or parameter.ndim > 1


def build_optimizer(model: Model, spec: TrainSpec) -> torch.optim.AdamW:
    """A fresh AdamW over exactly the trainable set, one group for each role that trains (two where
    weight decay leaves out some of it).

    Each group carries `role`, `base_lr` (the rate before the schedule) and `names`, in the order
    of its parameters.
    """
    trainable = set_trainable(model, spec)
    settings = spec.optimizer
    groups = []
    for role, decays in itertools.product(Role, (True, False)):
        named = {
            name: parameter
            for name, parameter in trainable.items()
            if role_of(name, spec) is role and decayed(name, parameter, settings) is decays
        }
        if named:
            rate = getattr(spec.rates, role)
            group = {"params": list(named.values()), "names": list(named), "role": role}
            group |= {"lr": rate, "base_lr": rate}
            group["weight_decay"] = settings.weight_decay if decays else 0.0
            groups.append(group)
    betas = settings.beta1, settings.beta2
    return torch.optim.AdamW(groups, betas=betas, eps=settings.eps, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Apply the schedule: every group's rate becomes its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `<parameter>/<entry>`, sharing storage with it."""
    return {
        f"{name}/{entry}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for entry, value in optimizer.state[parameter].items()
    }


def carried_tensors(tensors: dict[str, Tensor], spec: TrainSpec, layers: int) -> dict[str, Tensor]:
    """The part of an optimizer's state that the phase takes over, under the names it has there.

    `tensors` are those of the phase before, of a model of `layers` layers. What did not train there
    has no state to give; the result is empty with `carry=none`.
    """
    carry = spec.optimizer.carry
    if carry == "none":
        return {}
    carried = {name: value for name, value in tensors.items() if not name.startswith("layers.")}
    # Moments of weights that are not zero say nothing of those that are.
    zeroed = spec.growth is not None and spec.growth.init == "zero"
    for number, source in enumerate(layer_sources(layers, spec.growth)):
        if source.layer is None or (source.new and (carry != "copy" or zeroed)):
            continue
        old = f"layers.{source.layer}."
        for name, value in tensors.items():
            if name.startswith(old):
                carried[f"layers.{number}.{name.removeprefix(old)}"] = value
    return carried


def start_from(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give a fresh optimizer the state that `optimizer_tensors` or `carried_tensors` gave, by name.

    What is not in it starts afresh; what is used is taken out of it.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for entry in MOMENTS:
                if (value := tensors.pop(f"{name}/{entry}", None)) is not None:
                    optimizer.state[parameter][entry] = value.to(parameter.device, copy=True)
