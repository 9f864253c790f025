"""Engines that are not here, and what is told of them before anything is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from proglayer.errors import ConfigError
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


SLURM = Slurm(timeout_min=1, max_num_timeout=0, cpus_per_task=1, nodes=2, tasks_per_node=2)


@pytest.mark.parametrize(("devices", "nodes", "tasks"), [(1, 1, 2), (4, 2, 1), (2, 1, 4)])
def test_tasks_of_slurm_that_are_not_the_devices_of_a_run_are_refused(
    devices: int, nodes: int, tasks: int
) -> None:
    slurm = SLURM.model_copy(update={"nodes": nodes, "tasks_per_node": tasks})
    said = f"devices={devices}: hydra.launcher.nodes={nodes} .*give devices={nodes * tasks}, or"
    with pytest.raises(ConfigError, match=said):
        slurm.check_job(config(f"devices={devices}"))
    slurm.check_job(config(f"devices={nodes * tasks}"))


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
    assert SLURM.asked([job]).get("gpus_per_node") == of_slurm
    ray = Ray.model_validate({"ray": {"init": {}, "remote": {"num_cpus": 1, "num_gpus": 0}}})
    assert ray.asked(job) == {"name": tmp_path.name, **of_ray}
