"""How near a training step comes to what the machine can do, and what a study will take.

    python -m proglayer.bench                                # the default shape, ten minutes
    python -m proglayer.bench model.dim=128 initial_layers=6 model.vocab_size=8192 --json new.json
    python -m proglayer.bench --short                        # a minute; fails outside wide bounds
    python -m proglayer.bench --study experiment=original model=standard,deep_supervision
    python -m proglayer.bench --sweep 1000 --folder /shared  # what jobs cost beside their training

Settings are those of train.py. The corpus is made up, so none has to be there; only `--study`
opens the one that it names. Times are medians of repeats, taken in turns within one process: a
machine's own rate drifts, so only figures of one run can be divided by each other.

The floor of a step is every matrix product that its phase needs and nothing else, in the fastest
of several blockings. The dense twin is the same training with all logits materialised.

Shapes in names: as in `loss`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from rich.table import Table
from torch import Tensor

from proglayer import machine
from proglayer.config import Config, ConfigError, Precision, register, to_config
from proglayer.corpus import Corpus
from proglayer.display import console
from proglayer.entrance import explain_errors
from proglayer.growth import build
from proglayer.loss import block_words, cache_bytes, chunk_rows, linear_cross_entropy
from proglayer.optim import set_rates
from proglayer.plan import Phase, plan, training_flops
from proglayer.sweep import Job, check, expand, prefix_of
from proglayer.trainer import Training, autocast, evaluate

CONF = Path(__file__).resolve().parent.parent / "conf"

# What is measured where the command line says nothing else: WikiText-2's vocabulary.
SHAPE = {"experiment": "original", "model.vocab_size": "69830"}
# The short form: small enough for a minute on two cores, and still all about the head.
SHORT_SHAPE = {**SHAPE, "model.vocab_size": "16384"}
MODELS = ("standard", "deep_supervision")

# Bounds of the short form. Wide, as a machine of many users halves and doubles its pace: they
# catch a path that fell back to something else, not a slow percent.
MOST_STEP_TO_FLOOR = 3.0
LEAST_DENSE_TO_STEP = 1.1
MOST_TO_BEST = 2.0
MOST_EVALUATION_TO_PRODUCT = 3.0
MOST_MEMORY_TO_DENSE = 0.9

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


# ---------------------------------------------------------------------------------------------
# What is measured: settings, corpus, the dense twin


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra looking into the checkout's conf/, as train.py does."""
    if not (CONF / "config.yaml").exists():
        raise ConfigError(f"there is no {CONF}: the bench reads settings, so run it in a checkout")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def configs(overrides: Sequence[str], shape: Mapping[str, str]) -> dict[str, Config]:
    """The settings of each model to measure: `shape`, then the overrides; one if they name one."""
    given = {override.split("=")[0].lstrip("+~"): override for override in overrides}
    names = [given["model"].split("=", 1)[1]] if "model" in given else MODELS
    found = {}
    with _hydra():
        for name in names:
            base = {"model": name, **shape}
            own = [f"{key}={value}" for key, value in base.items() if key not in given]
            found[name] = to_config(compose("config", overrides=[*own, *overrides]))
    return found


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
        hidden_entd[e].flatten(0, 1).requires_grad_(_reaches(phase, e)) for e in training.read_exits
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
    words = block_words(rows, vocab, torch.float32, device_type)
    factors = (1, 1), (0.5, 1), (2, 1), (1, 0.5), (1, 2)
    tried = [(int(rows * more), int(words * wider)) for more, wider in factors]
    return {
        f"{w} x {r}": functools.partial(loss, r, w)
        for r, w in tried
        if 0 < r <= total and 0 < w <= vocab
    }


# ---------------------------------------------------------------------------------------------
# The floor


@dataclass(frozen=True)
class Blocking:
    """How the products with the head are cut: `rows` of hidden states by `words` of the head.

    words_first: logits lie as (words, rows), otherwise as (rows, words).
    parts: a block of words in so many products of a batch; 1 leaves it whole.
    """

    rows: int
    words: int
    words_first: bool
    parts: int

    def __str__(self) -> str:
        order = "words x rows" if self.words_first else "rows x words"
        cut = f" in {self.parts} parts" if self.parts > 1 else ""
        return f"{self.words} x {self.rows} {order}{cut}"


@dataclass(frozen=True)
class Need:
    """What `rows` rows need beside their logits: gradients of the hidden states, of the head."""

    rows: int
    to_hidden: bool
    to_head: bool


def step_needs(phase: Phase, seq_len: int) -> list[Need]:
    """What the exits that a step reads need of the head."""
    rows = phase.batch_size * seq_len
    return [
        Need(rows, _reaches(phase, exit), phase.rates.head is not None)
        for exit, weight in enumerate(phase.exit_weights)
        if weight > 0
    ]


def _reaches(phase: Phase, layer: int) -> bool:
    """Whether a gradient of the output of `layer` reaches something that trains."""
    trained = phase.trained_layers
    return phase.rates.embedding is not None or any(below <= layer for below in trained)


class HeadProducts:
    """The products with the head and nothing else, each block's while it is in cache.

    Logits are formed and overwritten; `hidden_grads` and `head_grad_vd` are what they would be if
    the gradient of the logits were the logits. Exits of equal needs are stacked.
    """

    def __init__(self, needs: Sequence[Need], head_vd: Tensor, blocking: Blocking) -> None:
        self.head_vd, self.blocking = head_vd, blocking
        self.head_grad_vd = torch.empty_like(head_vd)
        dim = head_vd.shape[1]
        self.groups: list[Need] = []
        for to_hidden, to_head in sorted({(n.to_hidden, n.to_head) for n in needs}, reverse=True):
            members = [n.rows for n in needs if (n.to_hidden, n.to_head) == (to_hidden, to_head)]
            self.groups.append(Need(sum(members), to_hidden, to_head))
        self.hidden = [torch.randn(n.rows, dim).to(head_vd) for n in self.groups]
        self.hidden_grads = [torch.empty_like(hidden_md) for hidden_md in self.hidden]
        self.buffer = head_vd.new_empty(blocking.rows * blocking.words)

    def __call__(self) -> None:
        begun = False
        for need, hidden_md, grad_md in zip(
            self.groups, self.hidden, self.hidden_grads, strict=True
        ):
            for first in range(0, need.rows, self.blocking.rows):
                rows = slice(first, first + self.blocking.rows)
                self.chunk(need, hidden_md[rows], grad_md[rows], not begun)
                begun = begun or need.to_head

    def chunk(self, need: Need, hidden_md: Tensor, grad_md: Tensor, first: bool) -> None:
        cut = self.blocking
        rows = len(hidden_md)
        hidden_dm = hidden_md.t().contiguous() if cut.words_first else hidden_md.t()
        total_pdm = hidden_md.new_zeros(cut.parts, len(hidden_dm), rows)
        for v in range(0, len(self.head_vd), cut.words):
            head = self.head_vd[v : v + cut.words]
            words = len(head)
            if not cut.words_first:
                logits = self.buffer[: rows * words].view(rows, words)
                torch.mm(hidden_md, head.t(), out=logits)
                if need.to_hidden:
                    torch.mm(logits, head, out=grad_md) if v == 0 else grad_md.addmm_(logits, head)
                if need.to_head:
                    _add_product(self.head_grad_vd[v : v + words], logits.t(), hidden_md, first)
                continue
            parts = cut.parts if words % cut.parts == 0 else 1
            head_pvd = head.unflatten(0, (parts, -1))
            logits = self.buffer[: rows * words].view(parts, words // parts, rows)
            torch.bmm(head_pvd, hidden_dm.expand(parts, *hidden_dm.shape), out=logits)
            if need.to_hidden:
                total_pdm[:parts].baddbmm_(head_pvd.transpose(1, 2), logits)
            if need.to_head:
                grad_pvd = self.head_grad_vd[v : v + words].unflatten(0, (parts, -1))
                _add_product(grad_pvd, logits, hidden_md.expand(parts, *hidden_md.shape), first)
        if need.to_hidden and cut.words_first:
            torch.sum(total_pdm, 0, out=grad_md.t())


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right; the first time, = instead. Two or three dimensions."""
    if first:
        torch.matmul(left, right, out=total)
    elif total.ndim == 3:
        total.baddbmm_(left, right)
    else:
        total.addmm_(left, right)


def blockings(device: torch.device, vocab: int, itemsize: int) -> list[Blocking]:
    """Blockings worth a look."""
    if device.type != "cpu":
        sizes = [(2048, vocab), (8192, vocab), (8192, 16384), (32768, 8192)]
        return [Blocking(m, min(v, vocab), order, 1) for m, v in sizes for order in (True, False)]
    threads = torch.get_num_threads()
    found = []
    for rows in (256, 512, 1024):
        # Logits that fill the second-level caches in use, or half of them.
        for share in (0.5, 1):
            words = max(16, int(share * cache_bytes() / (rows * itemsize)) // 16 * 16) * threads
            found += [Blocking(rows, words, True, parts) for parts in {1, threads}]
    found += [Blocking(128, vocab, False, 1), Blocking(512, 4096, False, 1)]
    return [replace(blocking, words=min(blocking.words, vocab)) for blocking in found]


class BodyProducts:
    """The products of the layers in a step: projections side by side, attention per head."""

    def __init__(self, phase: Phase, seq_len: int, dtype: torch.dtype, device: torch.device):
        shape = phase.architecture
        windows, heads = phase.batch_size, shape.num_heads
        tokens, dim, hidden = windows * seq_len, shape.dim, shape.ffn_multiple * shape.dim
        per_head = dim // heads
        # (batch, rows, inner, columns) of a product, and whether it has a matrix that trains.
        forward = {
            "query, key, value": (1, tokens, dim, 3 * dim),
            "scores": (windows * heads, seq_len, per_head, seq_len),
            "mixture": (windows * heads, seq_len, seq_len, per_head),
            "output": (1, tokens, dim, dim),
            "w1, w3": (1, tokens, dim, 2 * hidden),
            "w2": (1, tokens, hidden, dim),
        }
        shapes = []
        read = max(exit for exit, weight in enumerate(phase.exit_weights) if weight > 0)
        for layer in range(read + 1):
            for name, (batch, rows, inner, columns) in forward.items():
                shapes.append((batch, rows, inner, columns))
                attention = name in ("scores", "mixture")
                # Within a layer that trains, gradients reach everything but its first matrices.
                passes_on = _reaches(phase, layer)
                if name == "query, key, value":
                    passes_on = _reaches(phase, layer - 1)
                if passes_on:
                    shapes.append((batch, rows, columns, inner))
                if passes_on if attention else layer in phase.trained_layers:
                    shapes.append((batch, inner, rows, columns))
        kinds = {
            kind: tuple(
                torch.randn(kind[0], a, b, dtype=dtype, device=device)
                for a, b in ((kind[1], kind[2]), (kind[2], kind[3]), (kind[1], kind[3]))
            )
            for kind in set(shapes)
        }
        self.products = [kinds[kind] for kind in shapes]

    def __call__(self) -> None:
        for left, right, out in self.products:
            if len(out) == 1:
                torch.mm(left[0], right[0], out=out[0])
            else:
                torch.bmm(left, right, out=out)


# ---------------------------------------------------------------------------------------------
# Measuring


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


def peak_memory_mb(
    model: str, phase: Phase, overrides: Sequence[str], options: Sequence[str]
) -> dict[str, float]:
    """Peak memory of a few steps, ours and dense, each in a process of its own."""
    found = {}
    for kind in ("ours", "dense"):
        command = [sys.executable, "-m", "proglayer.bench", "--memory-of", kind]
        command += ["--phase", str(phase.index), *options, *overrides, f"model={model}"]
        # The package is found where this one was, installed or not.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CONF.parent)
        if done.returncode:
            raise ConfigError(f"measuring the memory of {kind} failed: {done.stderr.strip()}")
        found[kind] = float(done.stdout)
    return found


def run_for_memory(
    kind: str, phase: Phase, seq_len: int, steps: int, device: torch.device
) -> float:
    """Peak memory of this process, in MB, after a few steps; of the GPU's where there is one."""
    machine.reset_peak_memory(device)
    training = {"ours": Training, "dense": DenseTraining}[kind]
    train(new_training(training, phase, seq_len, steps, device))
    peaks = machine.peak_memory_mb(device)
    return peaks.get("device", peaks["process"])


# ---------------------------------------------------------------------------------------------
# A study


@dataclass(frozen=True)
class Shape:
    """Phases of a study that cost the same, and what they cost. Seconds.

    finish: reading every exit once more at the phase's end.
    """

    text: str
    phases: int
    epochs: int
    steps: int
    step: float
    evaluation: float
    finish: float

    @property
    def epoch(self) -> float:
        return self.steps * self.step + self.evaluation

    @property
    def seconds(self) -> float:
        """All phases of this shape, one after another."""
        return self.phases * (self.epochs * self.epoch + self.finish)


def study_jobs(arguments: Sequence[str]) -> list[Job]:
    """The jobs that the arguments of a sweep span, checked, with their corpora opened."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    with _hydra():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        settings = hydra.compose_config("config", list(arguments), run_mode=RunMode.MULTIRUN)
        sweeper: Any = Plugins.instance().instantiate_sweeper(
            config=settings,
            hydra_context=HydraContext(hydra.config_loader, Callbacks(settings)),
            task_function=lambda _: None,
        )
        return check(sweeper, expand(sweeper, list(settings.hydra.overrides.task)))


def distinct_phases(jobs: Sequence[Job]) -> list[tuple[Job, Phase]]:
    """Every phase that has to be trained once, however many jobs read it."""
    found: dict[Any, tuple[Job, Phase]] = {}
    for job in jobs:
        for depth, phase in enumerate(job.phases, start=1):
            found.setdefault(prefix_of(job, depth), (job, phase))
    return list(found.values())


def estimate(jobs: Sequence[Job], epochs: int, device: torch.device) -> list[Shape]:
    """What the distinct phases of a study take at `epochs` epochs each, by timing a few steps."""
    shapes: dict[Any, list[tuple[Job, Phase]]] = {}
    for job, phase in distinct_phases(jobs):
        shapes.setdefault(_cost_shape(job, phase), []).append((job, phase))
    return [_time_shape(members, epochs, device) for members in shapes.values()]


def _cost_shape(job: Job, phase: Phase) -> tuple[Any, ...]:
    """What the time of a phase depends on: how it starts and what its rates are do not matter."""
    return (
        phase.architecture,
        phase.trained_layers,
        tuple(weight > 0 for weight in phase.exit_weights),
        tuple(rate is None for rate in asdict(phase.rates).values()),
        phase.batch_size,
        phase.precision,
        phase.compile,
        phase.stop.max_epochs,
        job.config.data.seq_len,
        phase.windows(len(job.corpus.train)),
        len(job.corpus.validation),
    )


def _time_shape(members: Sequence[tuple[Job, Phase]], epochs: int, device: torch.device) -> Shape:
    job, phase = members[0]
    seq_len = job.config.data.seq_len
    steps = 1 if device.type == "cpu" else 20
    training = new_training(Training, phase, seq_len, steps, device)
    windows = min(len(job.corpus.validation), 4 * phase.batch_size)
    corpus = made_up_corpus(phase.architecture.vocab_size, seq_len, 0, windows)

    def read(exits: range) -> Callable[[], object]:
        return lambda: evaluate(training.model, phase, corpus, device, exits)

    seconds = interleaved(
        {
            "step": lambda: train(training),
            "evaluation": read(range(phase.layers - 1, phase.layers)),
            "finish": read(range(phase.layers)),
        },
        3,
        device,
    )
    whole = len(job.corpus.validation) / windows
    read_exits = sum(weight > 0 for weight in phase.exit_weights)
    return Shape(
        text=(
            f"{phase.name}: {phase.layers} layers, {len(phase.trained_layers)} trained, "
            f"{read_exits} exit{'s' if read_exits > 1 else ''} read, "
            f"vocabulary {phase.architecture.vocab_size:,}, dim {phase.architecture.dim}"
        ),
        phases=len(members),
        epochs=min(epochs, phase.stop.max_epochs),
        steps=phase.steps_per_epoch(len(job.corpus.train)),
        step=median(seconds["step"]) / steps,
        evaluation=median(seconds["evaluation"]) * whole,
        finish=median(seconds["finish"]) * whole,
    )


# ---------------------------------------------------------------------------------------------
# What is printed


def step_table(cases: Sequence[Case]) -> Table:
    table = _table(
        "a training step",
        "model",
        "phase",
        "square GFLOP/s",
        "floor: head",
        "to square",
        "floor: body",
        "step",
        "step / floor",
        "dense",
        "dense / step",
        "best blocking",
    )
    for case in cases:
        table.add_row(
            case.model,
            case.phase,
            f"{case.square_rate / 1e9:,.0f}",
            _ms(median(case.head)),
            f"{case.head_to_square:.2f}",
            _ms(median(case.body)),
            _ms(median(case.step)),
            f"{case.step_to_floor:.2f}",
            _ms(median(case.dense)),
            f"{case.dense_to_step:.2f}",
            case.blocking,
        )
    return table


def parts_table(cases: Sequence[Case]) -> Table:
    table = _table("a step by part, each waited for", "model", "phase", *PARTS, "sum")
    for case in cases:
        parts = [median(case.parts[part]) for part in PARTS]
        table.add_row(case.model, case.phase, *map(_ms, parts), _ms(sum(parts)))
    return table


def chunks_table(cases: Sequence[Case]) -> Table:
    table = _table(
        "the loss alone, in the chunks of its rule and in others",
        "model",
        "phase",
        "rule: words x rows",
        "ms",
        "rule / best",
        "others, ms",
    )
    for case in cases:
        (rule, taken), *others = case.chunks.items()
        table.add_row(
            case.model,
            case.phase,
            rule,
            f"{1e3 * median(taken):,.1f}",
            f"{case.chunks_to_best:.2f}",
            ", ".join(f"{name}: {1e3 * median(taken):,.1f}" for name, taken in others),
        )
    return table


def evaluation_table(cases: Sequence[Case]) -> Table:
    table = _table(
        "evaluation at the last exit, and peak memory of a process",
        "model",
        "phase",
        "windows",
        "evaluation",
        "its one product",
        "ratio",
        "MB ours",
        "MB dense",
        "ours / dense",
    )
    for case in cases:
        memory = [f"{case.memory_mb[kind]:,.0f}" for kind in case.memory_mb] or ["-", "-"]
        ratio = case.memory_to_dense
        table.add_row(
            case.model,
            case.phase,
            f"{case.windows:,}",
            _ms(median(case.evaluation)),
            _ms(median(case.product)),
            f"{case.evaluation_to_product:.2f}",
            *memory,
            "-" if ratio is None else f"{ratio:.2f}",
        )
    return table


def study_table(shapes: Sequence[Shape]) -> Table:
    table = _table(
        "distinct phases by what they cost",
        "shape",
        "phases",
        "steps",
        "a step",
        "an epoch, s",
        "epochs",
        "all, min",
    )
    for shape in shapes:
        table.add_row(
            shape.text,
            str(shape.phases),
            str(shape.steps),
            _ms(shape.step),
            f"{shape.epoch:.1f}",
            str(shape.epochs),
            f"{shape.seconds / 60:.1f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        folds = name in ("shape", "best blocking", "others, ms")
        words = folds or name in ("model", "phase", "command")
        table.add_column(name, justify="left" if words else "right", no_wrap=not folds)
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def outside_bounds(cases: Sequence[Case]) -> list[str]:
    """A line for each ratio that is outside the wide bounds of the short form."""
    found = []
    for case in cases:
        for what, value, low, high in (
            ("a step takes {:.2f} floors", case.step_to_floor, 0.0, MOST_STEP_TO_FLOOR),
            ("dense takes {:.2f} steps", case.dense_to_step, LEAST_DENSE_TO_STEP, float("inf")),
            ("its rule's chunks take {:.2f} of the best", case.chunks_to_best, 1.0, MOST_TO_BEST),
            (
                "an evaluation takes {:.2f} products",
                case.evaluation_to_product,
                0.0,
                MOST_EVALUATION_TO_PRODUCT,
            ),
            (
                "memory is {:.2f} of dense",
                case.memory_to_dense or 0.0,
                0.0,
                MOST_MEMORY_TO_DENSE,
            ),
        ):
            if not low <= value <= high:
                found.append(
                    f"{case.model}, {case.phase}: {what.format(value)}, "
                    f"expected {low:g} to {high:g}"
                )
    return found


# ---------------------------------------------------------------------------------------------
# What the jobs of a sweep cost beside their training

# Four experiments of five distinct phases on so little text that a phase trains in a blink: what
# is left is composing, checking, launching, the store and the records.
SWEPT = (
    "experiment=original,split_lr,control_unfrozen,control_keep_training",
    "data.samples=64",
    "data.validation_samples=32",
    "data.max_vocab=200",
    "model.dim=8",
    "model.num_heads=2",
    "phase.max_epochs=1",
    "phase.batch_size=64",
    "threads=1",
    "report=false",
)
EXPERIMENTS = 4
ALONE = (
    "the sweep",
    "again elsewhere, all stored",
    "again, all completed",
    "its table",
    "its report",
)


@dataclass(frozen=True)
class Spent:
    """What a command over the jobs of a sweep took, with its workers: time and CPU time in seconds,
    the largest peak of memory of a process in MB (10^6 bytes).
    """

    jobs: int
    command: str
    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Left:
    """What a sweep left on disk: files, and bytes in them, of its folder and of the store; and the
    locks among the store's files. A job holds one of them at a time.
    """

    jobs: int
    files: int
    bytes: int
    stored_files: int
    stored_bytes: int
    locks: int


def measure_sweep(jobs: int, folder: Path, overrides: Sequence[str]) -> tuple[list[Spent], Left]:
    """Run a sweep of about `jobs` jobs in an empty folder, and all that reads it.

    Raises ConfigError with what a command said that failed.
    """
    seeds = max(1, jobs // EXPERIMENTS)
    train = [str(CONF.parent / "train.py"), "-m", *SWEPT, f"seed=range(0,{seeds})"]
    train += [f"stages.dir={folder / 'stages'}", f"hydra.sweep.dir={folder / 'again'}", *overrides]
    first, read = f"hydra.sweep.dir={folder / 'first'}", str(folder / "first")
    commands = (
        [*train, first],
        train,
        train,
        ["-m", "proglayer.results", read],
        ["-m", "proglayer.report", read, "-o", str(folder / "report")],
    )
    spent = []
    for name, command in zip(ALONE, commands, strict=True):
        with open(folder / "said.txt", "w+", encoding="utf-8") as said:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, stdout=said, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - began
            if status:
                said.seek(0)
                raise ConfigError(f"--sweep: {name}: {(said.readlines() or [''])[-1].strip()}")
        cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6
        peak *= 1 if sys.platform == "darwin" else 1024
        spent.append(Spent(seeds * EXPERIMENTS, name, seconds, cpu, peak))
    sizes = {
        name: [path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()]
        for name in ("first", "stages")
    }
    left = Left(
        jobs=seeds * EXPERIMENTS,
        files=len(sizes["first"]),
        bytes=sum(sizes["first"]),
        stored_files=len(sizes["stages"]),
        stored_bytes=sum(sizes["stages"]),
        locks=sum(1 for _ in (folder / "stages").rglob("lock")),
    )
    return spent, left


def spent_table(spent: Sequence[Spent]) -> Table:
    """Times, and what each further job added since the smaller sweep: the same in every row of a
    command unless it grows faster than the jobs do.
    """
    table = _table(
        "a sweep of made-up jobs",
        "command",
        "jobs",
        "s",
        "of it CPU",
        "ms a further job",
        "of it CPU",
        "peak MB",
    )
    for command in dict.fromkeys(row.command for row in spent):
        before: Spent | None = None
        for row in (row for row in spent if row.command == command):
            more = ["", ""]
            if before is not None:
                jobs = row.jobs - before.jobs
                more = [
                    f"{1e3 * (row.seconds - before.seconds) / jobs:,.0f}",
                    f"{1e3 * (row.cpu_seconds - before.cpu_seconds) / jobs:,.0f}",
                ]
            times = (f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}")
            table.add_row(command, str(row.jobs), *times, *more, f"{row.peak_mb:,.0f}")
            before = row
    return table


# ---------------------------------------------------------------------------------------------
# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--short", action="store_true", help="few repeats; wide bounds are checked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure in FILE")
    parser.add_argument("--repeats", type=int, help="of a step in each case")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument("--study", action="store_true", help="estimate the time of a sweep")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of each phase of a study (%(default)s)"
    )
    parser.add_argument(
        "--sweep", type=int, metavar="JOBS", help="what so many jobs cost beside their training"
    )
    parser.add_argument("--folder", type=Path, help="where --sweep writes, to measure that disk")
    # How the bench calls itself for a peak of memory.
    parser.add_argument("--memory-of", choices=("ours", "dense"), help=argparse.SUPPRESS)
    parser.add_argument("--phase", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings, as of train.py")
    options = parser.parse_intermixed_args(arguments)
    for name in ("repeats", "epochs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.sweep is not None and options.sweep < 10 * EXPERIMENTS:
        parser.error(f"--sweep must be at least {10 * EXPERIMENTS}")
    with explain_errors():
        if options.sweep is not None:
            return _sweep(options)
        if options.study:
            return _study(options)
        return _bench(options)


def _bench(options: argparse.Namespace) -> int:
    effort = SHORT if options.short else FULL
    effort = replace(effort, repeats=options.repeats or effort.repeats)
    found = configs(options.overrides, SHORT_SHAPE if options.short else SHAPE)
    first = next(iter(found.values()))
    device = machine.pick_device(first.device, first.precision)
    with machine.switches(first.threads, first.precision):
        if options.memory_of:
            phase = _phases(first)[options.phase]
            peak = run_for_memory(
                options.memory_of, phase, first.data.seq_len, effort.memory_steps, device
            )
            print(peak)
            return 0
        here = machine.describe_machine(device)
        say = console().print
        say(
            f"{here.device_name}, threads {here.threads}, torch {here.torch}, "
            f"{first.precision.name}; batch {first.phase.batch_size} x {first.data.seq_len}, "
            f"dim {first.model.dim}, vocabulary {first.model.vocab_size:,}",
            markup=False,
        )
        cases = []
        for model, config in found.items():
            for phase in _phases(config):
                print(f"measuring {model}, {phase.name} ...", file=sys.stderr, flush=True)
                case = measure(model, phase, config.data.seq_len, effort, device)
                last = model == list(found)[-1] and phase.index == len(_phases(config)) - 1
                if not options.no_memory and (last or not options.short):
                    flags = ["--short"] if options.short else []
                    own = [o for o in options.overrides if not o.startswith("model=")]
                    memory = peak_memory_mb(model, phase, own, flags)
                    case = replace(case, memory_mb=memory)
                cases.append(case)
    for table in (step_table, parts_table, chunks_table, evaluation_table):
        say(table(cases))
    if options.json:
        _keep(options, {"machine": asdict(here), "cases": [_plain(case) for case in cases]})
    problems = outside_bounds(cases) if options.short else []
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


def _phases(config: Config) -> tuple[Phase, ...]:
    """The phases to measure."""
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size=null: without a corpus the bench needs a number")
    return plan(config, vocab_size=config.model.vocab_size)


def _study(options: argparse.Namespace) -> int:
    jobs = study_jobs(options.overrides)
    first = jobs[0].config
    device = machine.pick_device(first.device, first.precision)
    with machine.switches(first.threads, first.precision):
        here = machine.describe_machine(device)
        shapes = estimate(jobs, options.epochs, device)
    say = console().print
    say(study_table(shapes))
    seconds = sum(shape.seconds for shape in shapes)
    say(
        f"{len(jobs)} jobs, {sum(shape.phases for shape in shapes)} distinct phases: about "
        f"{seconds / 60:.0f} min with one job at a time, if every phase takes {options.epochs} "
        f"epochs and none is stored yet ({here.device_name}, threads {here.threads})",
        markup=False,
    )
    if options.json:
        _keep(options, {"machine": asdict(here), "study": [_plain(shape) for shape in shapes]})
    return 0


def _sweep(options: argparse.Namespace) -> int:
    spent: list[Spent] = []
    left: list[Left] = []
    try:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="proglayer-bench-") as folder:
            for jobs in (options.sweep // 10, options.sweep // 3, options.sweep):
                print(f"a sweep of {jobs} jobs ...", file=sys.stderr, flush=True)
                own = Path(folder) / str(jobs)
                own.mkdir()
                more, on_disk = measure_sweep(jobs, own, options.overrides)
                spent += more
                left.append(on_disk)
    except OSError as error:
        raise ConfigError(f"--folder={options.folder} cannot be written ({error})") from error
    say = console().print
    say(spent_table(spent))
    for disk in left:
        say(
            f"{disk.jobs} jobs: {disk.files / disk.jobs:.1f} files and "
            f"{disk.bytes / disk.jobs / 1e3:.0f} kB a job, and in the store "
            f"{disk.stored_files / disk.jobs:.1f} files and "
            f"{disk.stored_bytes / disk.jobs / 1e3:.0f} kB a job, {disk.locks} locks"
        )
    if options.json:
        figures = {"spent": list(map(asdict, spent)), "left": list(map(asdict, left))}
        _keep(options, {"sweep": figures})
    return 0


def _plain(figures: Case | Shape) -> dict[str, Any]:
    """Fields and what follows from them, as JSON can hold them."""
    derived = [name for name, kind in vars(type(figures)).items() if isinstance(kind, property)]
    return {**asdict(figures), **{name: getattr(figures, name) for name in derived}}


def _keep(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    about = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "overrides": options.overrides,
        "environment": machine.environment(),
        "git": machine.git_state(),
    }
    try:
        options.json.write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json={options.json} cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
