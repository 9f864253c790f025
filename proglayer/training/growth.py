"""The growth operators: where the layers of a deeper model come from, and what each one preserves.

One list says it: for each layer of the grown model, bottom first, the old layer that it is or
starts from, None for one that is drawn. `growth.layers` gives the list itself, an operator is a
name for one at every depth; `layer_sources` says which of its layers are new.

To add an operator: a name in `config.GrowthInit`, a class here and its row in `OPERATORS`, a file
in `conf/growth/`, and what it gives and preserves in `tests/training/test_growth.py`. Needs no
torch: `plan` reads it, and `build.grow` does it to a model.

Whatever the operator, embedding, head, final norm and old layers keep their values bit for bit, and
the old layers their order; every exit below the lowest new layer computes what it did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from proglayer.config import Config, ConfigError, GrowthInit, GrowthPosition
from proglayer.training.architecture import later

if TYPE_CHECKING:
    from torch import nn

    from proglayer.training.model import Model


@dataclass(frozen=True)
class Growth:
    """Layers added at the start of a phase. What the operator does not read is as it is here.

    given: the list of layers, where it is given and not the operator's.
    depth: the layers that `stack` repeats, where that is not all of them.
    """

    layers: int
    init: GrowthInit
    position: GrowthPosition = "top"
    noise: float = 0.0
    block: int = 1
    gate_steps: int = 0
    given: tuple[int | None, ...] | None = later(None)
    depth: int | None = later(None)


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
        from after `growth`; None for one that is drawn.

        `interleave` spreads the new ones evenly: 3 on 3 layers gives every old layer a new one
        above it, and 1 on 3 goes above the second. `groups` puts one above each of as many equal
        groups of old layers.

        Raises ConfigError for a depth at which the operator is not defined.
        """
        added = growth.layers
        below = [layers] * added  # how many old layers are below each new one
        if growth.position == "bottom":
            below = [0] * added
        elif growth.position == "interleave":
            below = [math.ceil((i + 0.5) * layers / added) for i in range(added)]
        elif growth.position == "groups":
            if layers % added:
                fit = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
                wrong = f"added_layers={added} makes no equal groups of {layers} layers"
                raise ConfigError(f"{wrong}: take one of {fit}, or another growth.position")
            below = [(i + 1) * layers // added for i in range(added)]
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
    """The old layers once more on top: the layer at place i starts from old layer i mod L of L.
    Preserves the old last exit's function: exit 2L is the old layers applied to it (Gong et al.
    2019; Du et al. 2024, "G_stack"). Where growths come one after another, L stays until the model
    has twice as many.
    """

    reads = ("noise",)

    def sources(self, layers: int, growth: Growth) -> list[int | None]:
        depth = growth.depth or layers
        return [*range(layers), *(i % depth for i in range(layers, layers + growth.layers))]


class Solar(Operator):
    """Two copies of the old layers that overlap: the upper m layers are left out of the lower copy,
    the lower m of the upper one (Kim et al. 2023, "SOLAR": 32 layers and m = 8 make 48). Preserves
    nothing.
    """

    reads = ("noise",)

    def sources(self, layers: int, growth: Growth) -> list[int | None]:
        overlap, odd = divmod(layers - growth.layers, 2)
        possible = overlap >= 0 and not odd
        _check(possible, f"growth=solar makes no {layers + growth.layers} layers of {layers}")
        return [*range(layers - overlap), *range(overlap, layers)]


class Block(Operator):
    """A block of `growth.block` layers again, above itself, as often as there are new ones.
    Preserves nothing.
    """

    reads = ("noise", "block")

    def lowest(self, layers: int, block: int) -> int:
        """The lowest layer of the block in a model of `layers` layers."""
        raise NotImplementedError

    def sources(self, layers: int, growth: Growth) -> list[int | None]:
        block, lowest = growth.block, self.lowest(layers, growth.block)
        _check(block <= layers, f"growth.block={block} is more than {layers}")
        above = lowest + block
        again = (lowest + number % block for number in range(growth.layers))
        return [*range(above), *again, *range(above, layers)]


class Last(Block):
    """The last block (Gong et al. 2019; Reddi et al. 2023, gradual stacking)."""

    def lowest(self, layers: int, block: int) -> int:
        return layers - block


class Middle(Block):
    """The middle one of n blocks, the ceil(n / 2)th (Saunshi et al. 2024, "MIDAS")."""

    def lowest(self, layers: int, block: int) -> int:
        _check(layers % block == 0, f"growth.block={block} does not divide {layers}")
        return (layers // block - 1) // 2 * block


class Lidas(Block):
    """The layers in the exact middle, whatever blocks they are of (Kapl et al. 2025, "LIDAS")."""

    def lowest(self, layers: int, block: int) -> int:
        return (layers - block) // 2


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
    "random": Random(),
    "copy": Copy(),
    "stack": Stack(),
    "solar": Solar(),
    "last": Last(),
    "middle": Middle(),
    "lidas": Lidas(),
    "zero": Zero(),
    "gate": Gate(),
}


def growth_of(config: Config, layers: int, initial: int) -> Growth | None:
    """The growth of a model of `layers` layers by `added_layers`, or to `growth.layers`, with what
    its operator reads; None where nothing changes.

    initial: how many layers the first growth of the run began with.
    """
    settings, added = config.growth, config.added_layers
    assert isinstance(added, int), "the settings are those of one growth"
    if settings.layers is not None:
        added = len(settings.layers) - layers
    elif not added:
        return None
    reads = OPERATORS[settings.init].reads
    growth = Growth(added, settings.init, **{name: getattr(settings, name) for name in reads})
    if settings.layers is not None:
        return replace(growth, given=settings.layers)
    while initial and initial * 2 <= layers:
        initial *= 2
    stacks = settings.init == "stack" and initial != layers
    return replace(growth, depth=initial if stacks else None)


def layer_sources(layers: int, growth: Growth | None) -> tuple[Source, ...]:
    """Where each layer, bottom first, of a model of `layers` layers comes from after `growth`.

    Of the layers that come from the same old one, the lowest is that one and the others are new;
    with `position=bottom` the highest is.

    Raises ConfigError for a list of other layers, of none, or of the model as it is.
    """
    if growth is None:
        return tuple(Source(layer, False) for layer in range(layers))
    sources = growth.given
    if sources is None:
        sources = OPERATORS[growth.init].sources(layers, growth)
    known = bool(sources) and all(old is None or old < layers for old in sources)
    _check(known, f"growth.layers={list(sources)} names others than {layers}")
    if sources == tuple(range(layers)):
        raise ConfigError(f"growth.layers={list(sources)} is the model as it is: give a change")
    at_bottom = growth.position == "bottom"
    return tuple(
        Source(old, old is None or old in (sources[i + 1 :] if at_bottom else sources[:i]))
        for i, old in enumerate(sources)
    )


def ties_of(sources: Sequence[Source], old: Sequence[int], share: bool) -> list[int]:
    """The layer whose tensors each layer of a grown model has, where layers had those of `old`.

    An old layer has those of the one that it had them of, or its own where the growth left that
    one out; with `share` a copy has those of its source.
    """
    place = {source.layer: i for i, source in enumerate(sources) if not source.new}
    return [
        i if layer is None or (new and not share) else place.get(old[layer], i)
        for i, (layer, new) in enumerate(sources)
    ]


def _check(holds: bool, wrong: str) -> None:
    if not holds:
        raise ConfigError(f"{wrong} layers: take other growth settings, or another depth")


def gate_value(growth: Growth | None, step: int, steps_per_epoch: int) -> float | None:
    """The gate of a phase's new layers at optimizer step `step`, counted from 0.

    It rises from 0 by equal parts to 1, which it has reached after `gate_steps` steps, at the
    latest at the end of the first epoch; from then on, and where there is no gate, the result is
    None.
    """
    steps = min(growth.gate_steps, steps_per_epoch) if growth else 0
    return step / steps if step < steps else None
