"""The benchmark of a training step runs, and its body forms the products that a plan counts."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from proglayer.training.cost import training_flops
from proglayer.training.plan import plan

from .helpers import ROOT, config

SMALL = ("model.dim=16", "model.num_heads=2", "phase.batch_size=4", "data.seq_len=8")


@pytest.fixture(scope="module")
def step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks" / "step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("experiment", ["original", "gradual_unfreezing", "control_head_only"])
@pytest.mark.parametrize("model", ["standard", "deep_supervision"])
def test_the_bound_of_the_body_is_of_the_products_that_a_step_needs(
    step: ModuleType, experiment: str, model: str
) -> None:
    for phase in plan(config(f"experiment={experiment}", f"model={model}", *SMALL), 300):
        form = step.body_products(phase.train, 8, torch.float32, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            form()
        assert counter.get_total_flops() == training_flops(phase.train, 8, 4).body
