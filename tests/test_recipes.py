"""The published recipes: what each trains, and that each runs from end to end."""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from proglayer import load_run
from proglayer.config import Config, flat_settings
from proglayer.launch.product import ProductSettings, expand
from proglayer.report.arms import MARGIN
from proglayer.report.comparisons import Kind
from proglayer.report.measures import timings
from proglayer.report.study import judge_study
from proglayer.results import load
from proglayer.run.progress import plan_lines
from proglayer.run.run import run
from proglayer.store.trajectory import Trajectory
from proglayer.training.cost import training_flops
from proglayer.training.plan import plan

from . import synthetic
from .helpers import ROOT, config

RECIPES = ROOT / "conf" / "experiment" / "recipe"
SMALL = (
    "data=text", f"data.files=[{ROOT / 'docs' / 'report.md'}]", "data.samples=40",
    "data.validation_samples=10", "data.seq_len=16", "data.held_out=0.3", "model.dim=16",
    "phase.max_epochs=2", "phase.initial.max_epochs=null", "phase.grown.max_epochs=null",
    "phase.batch_size=16", "threads=1", "report=false",
)  # fmt: skip


# What the arms of a recipe's command differ in, beside the seed: what the recipe is about.
GROWTH = {"growth.init"}
DIFFERS = {
    "g_stack": {"phase.schedule", "phase.initial.max_epochs"},
    "midas": GROWTH,
    "llama_pro": GROWTH,
    "gated": {"growth.gate_steps"},
    "one_hop": {"initial_layers", "added_layers"},
    "frozen_embedding": {"freeze.initial.embedding"},
    "layerskip": {"loss.curriculum"},
    "exits_only": {"phase.grown.exit_weights"},
    "loss_by_phase": {"phase.initial.exit_weights", "phase.grown.exit_weights"},
    "growth_timing": {"phase.initial.max_epochs", "phase.grown.max_epochs"},
    "depth_pays": GROWTH,
    "control_bigram": {"initial_layers"},
    "solar": GROWTH,
    "gradual_stacking": GROWTH,
    "lidas": GROWTH,
    "curse_of_depth": {"phase.schedule", "phase.initial.max_epochs", "model.residual_scale"},
    "wsd_growth": {"phase.schedule", "phase.initial.max_epochs"},
    "drop_layers": {"growth.layers"},
}


def jobs(name: str) -> list[tuple[str, ...]]:
    """The overrides of those jobs of a recipe's command that differ in more than the seed."""
    text = (RECIPES / f"{name}.yaml").read_text()
    found = re.search(r"^#   python train\.py -m (.*(?:\n#     .*)*)", text, re.MULTILINE)
    assert found is not None
    given = shlex.split(found[1].replace("\n#     ", " "))
    design = [each for each in given if each.startswith("hydra.sweeper.pairs=")]
    pairs = yaml.safe_load(design[0].split("=", 1)[1]) if design else []
    given = [each for each in given if each not in design and not each.startswith("seed=")]
    return [tuple(job) for job in expand(ProductSettings(pairs=pairs), given, None)]


def arms(name: str) -> list[Config]:
    """The settings of those jobs."""
    return [config(*job) for job in jobs(name)]


@pytest.mark.parametrize("name", DIFFERS)
def test_the_arms_of_a_command_differ_in_what_the_recipe_is_about_alone(name: str) -> None:
    first, *others = [dict(flat_settings(job.model_dump(mode="json"))) for job in arms(name)]
    assert others
    different = {each for each in first if any(job[each] != first[each] for job in others)}
    assert different == DIFFERS[name]
    depths = {plan(job, 8192)[-1].train.layers for job in arms(name)}
    assert len(depths) == (2 if name == "control_bigram" else 1)


# Commands that are judged in other ways than each variant against the first.
COMPARED = ("g_stack", "wsd_growth", "curse_of_depth", "growth_timing", "exits_only",
                  "loss_by_phase")  # fmt: skip


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("name", COMPARED)
def test_the_report_of_a_command_compares_its_arms(name: str, tmp_path: Path) -> None:
    """Each of them with another; what grows with the control of its own other settings, and at
    equal compute; moments of growth with each other.
    """
    for (number, (_, *own)), seed in itertools.product(enumerate(jobs(name)), (0, 1)):
        lengths = [min(phase.stop.max_epochs, 25) for phase in plan(arms(name)[number], 8192)]
        end = 7 - 0.002 * seed * number
        losses = [[end - 0.01 * epoch for epoch in range(length)] for length in lengths]
        at = tmp_path / f"{number}_{seed}"
        synthetic.run(at, f"recipe/{name}", "standard", seed, *own, losses=losses)
    study = judge_study(load(tmp_path), MARGIN, None)
    (condition,) = study.conditions
    assert bool(timings(condition.runs, condition.curves)) is (name == "growth_timing")
    made, variants = [own for own in study.others if own.tested], {*condition.runs["variant"]}
    assert {variant for own in made for variant in (own.a, own.b)} == variants
    assert len(variants) == len(jobs(name))
    scratch = {variant for variant in variants if "from_scratch" in variant}
    at_equal = {own.a: own.b for own in made if own.kind is Kind.budget}
    if name == "wsd_growth":  # growing ends amid the schedule of the longer one: no equal compute
        assert not at_equal
    elif scratch:
        assert ({*at_equal}, {*at_equal.values()}) == (variants - scratch, scratch)
    for own in made if scratch else ():
        apart = {each.split("=")[0] for each in {*own.a.split()} ^ {*own.b.split()}}
        assert len(apart - {"phase.initial.max_epochs"}) == 1
    if len(scratch) > 1:
        assert any({own.a, own.b} <= scratch for own in made)


@pytest.mark.parametrize(
    ("name", "within"),
    [("g_stack", 0.03), ("curse_of_depth", 0.003), ("growth_timing", 0.065)],
)
def test_arms_of_equal_cost_end_their_schedules_at_it(name: str, within: float) -> None:
    spent = []
    for job in arms(name):
        phases = plan(job, 8192)
        last = phases[-1]
        assert last.train.schedule.total_epochs in (None, last.stop.max_epochs)
        assert last.stop.max_epochs <= last.stop.patience
        epochs = [
            (phase.stop.max_epochs, training_flops(phase.train, 32, 3000)) for phase in phases
        ]
        spent.append(sum(number * sum(flops) for number, flops in epochs))
    assert min(spent) / max(spent) == pytest.approx(1, abs=within)


def test_moments_of_growth_cost_the_same_under_deep_supervision() -> None:
    text = (RECIPES / "growth_timing.yaml").read_text()
    ((initial, grown),) = re.findall(r"# +phase\.initial\S+=(\S+) phase\.grown\S+=(\S+)\n", text)
    phases = plan(config("experiment=recipe/growth_timing", "model=deep_supervision"), 8192)
    first, second = (sum(training_flops(phase.train, 32, 3000)) for phase in phases)
    pairs = zip(initial.split(","), grown.split(","), strict=True)
    spent = [int(before) * first + int(after) * second for before, after in pairs]
    assert spent == pytest.approx([spent[0]] * 6)


def test_a_gradual_curriculum_reads_every_exit_within_its_run() -> None:
    (phase,) = plan(config("experiment=recipe/layerskip", "loss.curriculum=gradual"), 8192)
    steps = [phase.train.exit_weights_at(47 * epoch, 47) for epoch in (0, 3, 6)]
    assert [sum(weight > 0 for weight in weights) for weights in steps] == [1, 3, 6]
    assert phase.stop.patience == phase.stop.max_epochs == 12
    assert steps[2] == pytest.approx([n * (n + 1) / 2 / 56 for n in range(1, 7)])


def test_every_recipe_is_here_and_opens_with_command_cost_and_expectation() -> None:
    # One needs a checkpoint, which is not here.
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*DIFFERS, "llama_pro_checkpoint"}
    for name in DIFFERS:
        text = (RECIPES / f"{name}.yaml").read_text()
        assert text.startswith("# @package _global_\n# ")
        for part in "#   python train.py -m experiment=recipe/", "Cost:", "Expect:":
            assert part in text


@pytest.mark.parametrize("name", DIFFERS)
def test_a_recipe_runs_from_end_to_end(name: str, tmp_path: Path) -> None:
    """At a size that trains in a moment: 2 epochs of 3 steps a phase."""
    steps = ["phase.epoch_steps=3"] if name == "wsd_growth" else []
    own = config(f"experiment=recipe/{name}", *SMALL, *steps, f"store.dir={tmp_path / 'stages'}")
    record = run(own, tmp_path / "run")
    assert record.state == "completed", record.reason
    planned = [phase.train.layers for phase in plan(own, record.corpus.vocab_size)]
    assert [phase.layers for phase in record.phases] == planned
    assert len(load_run(tmp_path / "run").layers) == planned[-1]
    for before, phase in itertools.pairwise(record.phases):
        if phase.growth is not None:
            assert len(phase.growth.exit_losses_after) == phase.layers
            shock = phase.growth.exit_losses_after[-1] - before.validation.loss
            assert (shock == 0) is (name in ("llama_pro", "gated"))


def run_until_killed(settings: Config, folder: Path, method: str, call: int) -> None:
    """A run that kills its process right after this call of a trajectory's method; state is stored
    after every step.
    """
    plain, calls = getattr(Trajectory, method), itertools.count(1)

    def killing(*arguments: Any) -> Any:
        result = plain(*arguments)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(Trajectory, method, killing)
    folder.mkdir()
    run(settings.model_copy(update={"checkpoint_every_s": 0.0}), folder)


# 3 to 6 to 12 layers after 6 and 12 steps of 3 windows a pass: each growth amid a pass.
TWICE = (
    *SMALL, "data.samples=56", "phase.epoch_steps=3", "added_layers=[3,6]", "growth=stack",
    "freeze=none", "lr.span=run", "lr.schedule=wsd", "lr.warmup_steps=2", "model.norm=pre",
    "optimizer.carry=copy", "phase.layer_drop=0.4",
)  # fmt: skip
STEPS = [("_after_step", step) for step in (5, 6, 7, 12, 13)]
MOMENTS = [*STEPS, ("finish", 1), ("start_exits", 1), ("start_exits", 2)]


def test_two_growths_amid_a_pass_killed_around_them_give_the_same_bits(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    record = run(config(*TWICE, f"store.dir={tmp_path / 'a'}"), whole)
    assert [phase.layers for phase in record.phases] == [3, 6, 12]
    assert [phase.new_layers for phase in record.phases[1:]] == [[3, 4, 5], [*range(6, 12)]]
    weights = (whole / "weights.safetensors").read_bytes()
    for number, moment in enumerate(MOMENTS):
        killed, own = tmp_path / f"{number}", config(*TWICE, f"store.dir={tmp_path / f's{number}'}")
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=run_until_killed, args=(own, killed, *moment))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        run(own, killed)
        assert lasting(killed) == lasting(whole), moment
        assert (killed / "weights.safetensors").read_bytes() == weights, moment


PLANS = {
    "solar": """\
1 initial: pre-norm; rate constant; at most 50 epochs, patience 1; exit weights 0 0 0 1, all read; \
carry none
2 grown: layers from 1 2 3 2* 3* 4; rate constant; at most 50 epochs, patience 1; exit weights \
0 0 0 0 0 1, all read; carry none""",
    "wsd_growth": """\
1 initial: pre-norm; rate wsd over 25 epochs, warm-up 20 steps; at most 16 epochs, all of them; \
exit weights 1, all read; carry none
2 grown: layers from 1 fresh* fresh* fresh* fresh* fresh*; rate wsd over 25 epochs, warm-up 20 \
steps; at most 9 epochs, all of them; exit weights 0 0 0 0 0 1, all read; carry existing""",
    "layerskip phase.layer_drop=0.1": """\
1 initial: pre-norm; rate constant; at most 12 epochs, patience 12; exit weights \
0.018 0.054 0.11 0.18 0.27 0.38, rotate read; layers dropped 0 0.015 0.032 0.052 0.074 0.1; \
carry none""",
}


@pytest.mark.parametrize("command", PLANS)
def test_a_plan_says_what_is_to_be_checked_against_the_paper(command: str) -> None:
    phases = plan(config(*f"experiment=recipe/{command}".split()), 8192)
    lines = [line.rpartition("; ")[0] for line in plan_lines(phases, 32, 1)]
    assert "\n".join(lines) == PLANS[command]


def lasting(folder: Path) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Phases and epochs of a run, times and the account of who trained them apart."""
    phases = json.loads((folder / "run.json").read_text())["phases"]
    head, *rows = csv.reader((folder / "metrics.csv").read_text().splitlines())
    kept = [n for n, name in enumerate(head) if name != "reused" and not name.endswith("seconds")]
    return phases, [[row[n] for n in kept] for row in rows]
