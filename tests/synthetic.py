"""Made-up runs and studies: records as the tool leaves them, with a known truth."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from proglayer.run.record import (
    CorpusRecord,
    Environment,
    EpochRow,
    GitState,
    GrowthRecord,
    PhaseRecord,
    RunRecord,
    RunState,
    Score,
    SweepJob,
    SweepRecord,
    write_metrics,
    write_record,
)
from proglayer.store.entries import Machine
from proglayer.training.cost import parameter_counts, training_flops
from proglayer.training.plan import plan
from proglayer.training.stopping import StopReason

from .helpers import config

VOCABULARY = 8192
WINDOWS = (3_000, 500)
STARTED = "2026-03-01T12:00:00+00:00"
# What deep supervision gains in every phase, and what a phase after the first gains, in nats.
DEEP_GAIN = 0.02
STEP_GAIN = 0.01


def score(loss: float, accuracy_percent: float | None = None) -> Score:
    """What an evaluation gives; accuracy falls by 5 points a nat, unless it is another."""
    if accuracy_percent is None:
        accuracy_percent = 100 * (0.16 + (6.9 - loss) / 20)
    return Score(loss=loss, accuracy=max(0.0, accuracy_percent / 100))


def leave(
    folder: Path,
    plain: dict[str, Any],
    phases: list[PhaseRecord],
    rows: list[EpochRow],
    status: str,
    **given: Any,
) -> Path:
    """A run's folder as the tool leaves it.

    A run that did not complete has no record of its last phase. `given` goes over the rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.log").write_text("began\n")
    state = RunState(status)
    record = RunRecord(
        state=state,
        reason="the loss became NaN" if status == "failed" else None,
        started=datetime.now(UTC) if status == "running" else datetime.fromisoformat(STARTED),
        config=plain,
        environment=Environment(
            proglayer="0.1.0", python="3.11.7", platform="x", host="h", process=1
        ),
        machine=Machine("cpu", "a cpu", 2, "2.13.0"),
        git=GitState(commit="c" * 40, changed=False),
        corpus=CorpusRecord(
            name="pydocs", fingerprint="f" * 64, vocab_size=VOCABULARY, seq_len=32,
            train_windows=WINDOWS[0], validation_windows=WINDOWS[1],
        ),
        phases=phases if state is RunState.completed else phases[:-1],
        epochs=rows,
        ended=datetime.fromisoformat("2026-03-01T12:01:30+00:00"),
        seconds=90.0,
    )  # fmt: skip
    if status in ("running", "pending"):
        record.phases, record.ended, record.seconds = [], None, None
    record = RunRecord.model_validate(record.model_dump() | given)
    write_record(folder, record)
    if record.epochs:
        write_metrics(folder, record)
    return folder


def aged(folder: Path, seconds: float) -> None:
    """Make a folder and all that lies in it as old as that."""
    then = time.time() - seconds
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


def run(
    folder: Path,
    experiment: str,
    model: str,
    seed: int,
    *overrides: str,
    status: str = "completed",
    losses: Sequence[Sequence[float]] | None = None,
    test_losses: Sequence[float | Sequence[float]] | None = None,
    same_as: str = "",
    shock: float | None = None,
    tested: float | None = None,
    **extra: Any,
) -> Path:
    """One run of `experiment` as it might have gone; its phases are those that it plans.

    With `losses`, each phase's validation losses are these; it stopped for want of improvement if
    the last is not the lowest, else at `max_epochs`. Accuracy falls by 5 points a nat.
    With `test_losses`, each phase's selected epoch has that one on a test text, or each epoch its
    own; with `tested` each has a loss so much higher than on the validation text. Runs of one
    `same_as` and seed trained the same models. With `shock`, each growth raises the loss by so
    much, and what is measured at its moment is recorded.
    """
    own = [f"experiment={experiment}", f"model={model}", f"seed={seed}", *overrides]
    settings = config(*own[:2], *overrides)
    draw = np.random.default_rng([seed, len(experiment), *experiment.encode()[:4], len(model)])
    shared = np.random.default_rng(seed)
    floor = 6.85 - DEEP_GAIN * (model == "deep_supervision") + shared.normal(0, 0.01)
    phases, rows = [], []
    for phase in plan(settings, VOCABULARY):
        spec = phase.train
        if phase.index:
            floor -= STEP_GAIN + draw.normal(0, 0.006)
        best = int(draw.integers(2, 5))
        count = best + phase.stop.patience
        noise = draw.normal(0, 0.002, count)
        away = np.abs(np.arange(1, count + 1) - best)
        step = 0.03 if phase.index else 0.08
        curve = (floor + step * away + np.abs(noise) * (away > 0)).tolist()
        if losses is not None:
            curve = [float(loss) for loss in losses[phase.index]]
            count, best = len(curve), int(np.argmin(curve)) + 1
        accuracies = [100 * (0.16 + (6.9 - loss) / 20) for loss in curve]
        flops = training_flops(spec, 32, WINDOWS[0])
        counts = parameter_counts(spec)
        seconds = (flops.head + flops.body) / 4e10
        cost = {
            "train_tokens": WINDOWS[0] * 32, "train_flops_head": flops.head,
            "train_flops_body": flops.body, "train_seconds": round(seconds, 3),
            "evaluation_seconds": round(seconds / 20, 3),
        }  # fmt: skip
        test = None if test_losses is None else test_losses[phase.index]
        test = test if tested is None else [loss + tested for loss in curve]
        of_epochs = test if isinstance(test, Sequence) else [None] * count
        selected = of_epochs[best - 1] if isinstance(test, Sequence) else test
        trained = repr((same_as or (experiment, model, overrides, curve), seed, phase.index))
        reach = 0.3 if model == "deep_supervision" else 3.0
        loss, accuracy = curve[best - 1], accuracies[best - 1]
        place: dict[str, Any] = {"phase": phase.index + 1, "layers": spec.layers}
        growth = None
        if spec.growth is not None and shock is not None:
            after = phases[-1].validation.loss + shock
            growth = GrowthRecord(
                exit_losses_after=[after] * spec.layers, gradient_share_new=[0.2, 0.4]
            )
            free = dict.fromkeys(cost, 0)
            rows.append(EpochRow(**place, **free, epoch=0, validation=score(after), train_loss=None,
                                 best=False, reused=False))  # fmt: skip
        phases.append(
            PhaseRecord(
                name=phase.name,
                layers=spec.layers,
                new_layers=list(spec.new_layers) if phase.index else [],
                parameters_total=counts.total,
                parameters_trainable=counts.trainable,
                frozen=list(spec.frozen),
                rates=spec.rates,
                exit_weights=list(spec.exit_weights),
                stopped=StopReason.patience if best < count else StopReason.max_epochs,
                best_epoch=best,
                trajectory=hashlib.sha256(trained.encode()).hexdigest()[:32],
                validation=score(loss, accuracy),
                test=None if selected is None else score(selected),
                exits={
                    spec.layers - gap: score(loss + 0.3 * gap, accuracy - reach * gap)
                    for gap in reversed(range(spec.layers))
                },
                growth=growth,
            )
        )
        rows += [
            EpochRow(
                **place, **cost, epoch=epoch, best=epoch == best, reused=False,
                train_loss=loss - 0.3, validation=score(loss, accuracy),
                test=None if test is None else score(test),
            )
            for epoch, (loss, accuracy, test) in enumerate(
                zip(curve, accuracies, of_epochs, strict=True), start=1
            )
        ]  # fmt: skip
    given: dict[str, Any] = {
        "overrides": own,
        "choices": {"model": model, "data": "pydocs", "experiment": experiment or None},
    }
    plain = settings.model_dump(mode="json") | {"seed": seed}
    phases = extra.pop("phases", phases)
    return leave(folder, plain, phases, rows, status, **(given | extra))


def sweep(
    folder: Path,
    experiments: Iterable[str],
    models: Iterable[str] = ("standard", "deep_supervision"),
    seeds: Iterable[int] = (1, 2, 3, 4, 5),
    *overrides: str,
    **how: float | None,
) -> Path:
    """A completed sweep over all of them; `how` are `shock` and `tested` of `run`."""
    experiments, models, seeds = list(experiments), list(models), list(seeds)
    jobs = [(e, m, s) for e in experiments for m in models for s in seeds]
    for number, (experiment, model, seed) in enumerate(jobs):
        run(folder / f"{number}_aaaaaa", experiment, model, seed, *overrides, **how)
    command = [
        *("python", "train.py", "-m"),
        f"experiment={','.join(experiments)}",
        f"model={','.join(models)}",
        f"seed={','.join(map(str, seeds))}",
        *overrides,
    ]
    listed = [
        SweepJob(
            folder=f"{number}_aaaaaa",
            overrides=[f"experiment={e}", f"model={m}", f"seed={s}", *overrides],
        )
        for number, (e, m, s) in enumerate(jobs)
    ]
    write_record(folder, SweepRecord(jobs=listed, command=command))
    return folder
