"""How near a training step is to its bound, which is its matrix products and nothing else.

    python benchmarks/step.py                                # both models, both phases
    python benchmarks/step.py model.dim=128 initial_layers=6 precision=bfloat16
    python benchmarks/step.py --short threads=1              # a minute; status 1 beyond wide bounds

Settings are those of train.py, with experiment=original and a vocabulary of 69,830 to begin with.
Tokens are synthetic. What is divided by each other is timed in turns within one process, as a
machine's rate drifts, and each figure is a median. The bound takes the fastest of several
blockings, each block's products while it is in cache. `dense` is the same training with all logits
of an exit formed and differentiated by autograd.

Shapes in names: m rows, d model dimension, v vocabulary, p parts of a block.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from proglayer.config import Config, to_config  # noqa: E402
from proglayer.data.corpus import Corpus  # noqa: E402
from proglayer.launch.ask import register  # noqa: E402
from proglayer.run import machine  # noqa: E402
from proglayer.training.architecture import Architecture  # noqa: E402
from proglayer.training.blocks import cache_bytes  # noqa: E402
from proglayer.training.build import build  # noqa: E402
from proglayer.training.loss import ExitLosses  # noqa: E402
from proglayer.training.plan import TrainSpec, plan  # noqa: E402
from proglayer.training.trainer import Training  # noqa: E402

GIVEN = {"experiment": "original", "model": "standard,deep_supervision", "precision": "float32"}
VOCABULARY, VOCABULARY_SHORT = 69_830, 8_192
REPEATS, REPEATS_SHORT = 7, 3
# Wide: they hold on a busy machine, too. Of step / bound and of dense / step.
MOST_TO_BOUND, LEAST_TO_DENSE = 3.0, 1.1


def settings(given: dict[str, str]) -> Config:
    """The checked settings of train.py with these overrides."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = to_config(compose("config", [f"{name}={value}" for name, value in given.items()]))
    return machine.with_precision(config)[0]


def synthetic_corpus(spec: TrainSpec, seq_len: int, steps: int) -> Corpus:
    """Windows of ids drawn by Zipf's law as it fits English: the r-th with weight 1/(r + 2.7)."""
    vocab_size, windows = spec.architecture.vocab_size, steps * spec.batch_size
    weights = np.cumsum(1 / (np.arange(1, vocab_size + 1) + 2.7))
    drawn = np.random.default_rng(0).random((2, windows, seq_len + 1)) * weights[-1]
    train, validation = np.searchsorted(weights, drawn).astype(np.int32)
    return Corpus("synthetic", train, validation, vocab_size, fingerprint="", folder=Path())


def dense(
    hidden_end: Sequence[Tensor], head_vd: Tensor, target_n: Tensor, weight_e: Sequence[float],
    **_: object,
) -> ExitLosses:  # fmt: skip
    """`loss.linear_cross_entropy` with all logits formed, differentiated by autograd."""
    nll_e = [F.cross_entropy(F.linear(h_nd, head_vd), target_n) for h_nd in hidden_end]
    loss = sum(weight * nll for weight, nll in zip(weight_e, nll_e, strict=True))
    return ExitLosses(torch.stack(nll_e).detach(), torch.empty(0), torch.as_tensor(loss))


class DenseTraining(Training):
    """The same training with the logits of every exit formed."""

    records = False
    cross_entropy = staticmethod(dense)


def epochs(
    kind: type[Training], spec: TrainSpec, seq_len: int, steps: int, device: torch.device
) -> Callable[[], None]:
    """What trains one epoch of so many steps by the trainer's own loop."""
    training = kind(build(spec), spec, synthetic_corpus(spec, seq_len, steps), device)

    def train() -> None:
        training.train_epoch()
        training.finish_epoch()

    return train


def head_products(
    spec: TrainSpec, seq_len: int, head_vd: Tensor, rows: int, entries: int, parts: int
) -> Callable[[], None]:
    """The head's products in a step: of each exit the logits and, where they are needed, the
    gradients of hidden state and head, in blocks of `entries` x `rows`, cut into `parts`.
    """
    tokens, dim = spec.batch_size * seq_len, head_vd.shape[1]
    to_head = spec.rates.head is not None
    exits = [spec.lowest_trained <= exit for exit, weight in enumerate(spec.exit_weights) if weight]
    hidden_md = torch.randn(tokens, dim).to(head_vd)
    grad_vd, buffer = torch.empty_like(head_vd), head_vd.new_empty(rows * entries)

    def form() -> None:
        for to_hidden in exits:
            for part_md in hidden_md.split(rows):
                part_dm = part_md.t().contiguous()
                total_pdm = part_md.new_zeros(parts, dim, len(part_md))
                for v in range(0, len(head_vd), entries):
                    block_vd = head_vd[v : v + entries]
                    cut = parts if len(block_vd) % parts == 0 else 1
                    block_pvd = block_vd.unflatten(0, (cut, -1))
                    logits_pvm = buffer[: len(part_md) * len(block_vd)]
                    logits_pvm = logits_pvm.view(cut, -1, len(part_md))
                    torch.bmm(block_pvd, part_dm.expand(cut, *part_dm.shape), out=logits_pvm)
                    if to_hidden:
                        total_pdm[:cut].baddbmm_(block_pvd.mT, logits_pvm)
                    if to_head:
                        block_grad_pvd = grad_vd[v : v + entries].view(cut, -1, dim)
                        block_grad_pvd.baddbmm_(logits_pvm, part_md.expand(cut, *part_md.shape))

    return form


def body_products(
    spec: TrainSpec, seq_len: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """The products of the layers in a step: projections side by side, attention per head."""
    shape = spec.architecture
    assert isinstance(shape, Architecture), "the bound is of our own model"
    tokens, dim, hidden = spec.batch_size * seq_len, shape.dim, shape.ffn_multiple * shape.dim
    heads, of_head = spec.batch_size * shape.num_heads, dim // shape.num_heads
    # (batch, rows, inner, columns) of a layer's products; attention's have no matrix that trains.
    matrices = [(1, tokens, dim, 3 * dim), (1, tokens, dim, dim), (1, tokens, dim, 2 * hidden)]
    matrices.append((1, tokens, hidden, dim))
    attention = [(heads, seq_len, of_head, seq_len), (heads, seq_len, seq_len, of_head)]
    products: list[tuple[int, int, int, int]] = []
    for layer in range(spec.last_read + 1):
        products += matrices + attention
        reached = spec.lowest_trained <= layer
        for number, (batch, rows, inner, columns) in enumerate(matrices):
            # Queries, keys and values of the lowest layer that trains pass nothing on.
            if spec.lowest_trained < layer if number == 0 else reached:
                products.append((batch, rows, columns, inner))
            if layer in spec.trained_layers:
                products.append((batch, inner, rows, columns))
        for batch, rows, inner, columns in attention if reached else ():
            products += [(batch, rows, columns, inner), (batch, inner, rows, columns)]
    made = {
        (b, m, k, n): [
            torch.randn(b, *size, dtype=dtype, device=device) for size in ((m, k), (k, n), (m, n))
        ]
        for b, m, k, n in set(products)
    }

    def form() -> None:
        for product in products:
            left, right, out = made[product]
            torch.bmm(left, right, out=out)

    return form


def seconds(
    tasks: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, float]:
    """The median of each task's times, in turns, after one run of each that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                taken[name].append(time.perf_counter() - started)
    return {name: median(times) for name, times in taken.items()}


def measure(
    spec: TrainSpec, seq_len: int, repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of a step, of its bound, and of a step of the dense twin."""
    # On a GPU steps are launched ahead of their end, which a single one would not show.
    steps = 1 if device.type == "cpu" else 20
    vocab, threads = spec.architecture.vocab_size, torch.get_num_threads()
    dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
    head_vd = torch.randn(vocab, spec.architecture.dim, dtype=dtype, device=device)
    cuts = [(8_192, vocab, 1), (8_192, min(16_384, vocab), 1)]
    if device.type == "cpu":
        # Logits that fill the second-level caches in use, or half of them.
        cuts = [
            (rows, min(vocab, max(16, cache_bytes() // of // (rows * dtype.itemsize)) * threads), p)
            for rows in (256, 512, 1_024)
            for of in (1, 2)
            for p in {1, threads}
        ]
    tries = {str(cut): head_products(spec, seq_len, head_vd, *cut) for cut in cuts}
    tried = seconds(tries, 2, device)
    tasks = {
        "step": epochs(Training, spec, seq_len, steps, device),
        "head": tries[min(tried, key=lambda cut: tried[cut])],
        "body": body_products(spec, seq_len, dtype, device),
        "dense": epochs(DenseTraining, spec, seq_len, steps, device),
    }
    found = seconds(tasks, repeats, device)
    return found["step"] / steps, found["head"] + found["body"], found["dense"] / steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for. Returns 1 where `--short` finds a ratio out of bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="few repeats; wide bounds are checked")
    parser.add_argument("settings", nargs="*", help="name=value, as of train.py")
    options = parser.parse_intermixed_args(arguments)
    given = GIVEN | {"model.vocab_size": str(VOCABULARY_SHORT if options.short else VOCABULARY)}
    given |= dict(each.split("=", 1) for each in options.settings)
    repeats, is_off = REPEATS_SHORT if options.short else REPEATS, False
    print(
        f"{'model':18} {'phase':8} {'step':>9} {'bound':>9} {'step/bound':>10} {'dense/step':>10}"
    )
    for model in given.pop("model").split(","):
        config = settings({"model": model, **given})
        assert config.model.vocab_size is not None, "model.vocab_size=null: there is no corpus"
        device = machine.pick_device(config.device, config.precision)
        with machine.switches(config.threads, config.precision):
            for phase in plan(config, config.model.vocab_size):
                step, bound, twin = measure(phase.train, config.data.seq_len, repeats, device)
                print(
                    f"{model:18} {phase.name:8} {1e3 * step:6.1f} ms {1e3 * bound:6.1f} ms "
                    f"{step / bound:10.2f} {twin / step:10.2f}",
                    flush=True,
                )
                is_off |= step / bound > MOST_TO_BOUND or twin / step < LEAST_TO_DENSE
    if options.short and is_off:
        bounds = f"at most {MOST_TO_BOUND}, dense/step at least {LEAST_TO_DENSE}"
        print(f"error: step/bound is to be {bounds}", file=sys.stderr)
    return int(options.short and is_off)


if __name__ == "__main__":
    sys.exit(main())
