"""What a model is at any depth, as plain data: it is part of the key of what is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from pydantic_core import to_jsonable_python


def later(default: Any) -> Any:
    """A field that `keyed` leaves out at its default: it came when there were keys without it."""
    return field(default=default, metadata={"later": True})


def keyed(value: Any) -> Any:
    """What a key is the hash of, as plain data."""
    if not is_dataclass(value):
        return to_jsonable_python(value)
    return {
        each.name: keyed(found)
        for each in fields(value)
        if (found := getattr(value, each.name)) != each.default or not each.metadata
    }


@dataclass(frozen=True)
class Sizes:
    """What a model's parts hold and what its products cost.

    embedding, layer, norm, head: parameters of each, `norm` the final one's; those of a head that
        is the embedding are 0.
    matrices: of a layer's parameters, those of its matrices.
    reading: of those, what multiplies the layer's input with nothing between that trains.
    attention: heads times the dimension of a head.
    hidden: the width of the feed-forward.
    """

    embedding: int
    layer: int
    norm: int
    head: int
    matrices: int
    reading: int
    attention: int
    hidden: int


@dataclass(frozen=True)
class Architecture:
    """The project's own model, a `transformer.Transformer`.

    ties: for each layer the one whose tensors it has, where some have those of others.
    """

    vocab_size: int
    dim: int
    num_heads: int
    ffn_multiple: int
    rotary_base: float
    norm_eps: float
    norm: str = "post"
    residual_scale: str = later("none")
    ties: tuple[int, ...] = later(())

    # Its head is a matrix of its own.
    tied = False

    def grown(self, sources: Sequence[int | None], ties: Sequence[int] = ()) -> Architecture:
        """The same with layers from these old ones."""
        return replace(self, ties=() if [*ties] == [*range(len(ties))] else tuple(ties))

    @property
    def final_norm(self) -> bool:
        """Whether an exit reads the hidden state through a norm of its own."""
        return self.norm == "pre"

    @property
    def sizes(self) -> Sizes:
        """Four attention projections, a gated feed-forward and two gains make a layer."""
        dim, table = self.dim, self.vocab_size * self.dim
        matrices = 4 * dim**2 + 3 * self.ffn_multiple * dim**2
        return Sizes(
            embedding=table,
            layer=matrices + (4 if self.residual_scale == "layerscale" else 2) * dim,
            norm=dim * self.final_norm,
            head=table,
            matrices=matrices,
            # In a pre-norm layer a gain stands between the input and queries, keys and values.
            reading=0 if self.final_norm else 3 * dim**2,
            attention=dim,
            hidden=self.ffn_multiple * dim,
        )


@dataclass(frozen=True)
class CausalLM:
    """A causal language model of `transformers`.

    family: its `model_type`.
    settings: its configuration without its depth, as JSON with sorted keys.
    tied: whether embedding and head are one tensor.
    dtype: that of its weights.
    kinds: settings that are a list with a value for each layer, as JSON with sorted keys.
    """

    family: str
    vocab_size: int
    dim: int
    settings: str
    tied: bool
    sizes: Sizes
    dtype: str = "float32"
    kinds: str = later("{}")

    # What the families have in common.
    final_norm = True
    ties = ()

    def grown(self, sources: Sequence[int | None], ties: Sequence[int] = ()) -> CausalLM:
        """The same with layers from these old ones: each of the kind of its source, one that is
        drawn of that of the layer below.
        """
        kinds: dict[str, list[Any]] = {}
        for name, old in json.loads(self.kinds).items():
            kinds[name] = []
            for source in sources:
                below = kinds[name][-1] if kinds[name] else old[0]
                kinds[name].append(below if source is None else old[source])
        return replace(self, kinds=json.dumps(kinds, sort_keys=True))
