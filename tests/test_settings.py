"""Every setting is in the key of what it changes, or shown to leave the bits alone.

A setting that changed training without changing the key would give a run somebody else's phases.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from proglayer.config import Config, ConfigError, setting_names
from proglayer.data.corpus import open_corpus
from proglayer.run import machine
from proglayer.run.machine import pick_device, switches
from proglayer.store.trajectory import Machine, describe
from proglayer.training.plan import plan

from .helpers import config

# With these, every setting below has something to act on.
BASE = ("phase=grow_once", "freeze=none", "lr.schedule=cosine", "initial_layers=3")
LLAMA = "model=causal_lm model.family=llama model.dim=16 model.num_heads=4"
STEPS = "[{existing:1,embedding:false,head:true}]"
MACHINE = Machine("cpu", "a processor", 2, torch.__version__)
PRECISIONS = ("float32", "tf32", "bfloat16")

# What the key holds of the settings themselves, by a value that differs from BASE. What follows in
# a text are other settings, without which this one has nothing to act on.
IN_THE_PHASES = (
    "seed=7", "initial_layers=4", "added_layers=2", "model.dim=32", "model.num_heads=2",
    "model.ffn_multiple=2", "model.rotary_base=500", "model.norm_eps=1e-5", "model.vocab_size=500",
    "model.exit_weights=uniform", "phase.schedule=keep_training", "phase.batch_size=32",
    "phase.accumulate=2", "phase.samples=10", "phase.max_epochs=3", "phase.initial.batch_size=32",
    "phase.initial.max_epochs=3", "phase.initial.samples=10", "phase.grown.batch_size=32",
    "phase.grown.max_epochs=3", "phase.grown.samples=10", "growth.init=copy",
    "growth.position=bottom", "phase.initial.exit_weights=uniform",
    "phase.grown.exit_weights=uniform", "loss.curriculum=rotate",
    "loss.rotate_every=2 loss.curriculum=rotate", "loss.gradual_steps=2 loss.curriculum=gradual",
    "loss.detach=true", "loss.normalize=true loss.curriculum=rotate",
    "freeze.initial.embedding=false", "freeze.initial.head=false",
    "lr.decay_share=0.5 lr.schedule=wsd", "lr.grown.schedule=linear", "lr.grown.warmup_steps=3",
    "lr.grown.final_factor=0.5", "optimizer.carry=copy", "optimizer.decay_norms=false",
    "optimizer.decay_embedding=false", "growth.noise=0.5 growth.init=copy",
    "growth.block=2 growth.init=last added_layers=2", "growth.layers=[0,1,0,2]",
    "growths=[{growth:{init:copy}}]", "phase.epoch_steps=3", "lr.span=run lr.schedule=linear",
    "model.residual_scale=depth model.norm=pre", "growth.gate_steps=5 growth.init=gate",
    "growth.share=true growth.init=stack freeze=none",
    "model.norm=pre", "model.checkpoint_activations=true", f"model.family=qwen2 {LLAMA}",
    f"model.num_kv_heads=2 {LLAMA}", f"model.max_positions=64 {LLAMA}",
    f"model.untie=true {LLAMA} model.family=gpt2", f"model.weights=bfloat16 {LLAMA}",
    f"freeze.steps={STEPS}", "lr.base=0.5", "lr.factor.new=0.5", "lr.factor.existing=0.5",
    "lr.factor.embedding=0.5", "lr.factor.head=0.5", "lr.schedule=linear", "lr.warmup_steps=3",
    "lr.final_factor=0.5", "optimizer.beta1=0.5", "optimizer.beta2=0.5", "optimizer.eps=1e-5",
    "optimizer.weight_decay=0.5", "optimizer.clip_norm=0.5", "precision=bfloat16", "compile=true",
    "cache_frozen=true freeze=existing", "phase.layer_drop=0.5", "phase.initial.layer_drop=0.5",
    "phase.grown.layer_drop=[0,0.5,0.5,0]",
)  # fmt: skip
# What the key holds through the corpus's fingerprint.
IN_THE_TEXT = (
    "data.seq_len=16", "data.samples=20", "data.validation_samples=5", "data.lowercase=false",
    "data.min_count=200", "data.max_vocab=10", "data.tokenizer=bpe data.max_vocab=300",
    "data.held_out=0.4", "data.files=[{other}]",
)  # fmt: skip
# Where a text lies. What is read there is in the fingerprint, wherever it lies: see test_corpus.
PLACE_OF_THE_TEXT = {
    "data.source", "data.path", "data.repository", "data.configuration", "data.revision",
    "data.train_split", "data.validation_split", "data.text_column", "data.cache_dir",
    "data.tokenizer_revision",
}  # fmt: skip
# Whose model it is, and where its weights lie: those are in the key by their hash, wherever they
# lie: see test_causal_lm.
PLACE_OF_THE_WEIGHTS = {"model.kind", "model.path", "model.revision"}
# Read by the stopping rule alone, which reads a trajectory and changes none: see test_trajectory.
STOPPING = {
    "phase.patience", "phase.min_delta", "phase.initial.patience", "phase.initial.min_delta",
    "phase.grown.patience", "phase.grown.min_delta",
}  # fmt: skip
# Read where a phase starts and at its end: see test_trajectory.
EVALUATION = {"model.evaluated_exits"}
# In the key as what they come to on this machine.
IN_THE_MACHINE = {"device", "devices", "threads"}
# About the process, not the training: the bits are the same with any value of theirs, shown by
# test_checkpoints_on_the_way_change_nothing (checkpoint_every_s), test_train (store.dir,
# plan, on_error, objective), test_loggers, test_slots (jobs_per_gpu).
HARMLESS = {
    "plan", "on_error", "checkpoint_every_s", "store.dir", "logger.tensorboard",
    "logger.mlflow", "objective", "report", "jobs_per_gpu", "join_timeout_s",
}  # fmt: skip


def keys(settings: Config, fingerprint: str = "a text") -> str:
    """What decides each phase's key, the choice of epochs apart."""
    described = [
        describe(None, phase.train, fingerprint, MACHINE)
        for phase in plan(settings, vocab_size=100)
    ]
    return json.dumps(described, sort_keys=True)


def test_every_setting_is_classified_once() -> None:
    names = setting_names()
    leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    given = [text.split("=")[0] for text in (*IN_THE_PHASES, *IN_THE_TEXT)]
    named = (
        PLACE_OF_THE_TEXT,
        PLACE_OF_THE_WEIGHTS,
        STOPPING,
        EVALUATION,
        IN_THE_MACHINE,
        HARMLESS,
    )
    assert sorted(leaves) == sorted([*given, *itertools.chain(*named)])


@pytest.mark.parametrize("given", IN_THE_PHASES)
def test_a_setting_of_training_is_in_the_key(given: str) -> None:
    own, *others = given.split(" ")
    assert keys(config(*BASE, *others, own)) != keys(config(*BASE, *others))


def test_each_precision_has_a_key_of_its_own() -> None:
    assert len({keys(config(*BASE, f"precision={name}")) for name in PRECISIONS}) == 3


@pytest.mark.parametrize("name", sorted(STOPPING | EVALUATION | HARMLESS))
def test_a_setting_that_trains_nothing_is_not_in_the_key(name: str) -> None:
    values = {"plan": "true", "on_error": "stop", "report": "false"}
    values |= {"store.dir": "elsewhere", "model.evaluated_exits": "trained"}
    values["objective"] = "test_loss"
    values |= {"logger.tensorboard": "true", "logger.mlflow": "true"}
    assert keys(config(*BASE, f"{name}={values.get(name, '3')}")) == keys(config(*BASE))


def test_a_text_is_in_the_key(tmp_path: Path) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    words = [f"Word{i * i % 23} word{i % 7}" for i in range(2000)]
    text.write_text("\n".join(words))
    other.write_text("\n".join([*words[:-1], "something else"]))
    base = ("data=text", f"data.files=[{text}]", "data.samples=40", "data.validation_samples=8")

    def fingerprint(*overrides: str) -> str:
        return open_corpus(config(*base, *overrides).data).fingerprint

    plain = fingerprint()
    for given in IN_THE_TEXT:
        assert fingerprint(*given.format(other=other).split(" ")) != plain, given
    moved = tmp_path / "moved.txt"
    moved.write_text(text.read_text())
    assert fingerprint(f"data.files=[{moved}]", f"data.cache_dir={tmp_path / 'cache'}") == plain


def test_precision_tf32_is_refused_where_no_unit_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu", "tf32").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"^precision=tf32 needs a CPU, or .* is on mps: "):
        pick_device("mps", "tf32")


@pytest.mark.parametrize(
    ("units", "picked"),
    [({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_an_automatic_precision_is_what_the_processor_has_units_for(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], picked: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    settings, line = machine.with_precision(config(*BASE, "precision=auto", "device=cpu"))
    assert settings.precision == picked
    assert (line or "").startswith(f"precision=auto is {picked} here: ")


def test_on_a_gpu_sums_have_one_order_for_the_time_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = found()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with switches(None, "float32"):
        assert found() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with switches(None, "float32"):
        assert found() == (True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert found() == before


def test_a_run_leaves_the_processs_switches_as_it_found_them() -> None:
    matmul = torch.backends.cuda.matmul
    before = torch.get_num_threads(), matmul.allow_tf32
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision
    try:
        for found in (False, True, False):
            matmul.allow_tf32 = found
            for precision in PRECISIONS:
                with pytest.raises(RuntimeError, match="fails"), switches(3, precision):
                    assert torch.get_num_threads() == 3
                    assert matmul.allow_tf32 is (precision != "float32")
                    inside = torch.get_float32_matmul_precision()
                    assert inside == ("highest" if precision == "float32" else "medium")
                    raise RuntimeError("the job fails")
                assert matmul.allow_tf32 is found
                assert torch.backends.mkldnn.matmul.fp32_precision == on_cpu
                assert torch.get_num_threads() == before[0]
    finally:
        matmul.allow_tf32 = before[1]
