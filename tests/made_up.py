"""Made-up studies: records of whole experiments as the tool leaves them, with a known truth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from proglayer.config import to_plain
from proglayer.plan import parameter_counts, plan, training_flops
from proglayer.record import RECORD_FORMAT, changes, write_metrics, write_result

from .helpers import config

VOCABULARY = 8192
WINDOWS = (3_000, 500)
# What deep supervision gains in every phase, and what a phase after the first gains, in nats.
DEEP_GAIN = 0.02
STEP_GAIN = 0.01


def run(
    folder: Path,
    experiment: str,
    model: str,
    seed: int,
    *overrides: str,
    status: str = "completed",
    **extra: Any,
) -> Path:
    """One run of `experiment` as it might have gone; its phases are those that it plans."""
    own = (f"experiment={experiment}", f"model={model}", f"seed={seed}", *overrides)
    settings = config(*own[:2], *overrides)
    plain = to_plain(settings) | {"seed": seed}
    draw = np.random.default_rng([seed, len(experiment), *experiment.encode()[:4], len(model)])
    shared = np.random.default_rng(seed)
    floor = 6.85 - DEEP_GAIN * (model == "deep_supervision") + shared.normal(0, 0.01)
    phases, rows = [], []
    for phase in plan(settings, VOCABULARY):
        if phase.index:
            floor -= STEP_GAIN + draw.normal(0, 0.006)
        best = int(draw.integers(2, 5))
        count = best + phase.stop.patience
        noise = draw.normal(0, 0.002, count)
        away = np.abs(np.arange(1, count + 1) - best)
        losses = (
            floor + (0.03 if phase.index else 0.08) * away + np.abs(noise) * (away > 0)
        ).tolist()
        accuracies = [100 * (0.16 + (6.9 - loss) / 20) for loss in losses]
        flops = training_flops(phase, 32, WINDOWS[0])
        counts = parameter_counts(phase)
        seconds = (flops.head + flops.body) / 4e10

        def figures(loss: float, accuracy: float) -> dict[str, float]:
            return {
                "validation_loss": loss,
                "validation_perplexity": math.exp(loss),
                "validation_accuracy_percent": accuracy,
            }

        rows += [
            {
                "phase": phase.index + 1,
                "layers": phase.layers,
                "epoch": e,
                "train_loss": loss - 0.3,
                **figures(loss, accuracy),
                "train_tokens": WINDOWS[0] * 32,
                "train_seconds": round(seconds, 3),
                "evaluation_seconds": round(seconds / 20, 3),
                "best": e == best,
                "reused": False,
            }
            for e, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1)
        ]
        own_best = figures(losses[best - 1], accuracies[best - 1])
        reach = 0.3 if model == "deep_supervision" else 3.0
        loss, accuracy = losses[best - 1], accuracies[best - 1]
        exits = [
            {"layer": phase.layers - gap, **figures(loss + 0.3 * gap, accuracy - reach * gap)}
            for gap in reversed(range(phase.layers))
        ]
        phases.append(
            {
                "index": phase.index,
                "name": phase.name,
                "layers": phase.layers,
                "new_layers": list(phase.new_layers) if phase.index else [],
                "parameters_total": counts.total,
                "parameters_trainable": counts.trainable,
                "frozen": list(phase.frozen),
                "rates": {
                    "new": phase.rates.new,
                    "existing": phase.rates.existing,
                    "embedding": phase.rates.embedding,
                    "head": phase.rates.head,
                },
                "exit_weights": list(phase.exit_weights),
                "stage": f"{phase.index:032x}",
                "epochs": count,
                "best_epoch": best,
                "stopped": "no improvement",
                "best": {"train_loss": losses[best - 1] - 0.3, **own_best},
                "exits": exits,
                "train_tokens": WINDOWS[0] * 32 * count,
                "train_flops_head": flops.head * count,
                "train_flops_body": flops.body * count,
                "train_seconds": round(seconds, 3) * count,
                "evaluation_seconds": round(seconds / 20, 3) * count,
                "tokens_per_second": 30_000.0,
                "work": {
                    "epochs_trained": count,
                    "epochs_replayed": 0,
                    "epochs_reused": 0,
                    "seconds_saved": 0.0,
                    "seconds_waited": 0.0,
                    "peak_memory_mb": {"process": 700.0},
                },
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(plain))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(own)))
    write_metrics(folder, rows)
    if status == "running":
        return folder
    recorded = phases if status == "completed" else phases[:-1]
    result = {
        "format": RECORD_FORMAT,
        "status": status,
        "reason": None if status == "completed" else "the loss became NaN in epoch 2",
        "started": "2026-03-01T12:00:00+00:00",
        "overrides": list(own),
        "choices": {"model": model, "data": "pydocs", "experiment": experiment or None},
        "seed": seed,
        "config": plain,
        "environment": {"proglayer": "0.1.0", "python": "3.11.7", "platform": "x", "host": "h"},
        "machine": {"device": "cpu", "device_name": "a cpu", "threads": 2, "torch": "2.13.0"},
        "git": {"commit": "c" * 40, "changed": False},
        "corpus": {
            "name": "pydocs",
            "fingerprint": "f" * 64,
            "vocab_size": VOCABULARY,
            "seq_len": 32,
            "train_windows": WINDOWS[0],
            "validation_windows": WINDOWS[1],
        },
        "phases": recorded,
        **({"changes": changes(recorded)} if status == "completed" else {}),
        "ended": "2026-03-01T12:01:30+00:00",
        "seconds": 90.0,
        "objective": None,
        **extra,
    }
    write_result(folder, result)
    return folder


def sweep(
    folder: Path,
    experiments: Iterable[str],
    models: Iterable[str] = ("standard", "deep_supervision"),
    seeds: Iterable[int] = (1, 2, 3, 4, 5),
    *overrides: str,
) -> Path:
    """A completed sweep over all of them."""
    experiments, models, seeds = list(experiments), list(models), list(seeds)
    jobs = [(e, m, s) for e in experiments for m in models for s in seeds]
    for number, (experiment, model, seed) in enumerate(jobs):
        run(folder / f"{number}_aaaaaa", experiment, model, seed, *overrides)
    task = [
        f"experiment={','.join(experiments)}",
        f"model={','.join(models)}",
        f"seed={','.join(map(str, seeds))}",
        *overrides,
    ]
    given = {"hydra": {"overrides": {"task": task}}}
    (folder / "multirun.yaml").write_text(yaml.safe_dump(given))
    listed = [
        {
            "folder": f"{number}_aaaaaa",
            "overrides": [f"experiment={e}", f"model={m}", f"seed={s}", *overrides],
        }
        for number, (e, m, s) in enumerate(jobs)
    ]
    (folder / "jobs.json").write_text(json.dumps(listed))
    return folder
