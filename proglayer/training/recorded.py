"""Forward and backward pass of a training step as CUDA graphs: recorded once, then replayed.

On a GPU a step of a small model waits for the launches of its kernels, one after the other from
Python, and a graph launches them all at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proglayer.training.blocks import Workspace

# Steps of a kind that run as usual before one is recorded, and kinds that are recorded at most: a
# curriculum of exits has a few, and each keeps memory.
WARM_UP, MOST = 2, 16

# A graph and the tensors that it reads and writes: numbers of windows, loss, gradients, and the
# buffer, which must outlive the workspace's next one.
_Recorded = tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Sequence[Tensor | None], Tensor | None]

# Numbers of windows (n,) and exit weights to the loss, a scalar; leaves the gradients in `.grad`.
Step = Callable[[Tensor, Sequence[float]], Tensor]


class RecordedSteps:
    """Runs steps, from the third call of a kind on as a graph: the same kernels, the same bits.

    Of a kind are calls with as many windows and the same exit weights. What a graph reads and
    writes stays where it is as long as this lives: `parameters` must not be moved.
    """

    def __init__(
        self, parameters: Sequence[Tensor], workspace: Workspace, device: torch.device
    ) -> None:
        self.parameters, self.workspace, self.device = parameters, workspace, device
        self.calls: Counter[tuple[int, tuple[float, ...]]] = Counter()
        self.recorded: dict[tuple[int, tuple[float, ...]], _Recorded] = {}

    def __call__(self, step: Step, rows_n: Tensor, weights: Sequence[float]) -> Tensor:
        """The loss of `step`, a scalar that the next call may overwrite.

        Gradients of `parameters` must be None before.
        """
        kind = len(rows_n), tuple(weights)
        self.calls[kind] += 1
        if kind not in self.recorded:
            if self.calls[kind] <= WARM_UP or len(self.recorded) == MOST:
                return step(rows_n, weights)
            self.recorded[kind] = self._record(step, rows_n, weights)
        graph, place_n, loss, gradients, _ = self.recorded[kind]
        place_n.copy_(rows_n, non_blocking=True)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _record(self, step: Step, rows_n: Tensor, weights: Sequence[float]) -> _Recorded:
        place_n = rows_n.to(self.device)
        graph = torch.cuda.CUDAGraph()
        # Graphs that never run at once share their memory. Other threads may go on meanwhile.
        pool = next((graph.pool() for graph, *_ in self.recorded.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss = step(place_n, weights)
        gradients = [parameter.grad for parameter in self.parameters]
        return graph, place_n, loss, gradients, self.workspace.held
