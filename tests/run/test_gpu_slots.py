"""One job, one GPU: places on pretended GPUs, held by real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch

from proglayer.config import ConfigError
from proglayer.run import gpu_slots as slots
from proglayer.run.record import RunState, read_record
from proglayer.run.run import run
from proglayer.store.trajectory import Hooks, Interrupted

from ..helpers import ROOT, SHORT, config

GPU = torch.device("cuda")

# Eight jobs in a process each, on a machine with four GPUs, which hold their places until released.
EIGHT_JOBS = """
import contextlib, os, sys, time
from pathlib import Path
from proglayer.run import gpu_slots as slots
from proglayer.run.run import run
from tests.helpers import config
from tests.helpers import SHORT

folder = Path(sys.argv[1])
events = os.open(folder / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@contextlib.contextmanager
def use(index):
    os.write(events, f"on {index} {job} {os.getpid()}\\n".encode())
    while not (folder / "go").exists():
        time.sleep(0.01)
    yield
    os.write(events, f"off {index} {job} {os.getpid()}\\n".encode())

slots.gpus = lambda device: ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
slots.use = use
for job in range(8):
    settings = config(*SHORT, f"seed={job}", f"store.dir={folder}/stages", "phase.max_epochs=1")
    if os.fork() == 0:
        run(settings, folder / str(job))
        os._exit(0)
for job in range(8):
    os.wait()
"""


def test_eight_jobs_on_four_gpus_never_share_one_and_a_killed_one_frees_its(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", EIGHT_JOBS, str(tmp_path)], cwd=ROOT, stdout=out,
            env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def lines(name: str, word: str, count: int) -> list[str]:
        """The lines of a file with a word in them, once there are so many."""
        deadline = time.monotonic() + 100
        while True:
            text = (tmp_path / name).read_text() if (tmp_path / name).exists() else ""
            if len(found := [line for line in text.splitlines() if word in line]) >= count:
                return found
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def events(count: int) -> list[tuple[str, int, int, int]]:
        """What the jobs have written: on or off, which GPU, which job, which process."""
        parts = map(str.split, lines("events", " ", count))
        return [(word, int(gpu), int(job), int(pid)) for word, gpu, job, pid in parts]

    place = "waiting for a GPU: 4 here, each with as many jobs as jobs_per_gpu=1"
    assert len(lines("out", place, 4)) == 4
    assert sorted(gpu for _, gpu, _, _ in events(4)) == [0, 1, 2, 3]
    _, freed, killed, worker = events(4)[2]
    os.kill(worker, signal.SIGKILL)
    assert events(5)[4][:2] == ("on", freed)
    (tmp_path / "go").touch()
    assert process.wait(timeout=100) == 0

    holder: dict[int, int] = {}
    for word, gpu, job, _ in events(15):
        if word == "on":
            assert holder.get(gpu, killed) == killed, f"{job} while {holder[gpu]} holds {gpu}"
            holder[gpu] = job
        else:
            assert holder.pop(gpu) == job
    assert not holder
    records = {job: read_record(tmp_path / str(job)) for job in range(8)}
    assert [job for job, record in records.items() if record is None] == [killed]
    waited = [r.gpu.seconds_waited for r in records.values() if r and r.gpu]
    assert sum(bool(seconds) for seconds in waited) == 4
    assert len(lines("out", place, 4)) == 4


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "gpus", lambda _: ["GPU-a", "GPU-b"])
    monkeypatch.setattr(slots, "use", lambda _: nullcontext())
    monkeypatch.setattr(slots, "folder", lambda: tmp_path / "slots")


def held(jobs_per_gpu: int, stop: str | None = "SIGTERM"):
    hooks = Hooks(lambda: stop, lambda _: None, lambda _: None)
    return slots.hold(GPU, jobs_per_gpu, hooks)


@pytest.mark.usefixtures("two_gpus")
def test_jobs_share_a_gpu_once_none_is_empty_and_as_many_as_they_are_told() -> None:
    with ExitStack() as jobs:
        taken = [jobs.enter_context(held(2)) for _ in range(4)]
        assert [gpu.index for gpu in taken if gpu] == [0, 1, 0, 1]
        with pytest.raises(Interrupted, match="stopped by SIGTERM"), held(2):
            pass
    with pytest.raises(RuntimeError, match="fails"), held(1):
        raise RuntimeError("the job fails")
    with held(1) as again:
        assert again == slots.Gpu(index=0, name="GPU-a", seconds_waited=0.0)


@pytest.mark.usefixtures("two_gpus")
def test_a_run_that_is_stopped_while_it_waits_for_a_gpu_tells_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: torch.device) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return ["GPU-a", "GPU-b"]

    with held(1), held(1):
        monkeypatch.setattr(slots, "gpus", stopped)
        settings = config(*SHORT, f"store.dir={tmp_path}/stages")
        assert run(settings, tmp_path / "run").state is RunState.interrupted
    record = read_record(tmp_path / "run")
    assert record
    assert (record.reason, record.phases) == ("stopped by SIGTERM", [])


def test_the_same_bits_on_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(store: str, *overrides: str) -> list:
        settings = config(*SHORT, f"store.dir={tmp_path}/{store}", *overrides)
        record = run(settings, tmp_path / "run")
        return [(phase.stage, phase.best) for phase in record.phases]

    plain = trained("a")
    monkeypatch.setattr(slots, "gpus", lambda _: ["GPU-a", "GPU-b"])
    monkeypatch.setattr(slots, "use", lambda _: nullcontext())
    monkeypatch.setattr(slots, "folder", lambda: tmp_path / "slots")
    assert trained("b", "jobs_per_gpu=3") == plain


@pytest.mark.usefixtures("two_gpus")
def test_a_place_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "slots").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"^cannot lock a GPU in .* set TMPDIR"), held(1):
        pass


def test_what_a_scheduler_gives_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        def __init__(self, index: int) -> None:
            self.uuid = f"uuid-{index}"

    seen = 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    for name in ("RAY_JOB_ID", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        monkeypatch.delenv(name, raising=False)
    all_four = ["uuid-0", "uuid-1", "uuid-2", "uuid-3"]
    assert slots.gpus(torch.device("cpu")) == []
    assert slots.gpus(GPU) == all_four
    # Several are for several processes of the job to share out.
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1,2,3")
    assert slots.gpus(GPU) == all_four
    seen = 1
    assert slots.gpus(GPU) == []
    monkeypatch.delenv("SLURM_JOB_GPUS")
    assert slots.gpus(GPU) == ["uuid-0"]
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    assert slots.gpus(GPU) == []
