"""Times of a training step, of its matmul bound and its dense twin, of an evaluation; memory.

The corpus is synthetic, so none has to be there. The dense twin is the same training with all
logits materialised. Everything is timed in turns within one process: a machine's own rate drifts,
so only figures of one run can be divided by each other.

Shapes in names: as in `loss`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from proglayer.bench.bound import (
    Blocking,
    BodyProducts,
    HeadProducts,
    Products,
    blockings,
    step_products,
)
from proglayer.config import Precision
from proglayer.data.corpus import Corpus
from proglayer.run import machine
from proglayer.training.growth import build
from proglayer.training.loss import ExitLosses
from proglayer.training.plan import Phase
from proglayer.training.trainer import Training, evaluate

# What the trainer marks with `record_function`.
PARTS = ("data", "body forward", "head and loss", "body backward", "clipping", "optimizer")
STEPS_FOR_MEMORY = 3

RATIOS = {
    "step_to_bound": ("step", "bound"),
    "dense_to_step": ("dense", "step"),
    "evaluation_to_logits": ("evaluation", "logits"),
    "memory_to_dense": ("memory_mb", "dense_memory_mb"),
}

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Measurement:
    """One model in one phase and precision. Times in seconds, one for each repeat.

    gflops: 10^9 operations a second of a large square product.
    seconds: of "step" (a training step), "dense" (of the dense twin), "head" and "body" (their
        products in a step: the matmul bound), "square" (a product), "evaluation" of `windows`
        windows at the last exit and "logits" (its product with the head).
    parts: of a step by the profiler, name to seconds; empty on a GPU.
    memory_mb, dense_memory_mb: peak of a process of its own, MB (10^6 bytes); of the GPU's memory
        where there is one. None where not measured.
    """

    model: str
    phase: str
    precision: str
    blocking: str
    windows: int
    gflops: float
    seconds: dict[str, list[float]]
    parts: dict[str, float]
    memory_mb: float | None = None
    dense_memory_mb: float | None = None

    def value(self, name: str) -> Any:
        """A field, the median of a time, the seconds of a part, the `bound`, or one of `RATIOS`."""
        if name in RATIOS:
            over, under = map(self.value, RATIOS[name])
            return None if over is None or under is None else over / under
        if name == "bound":
            return self.value("head") + self.value("body")
        if name in self.seconds:
            return median(self.seconds[name])
        return self.parts[name] if name in self.parts else getattr(self, name, None)


def synthetic_corpus(vocab_size: int, seq_len: int, windows: int) -> Corpus:
    """Training and as many validation windows of ids drawn by Zipf's law as it fits English: the
    r-th with weight 1/(r + 2.7). Frequent ones have low numbers, as in order of first appearance.
    """
    weights = np.cumsum(1 / (np.arange(1, vocab_size + 1) + 2.7))
    drawn = np.random.default_rng(0).random((2, windows, seq_len + 1)) * weights[-1]
    train, validation = np.searchsorted(weights, drawn).astype(np.int32)
    return Corpus("synthetic", train, validation, vocab_size, fingerprint="", folder=Path())


def dense_cross_entropy(
    hidden_end: Sequence[Tensor],
    head_vd: Tensor,
    target_n: Tensor,
    weight_e: Sequence[float],
    **_: object,
) -> ExitLosses:
    """`loss.linear_cross_entropy` with all logits materialised, differentiated by autograd."""
    nll_e = [F.cross_entropy(F.linear(h_nd, head_vd), target_n) for h_nd in hidden_end]
    loss = sum(weight * nll for weight, nll in zip(weight_e, nll_e, strict=True))
    return ExitLosses(torch.as_tensor(loss), torch.stack(nll_e).detach(), torch.empty(0))


class DenseTraining(Training):
    """The same training with the logits of every exit materialised."""

    records = False
    cross_entropy = staticmethod(dense_cross_entropy)


def new_training(
    kind: type[Training], phase: Phase, seq_len: int, steps: int, device: torch.device
) -> Training:
    """A training of `phase` from random weights, whose epochs have `steps` steps."""
    phase = replace(phase, samples=None)
    corpus = synthetic_corpus(phase.architecture.vocab_size, seq_len, steps * phase.batch_size)
    return kind(build(phase), phase, corpus, device)


def train(training: Training) -> None:
    """One epoch of the trainer's own loop."""
    training.train_epoch()
    training.finish_epoch()


def parts_of_a_step(training: Training) -> dict[str, float]:
    """Seconds of each part of a training step on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(training)
    return {e.key: e.cpu_time_total / 1e6 for e in profiler.key_averages() if e.key in PARTS}


def interleaved(
    tasks: Mapping[Name, Callable[[], object]], repeats: int, device: torch.device
) -> dict[Name, list[float]]:
    """Seconds of each task, in turns, after one run of each that is not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            _synchronize(device)
            started = time.perf_counter()
            task()
            _synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def best_blocking(phase: Phase, seq_len: int, head_vd: Tensor) -> Blocking:
    """The blocking that is fastest at a first look, at one exit of each kind."""
    sample = sorted(set(step_products(phase, seq_len)), key=str)
    device = head_vd.device
    candidates = blockings(device, len(head_vd), head_vd.dtype.itemsize)
    tasks = {blocking: HeadProducts(sample, head_vd, blocking) for blocking in candidates}
    seconds = interleaved(tasks, 2, device)
    return min(candidates, key=lambda blocking: min(seconds[blocking]))


def measure(
    model: str,
    phases: Mapping[Precision, Phase],
    seq_len: int,
    repeats: int,
    windows: int,
    device: torch.device,
) -> list[Measurement]:
    """All times of one model in one phase, in each precision, all in turn."""
    # On a GPU steps are launched ahead of their end, which a single one would not show.
    steps = 1 if device.type == "cpu" else 20
    side = 2048 if device.type == "cpu" else 8192
    corpus = synthetic_corpus(next(iter(phases.values())).architecture.vocab_size, seq_len, windows)
    tasks: dict[tuple[Precision, str], Callable[[], object]] = {}
    trainings: dict[Precision, Training] = {}
    cuts: dict[Precision, Blocking] = {}
    for precision, phase in phases.items():
        dtype = torch.bfloat16 if precision is Precision.bfloat16 else torch.float32
        square = [torch.randn(side, side, dtype=dtype, device=device) for _ in range(3)]
        ours = trainings[precision] = new_training(Training, phase, seq_len, steps, device)
        dense = new_training(DenseTraining, phase, seq_len, steps, device)
        head_vd = ours.model.head_weight.detach().to(dtype)
        with machine.switches(None, precision):
            cut = cuts[precision] = best_blocking(phase, seq_len, head_vd)
        logits = [Products(windows * seq_len, False, False)]
        last = [phase.layers - 1]
        for name, task in {
            "square": partial(torch.mm, square[0], square[1], out=square[2]),
            "head": HeadProducts(step_products(phase, seq_len), head_vd, cut),
            "body": BodyProducts(phase, seq_len, dtype, device),
            "step": partial(train, ours),
            "dense": partial(train, dense),
            "logits": HeadProducts(logits, head_vd, cut),
            "evaluation": partial(evaluate, ours.model, phase, corpus, device, last),
        }.items():
            tasks[precision, name] = partial(_switched, precision, task)
    taken = interleaved(tasks, repeats, device)
    measured = []
    for precision, phase in phases.items():
        seconds = {name: times for (p, name), times in taken.items() if p is precision}
        for name in ("step", "dense"):
            seconds[name] = [epoch / steps for epoch in seconds[name]]
        with machine.switches(None, precision):
            parts = parts_of_a_step(trainings[precision]) if device.type == "cpu" else {}
        gflops = 2 * side**3 / median(seconds["square"]) / 1e9
        cut = str(cuts[precision])
        measured.append(
            Measurement(model, phase.name, precision.name, cut, windows, gflops, seconds, parts)
        )
    return measured


def _switched(precision: Precision, task: Callable[[], object]) -> None:
    with machine.switches(None, precision):
        task()


def peak_memory_mb(
    phase: Phase, seq_len: int, threads: int | None, device: str
) -> dict[str, float]:
    """Peak memory of a few steps, ours and dense, each in a process of its own."""
    found = {}
    for field, kind in (("memory_mb", Training), ("dense_memory_mb", DenseTraining)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[field] = pool.submit(
                _train_for_memory, kind, phase, seq_len, threads, device
            ).result()
    return found


def _train_for_memory(
    kind: type[Training], phase: Phase, seq_len: int, threads: int | None, name: str
) -> float:
    device = torch.device(name)
    with machine.switches(threads, phase.precision):
        machine.reset_peak_memory(device)
        train(new_training(kind, phase, seq_len, STEPS_FOR_MEMORY, device))
        peaks = machine.peak_memory_mb(device)
    return peaks.device or peaks.process or 0.0
