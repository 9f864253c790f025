"""What a phase reads: windows of tokens, and the hidden states of its frozen layers, computed once
and kept (`cache_frozen=true`).

What lies below the lowest layer that trains gives the same hidden states in every epoch. Kept for
all windows they cost windows x positions x dim x 4 bytes of memory for each exit that is read.

They are formed in the order of the windows, in batches of the phase's size: a function of weights
and text alone, so that a resumed phase has the same bits. Against the uncached path they differ by
the rounding of float32, as a product's rounding depends on where in its batch a window stands.

Shapes in names: n windows, t positions, d model dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from proglayer.training.group import Group
from proglayer.training.model import Model
from proglayer.training.plan import TrainSpec


class Windows:
    """Token windows (n, t + 1) to be batched: memory-mapped on the CPU, else on the device."""

    def __init__(self, tokens: np.ndarray, device: torch.device) -> None:
        self.seq_len = tokens.shape[1] - 1
        self.device = device
        self._mapped = tokens
        self._resident: Tensor | None = None
        if device.type != "cpu":
            self._resident = torch.from_numpy(np.array(tokens)).to(device)

    def __len__(self) -> int:
        return len(self._mapped)

    def batch(self, rows_n: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets (n, t), int64, of the windows numbered `rows_n` (on the CPU)."""
        if self._resident is not None:
            tokens = self._resident[rows_n.to(self.device, non_blocking=True)].long()
        else:
            tokens = torch.from_numpy(self._mapped[rows_n.numpy()]).long()
        return tokens[:, :-1], tokens[:, 1:]


class FrozenStates:
    """Hidden states at the exits below the first layer that trains, for all windows.

    exits: those to be read; the one that the first trained layer starts from is kept as well.
    group: each of its processes keeps those of its own windows (`Group.share`).
    """

    def __init__(
        self, spec: TrainSpec, exits: Sequence[int], windows: Windows, group: Group | None = None
    ) -> None:
        self.spec, self.windows, self.group = spec, windows, group
        self.first = min(spec.lowest_trained, 1 + max(exits))
        self.above = max(exits) >= self.first
        self.kept = [e for e in range(self.first) if e in exits or e == self.first - 1]
        self._states: list[Tensor] | None = None

    def hidden(self, model: Model, window_n: Tensor) -> dict[int, Tensor]:
        """Hidden states (n, t, d) by exit, of the windows of these numbers.

        The first call computes them for all.
        """
        if self._states is None:
            self._states = self._compute(model)
        place_n = window_n if self.group is None else window_n // self.group.size
        found = {e: kept[place_n] for e, kept in zip(self.kept, self._states, strict=True)}
        if self.above:
            above = model.layers_from(self.first, found[self.first - 1])
            found |= dict(enumerate(above, start=self.first))
        return found

    @torch.no_grad()
    def _compute(self, model: Model) -> list[Tensor]:
        states: list[Tensor] = []
        own = torch.arange(len(self.windows))
        if self.group is not None:
            own = self.group.share(own, own=True)
        for place_n in torch.arange(len(own)).split(self.spec.batch_size):
            x_ntd = model.embed(self.windows.batch(own[place_n])[0])
            below = model.layers_from(0, x_ntd, self.first)
            hidden_entd = [below[e] for e in self.kept]
            if not states:
                with torch.inference_mode(False):
                    states = [x.new_empty(len(own), *x.shape[1:]) for x in hidden_entd]
            for kept, hidden_ntd in zip(states, hidden_entd, strict=True):
                kept[place_n] = hidden_ntd
        return states
