"""How near a training step comes to what the machine can do.

    python -m proglayer.bench                                # the default shape, some minutes
    python -m proglayer.bench model.dim=128 initial_layers=6 model.vocab_size=8192 --json new.json
    python -m proglayer.bench precision=float32,bfloat16     # in turn, in one process
    python -m proglayer.bench --short                        # a minute; fails outside wide bounds

Settings are those of train.py. The corpus is synthetic, so none has to be there. Times are medians
of repeats, taken in turns within one process: a machine's own rate drifts, so only figures of one
run can be divided by each other.

The matmul bound of a step is every matrix product that its phase needs and nothing else, in the
fastest of several blockings. The dense twin is the same training with all logits materialised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.table import Table

from proglayer import files
from proglayer.bench.harness import PARTS, RATIOS, Measurement, measure, peak_memory_mb
from proglayer.config import Config, ConfigError, to_config
from proglayer.console import console
from proglayer.errors import run_command
from proglayer.launch.ask import register
from proglayer.launch.job import explain
from proglayer.run import machine
from proglayer.run.code import git_state
from proglayer.training.plan import Phase, plan

CONF = Path(__file__).resolve().parents[2] / "conf"

# What is measured where the command line says nothing else: WikiText-2's vocabulary; the short
# form is small enough for a minute on two cores, and still all about the head.
VOCABULARY, VOCABULARY_SHORT = 69830, 16384
MODELS = "standard,deep_supervision"
REPEATS, REPEATS_SHORT = 7, 3
WINDOWS, WINDOWS_SHORT = 512, 256

# Bounds of the short form. Wide, as a machine of many users halves and doubles its pace: they
# catch a path that fell back to something else, not a slow percent.
BOUNDS: tuple[tuple[str, str, float, float], ...] = (
    ("a step takes {:.2f} matmul bounds", "step_to_bound", 0.0, 3.0),
    ("dense takes {:.2f} steps", "dense_to_step", 1.1, float("inf")),
    ("an evaluation takes {:.2f} products", "evaluation_to_logits", 0.0, 3.0),
    ("memory is {:.2f} of dense", "memory_to_dense", 0.0, 0.9),
)

# What is printed, by the names of `Measurement`; times in ms.
TABLES: dict[str, tuple[str, ...]] = {
    "a training step, its matmul bound (head and body), its dense twin": (
        "gflops", "head", "body", "step", "step_to_bound", "dense", "dense_to_step", "blocking",
    ),
    "a training step by part": PARTS,
    "an evaluation at the last exit, the product with the head in it; peak memory of a process": (
        "windows", "evaluation", "logits", "evaluation_to_logits",
        "memory_mb", "dense_memory_mb", "memory_to_dense",
    ),
}  # fmt: skip


def table(title: str, measured: Sequence[Measurement]) -> Table:
    """A row for each measurement, with the columns of that table."""
    made = Table(title=title, title_justify="left")
    for name in ("model", "phase", "precision", *TABLES[title]):
        words = name in ("model", "phase", "precision", "blocking")
        made.add_column(name.replace("_", " "), justify="left" if words else "right")
    for row in measured:
        cells = (_cell(name, row.value(name)) for name in TABLES[title])
        made.add_row(row.model, row.phase, row.precision, *cells)
    return made


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if name.endswith("_mb") or name == "gflops":
        return f"{value:,.0f}"
    return f"{value:.2f}" if "_to_" in name else f"{1e3 * value:,.1f} ms"


def outside_bounds(measured: Sequence[Measurement]) -> list[str]:
    """A line for each ratio that is outside the wide bounds of the short form."""
    return [
        f"{row.model}, {row.phase}, {row.precision}: {what.format(value)}, "
        f"expected {low:g} to {high:g}"
        for row in measured
        for what, name, low, high in BOUNDS
        if (value := row.value(name)) is not None and not low <= value <= high
    ]


def configs(overrides: Sequence[str], vocab_size: int) -> dict[str, list[Config]]:
    """The settings of each model to measure, one for each precision. Raises ConfigError."""
    given = {"experiment": "original", "model.vocab_size": str(vocab_size)}
    for override in overrides:
        name, _, given[name] = override.partition("=")
    models = given.pop("model", MODELS).split(",")
    precisions = given.pop("precision", "float32").split(",")
    if not (CONF / "config.yaml").exists():
        raise ConfigError(f"there is no {CONF}: the bench reads settings, so run it in a checkout")
    found: dict[str, list[Config]] = {model: [] for model in models}
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for model, precision in itertools.product(models, precisions):
            chosen = {"model": model, "precision": precision, **given}
            settings = compose("config", [f"{name}={value}" for name, value in chosen.items()])
            found[model].append(machine.with_precision(to_config(settings))[0])
    return found


def _phases(config: Config) -> tuple[Phase, ...]:
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size=null: without a corpus the bench needs a number")
    return plan(config, vocab_size=config.model.vocab_size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--short", action="store_true", help="few repeats; wide bounds are checked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--repeats", type=int, help="of each measurement")
    parser.add_argument("overrides", nargs="*", help="settings, as of train.py")
    options = parser.parse_intermixed_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return run_command(lambda: _bench(options), explain)


def _bench(options: argparse.Namespace) -> int:
    repeats = options.repeats or (REPEATS_SHORT if options.short else REPEATS)
    windows = WINDOWS_SHORT if options.short else WINDOWS
    found = configs(options.overrides, VOCABULARY_SHORT if options.short else VOCABULARY)
    first = next(iter(found.values()))[0]
    for config in (config for several in found.values() for config in several):
        device = machine.pick_device(config.device, config.precision)
    with machine.switches(first.threads, first.precision):
        here = machine.describe_machine(device)
        say = console().print
        say(
            f"{here.device_name}, threads {here.threads}, torch {here.torch}; batch "
            f"{first.phase.batch_size} x {first.data.seq_len}, dim {first.model.dim}, "
            f"vocabulary {first.model.vocab_size or 0:,}",
            markup=False,
        )
        measured: list[Measurement] = []
        for model, several in found.items():
            for phases in zip(*map(_phases, several), strict=True):
                print(f"measuring {model}, {phases[0].name} ...", file=sys.stderr, flush=True)
                by_precision = {phase.precision: phase for phase in phases}
                seq_len = first.data.seq_len
                rows = measure(model, by_precision, seq_len, repeats, windows, device)
                measured += [
                    replace(row, **peak_memory_mb(phase, seq_len, first.threads, device.type))
                    for row, phase in zip(rows, phases, strict=True)
                ]
    for title in TABLES:
        say(table(title, measured))
    if options.json:
        ratios = [{name: row.value(name) for name in RATIOS} for row in measured]
        figures = {
            "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "overrides": options.overrides,
            "environment": machine.environment().model_dump(),
            "git": (git := git_state()) and git.model_dump(),
            "machine": asdict(here),
            "measured": [asdict(row) | more for row, more in zip(measured, ratios, strict=True)],
        }
        data = json.dumps(figures, indent=1).encode() + b"\n"
        ours = files.begins_with(b'{"taken":')
        files.write_atomically(options.json, data, "--json", ours)
    problems = outside_bounds(measured) if options.short else []
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
