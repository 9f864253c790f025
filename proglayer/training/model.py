"""What a model is to the trainer, the loss, the growth and the store: they ask nothing else of one.

Its parameters are named by their part: `embedding.*`, `layers.<number>.*` from the bottom up,
`norm.*` (the final one, where there is one) and `head.*`. Their roles follow from that.

Shapes in names: n windows, t positions, d model dimension, v vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Tied(nn.Module):
    """A layer once more at another place: it has no tensors of its own there."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.of = (layer,)  # in a tuple it is no part of this module

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return self.of[0](*given, **named)


class Model(nn.Module):
    """A decoder-only language model: embedding, layers, and one head that every exit shares.

    It gives the hidden state of every exit and knows no loss: the head's weight is read by
    `loss.py`, which never forms all logits. A subclass sets `embedding`, `layers`, `norm` and
    `head`, gives `beside`, and says how a part is drawn and how a layer is made to add nothing.
    """

    embedding: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        # While a growth's gate opens: the layers behind it, and its value (a scalar tensor).
        self.gated_layers: tuple[int, ...] = ()
        self.gate: Tensor | None = None
        # The layers that the step under way leaves out: their output is what they read.
        self.dropped: tuple[int, ...] = ()
        # Whether what a layer computes is formed again in the backward pass instead of kept.
        self.checkpoint_activations = False

    def settle(self) -> Self:
        """Form what is computed from the architecture alone and stored nowhere. Returns itself."""
        return self

    @abstractmethod
    def beside(self, x_ntd: Tensor) -> dict[str, Any]:
        """What every layer takes beside the hidden state `x_ntd`, by the names of its arguments."""

    @abstractmethod
    def initialize(self, part: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights of a part of this model, which is on the CPU, from `generator`."""

    @abstractmethod
    def silence(self, layer: nn.Module) -> None:
        """Make both branches of a layer add nothing: their output projections become 0."""

    @property
    def head_weight(self) -> Tensor:
        """The output head, (vocab, dim)."""
        assert isinstance(self.head.weight, Tensor)
        return self.head.weight

    def embed(self, tokens_nt: Tensor) -> Tensor:
        """What the lowest layer reads, (windows, positions, dim)."""
        return self.embedding(tokens_nt)

    def read(self, hidden_ntd: Tensor) -> Tensor:
        """What the head reads at an exit with this hidden state; the same shape."""
        return self.norm(hidden_ntd)

    def forward(self, tokens_nt: Tensor) -> tuple[Tensor, ...]:
        """Hidden states (windows, positions, dim) after each layer, bottom first; with no layer at
        all, the embedding alone.

        What is frozen runs without recording gradients as far as nothing below it trains.
        """
        return self.layers_from(0, self.embed(tokens_nt))

    def layers_from(self, first: int, x_ntd: Tensor, end: int | None = None) -> tuple[Tensor, ...]:
        """Hidden states after each of the layers from `first` to before `end` (None: to the top).

        x_ntd: what layer `first` reads.
        """
        beside = self.beside(x_ntd)
        checkpointed = self.checkpoint_activations and torch.is_grad_enabled()
        exits = []
        for number, layer in enumerate(self.layers[first:end], start=first):
            if number in self.dropped:
                exits.append(x_ntd)
                continue
            if checkpointed:
                # Formed again in the backward pass (Chen et al. 2016, "Training deep nets with
                # sublinear memory cost"). No layer draws random numbers.
                y_ntd = checkpoint(
                    layer, x_ntd, use_reentrant=False, preserve_rng_state=False, **beside
                )
            else:
                y_ntd = layer(x_ntd, **beside)
            if self.gate is not None and number in self.gated_layers:
                y_ntd = self.gate * y_ntd + (1 - self.gate) * x_ntd
            x_ntd = y_ntd
            exits.append(x_ntd)
        return tuple(exits or [x_ntd])

    def logits(self, tokens_nt: Tensor) -> Tensor:
        """Next-token logits (windows, positions, vocab) at the last exit, for using a model."""
        return F.linear(self.read(self(tokens_nt)[-1]), self.head_weight)
