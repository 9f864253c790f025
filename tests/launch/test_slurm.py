"""A sweep through a real Slurm: two nodes on this machine, started for these tests alone."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proglayer.results import load
from proglayer.run.run import run

from ..helpers import (
    ROOT,
    SHORT,
    Command,
    assert_same_bits,
    config,
    epochs,
    epochs_trained,
    free_port,
    results,
    start,
)
from ..synthetic import aged

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NODES = ("n1", "n2")
ON_SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null")
# Some seconds of training, long enough to come in between.
LONG = (
    *SHORT, "threads=1", "seed=7", "phase.max_epochs=60", "phase.patience=60",
    "checkpoint_every_s=1",
)  # fmt: skip
SBIN = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


def is_here() -> bool:
    return all(shutil.which(daemon, path=SBIN) for daemon in ("slurmctld", "munged"))


def install() -> None:
    """Install Slurm, if that can be had: without it the tests here are skipped."""
    apt = ("apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=15")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for what in ("update",), ("install", "-y", "--no-install-recommends", "slurm-wlm", "munge"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run([*apt, *what], env=environment, timeout=180)


@dataclass
class Cluster:
    """A controller and two nodes. `environment` leads Slurm's commands to it."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    commands: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SBIN}

    def start(self, name: str, *command: str) -> None:
        """Start a daemon. Its output, and its own log, are in the cluster's folder."""
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=os.environ | self.environment, stdout=out, stderr=out, cwd=self.folder
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def configure(self) -> None:
        ports = [free_port() for _ in range(3)]
        host = socket.gethostname().split(".")[0]
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        version = self.ask("slurmd", "-V")
        if int(re.findall(r"\d+", version)[0]) >= 23:
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        # A job that was put back waits for the credential of its last start to run out.
        (self.folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={self.folder}/munge.sock,cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool_%n
SlurmctldPidFile={self.folder}/controller.pid
SlurmdPidFile={self.folder}/%n.pid
SlurmctldLogFile={self.folder}/controller.log
SlurmdLogFile={self.folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=5
KillWait=10
MinJobAge=600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP GraceTime=30
""")
        (self.folder / "state").mkdir()

    def up(self) -> None:
        """Start everything; back when both nodes take jobs."""
        self.configure()
        files = {"key": "key", "socket": "sock", "log": "log", "pid": "pid", "seed": "seed"}
        places = [
            f"--{name}{'' if name == 'socket' else '-file'}={self.folder}/munge.{ending}"
            for name, ending in files.items()
        ]
        self.start("munge", "munged", "--foreground", "--force", *places)
        self.until(lambda: (self.folder / "munge.sock").exists(), 10)
        self.start("controller", "slurmctld", "-D")
        for name in NODES:
            (self.folder / f"spool_{name}").mkdir()
            self.start_node(name)
        self.until(lambda: self.ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 2, 30)

    def down(self) -> None:
        """End everything, also what a test left behind that failed."""
        for command in self.commands:
            command.kill()
            command.wait()
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.ask("scancel", "--me")
            end = time.monotonic() + 20
            while self.ask("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        """What a command of Slurm's prints; empty where the controller does not answer yet."""
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.stdout

    def state(self, number: str) -> dict[str, str]:
        """What Slurm says of a job, such as its JobState."""
        answer = self.ask("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S*)", answer))

    def until(self, seen: Callable[[], Any], seconds: float) -> None:
        """Wait until `seen` gives something."""
        end = time.monotonic() + seconds
        while not seen():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                outs = sorted(self.folder.glob("*.out"))
                logs = [path.read_text(errors="replace")[-1500:] for path in outs]
                pytest.fail(f"not within {seconds} s (ended: {dead})\n" + "\n".join(logs))
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    if os.environ.get("PROGLAYER_TEST_INSTALL") == "yes" and not is_here():
        install()
    if not is_here():
        pytest.skip("no Slurm here; as root on Debian PROGLAYER_TEST_INSTALL=yes installs it")
    there = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        there.up()
        yield there
    finally:
        there.down()


@dataclass
class Sweep:
    """A sweep's command in a process of its own, and its folder."""

    cluster: Cluster
    folder: Path
    arguments: tuple[str, ...]
    code: Path = ROOT

    def start(self) -> Sweep:
        arguments = ("-m", *ON_SLURM, *self.arguments, f"hydra.sweep.dir={self.folder.name}")
        variables = {**self.cluster.environment, "PYTHONPATH": str(self.code)}
        self.process = start(self.folder.parent, *arguments, code=self.code, **variables)
        self.cluster.commands.append(self.process)
        return self

    def finish(self) -> tuple[int, str]:
        """The command's exit status and output."""
        out, _ = self.process.communicate(timeout=280)
        return self.process.returncode, out

    @property
    def numbers(self) -> list[str]:
        """The jobs' numbers in Slurm, in the order of the jobs."""
        path = self.folder / ".slurm/jobs.json"
        ids = json.loads(path.read_text()) if path.exists() else {}
        return [ids[name] for name in sorted(ids, key=lambda name: int(name.split("_")[0]))]

    def epochs(self, job: int) -> int:
        """How many epochs the job of this number in the sweep shows."""
        return len(self.record(job).get("epochs", []))

    def statuses(self) -> list[str]:
        return load(self.folder).runs["status"].tolist()

    def record(self, job: int) -> dict[str, Any]:
        """The record of a job; empty while there is none."""
        found = list(self.folder.glob(f"{job}_*/run.json"))
        return json.loads(found[0].read_text()) if found else {}

    def state(self, job: int) -> str | None:
        return self.record(job).get("state")


def weights(sweep: Path) -> list[bytes]:
    """Of each job, in their order."""
    paths = sweep.glob("*/weights.safetensors")
    ordered = sorted(paths, key=lambda path: int(path.parent.name.split("_")[0]))
    return [path.read_bytes() for path in ordered]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """Record and weights of a run of LONG that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(config(*LONG, f"store.dir={folder / 'stages'}"), folder / "run")
    (record,) = results(folder)
    return record, (folder / "run/weights.safetensors").read_bytes()


def test_experiments_with_both_models_train_no_phase_twice_and_change_no_bit(
    cluster: Cluster, train: Command, tmp_path: Path
) -> None:
    jobs = (
        *SHORT, "threads=1", "experiment=original,control_from_scratch",
        "model=standard,deep_supervision",
    )  # fmt: skip
    sweep = Sweep(cluster, tmp_path / "there", jobs)
    status, out = sweep.start().finish()
    assert status == 0, out
    assert train("-m", *jobs, "hydra.sweep.dir=here", "store.dir=others").status == 0

    there, here = results(tmp_path / "there"), results(tmp_path / "here")
    assert len(there) == 2 * 2
    assert_same_bits(there, here)
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    # Jobs run from a copy of the code, and know where it comes from.
    assert [record["git"] for record in there] == [record["git"] for record in here]
    assert epochs_trained(there) == epochs_trained(here)
    used = [cluster.state(number)["NodeList"] for number in sweep.numbers]
    assert set(used) == set(NODES)


def test_a_job_that_is_put_back_goes_on_with_the_same_bits(
    cluster: Cluster, undisturbed: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    """By `scontrol requeue`, as by one with precedence, and by the end of its time."""
    # Slurm looks after limits twice a minute: the signal comes 20 to 50 s after a job's start.
    limit = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=10")
    sweep = Sweep(cluster, tmp_path / "s", (*LONG, *limit, "store.dir=a,b")).start()
    cluster.until(lambda: min(sweep.epochs(0), sweep.epochs(1)) > 2, 180)
    # One waits for the end of its time, at no cost: the signal goes with SIGCONT.
    os.kill(int(sweep.record(1)["environment"]["process"]), signal.SIGSTOP)
    first, second = sweep.numbers
    cluster.ask("scontrol", "requeue", first)
    cluster.until(lambda: sweep.state(0) == "preempted", 20)
    assert sweep.record(0)["reason"] == "stopped by SIGTERM; Slurm starts it again"
    assert sweep.statuses()[0] == "preempted"

    status, out = sweep.finish()
    assert status == 0, out
    assert all(int(cluster.state(number)["Restarts"]) >= 1 for number in (first, second))
    log = next(sweep.folder.glob("1_*/train.log")).read_text()
    assert "stopped by SIGUSR2; it goes on when its scheduler starts it again" in log
    for record in results(sweep.folder):
        assert_same_bits([record], [undisturbed[0]])
        assert sum(epochs(record, reused=True)) > 0
    assert weights(sweep.folder) == [undisturbed[1]] * 2


def test_what_is_edited_while_jobs_queue_has_no_effect_and_the_same_command_waits_for_them(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Two jobs, one of which will fail, in the queue while their command and all else changes."""
    code = tmp_path / "checkout"
    for name in ("proglayer", "hydra_plugins", "conf"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", code)
    rates_of_jobs = ("lr.base=0.001,1e15", "optimizer.clip_norm=null", "seed=7")
    held = "+hydra.launcher.additional_parameters.hold=true"
    sweep = Sweep(cluster, tmp_path / "s", (*SHORT, "threads=1", *rates_of_jobs, held), code)
    sweep.start()
    cluster.until(lambda: len(sweep.numbers) == 2, 60)
    numbers = sweep.numbers
    assert sweep.statuses() == ["pending", "pending"]
    sweep.process.kill()
    sweep.finish()

    settings = code / "conf/config.yaml"
    as_submitted = settings.read_text()
    settings.write_text(as_submitted.replace("weight_decay: 0.01", "weight_decay: 0.02"))
    status, out = sweep.start().finish()
    assert status == 1
    assert "is in the queue with other settings" in out
    settings.write_text(as_submitted)
    sweep.start()
    assert sweep.process.stdout is not None
    waits = next(line.strip() for line in sweep.process.stdout if "Slurm" in line)
    assert waits.startswith("in Slurm's queue: 2 jobs")
    rates = code / "conf/lr/reduced.yaml"
    rates.write_text(rates.read_text().replace("factor:", "factors:"))
    (code / "proglayer/training/trainer.py").write_text("raise RuntimeError('another branch')")
    for number in numbers:
        cluster.ask("scontrol", "release", number)
    status, out = sweep.finish()
    assert sweep.numbers == numbers
    assert sweep.record(0)["config"]["lr"]["factor"]["new"] == 0.1
    # One that fails is failed for Slurm and in the table.
    assert [cluster.state(number)["JobState"] for number in numbers] == ["COMPLETED", "FAILED"]
    assert status == 1
    assert "2 runs: 1 completed, 1 failed" in out
    printed = "".join(path.read_text() for path in sweep.folder.glob(".slurm/**/*_log.*"))
    assert "lower lr.base" in printed


def test_a_job_whose_node_died_is_lost_and_the_same_command_resumes_it(
    cluster: Cluster, undisturbed: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    # Slurm would start it again itself.
    jobs = (*LONG, "~hydra.launcher.additional_parameters.requeue",
            "+hydra.launcher.additional_parameters.no-requeue=true")  # fmt: skip
    sweep = Sweep(cluster, tmp_path / "s", jobs).start()
    cluster.until(lambda: sweep.epochs(0) > 5, 60)
    (number,) = sweep.numbers
    node = cluster.state(number)["NodeList"]
    cluster.daemons[node].kill()
    cluster.daemons.pop(node).wait()
    kill_all_of(number)
    # The table knows of nothing: the job's last sign of life grows old.
    (folder,) = sweep.folder.glob("0_*")
    aged(folder, 300)
    assert sweep.statuses() == ["lost"]

    status, out = sweep.finish()
    assert status == 1
    assert "ended without a record" in out
    assert "1 run: 1 lost" in out
    cluster.start_node(node)
    status, out = sweep.start().finish()
    assert status == 0, out
    assert_same_bits([sweep.record(0)], [undisturbed[0]])
    assert weights(sweep.folder) == [undisturbed[1]]
    assert epochs(sweep.record(0), reused=True)[0] >= 5


def test_a_run_over_both_nodes_goes_on_when_either_dies_with_the_bits_of_two_processes(
    cluster: Cluster, tmp_path: Path
) -> None:
    two = (*LONG, "devices=2")
    (tmp_path / "here").mkdir()
    here = start(tmp_path / "here", *two, "hydra.run.dir=run")
    said, _ = here.communicate(timeout=200)
    assert here.returncode == 0, said

    over = ("hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1")
    sweep = Sweep(cluster, tmp_path / "s", (*two, *over)).start()
    for restarts, node in enumerate(reversed(NODES)):  # the job's script is on the first
        cluster.until(lambda: sweep.state(0) == "running" and sweep.epochs(0) > 2, 90)
        (number,) = sweep.numbers
        cluster.daemons[node].kill()
        cluster.daemons.pop(node).wait()
        kill_all_of(number, node)
        cluster.until(
            lambda job=number, before=restarts: int(cluster.state(job)["Restarts"]) > before, 90
        )
        assert sweep.state(0) != "completed"
        cluster.start_node(node)

    status, out = sweep.finish()
    assert status == 0, out
    assert_same_bits([sweep.record(0)], results(tmp_path / "here"))
    assert weights(sweep.folder) == [(tmp_path / "here/run/weights.safetensors").read_bytes()]
    assert epochs(sweep.record(0), reused=True)[0] > 2


def kill_all_of(number: str, node: str | None = None) -> None:
    """End everything that belongs to a job of Slurm, and what watches over it, without a word.

    node: there alone.
    """
    wanted = [f"SLURM_JOB_ID={number}\0"] + [f"SLURMD_NODENAME={node}\0"] * (node is not None)
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_text(errors="replace")
            if all(each in environment for each in wanted):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                watches = Path(f"/proc/{parent}/cmdline").read_text().startswith("slurmstepd: [")
                found |= {int(process.name), *([int(parent)] if watches else [])}
    for pid in sorted(found):  # who watches first
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
