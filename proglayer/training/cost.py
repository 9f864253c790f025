"""What a phase costs: parameters and operations. Needs no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

from proglayer.training.plan import TrainSpec


class Counts(NamedTuple):
    """Parameters of a model."""

    total: int
    trainable: int


class Flops(NamedTuple):
    """Floating-point operations (a multiply-add is two) of the head and of everything below it."""

    head: int
    body: int


def parameter_counts(spec: TrainSpec) -> Counts:
    """Parameters of the model in the phase, in all and those that train."""
    sizes = spec.architecture.sizes
    head = sizes.norm + sizes.head
    own = {*spec.ties}
    trainable = (sizes.layer - _held(spec)[0]) * len(own.intersection(spec.trained_layers))
    trainable += sizes.embedding * (spec.rates.embedding is not None)
    trainable += head * (spec.rates.head is not None)
    return Counts(sizes.embedding + head + sizes.layer * len(own), trainable)


def memory(spec: TrainSpec, seq_len: int, processes: int = 1) -> dict[str, int]:
    """Bytes on each of so many devices: of weights, gradients and moments, and, about, of what
    layers keep for the backward pass (`activations`). The loss keeps a buffer of its own.
    """
    counts, sizes, dim = parameter_counts(spec), spec.architecture.sizes, spec.architecture.dim
    size = 2 if getattr(spec.architecture, "dtype", None) == "bfloat16" else 4
    layers = min(spec.last_read + 1, spec.layers) - max(0, spec.lowest_trained)
    layer = 6 * dim + 4 * sizes.attention + 4 * sizes.hidden
    kept = layers * dim + layer if spec.checkpoint_activations else layers * layer
    tokens = seq_len * math.ceil(spec.batch_size / processes / spec.accumulate)
    trains = {"gradients": counts.trainable * size, "moments": 2 * counts.trainable * size}
    return {"weights": counts.total * size, **trains, "activations": tokens * kept * size}


def training_flops(spec: TrainSpec, seq_len: int, train_windows: int, epoch: int = 1) -> Flops:
    """Operations of one epoch of training: every matrix product that this phase needs.

    Forward everywhere; the gradient of a matrix where it trains; the gradient of its input where
    something below it trains. Only exits with a weight are read, and of those the ones that the
    curriculum reads in this epoch (1 is the first). Causal attention is counted
    over the whole square, as the usual formula 4 x tokens x dim does. What `cache_frozen` keeps
    runs once a phase and is left out; so is what `checkpoint_activations` forms a second time. Of
    a layer that steps leave out its mean share counts. In the lowest layer that trains, gradients
    are counted also where frozen kinds need none.
    """
    tokens = spec.windows(train_windows) * seq_len
    token_product = 2 * spec.architecture.vocab_size * spec.architecture.dim
    lowest = spec.lowest_trained
    # A norm that trains between hidden state and head needs the gradient of what the head reads.
    norm_trains = spec.architecture.final_norm and spec.rates.head is not None
    head = 0
    for exit, read in enumerate(_tokens_read(spec, seq_len, train_windows, epoch)):
        attached = not spec.detached or exit == spec.last_read
        to_hidden = (lowest <= exit and attached) or norm_trains
        head += token_product * read * (1 + (spec.rates.head is not None) + to_hidden)
    sizes = spec.architecture.sizes
    matrices, reading = 2 * tokens * sizes.matrices, 2 * tokens * sizes.reading
    scores = 4 * tokens * seq_len * sizes.attention
    trained = matrices - 2 * tokens * _held(spec)[1]
    body = 0
    for layer in range(lowest if spec.cache_frozen else 0, min(spec.last_read + 1, spec.layers)):
        products = matrices + scores
        if lowest <= layer:
            products += 2 * scores
            products += matrices - reading * (lowest == layer)
            products += trained * (layer in spec.trained_layers)
        body += round(products * (1 - spec.layer_drop[layer])) if spec.layer_drop else products
    return Flops(head=head, body=body)


def evaluation_flops(spec: TrainSpec, seq_len: int, validation_windows: int) -> Flops:
    """Operations of one evaluation at the last exit: the forward products.

    What `cache_frozen` keeps runs once a phase and is left out.
    """
    tokens = validation_windows * seq_len
    sizes = spec.architecture.sizes
    layer = 2 * tokens * sizes.matrices + 4 * tokens * seq_len * sizes.attention
    layers = spec.layers - (spec.lowest_trained if spec.cache_frozen else 0)
    head = 2 * tokens * spec.architecture.vocab_size * spec.architecture.dim
    return Flops(head=head, body=layer * layers)


def _held(spec: TrainSpec) -> tuple[int, int]:
    """Parameters of a layer that frozen kinds hold, and those of them that are of matrices."""
    if not spec.frozen_kinds:
        return 0, 0
    from proglayer.training.optim import held_in_layer  # it needs torch

    return held_in_layer(spec.architecture, spec.frozen_kinds)


def _tokens_read(spec: TrainSpec, seq_len: int, train_windows: int, epoch: int) -> list[int]:
    """How many tokens of an epoch the loss reads at each exit."""
    windows, steps = spec.windows(train_windows), spec.steps_per_epoch(train_windows)
    if spec.curriculum.kind == "all":
        return [windows * seq_len * (weight > 0) for weight in spec.exit_weights]
    read = [0] * spec.exits
    for step in range(steps):
        batch = min(spec.batch_size, windows - step * spec.batch_size)
        for exit, weight in enumerate(spec.exit_weights_at((epoch - 1) * steps + step, steps)):
            read[exit] += batch * seq_len * (weight > 0)
    return read
