"""Engines that are not here, and what is told of them before anything is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from proglayer.launch.engines import Ray
from proglayer.launch.job import Job
from proglayer.launch.slurm import Slurm

from ..helpers import SHORT, Command, config


def test_an_engine_that_is_missing_says_what_to_install(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, choice in ("ray", "hydra/launcher=ray"), ("optuna", "hydra/sweeper=optuna"):
        monkeypatch.setitem(sys.modules, module, None)
        done = train("-m", *SHORT, "seed=1,2", choice)
        assert done.status == 1
        install = f"pip install -c constraints.txt -e '.[{module}]'"
        assert done.err == f"error: {choice} is not installed: {install}\n"


def test_slurm_that_does_not_answer_is_told_before_anything_is_left(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for searched in ("seed=1,2",), ("hydra/sweeper=optuna", "lr.base=interval(1e-4,1e-2)"):
        done = train("-m", *SHORT, *searched, "hydra/launcher=slurm", "hydra.sweep.dir=s")
        assert done.status == 1
        (line,) = done.err.splitlines()
        assert line.startswith("error: hydra/launcher=slurm: no Slurm answers here (")
        assert "squeue" in line
        assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("devices", "nodes", "tasks"), [(1, 1, 2), (4, 2, 1), (2, 1, 4)])
def test_tasks_of_slurm_that_are_not_the_devices_of_a_run_are_refused(
    devices: int, nodes: int, tasks: int,
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("submitit")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    launcher = f"hydra.launcher.nodes={nodes}", f"hydra.launcher.tasks_per_node={tasks}"
    sweep = ("seed=1,2", f"devices={devices}", "hydra/launcher=slurm", "hydra.sweep.dir=s")
    done = train("-m", *SHORT, *sweep, *launcher)
    assert done.status == 1
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: devices={devices}: hydra.launcher.nodes={nodes} with tasks_per")
    assert f"give devices={nodes * tasks}, or auto" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("given", "of_slurm", "of_ray"),
    [
        ("devices=8", None, {"num_cpus": 8}),
        ("device=cuda devices=8", 4, {"num_cpus": 8, "num_gpus": 8}),
        ("device=cuda devices=auto", 2, {"num_gpus": 1}),
    ],
)
def test_a_job_gets_room_for_its_devices(
    given: str, of_slurm: int | None, of_ray: dict[str, int], tmp_path: Path
) -> None:
    job = Job(config(*given.split()), tmp_path, (), {}, tmp_path)
    slurm = Slurm(timeout_min=1, max_num_timeout=0, cpus_per_task=1, nodes=2, tasks_per_node=2)
    assert slurm.asked([job]).get("gpus_per_node") == of_slurm
    ray = Ray.model_validate({"ray": {"init": {}, "remote": {"num_cpus": 1, "num_gpus": 0}}})
    assert ray.asked(job) == {"name": tmp_path.name, **of_ray}


@pytest.mark.parametrize(
    ("given", "nodes", "tasks", "threads"),
    [
        ("devices=1", 1, 1, 8),
        ("devices=4", 1, 1, 2),
        ("devices=4", 2, 2, 8),
        ("devices=auto", 2, 2, 8),
    ],
)
def test_cpus_per_task_are_the_threads_of_each_task_and_shared_out_within_one(
    given: str, nodes: int, tasks: int, threads: int
) -> None:
    settings = {"timeout_min": 1, "max_num_timeout": 0, "cpus_per_task": 8}
    slurm = Slurm(**settings, nodes=nodes, tasks_per_node=tasks)
    assert slurm.threads_of(config(given)) == threads
