"""Weights and training states as bytes: safetensors files with plain data beside the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from proglayer.training.build import restored
from proglayer.training.model import Model
from proglayer.training.optim import optimizer_tensors, start_from
from proglayer.training.plan import TrainSpec
from proglayer.training.trainer import Training

# The entry of a file's metadata that holds what is not a tensor.
ABOUT = "proglayer"

# Tensors by name.
Tensors = dict[str, Tensor]


def on_cpu(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors on the CPU, where they were elsewhere; else they share storage."""
    return {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}


def pack_weights(spec: TrainSpec, weights: Tensors) -> bytes:
    """The file of a phase's model."""
    return _pack(weights, {"architecture": asdict(spec.architecture), "layers": spec.layers})


def load_model(content: bytes) -> Model:
    """The model in a file of weights, on the CPU."""
    about = _about(content)
    return restored(about["layers"], about["architecture"], safetensors.torch.load(content))


def pack_training(training: Training) -> bytes:
    """Everything that training changes, for going on from exactly here."""
    tensors = {"loss_sum": training.loss_sum}
    tensors |= {f"model/{name}": value for name, value in _trainable(training).items()}
    for name, value in optimizer_tensors(training.optimizer).items():
        tensors[f"optimizer/{name}"] = value
    about: dict[str, Any] = {"seconds": training.seconds}
    if training.gradient_shares and training.epoch == 0:
        about["gradient_shares"] = [float(share) for share in training.gradient_shares]
    return _pack(on_cpu(tensors), about)


def pack_optimizer(training: Training) -> bytes:
    """The optimizer's state, for a later phase that takes it over."""
    return safetensors.torch.save(on_cpu(optimizer_tensors(training.optimizer)))


def load_training(training: Training, content: bytes) -> None:
    """Put a stored state into `training`, but for its position."""
    parts: dict[str, Tensors] = {"loss_sum": {}, "model": {}, "optimizer": {}}
    for name, value in safetensors.torch.load(content).items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    about = _about(content)
    with torch.no_grad():
        for name, parameter in _trainable(training).items():
            parameter.copy_(parts["model"][name])
    start_from(training.optimizer, parts["optimizer"])
    training.loss_sum = parts["loss_sum"][""].to(training.device)
    training.seconds = about["seconds"]
    training.gradient_shares = [torch.tensor(share) for share in about.get("gradient_shares", [])]


def _trainable(training: Training) -> Tensors:
    return {n: p for n, p in training.model.named_parameters() if p.requires_grad}


def _pack(tensors: Tensors, about: dict[str, Any]) -> bytes:
    """A safetensors file; equal content gives equal bytes.

    The plain data is one entry of the file's metadata, since those come in no fixed order.
    """
    return safetensors.torch.save(tensors, {ABOUT: json.dumps(about, sort_keys=True)})


def _about(content: bytes) -> dict[str, Any]:
    """The plain data of such a file: it begins with a length of 8 bytes, then a header in JSON."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"][ABOUT])
