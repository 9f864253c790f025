"""Settings and corpora for tests: composed as on the command line, small enough to train on."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from proglayer.config import Config, setting_names, to_config
from proglayer.data.corpus import Corpus
from proglayer.launch.ask import parse, register

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


def composed(*overrides: str) -> DictConfig:
    """What Hydra makes of `conf/` and these overrides."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@functools.cache
def _chosen(*groups: str) -> DictConfig:
    return composed(*groups)


@functools.cache
def config(*overrides: str) -> Config:
    """The checked settings for these overrides. Single settings are merged over a composition of
    the groups that is kept, as composing takes 0.1 s.
    """
    names = set(setting_names())
    single = [each for each in parse(overrides) if each.get_key_element() in names]
    groups = {*overrides} - {each.input_line for each in single}
    settings = copy.deepcopy(_chosen(*(text for text in overrides if text in groups)))
    for each in single:
        OmegaConf.update(settings, each.key_or_group, each.value(), merge=True)
    return to_config(settings)


def experiments() -> list[str]:
    """Every file of conf/experiment."""
    return sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def tiny_corpus(
    windows: int = 40, seq_len: int = 8, vocab_size: int = 30, seed: int = 0, name: str = "tiny"
) -> Corpus:
    """Windows of a made-up language in which each word mostly follows from the last."""
    draw = np.random.default_rng(seed)
    length = 2 * windows * (seq_len + 1)
    stream = np.empty(length, dtype=np.int32)
    stream[0] = 2
    for i in range(1, length):
        follows = (3 * stream[i - 1] + 1) % (vocab_size - 2) + 2
        stream[i] = follows if draw.random() < 0.7 else draw.integers(2, vocab_size)
    train, validation = stream.reshape(2, windows, seq_len + 1)
    digest = hashlib.sha256(stream.tobytes() + f"{train.shape}".encode()).hexdigest()
    return Corpus(
        name=name, train=train, validation=validation, vocab_size=vocab_size, fingerprint=digest,
        folder=Path(), validation_bytes=5 * windows * seq_len,
    )  # fmt: skip


# A model that trains in a moment on `tiny_corpus`.
TINY = (
    "model.dim=8", "model.num_heads=2", "model.ffn_multiple=2", "initial_layers=3",
    "phase.batch_size=16", "phase.max_epochs=3", "lr.base=0.01",
)  # fmt: skip
# A run on the embedded corpus that takes a moment.
SHORT = (
    "data.samples=64", "data.validation_samples=32", "data.max_vocab=200", "model.dim=8",
    "model.num_heads=2", "phase.max_epochs=2", "phase.batch_size=16", "report=false",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


def results(folder: Path) -> list[dict[str, Any]]:
    """The records below `folder`, jobs in their order."""
    paths = list(folder.rglob("run.json"))
    ordered = sorted(paths, key=lambda p: int(p.parent.name.split("_")[0])) if paths[1:] else paths
    return [json.loads(path.read_text()) for path in ordered]


def assert_same_bits(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """All of ours completed, with the figures of theirs."""
    assert [r["state"] for r in ours] == ["completed"] * len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for p, q in zip(mine["phases"], other["phases"], strict=True):
            for name in ("trajectory", "validation", "exits"):
                assert p[name] == q[name]
        assert losses(mine) == losses(other)


def losses(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What each epoch of a run gave."""
    return [(row["train_loss"], row["validation"]) for row in record["epochs"]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every regular file below a folder, by its path there."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if stat.S_ISREG(path.lstat().st_mode)
    }


def environment(folder: Path) -> dict[str, str]:
    """That of a command whose store is `folder/stages`; workers import the package by name."""
    own = {"PROGLAYER_STORE": str(folder / "stages"), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own}


def start(
    folder: Path, *arguments: str, code: Path = ROOT, **variables: str
) -> subprocess.Popen[str]:
    """`python train.py ...` in a process of its own that works in `folder`, the output in one."""
    return subprocess.Popen(
        [sys.executable, str(code / "train.py"), *arguments],
        cwd=folder, env=environment(folder) | variables, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def until(there: Callable[[], T], process: subprocess.Popen[str] | None = None) -> T:
    """What `there` gives once it gives something, while the command goes on."""
    deadline = time.monotonic() + 200
    while not (found := there()):
        if process is not None:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def worker_of(job: Path) -> int | None:
    """The process that is at work on a job and has recorded an epoch."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((job / "run.json").read_text())
        if record["state"] == "running" and record["epochs"]:
            return record["environment"]["process"]
    return None


def at_work(sweep: Path) -> dict[Path, int]:
    """The process of each job of a sweep that is between its first epoch and its end."""
    found = ((job, worker_of(job)) for job in sweep.glob("[0-9]*"))
    return {job: process for job, process in found if process is not None}


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie that nobody has asked for yet."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def epochs(record: dict[str, Any], reused: bool | None = None) -> list[int]:
    """How many epochs each phase of a run has; those alone that were, or were not, reused."""
    return [
        sum(
            row["phase"] == number and row["epoch"] > 0 and reused in (None, row["reused"])
            for row in record["epochs"]
        )
        for number in range(1, len(record["phases"]) + 1)
    ]


def epochs_trained(records: list[dict[str, Any]]) -> dict[str, int]:
    """How many epochs of each trajectory these runs trained, all together."""
    trained: Counter[str] = Counter()
    for record in records:
        for phase, count in zip(record["phases"], epochs(record, reused=False), strict=True):
            trained[phase["trajectory"]] += count
    return dict(trained)
