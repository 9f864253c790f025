"""Sweeps on Ray: on a real cluster of two nodes on this machine, and on one that a sweep starts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..helpers import (
    SHORT,
    Command,
    assert_same_bits,
    at_work,
    environment,
    epochs,
    epochs_trained,
    free_port,
    results,
    start,
    until,
)

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

# Long enough to be caught at work.
ALL = (
    *SHORT, "threads=1", "phase.max_epochs=4", "phase.patience=4",
    "experiment=original,control_from_scratch", "model=standard,deep_supervision",
)  # fmt: skip
# Of a cluster that runs code for those alone who know a word.
WORD = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()}


def sweep(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """The command, started in `folder`."""
    variables["RAY_USAGE_STATS_ENABLED"] = "0"
    return start(folder, "-m", *SHORT, *arguments, "hydra/launcher=ray", **variables)


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    """What a command printed, which must have ended with this status."""
    out, _ = process.communicate(timeout=400)
    assert process.returncode == status, out
    return out


# ---------------------------------------------------------------------------------------------
# A cluster


class Cluster:
    """Nodes of one core each, all of them on this machine, found under one address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.groups: list[int] = []
        self.address = f"127.0.0.1:{free_port()}"

    def start_node(self) -> None:
        """Start the head, or one more node, and wait until it is there."""
        of_head = (
            "--head", f"--port={self.address.split(':')[1]}", "--include-dashboard=false",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder}",
        )  # fmt: skip
        of_node = of_head if not self.groups else (f"--address={self.address}",)
        command = [
            str(Path(sys.executable).with_name("ray")), "start", *of_node, "--num-cpus=1",
            "--num-gpus=0", "--node-ip-address=127.0.0.1", "--object-store-memory=80000000",
            "--dashboard-agent-listen-port=0", "--disable-usage-stats",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env=environment(self.folder) | WORD, start_new_session=True,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.groups.append(process.pid)
        # The node's processes keep the pipe, so its end never comes.
        status = process.wait(timeout=60)
        assert status == 0, os.read(process.stdout.fileno(), 100_000)  # pyright: ignore

    def workers(self, number: int) -> list[int]:
        """The processes that a node has started beside its own group's, which run tasks."""
        group = self.groups[number]
        own = [pid for pid, _, its_group in processes() if its_group == group]
        return [pid for pid, parent, its in processes() if parent in own and its != group]

    def kill_node(self, number: int) -> None:
        """End all of a node's processes at once, as when its machine dies."""
        workers = self.workers(number)
        os.killpg(self.groups[number], signal.SIGKILL)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    def stop(self) -> None:
        for number in range(len(self.groups)):
            with contextlib.suppress(ProcessLookupError):
                self.kill_node(number)


def processes() -> list[tuple[int, int, int]]:
    """Number, parent and group of every process."""
    command = ["ps", "-eo", "pid=,ppid=,pgid="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [(int(pid), int(parent), int(group)) for pid, parent, group in map(str.split, lines)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # The names of sockets below it must stay under 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    nodes = Cluster(folder)
    try:
        nodes.start_node()
        nodes.start_node()
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes_give_the_bits_of_one_process(
    cluster: Cluster, train: Command, tmp_path: Path
) -> None:
    assert train("-m", *ALL, "hydra.sweep.dir=basic").status == 0
    alone = results(tmp_path / "basic")
    assert len(alone) == 2 * 2
    assert [r["environment"]["scheduler"] for r in alone] == [None] * len(alone)

    # Folders count from where the command is started, and the store is named in its environment;
    # Ray's workers are elsewhere and have another. A node dies in the middle of a phase.
    given = (*ALL, f"hydra.launcher.ray.init.address={cluster.address}", "hydra.sweep.dir=ray")
    process = sweep(tmp_path, *given, **WORD, PROGLAYER_STORE=str(tmp_path / "ray-stages"))

    def at_work_on_second() -> list[Path]:
        jobs = at_work(tmp_path / "ray")
        workers = cluster.workers(1) if jobs else []
        return [job for job, worker in jobs.items() if worker in workers]

    (job,) = until(at_work_on_second, process)
    cluster.kill_node(1)
    assert json.loads((job / "run.json").read_text())["state"] == "running"
    ended(process)
    records = results(tmp_path / "ray")
    assert_same_bits(records, alone)
    places = [record["environment"] for record in records]
    assert {place["scheduler"] for place in places} == {"ray"}
    assert len({place["scheduler_job"] for place in places}) == len(places)
    # Some epochs of the job that died are read, none is trained by two jobs.
    trained, whole = epochs_trained(records), epochs_trained(alone)
    assert all(trained[stage] <= epochs for stage, epochs in whole.items())
    assert sum(trained.values()) < sum(whole.values())


# ---------------------------------------------------------------------------------------------
# Here, where plain Ray needs no variable of its own


def test_a_job_whose_process_dies_for_good_fails_alone(tmp_path: Path) -> None:
    jobs = ("seed=1,2", "lr.base=0.001,1e15", "optimizer.clip_norm=null", "hydra.sweep.dir=s")
    task = ("hydra.launcher.ray.remote.max_retries=0", "hydra.launcher.ray.remote.num_cpus=2")
    process = sweep(tmp_path, *jobs, *task, "hydra.launcher.ray.init.num_cpus=4")
    (worker,) = until(
        lambda: [pid for job, pid in at_work(tmp_path / "s").items() if job.name[:2] == "0_"],
        process,
    )
    os.kill(worker, signal.SIGKILL)
    out = ended(process, status=1)
    records = results(tmp_path / "s")
    assert [r["state"] for r in records] == ["lost", "failed", "completed", "failed"]
    _, diverged, well, _ = records
    assert "lower lr.base" in diverged["reason"]
    # A job has as many threads as its task has cores.
    assert well["machine"]["threads"] == 2
    assert "was lost by Ray: The worker died" in out
    assert "4 runs: 1 completed, 2 failed, 1 lost" in out
    assert "Traceback" not in out


def test_a_job_on_two_devices_takes_two_cores_and_has_the_bits_of_one_without_ray(
    tmp_path: Path,
) -> None:
    jobs = ("seed=1,2", "devices=2", "threads=1", "hydra.sweep.dir=s")
    (tmp_path / "here").mkdir()
    ended(start(tmp_path / "here", "-m", *SHORT, *jobs))
    ended(sweep(tmp_path, *jobs, "hydra.launcher.ray.init.num_cpus=2"))
    here, there = results(tmp_path / "here"), results(tmp_path / "s")
    assert_same_bits(there, here)
    assert [r["weights_sha256"] for r in there] == [r["weights_sha256"] for r in here]
    first, second = sorted(there, key=lambda record: record["started"])
    assert first["ended"] < second["started"]  # there is room for one at a time


def test_ctrl_c_ends_the_jobs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    jobs = ("seed=1,2,3", "hydra.sweep.dir=s", "phase.max_epochs=60", "phase.patience=60",
            "hydra.launcher.ray.init.num_cpus=2")  # fmt: skip
    process = sweep(tmp_path, *jobs)
    until(lambda: len(at_work(tmp_path / "s")) == 2, process)
    process.send_signal(signal.SIGINT)
    ended(process, status=130)
    stopped = results(tmp_path / "s")
    assert [r["state"] for r in stopped] == ["interrupted", "interrupted", "waiting"]
    assert [r["reason"] for r in stopped[:2]] == ["stopped by SIGINT"] * 2
    assert list((tmp_path / "stages").glob("*/state-*"))
    out = ended(sweep(tmp_path, *jobs))
    assert "error" not in out.lower()
    records = results(tmp_path / "s")
    assert [r["state"] for r in records] == ["completed"] * 3
    assert all(epochs(record, reused=True)[0] for record in records[:2])


def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    given = f"hydra.launcher.ray.init.address=127.0.0.1:{free_port()}"
    out = ended(sweep(tmp_path, "seed=1,2", given), status=1)
    assert out.splitlines()[-1].startswith(f"error: {given}: no cluster to work with (")
    assert "Traceback" not in out
