"""The growth operators: where the layers of a deeper model come from, and what each one preserves.

To add one: a name in `config.GrowthInit`, a class here and its row in `OPERATORS`, and a test of
what it preserves. Needs no torch: `plan` reads it, and `build.grow` does it to a model.

Whatever the operator, embedding, head, final norm and old layers keep their values bit for bit, and
the old layers their order; every exit below the lowest new layer computes what it did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from proglayer.config import GrowthConfig, GrowthInit, GrowthPosition

if TYPE_CHECKING:
    from torch import nn

    from proglayer.training.model import Model


@dataclass(frozen=True)
class Growth:
    """Layers added at the start of a phase. What the operator does not read is as it is here."""

    layers: int
    init: GrowthInit
    position: GrowthPosition = GrowthPosition.top
    noise: float = 0.0
    block: int = 1
    gate_steps: int = 0


class Source(NamedTuple):
    """Where a layer of a grown model comes from.

    `layer` is the old layer that it is or starts from, None for one that is drawn; `new` whether
    the growth added it.
    """

    layer: int | None
    new: bool


class Operator:
    """How the new layers of a growth come to be.

    reads: the settings of `growth` that it reads, beside `init`.
    """

    reads: tuple[str, ...] = ("position", "noise")

    def sources(self, layers: int, growth: Growth) -> list[int | None]:
        """The old layer that each layer, bottom first, of a model of `layers` layers is or starts
        from after `growth`; None for one that is drawn. `layer_sources` says which are new.

        `interleave` spreads the new ones evenly: 3 on 3 layers gives every old layer a new one
        above it, and 1 on 3 goes above the second.
        """
        added = growth.layers
        below = [layers] * added  # how many old layers are below each new one
        if growth.position is GrowthPosition.bottom:
            below = [0] * added
        elif growth.position is GrowthPosition.interleave:
            below = [math.ceil((i + 0.5) * layers / added) for i in range(added)]
        sources: list[int | None] = []
        for old in range(layers + 1):
            sources += [self.origin(old)] * below.count(old) + [old]
        return sources[:-1]

    def origin(self, below: int) -> int | None:
        """The old layer that a new one above so many old ones starts from: the one below it, at the
        bottom the one above.
        """
        return max(0, below - 1)

    def start(self, model: Model, layer: nn.Module) -> None:
        """Change a new layer of `model` once it has its values."""


class Random(Operator):
    """New layers as of an untrained model, from a stream of their own. Preserves nothing."""

    reads = ("position",)

    def origin(self, below: int) -> None:
        return None


class Copy(Operator):
    """The layer below once more (Chang et al. 2018, interleaved). Preserves nothing."""


class Stack(Operator):
    """The old layers once more on top: new layer i starts from old layer i mod L of L. Preserves
    the old last exit's function: exit 2L is the old layers applied to it (Gong et al. 2019; Du et
    al. 2024, "G_stack").
    """

    reads = ("noise",)

    def sources(self, layers: int, growth: Growth) -> list[int | None]:
        return [*range(layers), *(number % layers for number in range(growth.layers))]


class Middle(Operator):
    """A block in the middle repeated, above itself (Saunshi et al. 2024, "MIDAS"). Preserves
    nothing.
    """

    reads = ("noise", "block")

    def sources(self, layers: int, growth: Growth) -> list[int | None]:
        lowest = (layers - growth.block) // 2
        above = lowest + growth.block
        again = (lowest + number % growth.block for number in range(growth.layers))
        return [*range(above), *again, *range(above, layers)]


class Zero(Operator):
    """Copies whose branches give 0, as their attention output `o` and `w2` are 0 (Wu et al. 2024,
    "LLaMA Pro"). Preserves, pre-norm, every function, bit for bit, in every position. Post-norm
    such a layer is x / rms(x): on top of the model every token's most likely next word stays and
    only the loss's temperature moves; its gains start at 1 for that. Their first gradient is 0 but
    at `o`, `w2` and, post-norm, at the gains.
    """

    def start(self, model: Model, layer: nn.Module) -> None:
        model.silence(layer)


class Gate(Operator):
    """Copies behind a gate g: hidden state = g layer(h) + (1 - g) h (after Yao et al. 2024, "Masked
    structural growth"). Preserves, at g = 0, every function, bit for bit, in both norms and every
    position; at g = 1 it is the model without a gate. `gate_value` says how g moves.
    """

    reads = ("position", "noise", "gate_steps")


OPERATORS: dict[GrowthInit, Operator] = {
    GrowthInit.random: Random(),
    GrowthInit.copy: Copy(),
    GrowthInit.stack: Stack(),
    GrowthInit.middle: Middle(),
    GrowthInit.zero: Zero(),
    GrowthInit.gate: Gate(),
}


def growth_of(settings: GrowthConfig, added: int) -> Growth | None:
    """The growth by so many layers, with what its operator reads; None where none is added."""
    if not added:
        return None
    reads = OPERATORS[settings.init].reads
    return Growth(added, settings.init, **{name: getattr(settings, name) for name in reads})


def layer_sources(layers: int, growth: Growth | None) -> tuple[Source, ...]:
    """Where each layer, bottom first, of a model of `layers` layers comes from after `growth`.

    Of the layers that come from the same old one, the lowest is that one and the others are new;
    with `position=bottom` the highest is.
    """
    if growth is None:
        return tuple(Source(layer, False) for layer in range(layers))
    sources = OPERATORS[growth.init].sources(layers, growth)
    at_bottom = growth.position is GrowthPosition.bottom
    return tuple(
        Source(old, old is None or old in (sources[i + 1 :] if at_bottom else sources[:i]))
        for i, old in enumerate(sources)
    )


def gate_value(growth: Growth | None, step: int, steps_per_epoch: int) -> float | None:
    """The gate of a phase's new layers at optimizer step `step`, counted from 0.

    It rises from 0 by equal parts to 1, which it has reached after `gate_steps` steps, at the
    latest at the end of the first epoch; from then on, and where there is no gate, the result is
    None.
    """
    steps = min(growth.gate_steps, steps_per_epoch) if growth else 0
    return step / steps if step < steps else None
