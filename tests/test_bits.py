"""Weights and losses of tiny runs that no change of the code may move.

`golden/bits.json` has them. Rounding differs between processors, so weights are compared bit for
bit on the processor and the torch that the file names, and losses to four digits elsewhere.
Made again by `python -m tests.test_bits`, which is right only where training is meant to change.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .helpers import ROOT, Command

GOLDEN = ROOT / "tests" / "golden" / "bits.json"
TEXT = ROOT / "tests" / "fixtures" / "text.txt"

TINY = (
    "data=text", f"data.files=[{TEXT}]", "data.seq_len=8", "data.samples=64",
    "data.validation_samples=20", "data.max_vocab=120", "model.dim=16", "model.num_heads=2",
    "phase.batch_size=16", "phase.max_epochs=2", "phase.patience=2", "lr.base=0.01",
    "precision=float32", "device=cpu", "threads=1", "report=false", "seed=7",
)  # fmt: skip
CASES = {
    "standard": ("model=standard",),
    "deep_supervision": ("model=deep_supervision", "experiment=original"),
    "stack_noise_carry_pre": (
        "model.norm=pre", "growth=stack", "growth.noise=0.2", "added_layers=3", "freeze=none",
        "optimizer.carry=copy",
    ),
    "gate_cache_frozen": (
        "model=deep_supervision", "growth=gate", "growth.gate_steps=3", "cache_frozen=true",
    ),
    "zero_interleave_pre": (
        "model.norm=pre", "growth=zero", "growth.position=interleave", "added_layers=2",
        "freeze=none",
    ),
    "rotate": ("model=deep_supervision", "loss.curriculum=rotate"),
    "detach": ("model=deep_supervision", "loss.detach=true"),
    "gradual_split": ("freeze=gradual", "lr=split", "lr.schedule=cosine"),
    "llama": (
        "model=causal_lm", "model.family=llama", "model.dim=16", "model.num_heads=2",
        "growth=copy",
    ),
}  # fmt: skip


def this_machine() -> str:
    """Return the processor and the torch that decide how sums are rounded."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        parts = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
        cpu = " ".join([name, *(part for part in parts if part in flags.split())])
    except (OSError, StopIteration):
        pass
    return f"{cpu}, torch {torch.__version__.split('+')[0]}"


def outcome(run: Path) -> dict[str, Any]:
    """Return a hash of the weights by name and content, and the validation loss of each epoch."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "weights.safetensors").items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    with open(run / "metrics.csv", newline="") as file:
        losses = [float(row["validation_loss"]) for row in csv.DictReader(file)]
    return {"weights": digest.hexdigest(), "losses": losses}


@pytest.mark.parametrize("case", CASES)
def test_training_gives_the_bits_that_it_gave(case: str, train: Command, tmp_path: Path) -> None:
    if case == "llama":
        pytest.importorskip("transformers")
    golden = json.loads(GOLDEN.read_text())
    expected = golden["runs"][case]
    done = train(*TINY, *CASES[case], f"hydra.run.dir={tmp_path / 'run'}")
    assert done.status == 0, done.err
    found = outcome(tmp_path / "run")
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-4)
    if golden["machine"] == this_machine():
        assert found == expected


def _make(train_py: Path) -> None:
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for case, settings in CASES.items():
            run = Path(folder) / case
            command = [sys.executable, str(train_py), *TINY, *settings, f"hydra.run.dir={run}"]
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            runs[case] = outcome(run)
    golden = {"machine": this_machine(), "runs": runs}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    _make(ROOT / "train.py" if len(sys.argv) < 2 else Path(sys.argv[1]))
