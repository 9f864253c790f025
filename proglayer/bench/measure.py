"""What a training step takes beside its floor, part by part, and with all logits; an evaluation;
memory.

The corpus is made up, so none has to be there. Times are in turns within one process: a machine's
own rate drifts, so only figures of one run can be divided by each other. The dense twin is the same
training with all logits materialised.

Shapes in names: as in `loss`.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from proglayer.bench.bound import (
    Blocking,
    BodyProducts,
    HeadProducts,
    Need,
    blockings,
    reaches,
    step_needs,
)
from proglayer.config import Precision
from proglayer.data.corpus import Corpus
from proglayer.run import machine
from proglayer.training.blocks import block_entries, chunk_rows
from proglayer.training.growth import build
from proglayer.training.loss import linear_cross_entropy
from proglayer.training.optim import set_rates
from proglayer.training.plan import Phase, training_flops
from proglayer.training.trainer import Training, autocast, evaluate

PARTS = ("data", "body forward", "head and loss", "body backward", "clipping", "optimizer")


@dataclass(frozen=True)
class Effort:
    """How much is measured: repeats of a step, windows and repeats of an evaluation, blockings
    that go on from the first look to the repeats, and optimizer steps of a peak of memory.
    """

    repeats: int
    windows: int
    evaluations: int
    finalists: int
    memory_steps: int


FULL = Effort(repeats=7, windows=2000, evaluations=3, finalists=3, memory_steps=3)
SHORT = Effort(repeats=3, windows=256, evaluations=3, finalists=2, memory_steps=2)


@dataclass(frozen=True)
class Case:
    """Figures of one model in one phase. Times in seconds, one for each repeat.

    square: a product of two square matrices, of `square_flops` operations.
    head, body: the products of a step, the head's in the best blocking, which `blocking` names.
    step, dense: a whole step, ours and with all logits. parts: ours again, measured part by part.
    chunks: our loss alone in the chunks that its rule chooses, named first, and in others.
    evaluation: of `windows` windows at the last exit; product: its one product with the head.
    memory_mb: peak of a process of its own, "ours" and "dense"; of the GPU's memory where there
        is one. Empty where not measured.
    """

    model: str
    phase: str
    layers: int
    exits: int
    square: list[float]
    square_flops: int
    head: list[float]
    head_flops: int
    body: list[float]
    blocking: str
    step: list[float]
    dense: list[float]
    parts: dict[str, list[float]]
    chunks: dict[str, list[float]]
    evaluation: list[float]
    product: list[float]
    product_blocking: str
    windows: int
    memory_mb: dict[str, float]

    @property
    def square_rate(self) -> float:
        """Operations a second of large square products."""
        return self.square_flops / median(self.square)

    @property
    def floor(self) -> float:
        """Seconds of all products of a step."""
        return median(self.head) + median(self.body)

    @property
    def step_to_floor(self) -> float:
        return median(self.step) / self.floor

    @property
    def head_to_square(self) -> float:
        """How much longer the head's products take than at the rate of square ones."""
        return median(self.head) * self.square_rate / self.head_flops

    @property
    def dense_to_step(self) -> float:
        return median(self.dense) / median(self.step)

    @property
    def chunks_to_best(self) -> float:
        """How much longer the loss takes in its rule's chunks than in the best of those tried."""
        rule, *_ = times = [median(taken) for taken in self.chunks.values()]
        return rule / min(times)

    @property
    def evaluation_to_product(self) -> float:
        return median(self.evaluation) / median(self.product)

    @property
    def memory_to_dense(self) -> float | None:
        return self.memory_mb["ours"] / self.memory_mb["dense"] if self.memory_mb else None


def made_up_corpus(
    vocab_size: int, seq_len: int, train_windows: int, validation_windows: int
) -> Corpus:
    """Windows of words drawn by Zipf's law as it fits English: the r-th with weight 1/(r + 2.7).

    Frequent words have the low numbers, as they do in a vocabulary in order of first appearance.
    """
    weights = np.cumsum(1 / (np.arange(1, vocab_size + 1) + 2.7))
    windows, length = train_windows + validation_windows, seq_len + 1
    drawn = np.random.default_rng(0).random(windows * length) * weights[-1]
    tokens = np.searchsorted(weights, drawn).astype(np.int32).reshape(windows, length)
    return Corpus(
        name="made up",
        train=tokens[:train_windows],
        validation=tokens[train_windows:],
        vocab_size=vocab_size,
        fingerprint="",
        folder=Path(),
    )


class DenseTraining(Training):
    """The same training with the logits of every exit materialised, differentiated by autograd."""

    def loss(self, input_nt: Tensor, target_nt: Tensor) -> Tensor:
        with autocast(self.phase, self.device):
            hidden_entd = self.body(input_nt)
            total = torch.zeros((), device=self.device)
            for e in self.read_exits:
                logits_nv = self.model.head(hidden_entd[e]).flatten(0, 1)
                nll = F.cross_entropy(logits_nv, target_nt.reshape(-1))
                total = total + self.phase.exit_weights[e] * nll
            return total


def new_training(
    kind: type[Training], phase: Phase, seq_len: int, steps: int, device: torch.device
) -> Training:
    """A training of `phase` from random weights, whose epochs have `steps` steps."""
    phase = replace(phase, samples=None)
    vocab_size = phase.architecture.vocab_size
    corpus = made_up_corpus(vocab_size, seq_len, steps * phase.batch_size, 0)
    return kind(build(phase), phase, corpus, device)


def train(training: Training) -> None:
    """One epoch of the trainer's own loop."""
    training.train_epoch()
    training.finish_epoch()


def train_by_part(training: Training) -> dict[str, float]:
    """One step on the first windows, the same as the trainer's; gives the seconds of each part."""
    phase, model, device = training.phase, training.model, training.device
    seconds: dict[str, float] = {}
    _synchronize(device)
    before = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal before
        _synchronize(device)
        now = time.perf_counter()
        seconds[part] = now - before
        before = now

    model.train()
    input_nt, target_nt = training.windows.batch(torch.arange(phase.batch_size))
    lap("data")
    for parameter in training.trainable:
        parameter.grad = None
    with autocast(phase, device):
        hidden_entd = training.body(input_nt)
        lap("body forward")
        read = [hidden_entd[e].flatten(0, 1) for e in training.read_exits]
        cut = [hidden.detach().requires_grad_(hidden.requires_grad) for hidden in read]
        loss = linear_cross_entropy(
            cut,
            model.head.weight,
            target_nt.reshape(-1),
            [phase.exit_weights[e] for e in training.read_exits],
            count=False,
            workspace=training.workspace,
        ).loss
    loss.backward()
    lap("head and loss")
    trained = [(h, c.grad) for h, c in zip(read, cut, strict=True) if h.requires_grad]
    if trained:
        torch.autograd.backward([h for h, _ in trained], [gradient for _, gradient in trained])
    lap("body backward")
    if phase.optimizer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(training.trainable, phase.optimizer.clip_norm)
    lap("clipping")
    done = training.epoch * training.steps_per_epoch
    set_rates(training.optimizer, phase.schedule.factor(done, training.steps_per_epoch))
    training.optimizer.step()
    lap("optimizer")
    return seconds


def in_chunks(training: Training) -> dict[str, Callable[[], object]]:
    """Our loss and its gradients in the chunks that its rule chooses, then in smaller and larger
    ones; named by their words and rows.
    """
    phase, head_vd = training.phase, training.model.head.weight
    input_nt, target_nt = training.windows.batch(torch.arange(phase.batch_size))
    with autocast(phase, training.device), torch.no_grad():
        hidden_entd = training.model(input_nt)
    hidden_end = [
        hidden_entd[e].flatten(0, 1).requires_grad_(reaches(phase, e)) for e in training.read_exits
    ]
    weight_e = [phase.exit_weights[e] for e in training.read_exits]

    def loss(rows: int, words: int) -> None:
        head_vd.grad = None
        for hidden_nd in hidden_end:
            hidden_nd.grad = None
        linear_cross_entropy(
            hidden_end,
            head_vd,
            target_nt.reshape(-1),
            weight_e,
            count=False,
            rows=rows,
            block=words,
            workspace=training.workspace,
        ).loss.backward()

    # Exits of equal needs share their chunks; the most rows are those of the largest such group.
    groups = Counter(hidden_nd.requires_grad for hidden_nd in hidden_end)
    total = max(groups.values()) * target_nt.numel()
    vocab, device_type = len(head_vd), training.device.type
    rows = chunk_rows(total, vocab, phase.rates.head is not None, torch.float32, device_type)
    words = block_entries(rows, vocab, torch.float32, device_type)
    factors = (1, 1), (0.5, 1), (2, 1), (1, 0.5), (1, 2)
    tried = [(int(rows * more), int(words * wider)) for more, wider in factors]
    return {
        f"{w} x {r}": functools.partial(loss, r, w)
        for r, w in tried
        if 0 < r <= total and 0 < w <= vocab
    }


def interleaved(
    tasks: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each task, in turns, after one run of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
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


def finalists(
    needs: Sequence[Need], head_vd: Tensor, count: int, device: torch.device
) -> list[Blocking]:
    """The blockings that are fastest at a first look, at one exit of each kind."""
    sample = list({(n.to_hidden, n.to_head): n for n in needs}.values())
    candidates = blockings(device, len(head_vd), head_vd.dtype.itemsize)
    tasks = {str(cut): HeadProducts(sample, head_vd, cut) for cut in candidates}
    seconds = interleaved(tasks, 2, device)
    best = sorted(tasks, key=lambda name: min(seconds[name]))[:count]
    return [tasks[name].blocking for name in best]


def measure(model: str, phase: Phase, seq_len: int, effort: Effort, device: torch.device) -> Case:
    """All figures of one model in one phase but the memory."""
    dtype = torch.bfloat16 if phase.precision is Precision.bfloat16 else torch.float32
    vocab = phase.architecture.vocab_size
    # On a GPU steps are launched ahead of their end, which a single one would not show.
    steps = 1 if device.type == "cpu" else 20
    ours = new_training(Training, phase, seq_len, steps, device)
    dense = new_training(DenseTraining, phase, seq_len, steps, device)
    parts: dict[str, list[float]] = {part: [] for part in PARTS}

    def by_part() -> None:
        for part, seconds in train_by_part(ours).items():
            parts[part].append(seconds)

    side = 2048 if device.type == "cpu" else 8192
    left, right, out = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(3))

    def square() -> None:
        torch.mm(left, right, out=out)

    needs = step_needs(phase, seq_len)
    head_vd = ours.model.head.weight.detach().to(dtype)
    cuts = finalists(needs, head_vd, effort.finalists, device)
    heads = {f"head {cut}": HeadProducts(needs, head_vd, cut) for cut in cuts}
    tasks: dict[str, Callable[[], object]] = {
        "square": square,
        "body": BodyProducts(phase, seq_len, dtype, device),
        **heads,
        "step": lambda: train(ours),
        "dense": lambda: train(dense),
        "parts": by_part,
    }
    seconds = interleaved(tasks, effort.repeats, device)
    best = min(heads, key=lambda name: median(seconds[name]))
    tasks.clear()  # and with them the dense twin's memory
    chunks = interleaved(in_chunks(ours), effort.repeats, device)

    corpus = made_up_corpus(vocab, seq_len, 0, effort.windows)
    exits = [phase.layers - 1]
    one_product = [Need(effort.windows * seq_len, False, False)]
    batch = [Need(phase.batch_size * seq_len, False, False)]
    (cut,) = finalists(batch, head_vd, 1, device)
    evaluations = interleaved(
        {
            "product": HeadProducts(one_product, head_vd, cut),
            "evaluation": lambda: evaluate(ours.model, phase, corpus, device, exits),
        },
        effort.evaluations,
        device,
    )
    return Case(
        model=model,
        phase=phase.name,
        layers=phase.layers,
        exits=len(needs),
        square=seconds["square"],
        square_flops=2 * side**3,
        head=seconds[best],
        head_flops=training_flops(replace(phase, samples=None), seq_len, phase.batch_size).head,
        body=seconds["body"],
        blocking=str(heads[best].blocking),
        step=[taken / steps for taken in seconds["step"]],
        dense=[taken / steps for taken in seconds["dense"]],
        # Without the run that is not counted.
        parts={part: taken[1:] for part, taken in parts.items()},
        chunks=chunks,
        evaluation=evaluations["evaluation"],
        product=evaluations["product"],
        product_blocking=str(cut),
        windows=effort.windows,
        memory_mb={},
    )


def run_for_memory(
    kind: str, phase: Phase, seq_len: int, steps: int, device: torch.device
) -> float:
    """Peak memory of this process, in MB, after a few steps; of the GPU's where there is one."""
    machine.reset_peak_memory(device)
    training = {"ours": Training, "dense": DenseTraining}[kind]
    train(new_training(training, phase, seq_len, steps, device))
    peaks = machine.peak_memory_mb(device)
    return peaks.device or peaks.process or 0.0
