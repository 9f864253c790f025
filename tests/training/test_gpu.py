"""Training on a GPU: what the CPU gives, the same bits each time, and no wait within an epoch.

What can be asked of the CPU too is asked of it, so that these tests are known to work where there
is no GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from proglayer.run.machine import switches
from proglayer.training.build import build, grow
from proglayer.training.plan import TrainSpec, plan
from proglayer.training.recorded import WARM_UP
from proglayer.training.trainer import Training, evaluate

from ..helpers import TINY, config, tiny_corpus

CORPUS = tiny_corpus()
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def planned(*overrides: str) -> tuple[TrainSpec, ...]:
    given = ("model=deep_supervision", "freeze=gradual", *overrides)
    phases = plan(config(*TINY, *given), CORPUS.vocab_size)
    return tuple(phase.train for phase in phases)


class Plain(Training):
    """Steps launched kernel by kernel."""

    records = False


def trained(
    device: str, *overrides: str, kind: type[Training] = Training, epochs: int = 1
) -> dict[str, Tensor]:
    """Weights, and the validation loss at each exit, after some epochs of each phase."""
    phases = planned(*overrides)
    model = build(phases[0])
    found: dict[str, Tensor] = {}
    with switches(None, phases[0].precision):
        for phase in phases:
            model = grow(model.cpu(), phase)
            training = kind(model, phase, CORPUS, torch.device(device))
            for _ in range(epochs):
                training.train_epoch()
                training.finish_epoch()
            exits = evaluate(model, phase, CORPUS, training.device, range(phase.layers))
            found[f"losses {phase.index}"] = torch.tensor([each.loss for each in exits])
    return found | {name: weights.cpu() for name, weights in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_training_repeats_bit_for_bit(device: str, precision: str) -> None:
    runs = [trained(device, f"precision={precision}") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_gpu_trains_as_the_cpu_does(precision: str) -> None:
    there, here = trained("cuda", f"precision={precision}"), trained("cpu")
    tolerance = {"float32": 1e-3, "tf32": 0.02, "bfloat16": 0.05}[precision]
    for name in (name for name in here if name.startswith("losses")):
        torch.testing.assert_close(there[name], here[name], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize(
    "given", [(), ("loss.curriculum=rotate",), ("growth=gate", "growth.gate_steps=2")]
)
def test_steps_as_graphs_give_the_bits_of_plain_ones(
    precision: str, given: tuple[str, ...]
) -> None:
    given = (*given, f"precision={precision}")
    recorded = trained("cuda", *given, epochs=4)
    plain = trained("cuda", *given, kind=Plain, epochs=4)
    assert all(torch.equal(recorded[name], plain[name]) for name in plain)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_compiled_body_trains_as_the_plain_one() -> None:
    compiled, plain = trained("cuda", "compile=true"), trained("cuda")
    for name in (name for name in plain if name.startswith("losses")):
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_no_step_waits_for_the_device(device: str) -> None:
    phase = planned()[0]
    training = Training(build(phase), phase, CORPUS, torch.device(device))

    def waits(mode: str) -> None:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    with switches(None, "float32"):
        for _ in range(WARM_UP + 1):  # what is made once may wait
            training.train_epoch()
            training.finish_epoch()
        steps = 0

        def after_step(_: object) -> None:
            nonlocal steps
            steps += 1
            # The epoch's last look at its loss has to wait.
            waits("default" if steps == training.steps_per_epoch - 1 else "error")

        try:
            training.train_epoch(after_step)
        finally:
            waits("default")
    assert steps == training.steps_per_epoch > 2
