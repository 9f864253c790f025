"""Random faults against the real commands: command lines, values, folders, stores and kills.

Small by default. With a number in PROGLAYER_TEST_CAMPAIGN it is large, and the number is its seed:
2,000 command lines, every setting at every edge, 200 hostile folders, 200 damaged stores and 100
kills, in about two hours of one core. Whatever is drawn: no traceback, nothing that takes more than
10 s of the processor, no file touched that is not ours, and no figure changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proglayer.config import setting_names

from .helpers import (
    ROOT,
    Command,
    assert_same_bits,
    contents,
    environment,
    experiments,
    is_running,
    results,
)

SEED = os.environ.get("PROGLAYER_TEST_CAMPAIGN", "")
MOST_SECONDS = 10.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * 3600 if SEED else 300)]

WORDS = "\n".join(" ".join("abcdefgh"[(i * j) % 8] for j in range(9)) for i in range(400))
# A run of a moment, on a text of its own.
BASE = (
    "data=text",
    "data.files=[words.txt]",
    "data.seq_len=8",
    "data.cache_dir=cache",
    "data.min_count=1",
    "model.dim=8",
    "model.num_heads=2",
    "initial_layers=2",
    "phase.max_epochs=1",
    "phase.batch_size=64",
    "threads=1",
    "report=false",
)
EDGES = ("-inf", "-1", "0", "1e308", "inf", "nan", "null", '""', "[]", "{}")


def many(small: int, large: int) -> int:
    """How many of something are drawn."""
    return large if SEED else small


def draw(part: str) -> random.Random:
    """A stream of its own for each part."""
    return random.Random(f"{SEED or 0} {part}")


@contextlib.contextmanager
def judged(faults: list[str], what: str) -> Iterator[None]:
    """Note a traceback, or too long a time, of a block that is known as `what`."""
    started = time.process_time()
    try:
        yield
    except SystemExit:
        pass
    except Exception:
        faults.append(f"{what}\n{traceback.format_exc(limit=-4)}")
    if (seconds := time.process_time() - started) > MOST_SECONDS:
        faults.append(f"{what}\ntook {seconds:.0f} s")


def check_told(faults: list[str], what: str, status: int, out: str, err: str) -> None:
    """Note an end without a reason, and a traceback that was printed."""
    if "Traceback" in out + err or "Error:" in err.replace("rror: ", ""):
        faults.append(f"{what}\n{err[-1500:]}")
    elif status not in (0, 1, 2) or (status == 1 and "error: " not in err.lower()):
        faults.append(f"{what}\nstatus {status} and {err[-300:]!r}")


def listed(faults: list[str]) -> str:
    """All of them, for a failed assertion."""
    return f"{len(faults)} faults\n\n" + "\n\n".join(faults)


# --- command lines --------------------------------------------------------------------------------

LEAVES = [name for name in setting_names() if name not in ("plan", "data.files", "data.cache_dir")]
GROUPS = ("model", "phase", "growth", "freeze", "lr", "logger", "experiment", "local", "data")
HYDRA = (
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.chdir", "hydra.job.name",
    "hydra.verbose", "hydra/launcher", "hydra.launcher", "hydra.launcher.n_jobs", "hydra.sweeper",
    "hydra.sweeper.params", "hydra.sweeper.pairs", "hydra.sweeper.max_batch_size", "hydra.mode",
    "hydra.output_subdir", "hydra.job.num", "hydra/sweeper", "hydra/job_logging", "hydra.help",
)  # fmt: skip
OPTIONS = (
    "-m", "--cfg=job", "--info=config", "--resolve", "--help", "--hydra-help", "--version", "--run",
    "--shell-completion", "--config-dir=nowhere", "--config-name=nope", "--config-path=nowhere",
    "--package=lr", "--info=plugins", "--experimental-rerun=nowhere", "--nope", "-x", "--", "-",
)  # fmt: skip
ATOMS = (
    *EDGES, "1", "2", "0.5", "-0.0", "1e-3", "9" * 400, "true", "None", "NULL", "all", "last", "~",
    "${seed}", "${nope}", "${oc.env:NOPE}", "${oc.env:HOME}", "${now:%Y}", "${hydra:job.num}", "$",
    "'it''s'", "'a b'", '"a\\"b"', "a:b", "[b]x[/b]", "\x1b[31m", "\u00e9\u4e2d", "a=b", "{a:1}",
    "[{}]", "[[]]", "[1,2]", "[1,null]", "{existing: 0}", "1,2", "range(0,3)", "range(0,1e9)",
    "choice(1,2)", "glob(*)", "glob(nope*)", "interval(0,1)", "tag(a,interval(0,1))", "sort(2,1)",
    "shuffle(1,2)", "int(1.5)", "float(x)", "str([1])", "json_str(1)", "extend_list(1)", "../x",
    "/etc/passwd", "words.txt", "", " ", "\t", "\\", "[" * 200, "((", "%s", "{0}", "a" * 40_000,
)  # fmt: skip


def value(source: random.Random, depth: int = 0) -> str:
    """A value of Hydra's grammar, or nearly one."""
    kind = source.random()
    if depth > 3 or kind < 0.75:
        return source.choice(ATOMS)
    inner = [value(source, depth + 1) for _ in range(source.randrange(4))]
    if kind < 0.85:
        return f"[{','.join(inner)}]"
    if kind < 0.92:
        return "{" + ",".join(f"{source.choice(('new', 'a', '1'))}:{each}" for each in inner) + "}"
    return f"{source.choice(('choice', 'range', 'cast', 'interval', 'glob'))}({','.join(inner)})"


def override(source: random.Random) -> str:
    """One override, with a name that there is, or nearly."""
    key = source.choice((source.choice(LEAVES), source.choice(GROUPS), source.choice(HYDRA)))
    if source.random() < 0.1:
        near = (key[:-1], f"{key}.x", f"{key}[0]", f"{key}@a.b", key.upper(), f" {key}")
        key = source.choice(near)
    sign = source.choice(("", "", "", "", "+", "++", "~"))
    if key in GROUPS and source.random() < 0.5:
        return f"{sign}{key}={source.choice((*experiments(), 'standard', 'glob(*)', 'original,'))}"
    equals = source.choice(("=", "=", "=", "=", "=", "=", " = ", "==", ":", ""))
    return f"{sign}{key}{equals}{value(source)}" if equals else f"{sign}{key}"


def command_line(source: random.Random) -> list[str]:
    """Up to four overrides and perhaps an option, on top of a plan that can be made."""
    line = [override(source) for _ in range(source.randrange(1, 4))]
    if source.random() < 0.35:
        line.insert(source.randrange(len(line) + 1), source.choice((*OPTIONS, "-m", "-m", "-m")))
    return [text.replace("\0", "") for text in line]


def prepared(folder: Path) -> dict[str, bytes]:
    """A folder to give commands in; what must still be in it afterwards."""
    (folder / "words.txt").write_text(WORDS)
    (folder / "notes").mkdir()
    (folder / "notes/run.json").write_text("mine")
    (folder / "train.log").write_text("mine")
    return contents(folder)


@pytest.fixture(autouse=True)
def quiet_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler of the command before may still hold its stream, which a process's end closes."""
    monkeypatch.setattr("logging.raiseExceptions", False)


def test_any_command_line_is_planned_or_refused_in_lines(train: Command, tmp_path: Path) -> None:
    source, faults = draw("lines"), []
    before = prepared(tmp_path)
    for _ in range(many(40, 1_800)):
        line = command_line(source)
        what = " ".join(line)[:300]
        with judged(faults, what):
            done = train(*BASE, *line, "plan=true")
            check_told(faults, what, done.status, done.out, done.err)
    after = contents(tmp_path)
    assert not faults, listed(faults)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path.endswith("weights.safetensors")]


def test_any_command_line_ends_as_a_command(tmp_path: Path) -> None:
    source, faults = draw("commands"), []
    before = prepared(tmp_path)
    for _ in range(many(1, 200)):
        line = command_line(source)
        done = command(tmp_path, *BASE, *line, "plan=true")
        check_told(faults, " ".join(line)[:300], done.returncode, done.stdout, done.stderr)
    after = contents(tmp_path)
    assert not faults, listed(faults)
    assert {path: after.get(path) for path in before} == before


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """train.py in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], env=environment(folder), cwd=folder,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_every_setting_at_every_edge_is_planned_or_refused_in_lines(
    train: Command, tmp_path: Path
) -> None:
    source, faults = draw("edges"), []
    before = prepared(tmp_path)
    given = [f"{name}={edge}" for name in LEAVES for edge in EDGES]
    for each in source.sample(given, many(12, len(given))):
        with judged(faults, each):
            done = train(*BASE, each, "plan=true")
            check_told(faults, each, done.status, done.out, done.err)
            if done.status and each.split("=")[0].split(".")[0] not in done.err:
                faults.append(f"{each}\nis not named in {done.err!r}")
    after = contents(tmp_path)
    assert not faults, listed(faults)
    assert {path: after.get(path) for path in before} == before


# --- folders --------------------------------------------------------------------------------------

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**400, 1e308, -0.0, "", "x" * 5_000, "\x1b[2J", "[b]", "=1+1", [],
    {}, [[]], {"": None}, "2026-13-45T99:99", "../../etc", "<script>", "\ud800", {"a": {"b": []}},
)  # fmt: skip


def damaged_json(source: random.Random, plain: Any) -> Any:
    """Plain data with something else somewhere in it."""
    if isinstance(plain, dict) and plain and source.random() < 0.85:
        key = source.choice(list(plain))
        if source.random() < 0.1:
            return {name: item for name, item in plain.items() if name != key}
        return {**plain, key: damaged_json(source, plain[key])}
    if isinstance(plain, list) and plain and source.random() < 0.85:
        place = source.randrange(len(plain))
        return [*plain[:place], damaged_json(source, plain[place]), *plain[place + 1 :]]
    return source.choice(JUNK)


def spoil(source: random.Random, path: Path) -> str:
    """Do something to a file. Returns what."""
    content = path.read_bytes()
    how = source.choice(
        ("json", "json", "json", "flip", "flip", "cut", "empty", "noise", "gone", "folder", "link",
         "loop", "pipe", "device", "deep", "bomb", "large", "twice", "rename", "elsewhere")
    )  # fmt: skip
    if how == "json":
        with contextlib.suppress(ValueError):
            plain = damaged_json(source, json.loads(content))
            content = json.dumps(plain).encode(errors="surrogatepass")
    path.unlink()
    place = source.randrange(len(content) + 1)
    if how == "flip" and content:
        place %= len(content)
        flipped = bytes([content[place] ^ (1 << source.randrange(8))])
        content = content[:place] + flipped + content[place + 1 :]
    aliases = [b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghi"]
    written = {
        "cut": content[:place],
        "empty": b"",
        "noise": source.randbytes(200),
        "deep": b"[" * 100_000,
        "bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(aliases),
        "large": b" " * 20_000_000,
        "twice": content + content,
        "json": content,
        "flip": content,
    }
    if how in written:
        path.write_bytes(written[how])
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(path.parent / "nowhere")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "rename":
        names = ("\x1b[31m", "[b]", "a\nb", "\u202e", "x" * 200, "-rf", "run.json.bak")
        (path.parent / source.choice(names)).write_bytes(content)
    elif how == "elsewhere":
        other = source.choice([p for p in path.parent.parent.rglob("*") if p.is_dir()])
        with contextlib.suppress(OSError):
            (other / path.name).write_bytes(content)
    return f"{path.name}: {how}"


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def unlinked(source: Path, copy: Path) -> None:
    """A copy whose files are nobody else's, and may be written."""
    shutil.copytree(source, copy, symlinks=True)
    for path in files_of(copy):
        path.chmod(0o644)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep that was run, its store, and its text."""
    folder = tmp_path_factory.mktemp("study")
    prepared(folder)
    done = command(folder, "-m", *BASE, "seed=1,2", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    return folder


def mains() -> dict[str, Callable[[list[str]], int]]:
    """Our commands that read what they are given; arguments -> status."""
    from proglayer.report.__main__ import main as report
    from proglayer.results.__main__ import main as show
    from proglayer.store.__main__ import main as store

    return {"results": show, "report": report, "store": store}


def test_a_hostile_folder_is_read_in_time_and_left_as_it_is(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from proglayer.errors import run_command

    source, faults = draw("folders"), []
    for number in range(many(3, 200)):
        folder = tmp_path / f"{number}"
        unlinked(study, folder)
        found = [path for path in files_of(folder) if "cache" not in path.parts]
        wrong = {spoil(source, path) for path in source.sample(found, source.randrange(1, 6))}
        before = contents(folder)
        for arguments in (
            ["results", str(folder)],
            ["report", str(folder), "-o", str(tmp_path / f"report{number}")],
            ["store", "list", "--dir", str(folder / "stages")],
            ["store", "list", "--dir", str(folder)],
            ["store", "prune", "--max-size", "0", "--dir", str(folder / "sweep")],
        ):
            what = f"{' '.join(arguments)} with {sorted(wrong)}"
            with judged(faults, what):
                status = run_command(lambda a=arguments: mains()[a[0]](a[1:]))  # type: ignore[misc]
                out, err = capsys.readouterr()
                status = 0 if arguments[0] == "results" and status == 1 else status  # some failed
                check_told(faults, what, status, out, err)
                if "\x1b" in out + err or "\u202e" in out + err:
                    faults.append(f"{what}\nlets an escape reach the terminal")
            if contents(folder) != before:
                faults.append(f"{what}\nchanged a file")
                before = contents(folder)
        shutil.rmtree(folder)
    assert not faults, listed(faults)


# --- stores ---------------------------------------------------------------------------------------


# What a run says of a store in which something else lies in a place of its own.
REFUSED = (
    "is there and was not written by proglayer",
    "does not say that its folder is a store",
    "is a store of a later version",
    "is a link, and no link is followed in a store",
    "cannot write to",
)


def figures(folder: Path) -> list[dict[str, Any]]:
    """What runs came to: records without times, and the bytes of their models."""
    found = []
    for record in results(folder):
        phases = [(p["trajectory"], p["validation"], p["exits"]) for p in record["phases"]]
        found.append({"status": record["state"], "phases": phases})
    return [*found, *({"weights": p.read_bytes()} for p in sorted(folder.rglob("weights.saf*")))]


def test_a_damaged_store_changes_no_bit_and_nothing_foreign_goes(
    study: Path, tmp_path: Path, train: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    from proglayer.errors import run_command

    source, faults = draw("stores"), []
    expected = figures(study / "sweep")
    for number in range(many(3, 200)):
        shutil.rmtree(tmp_path, ignore_errors=True)
        unlinked(study, tmp_path)
        shutil.rmtree(tmp_path / "sweep")
        store = tmp_path / "stages"
        mine = {tmp_path / "words.txt", store / "thesis.tar.gz", store / "a.b.json"}
        key = source.choice([path for path in store.iterdir() if path.is_dir()])
        mine |= {key / "figure.v2.pdf", store / "corpora/enwik8.tar.gz"}
        (store / "corpora").mkdir()
        for path in mine - {tmp_path / "words.txt"}:
            path.write_text("mine")
        before = {path: path.read_bytes() for path in mine}
        ours = [path for path in files_of(store) if path not in mine]
        wrong = {spoil(source, path) for path in source.sample(ours, source.randrange(1, 8))}
        what = f"{number}: {sorted(wrong)}"
        with judged(faults, what):
            if source.random() < 0.5:
                arguments = ["verify", "--dir", str(store)]
                status = run_command(lambda a=arguments: mains()["store"](a))  # type: ignore[misc]
                out, err = capsys.readouterr()
                check_told(faults, what, 0 if status == 1 else status, out, err)  # some are damaged
            done = train("-m", *BASE, "seed=1,2", "hydra.sweep.dir=sweep")
            check_told(faults, what, done.status, done.out, done.err)
            if done.status == 0 and figures(tmp_path / "sweep") != expected:
                faults.append(f"{what}\ncame to other figures")
            elif done.status and not any(text in done.err + done.out for text in REFUSED):
                faults.append(f"{what}\nfailed: {done.out[-500:]} {done.err[-500:]}")
        after = {path: path.read_bytes() if path.is_file() else None for path in mine}
        if after != before:
            faults.append(f"{what}\ntouched what is not ours")
    assert not faults, listed(faults)


# --- kills ----------------------------------------------------------------------------------------


def test_kills_of_a_sweep_change_no_bit(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    source = draw("kills")
    jobs = ("-m", *BASE, "phase.max_epochs=6", "phase.patience=6", "seed=1,2")
    jobs += ("hydra.sweep.dir=sweep", "checkpoint_every_s=0.1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in whole, killed:
        folder.mkdir()
        before = prepared(folder)
    assert command(whole, *jobs).returncode == 0
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    left = many(1, 100)
    while left:
        for leftover in "sweep", "stages":  # begin anew once all is done
            if left % 10 == 0:
                shutil.rmtree(killed / leftover, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *jobs, *joblib], cwd=killed,
            env=environment(killed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until = time.monotonic() + 240  # of a machine that is busy
        while process.poll() is None and not list(killed.glob("sweep/*/metrics.csv")):
            if time.monotonic() > until:
                process.kill()
                raise AssertionError("no epoch after so long")
            time.sleep(0.02)
        time.sleep(source.uniform(0, 2))
        workers = list(filter(is_worker, children(process.pid)))
        victim = source.choice([process.pid, *workers])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        until = time.monotonic() + 60
        while any(map(is_running, workers)):
            assert time.monotonic() < until, "a worker outlives its parent"
            time.sleep(0.1)
        left -= 1
    assert command(killed, *jobs).returncode == 0
    assert_same_bits(results(killed / "sweep"), results(whole / "sweep"))
    assert figures(killed / "sweep") == figures(whole / "sweep")
    assert not list((killed / "sweep").rglob(".tmp-*"))
    after = contents(killed)
    assert {path: after.get(path) for path in before} == before


def children(parent: int) -> list[int]:
    """The processes that one has started, and those that they have."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True
    ).stdout.split()
    return [child for pid in map(int, listed) for child in (pid, *children(pid))]


def is_worker(process: int) -> bool:
    """Whether it is one of joblib's, and not what keeps account of them."""
    with contextlib.suppress(OSError):
        return b"popen_loky" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False
