"""What a step takes that two processes of a thread share out, against one process of two threads.

    python benchmarks/devices.py           # four minutes, on two cores that nothing else uses

Settings are those of benchmarks/step.py. Both train in turns, a few steps each, so that a machine's
rate may drift; figures are medians. `summing` is what the first process is within the sum of the
gradients, and `meeting` within the meeting that a step begins with: in both it also waits for the
other. Before them, sums of some sizes alone, both processes beginning together.
"""

from __future__ import annotations

import os
import socket
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from step import GIVEN, settings, synthetic_corpus
from torch.multiprocessing.spawn import spawn

from proglayer.run import machine
from proglayer.training.build import build
from proglayer.training.group import Group, joined
from proglayer.training.plan import plan
from proglayer.training.trainer import Training, follow_orders

CPU = torch.device("cpu")
LLAMA = {"model": "causal_lm", "model.family": "llama", "model.dim": "256", "model.num_heads": "4"}
CASES = (
    {"model": "standard", "model.vocab_size": "8192"},
    {"model": "standard", "model.vocab_size": "69830"},
    {**LLAMA, "model.vocab_size": "8192", "initial_layers": "6"},
)
MEGABYTES = (1, 4, 16, 64)
STEPS, REPEATS = 4, 7
# Seconds within collectives since they were last looked at: of gradients, and of meetings.
within = {"summing": 0.0, "meeting": 0.0}


def timed(all_reduce: Any) -> Any:
    """`all_reduce` with its time added to `within`."""

    def run(tensor: torch.Tensor, *others: Any, **named: Any) -> Any:
        began = time.perf_counter()
        work = all_reduce(tensor, *others, **named)
        name = "summing" if tensor.is_floating_point() else "meeting"
        within[name] += time.perf_counter() - began
        return work

    return run


def lead(case: dict[str, str], phase: Any, corpus: Any, group: Group) -> None:
    """Time a phase with one process and with both, and print it."""
    spec, row = phase.train, dict[str, list[float]]()
    both = Training(build(spec), spec, corpus, CPU, group=group)
    both.call_others()
    trainings = {"one": Training(build(spec), spec, corpus, CPU), "two": both}
    for repeat in range(REPEATS + 1):  # the first is not counted
        for name, training in trainings.items():
            torch.set_num_threads(2 if name == "one" else 1)
            within.update(summing=0.0, meeting=0.0)
            began = time.perf_counter()
            training.train_epoch()
            took = {name: time.perf_counter() - began} | (within if training is both else {})
            training.finish_epoch()
            for figure, seconds in took.items() if repeat else ():
                row.setdefault(figure, []).append(1e3 * seconds / STEPS)
    sent = sum(p.grad.numel() for p in both.trainable if p.grad is not None) * 4e-6
    of = {name: median(found) for name, found in row.items()}
    ratios = [two / one for one, two in zip(row["one"], row["two"], strict=True)]
    print(
        f"{case['model']:11} {case['model.vocab_size']:>6} {phase.name:8} {sent:6.1f} MB   "
        + "   ".join(f"{name} {ms:7.1f} ms" for name, ms in of.items())
        + f"   two/one {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        flush=True,
    )


def member(rank: int, port: int) -> None:
    """Be one of the two processes."""
    where = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    dist.all_reduce = timed(dist.all_reduce)
    with machine.switches(1, "float32"), joined(CPU, 60) as group:
        for megabytes in MEGABYTES:
            tensor, taken = torch.zeros(megabytes * 250_000), []
            for _ in range(3 * REPEATS):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(tensor)
                taken.append(1e3 * (time.perf_counter() - began))
            if rank == 0:
                print(f"sum of {megabytes:2} MB: {median(taken):6.1f} ms", flush=True)
        for case in CASES:
            config = settings(GIVEN | case)
            assert config.model.vocab_size is not None, "it is given"
            phases = plan(config, config.model.vocab_size)
            corpus = synthetic_corpus(phases[0].train, config.data.seq_len, STEPS)
            if rank:
                follow_orders(group, [phase.train for phase in phases], corpus, CPU)
                continue
            for phase in phases:
                lead(case, phase, corpus, group)
            if case is not CASES[-1]:
                group.end()


def main() -> None:
    """Start both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(member, (port,), 2)


if __name__ == "__main__":
    main()
