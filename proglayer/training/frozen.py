"""The hidden states of a phase's frozen layers, computed once and kept (`cache_frozen=true`).

What lies below the lowest layer that trains gives the same hidden states in every epoch. Kept for
all windows they cost windows x positions x dim x 4 bytes for each exit that is read: in memory up
to a share of what is free, beyond it in a file that is gone with the process.

They are formed in the order of the windows, in batches of the phase's size: a function of weights
and text alone, so that a resumed phase has the same bits. Against the uncached path they differ by
the rounding of float32, as a product's rounding depends on where in its batch a window stands.

Shapes in names: n windows, t positions, d model dimension.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from proglayer.config import ConfigError
from proglayer.training.model import Model
from proglayer.training.plan import TrainSpec

SHARE_OF_FREE_MEMORY = 0.25


class FrozenStates:
    """Hidden states at the exits below the first layer that trains, for all windows.

    exits: those to be read; the one that the first trained layer starts from is kept as well.
    windows: how many there are; inputs: the tokens (n, t) of those of these numbers.
    """

    def __init__(
        self,
        spec: TrainSpec,
        exits: Sequence[int],
        windows: int,
        inputs: Callable[[Tensor], Tensor],
    ) -> None:
        self.spec, self.windows, self.inputs = spec, windows, inputs
        self.first = min(spec.lowest_trained, 1 + max(exits))
        self.above = max(exits) >= self.first
        self.kept = [e for e in range(self.first) if e in exits or e == self.first - 1]
        self._states: list[Tensor] | None = None

    def hidden(self, model: Model, window_n: Tensor) -> dict[int, Tensor]:
        """Hidden states (n, t, d) by exit, of the windows of these numbers.

        The first call computes them for all. Raises ConfigError where they find no room.
        """
        if self._states is None:
            self._states = self._compute(model)
        found = {e: kept[window_n] for e, kept in zip(self.kept, self._states, strict=True)}
        if self.above:
            above = model.layers_from(self.first, found[self.first - 1])
            found |= dict(enumerate(above, start=self.first))
        return found

    @torch.no_grad()
    def _compute(self, model: Model) -> list[Tensor]:
        states: list[Tensor] = []
        for window_n in torch.arange(self.windows).split(self.spec.batch_size):
            x_ntd = model.embed(self.inputs(window_n))
            below = model.layers_from(0, x_ntd, self.first)
            hidden_entd = [below[e] for e in self.kept]
            if not states:
                shape = (self.windows, *hidden_entd[0].shape[1:])
                with torch.inference_mode(False):
                    states = [_room(shape, x.dtype, len(self.kept)) for x in hidden_entd]
            for kept, hidden_ntd in zip(states, hidden_entd, strict=True):
                kept[window_n] = hidden_ntd
        return states


def _room(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> Tensor:
    """An uninitialised tensor, one of `count`: in memory, or where that is scarce, in a file."""
    size = int(np.prod(shape)) * dtype.itemsize
    if count * size <= SHARE_OF_FREE_MEMORY * _free_bytes():
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile() as file:
        # Not a sparse file: a disk that fills up later would end the process by a signal.
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise ConfigError(
                f"cache_frozen=true: {count * size / 1e6:,.0f} MB of hidden states find no room in "
                f"memory, nor in {tempfile.gettempdir()} ({error.strerror}): set cache_frozen=false"
            ) from error
        flat = np.memmap(file, np.uint8, "r+", shape=(size,))  # holds the file
    return torch.from_numpy(flat).view(dtype).view(shape)


def _free_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not report it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
