"""A batch shared out between two processes is the batch of one, within rounding."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from proglayer.training.build import build, grow
from proglayer.training.group import joined
from proglayer.training.model import Model
from proglayer.training.plan import TrainSpec, plan
from proglayer.training.trainer import Training, evaluate, follow_orders

from ..helpers import TINY, config, free_port, tiny_corpus
from .tiny import CPU

# 24 steps of 7, of which one process takes 4 and the other 3, or 21 of 8; the last step has one
# window, for one of them alone.
CORPUS = tiny_corpus(windows=169)
DEEP = "model=deep_supervision"
LLAMA = ("model=causal_lm", "model.family=llama")
# A name -> what is set, and the phase that is trained.
CASES = {
    "Standard, post-norm, 7 windows a batch": ((), 0),
    "deep supervision": ((DEEP,), 0),
    "pre-norm": (("model.norm=pre",), 0),
    "frozen trunk": (("freeze=existing",), 1),
    "rotate": ((DEEP, "loss.curriculum=rotate", "freeze=none"), 1),
    "gate": ((DEEP, "growth=gate", "growth.gate_steps=10", "freeze=none"), 1),
    "accumulate": (("phase.accumulate=4", "phase.batch_size=8"), 0),
    "layers left out": (("model.norm=pre", "phase.layer_drop=0.5"), 0),
    "llama": ((*LLAMA, "growth=copy"), 1),
    "cache_frozen": (("cache_frozen=true",), 1),
    "unequal exit weights": ((DEEP, "model.exit_weights=[1,5,2,4]"), 0),
}
if importlib.util.find_spec("transformers") is None:
    del CASES["llama"]


def specs() -> list[tuple[TrainSpec, TrainSpec]]:
    """The first phase of each case and the one that is trained, by which orders find it."""
    found = []
    for number, (overrides, index) in enumerate(CASES.values()):
        # At the rate of TINY differences of rounding grow, as one process shows with accumulate.
        settings = config(*TINY, "lr.base=0.001", "phase.batch_size=7", *overrides)
        phases = plan(settings, CORPUS.vocab_size)
        found.append((phases[0].train, replace(phases[index].train, index=number)))
    return found


def state(training: Training) -> dict[str, torch.Tensor]:
    return {"loss": training.loss_sum} | dict(training.model.state_dict())


def process(rank: int, port: int, folder: Path) -> None:
    """One of two: the first also trains alone, and writes down how far the two are apart."""
    where = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    torch.set_num_threads(1)
    cases = specs()
    apart: dict[str, dict[str, float]] = {}
    with joined(CPU, 60) as group:
        if rank:
            follow_orders(group, [spec for _, spec in cases], CORPUS, CPU)
            return
        for name, (first, spec) in zip(CASES, cases, strict=True):
            starts: list[Model] = [grow(build(first), spec) for _ in range(2)]
            alone = Training(starts[0], spec, CORPUS, CPU)
            shared = Training(starts[1], spec, CORPUS, CPU, group=group)
            shared.call_others()
            for training in alone, shared:
                training.train_epoch()
            exits = [spec.exits - 1]
            (there,) = evaluate(alone.model, spec, CORPUS, CPU, exits)
            kept = {"frozen": shared.frozen_validation, "shared": True}
            (here,) = evaluate(shared.model, spec, CORPUS, CPU, exits, group=group, **kept)
            (sent,) = evaluate(shared.model, spec, CORPUS, CPU, exits, group=group)
            pairs = zip(state(shared).values(), state(alone).values(), strict=True)
            apart[name] = {
                "steps": shared.step,
                "weights": max(float((a - b).norm() / b.norm()) for a, b in pairs),
                "loss": abs(float(shared.loss_sum / alone.loss_sum) - 1),
                "validation": abs(here.loss / there.loss - 1),
                # Where the other process has other weights than those that are sent to it.
                "others": 0.0 if shared.frozen_validation else abs(here.loss / sent.loss - 1),
            }
    (folder / "apart.json").write_text(json.dumps(apart, indent=1))


@pytest.mark.timeout(200)
def test_a_batch_shared_out_is_the_batch_of_one_process(tmp_path: Path) -> None:
    given = free_port(), tmp_path
    spawn(process, given, 2)
    apart = json.loads((tmp_path / "apart.json").read_text())
    assert apart.keys() == CASES.keys()
    for name, found in apart.items():
        assert found["steps"] >= 20, name
        assert found["others"] == 0, name
        assert max(found["weights"], found["loss"], found["validation"]) < 1e-5, (name, found)


if __name__ == "__main__":
    folder = Path("build")
    folder.mkdir(exist_ok=True)
    spawn(process, (free_port(), folder), 2)
    for case, found in json.loads((folder / "apart.json").read_text()).items():
        print(f"| {case} | {' | '.join(f'{value:.1e}' for value in found.values())} |")
