"""How near a training step comes to what the machine can do, and what a study will take.

    python -m proglayer.bench                                # the default shape, ten minutes
    python -m proglayer.bench model.dim=128 initial_layers=6 model.vocab_size=8192 --json new.json
    python -m proglayer.bench --short                        # a minute; fails outside wide bounds
    python -m proglayer.bench --study experiment=original model=standard,deep_supervision
    python -m proglayer.bench --sweep 1000 --folder /shared  # what jobs cost beside their training

Settings are those of train.py. The corpus is made up, so none has to be there; only `--study`
opens the one that it names. Times are medians of repeats, taken in turns within one process: a
machine's own rate drifts, so only figures of one run can be divided by each other.

The floor of a step is every matrix product that its phase needs and nothing else, in the fastest
of several blockings. The dense twin is the same training with all logits materialised.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from hydra import compose, initialize_config_dir
from rich.table import Table

from proglayer.bench.estimate import Shape, estimate
from proglayer.bench.measure import (
    FULL,
    PARTS,
    SHORT,
    Case,
    measure,
    run_for_memory,
)
from proglayer.bench.overhead import EXPERIMENTS, Left, Spent, measure_sweep
from proglayer.config import Config, ConfigError, register, to_config
from proglayer.console import console
from proglayer.launch.job import explain_errors
from proglayer.launch.sweep import Job, check, expand
from proglayer.run import machine
from proglayer.run.code import git_state
from proglayer.store.record import to_dict
from proglayer.training.plan import Phase, plan

CONF = Path(__file__).resolve().parents[2] / "conf"

# What is measured where the command line says nothing else: WikiText-2's vocabulary.
SHAPE = {"experiment": "original", "model.vocab_size": "69830"}
# The short form: small enough for a minute on two cores, and still all about the head.
SHORT_SHAPE = {**SHAPE, "model.vocab_size": "16384"}
MODELS = ("standard", "deep_supervision")

# Bounds of the short form. Wide, as a machine of many users halves and doubles its pace: they
# catch a path that fell back to something else, not a slow percent.
MOST_STEP_TO_FLOOR = 3.0
LEAST_DENSE_TO_STEP = 1.1
MOST_TO_BEST = 2.0
MOST_EVALUATION_TO_PRODUCT = 3.0
MOST_MEMORY_TO_DENSE = 0.9


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra looking into the checkout's conf/, as train.py does."""
    if not (CONF / "config.yaml").exists():
        raise ConfigError(f"there is no {CONF}: the bench reads settings, so run it in a checkout")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def configs(overrides: Sequence[str], shape: Mapping[str, str]) -> dict[str, Config]:
    """The settings of each model to measure: `shape`, then the overrides; one if they name one."""
    given = {override.split("=")[0].lstrip("+~"): override for override in overrides}
    names = [given["model"].split("=", 1)[1]] if "model" in given else MODELS
    found = {}
    with _hydra():
        for name in names:
            base = {"model": name, **shape}
            own = [f"{key}={value}" for key, value in base.items() if key not in given]
            found[name] = to_config(compose("config", overrides=[*own, *overrides]))
    return found


def study_jobs(arguments: Sequence[str]) -> list[Job]:
    """The jobs that the arguments of a sweep span, checked, with their corpora opened."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    with _hydra():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        settings = hydra.compose_config("config", list(arguments), run_mode=RunMode.MULTIRUN)
        sweeper: Any = Plugins.instance().instantiate_sweeper(
            config=settings,
            hydra_context=HydraContext(hydra.config_loader, Callbacks(settings)),
            task_function=lambda _: None,
        )
        return check(sweeper, expand(sweeper, list(settings.hydra.overrides.task)))


# ---------------------------------------------------------------------------------------------
# What is printed


def step_table(cases: Sequence[Case]) -> Table:
    table = _table(
        "a training step",
        "model",
        "phase",
        "square GFLOP/s",
        "floor: head",
        "to square",
        "floor: body",
        "step",
        "step / floor",
        "dense",
        "dense / step",
        "best blocking",
    )
    for case in cases:
        table.add_row(
            case.model,
            case.phase,
            f"{case.square_rate / 1e9:,.0f}",
            _ms(median(case.head)),
            f"{case.head_to_square:.2f}",
            _ms(median(case.body)),
            _ms(median(case.step)),
            f"{case.step_to_floor:.2f}",
            _ms(median(case.dense)),
            f"{case.dense_to_step:.2f}",
            case.blocking,
        )
    return table


def parts_table(cases: Sequence[Case]) -> Table:
    table = _table("a step by part, each waited for", "model", "phase", *PARTS, "sum")
    for case in cases:
        parts = [median(case.parts[part]) for part in PARTS]
        table.add_row(case.model, case.phase, *map(_ms, parts), _ms(sum(parts)))
    return table


def chunks_table(cases: Sequence[Case]) -> Table:
    table = _table(
        "the loss alone, in the chunks of its rule and in others",
        "model",
        "phase",
        "rule: words x rows",
        "ms",
        "rule / best",
        "others, ms",
    )
    for case in cases:
        (rule, taken), *others = case.chunks.items()
        table.add_row(
            case.model,
            case.phase,
            rule,
            f"{1e3 * median(taken):,.1f}",
            f"{case.chunks_to_best:.2f}",
            ", ".join(f"{name}: {1e3 * median(taken):,.1f}" for name, taken in others),
        )
    return table


def evaluation_table(cases: Sequence[Case]) -> Table:
    table = _table(
        "evaluation at the last exit, and peak memory of a process",
        "model",
        "phase",
        "windows",
        "evaluation",
        "its one product",
        "ratio",
        "MB ours",
        "MB dense",
        "ours / dense",
    )
    for case in cases:
        memory = [f"{case.memory_mb[kind]:,.0f}" for kind in case.memory_mb] or ["-", "-"]
        ratio = case.memory_to_dense
        table.add_row(
            case.model,
            case.phase,
            f"{case.windows:,}",
            _ms(median(case.evaluation)),
            _ms(median(case.product)),
            f"{case.evaluation_to_product:.2f}",
            *memory,
            "-" if ratio is None else f"{ratio:.2f}",
        )
    return table


def study_table(shapes: Sequence[Shape]) -> Table:
    table = _table(
        "distinct phases by what they cost",
        "shape",
        "phases",
        "steps",
        "a step",
        "an epoch, s",
        "epochs",
        "all, min",
    )
    for shape in shapes:
        table.add_row(
            shape.text,
            str(shape.phases),
            str(shape.steps),
            _ms(shape.step),
            f"{shape.epoch:.1f}",
            str(shape.epochs),
            f"{shape.seconds / 60:.1f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        folds = name in ("shape", "best blocking", "others, ms")
        words = folds or name in ("model", "phase", "command")
        table.add_column(name, justify="left" if words else "right", no_wrap=not folds)
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def outside_bounds(cases: Sequence[Case]) -> list[str]:
    """A line for each ratio that is outside the wide bounds of the short form."""
    found = []
    for case in cases:
        for what, value, low, high in (
            ("a step takes {:.2f} floors", case.step_to_floor, 0.0, MOST_STEP_TO_FLOOR),
            ("dense takes {:.2f} steps", case.dense_to_step, LEAST_DENSE_TO_STEP, float("inf")),
            ("its rule's chunks take {:.2f} of the best", case.chunks_to_best, 1.0, MOST_TO_BEST),
            (
                "an evaluation takes {:.2f} products",
                case.evaluation_to_product,
                0.0,
                MOST_EVALUATION_TO_PRODUCT,
            ),
            (
                "memory is {:.2f} of dense",
                case.memory_to_dense or 0.0,
                0.0,
                MOST_MEMORY_TO_DENSE,
            ),
        ):
            if not low <= value <= high:
                found.append(
                    f"{case.model}, {case.phase}: {what.format(value)}, "
                    f"expected {low:g} to {high:g}"
                )
    return found


def spent_table(spent: Sequence[Spent]) -> Table:
    """Times, and what each further job added since the smaller sweep: the same in every row of a
    command unless it grows faster than the jobs do.
    """
    table = _table(
        "a sweep of made-up jobs",
        "command",
        "jobs",
        "s",
        "of it CPU",
        "ms a further job",
        "of it CPU",
        "peak MB",
    )
    for command in dict.fromkeys(row.command for row in spent):
        before: Spent | None = None
        for row in (row for row in spent if row.command == command):
            more = ["", ""]
            if before is not None:
                jobs = row.jobs - before.jobs
                more = [
                    f"{1e3 * (row.seconds - before.seconds) / jobs:,.0f}",
                    f"{1e3 * (row.cpu_seconds - before.cpu_seconds) / jobs:,.0f}",
                ]
            times = (f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}")
            table.add_row(command, str(row.jobs), *times, *more, f"{row.peak_mb:,.0f}")
            before = row
    return table


# ---------------------------------------------------------------------------------------------
# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--short", action="store_true", help="few repeats; wide bounds are checked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure in FILE")
    parser.add_argument("--repeats", type=int, help="of a step in each case")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument("--study", action="store_true", help="estimate the time of a sweep")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of each phase of a study (%(default)s)"
    )
    parser.add_argument(
        "--sweep", type=int, metavar="JOBS", help="what so many jobs cost beside their training"
    )
    parser.add_argument("--folder", type=Path, help="where --sweep writes, to measure that disk")
    # How the bench calls itself for a peak of memory.
    parser.add_argument("--memory-of", choices=("ours", "dense"), help=argparse.SUPPRESS)
    parser.add_argument("--phase", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings, as of train.py")
    options = parser.parse_intermixed_args(arguments)
    for name in ("repeats", "epochs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.sweep is not None and options.sweep < 10 * EXPERIMENTS:
        parser.error(f"--sweep must be at least {10 * EXPERIMENTS}")
    with explain_errors():
        if options.sweep is not None:
            return _sweep(options)
        if options.study:
            return _study(options)
        return _bench(options)


def _bench(options: argparse.Namespace) -> int:
    effort = SHORT if options.short else FULL
    effort = replace(effort, repeats=options.repeats or effort.repeats)
    found = configs(options.overrides, SHORT_SHAPE if options.short else SHAPE)
    first = next(iter(found.values()))
    device = machine.pick_device(first.device, first.precision)
    with machine.switches(first.threads, first.precision):
        if options.memory_of:
            phase = _phases(first)[options.phase]
            peak = run_for_memory(
                options.memory_of, phase, first.data.seq_len, effort.memory_steps, device
            )
            print(peak)
            return 0
        here = machine.describe_machine(device)
        say = console().print
        say(
            f"{here.device_name}, threads {here.threads}, torch {here.torch}, "
            f"{first.precision.name}; batch {first.phase.batch_size} x {first.data.seq_len}, "
            f"dim {first.model.dim}, vocabulary {first.model.vocab_size:,}",
            markup=False,
        )
        cases = []
        for model, config in found.items():
            for phase in _phases(config):
                print(f"measuring {model}, {phase.name} ...", file=sys.stderr, flush=True)
                case = measure(model, phase, config.data.seq_len, effort, device)
                last = model == list(found)[-1] and phase.index == len(_phases(config)) - 1
                if not options.no_memory and (last or not options.short):
                    flags = ["--short"] if options.short else []
                    own = [o for o in options.overrides if not o.startswith("model=")]
                    memory = _peak_memory_mb(model, phase, own, flags)
                    case = replace(case, memory_mb=memory)
                cases.append(case)
    for table in (step_table, parts_table, chunks_table, evaluation_table):
        say(table(cases))
    if options.json:
        _keep(options, {"machine": asdict(here), "cases": [_plain(case) for case in cases]})
    problems = outside_bounds(cases) if options.short else []
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


def _peak_memory_mb(
    model: str, phase: Phase, overrides: Sequence[str], options: Sequence[str]
) -> dict[str, float]:
    """Peak memory of a few steps, ours and dense, each in a process of its own."""
    found = {}
    for kind in ("ours", "dense"):
        command = [sys.executable, "-m", "proglayer.bench", "--memory-of", kind]
        command += ["--phase", str(phase.index), *options, *overrides, f"model={model}"]
        # The package is found where this one was, installed or not.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CONF.parent)
        if done.returncode:
            raise ConfigError(f"measuring the memory of {kind} failed: {done.stderr.strip()}")
        found[kind] = float(done.stdout)
    return found


def _phases(config: Config) -> tuple[Phase, ...]:
    """The phases to measure."""
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size=null: without a corpus the bench needs a number")
    return plan(config, vocab_size=config.model.vocab_size)


def _study(options: argparse.Namespace) -> int:
    jobs = study_jobs(options.overrides)
    first = jobs[0].config
    device = machine.pick_device(first.device, first.precision)
    with machine.switches(first.threads, first.precision):
        here = machine.describe_machine(device)
        shapes = estimate(jobs, options.epochs, device)
    say = console().print
    say(study_table(shapes))
    seconds = sum(shape.seconds for shape in shapes)
    say(
        f"{len(jobs)} jobs, {sum(shape.phases for shape in shapes)} distinct phases: about "
        f"{seconds / 60:.0f} min with one job at a time, if every phase takes {options.epochs} "
        f"epochs and none is stored yet ({here.device_name}, threads {here.threads})",
        markup=False,
    )
    if options.json:
        _keep(options, {"machine": asdict(here), "study": [_plain(shape) for shape in shapes]})
    return 0


def _sweep(options: argparse.Namespace) -> int:
    spent: list[Spent] = []
    left: list[Left] = []
    try:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="proglayer-bench-") as folder:
            for jobs in (options.sweep // 10, options.sweep // 3, options.sweep):
                print(f"a sweep of {jobs} jobs ...", file=sys.stderr, flush=True)
                own = Path(folder) / str(jobs)
                own.mkdir()
                more, on_disk = measure_sweep(jobs, own, options.overrides)
                spent += more
                left.append(on_disk)
    except OSError as error:
        raise ConfigError(f"--folder={options.folder} cannot be written ({error})") from error
    say = console().print
    say(spent_table(spent))
    for disk in left:
        say(
            f"{disk.jobs} jobs: {disk.files / disk.jobs:.1f} files and "
            f"{disk.bytes / disk.jobs / 1e3:.0f} kB a job, and in the store "
            f"{disk.stored_files / disk.jobs:.1f} files and "
            f"{disk.stored_bytes / disk.jobs / 1e3:.0f} kB a job, {disk.locks} locks"
        )
    if options.json:
        figures = {"spent": list(map(asdict, spent)), "left": list(map(asdict, left))}
        _keep(options, {"sweep": figures})
    return 0


def _plain(figures: Case | Shape) -> dict[str, Any]:
    """Fields and what follows from them, as JSON can hold them."""
    derived = [name for name, kind in vars(type(figures)).items() if isinstance(kind, property)]
    return {**asdict(figures), **{name: getattr(figures, name) for name in derived}}


def _keep(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    about = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "overrides": options.overrides,
        "environment": to_dict(machine.environment()),
        "git": to_dict(git_state()),
    }
    try:
        options.json.write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json={options.json} cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
