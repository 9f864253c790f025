"""Random command lines: each is planned, shown or refused in lines, whatever is drawn.

Small by default. With a number in PROGLAYER_TEST_CAMPAIGN there are 1,800, and the number is the
seed.
"""

from __future__ import annotations

import os
import random
import time
import traceback
from pathlib import Path

import pytest

from proglayer.config import setting_names

from .helpers import Command, contents, experiments

SEED = os.environ.get("PROGLAYER_TEST_CAMPAIGN", "")
MOST_SECONDS = 10.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * 3600 if SEED else 300)]

WORDS = "\n".join(" ".join("abcdefgh"[(i * j) % 8] for j in range(9)) for i in range(400))
# A run of a moment, on a text of its own.
BASE = (
    "data=text", "data.files=[words.txt]", "data.seq_len=8", "data.cache_dir=cache", "model.dim=8",
    "model.num_heads=2", "initial_layers=2", "phase.max_epochs=1", "threads=1", "report=false",
)  # fmt: skip
LEAVES = [name for name in setting_names() if name not in ("plan", "data.files", "data.cache_dir")]
GROUPS = ("model", "phase", "growth", "freeze", "lr", "logger", "experiment", "local", "data")
HYDRA = (
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.chdir", "hydra.job.name",
    "hydra.verbose", "hydra/launcher", "hydra.launcher", "hydra.launcher.n_jobs", "hydra.sweeper",
    "hydra.sweeper.params", "hydra.sweeper.pairs", "hydra.sweeper.blocks", "hydra.mode",
    "hydra.output_subdir", "hydra.job.num", "hydra/sweeper", "hydra/job_logging", "hydra.help",
)  # fmt: skip
OPTIONS = (
    "-m", "--cfg=job", "--info=config", "--resolve", "--help", "--hydra-help", "--version", "--run",
    "--shell-completion", "--config-dir=nowhere", "--config-name=nope", "--config-path=nowhere",
    "--package=lr", "--info=plugins", "--experimental-rerun=nowhere", "--nope", "-x", "--", "-",
)  # fmt: skip
ATOMS = (
    "-inf", "-1", "0", "1e308", "inf", "nan", "null", '""', "[]", "{}", "1", "2",
    "0.5", "-0.0", "1e-3", "9" * 400, "true", "None", "NULL", "all", "last", "~",
    "${seed}", "${nope}", "${oc.env:NOPE}", "${oc.env:HOME}", "${now:%Y}", "${hydra:job.num}", "$",
    "'it''s'", "'a b'", '"a\\"b"', "a:b", "[b]x[/b]", "\x1b[31m", "\u00e9\u4e2d", "a=b", "{a:1}",
    "[{}]", "[[]]", "[1,2]", "[1,null]", "{existing: 0}", "1,2", "range(0,3)", "range(0,1e9)",
    "choice(1,2)", "glob(*)", "glob(nope*)", "interval(0,1)", "tag(a,interval(0,1))", "sort(2,1)",
    "shuffle(1,2)", "int(1.5)", "float(x)", "str([1])", "json_str(1)", "extend_list(1)", "../x",
    "/etc/passwd", "words.txt", "", " ", "\t", "\\", "[" * 200, "((", "%s", "{0}", "a" * 40_000,
)  # fmt: skip


def command_line(source: random.Random) -> list[str]:
    """Up to three overrides and perhaps an option, on top of a plan that can be made."""
    line = []
    for _ in range(source.randrange(1, 4)):
        key = source.choice((source.choice(LEAVES), source.choice(GROUPS), source.choice(HYDRA)))
        key = source.choice((*[key] * 9, key[:-1], f"{key}.x", f"{key}@a.b", key.upper()))
        value = source.choice((*ATOMS, *experiments()) if key in GROUPS else ATOMS)
        sign, equals = source.choice(("", "", "", "+", "++", "~")), source.choice("====: ")
        line.append(f"{sign}{key}{equals}{value}")
    if source.random() < 0.35:
        line.insert(source.randrange(len(line) + 1), source.choice((*OPTIONS, "-m", "-m", "-m")))
    return line


def test_any_command_line_is_planned_or_refused_in_lines(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A handler of the command before may still hold its stream, which a process's end closes.
    monkeypatch.setattr("logging.raiseExceptions", False)
    source, faults = random.Random(f"{SEED or 0} lines"), []
    (tmp_path / "words.txt").write_text(WORDS)
    before = contents(tmp_path)
    for _ in range(1_800 if SEED else 30):
        line = command_line(source)
        started = time.process_time()
        try:
            done = train(*BASE, *line, "plan=true")
            refused = done.status in (1, 2) and "error: " in done.err.lower()
            if "Traceback" in done.out + done.err or not (refused or done.status == 0):
                faults.append(f"{line}\nstatus {done.status} and {done.err[-1500:]}")
        except Exception:
            faults.append(f"{line}\n{traceback.format_exc(limit=-4)}")
        if (seconds := time.process_time() - started) > MOST_SECONDS:
            faults.append(f"{line}\ntook {seconds:.0f} s")
    after = contents(tmp_path)
    assert not faults, "\n\n".join([f"{len(faults)} faults", *(each[:2000] for each in faults)])
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path.endswith("weights.safetensors")]
