"""How often the claims of a report are wrong, in simulated studies of known truth.

`python -m tests.report.simulated` prints a row per cell. The runs of a cell are records that
`synthetic` writes, read as for a report. Every study puts accuracies and losses of its own into the
frames that were read, and goes the way of a report from there: into arms, courses, comparisons and
verdicts. Many studies go at once, each under a text of its own, and each is judged by itself. No
picture is drawn and no page written.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from proglayer.report import comparisons, measures, stats
from proglayer.report.arms import DEEP, MARGIN, STANDARD
from proglayer.report.arms import arms as arms_of
from proglayer.report.comparisons import Comparison
from proglayer.results import Results, load
from proglayer.results.read import with_changes

from .. import synthetic

EXPERIMENTS = ("original", "control_from_scratch", "control_unfrozen")
# Standard deviations in points of accuracy: of a seed in all its runs, of a run, and of the
# evaluation of one epoch.
SEED_SD, RUN_SD, EPOCH_SD = 0.3, 0.2, 0.08
COLLAPSE_SHARE, COLLAPSE_POINTS = 0.1, -4.0
DISTRIBUTIONS = ("normal", "heavy tails", "collapsing", "controls collapse")
# How many studies are in the frames at a time.
AT_ONCE = 100


def noise(draw: np.random.Generator, distribution: str, size: Any) -> np.ndarray:
    """What sets runs apart, in points of accuracy, with a standard deviation of RUN_SD at most."""
    if distribution == "heavy tails":
        return RUN_SD / np.sqrt(3) * draw.standard_t(3, size)
    return RUN_SD * draw.normal(size=size)


class Numbers(NamedTuple):
    """What the runs of many studies come to, in points of accuracy.

    choices: for each run, (studies, epochs): of the epochs that it can choose from.
    test: (studies, runs), of the chosen epoch on the test text; None without one.
    """

    choices: list[np.ndarray]
    test: np.ndarray | None

    def of(self, studies: slice) -> Numbers:
        """Those of some of the studies."""
        test = None if self.test is None else self.test[studies]
        return Numbers([own[studies] for own in self.choices], test)


def drawn(
    template: Results,
    seeds: int,
    distribution: str = "normal",
    *,
    studies: int,
    true: float = 0.0,
    epochs: int = 1,
    tested: bool = False,
) -> Numbers:
    """Draw studies in which `original` is better than both controls by `true` points.

    Args:
        template: of `template`, for as many seeds.
        epochs: how many epochs, all equally good, the controls have for each of the original's to
            choose from. Each is evaluated with an error of EPOCH_SD, which the choice falls for.
        tested: all is judged on a test text, where the chosen epoch has an error of its own.
    """
    draw = np.random.default_rng([seeds, DISTRIBUTIONS.index(distribution), epochs, tested])
    runs = template.runs
    original = (runs["experiment"] == "original").to_numpy()
    of_seed = SEED_SD * draw.normal(size=(studies, seeds))[:, runs["seed"]]
    truth = 16 + of_seed + noise(draw, distribution, (studies, len(runs))) + true * original
    if "collaps" in distribution:
        collapsed = draw.random(truth.shape) < COLLAPSE_SHARE
        truth += COLLAPSE_POINTS * (collapsed & ~(original & (distribution != "collapsing")))
    unsure = EPOCH_SD * (epochs > 1 or tested)
    choices = [
        truth[:, [run]] + unsure * draw.normal(size=(studies, 1 if own else epochs))
        for run, own in enumerate(original)
    ]
    test = truth + EPOCH_SD * draw.normal(size=truth.shape) if tested else None
    return Numbers(choices, test)


def loss_of(accuracy: Any) -> Any:
    """The loss that `synthetic` has beside an accuracy in percent."""
    return 6.9 - (accuracy - 16) / 5


def losses(experiment: str, choices: Sequence[float]) -> list[list[float]]:
    """Each phase's validation losses where a run has these accuracies to choose from.

    Epochs that it does not choose are far worse. The original has so many that its budget holds
    whatever a control chooses from.
    """
    bad = loss_of(6.0)
    last = [*map(loss_of, choices), bad]
    if "scratch" in experiment:
        return [last]
    if experiment == "original":
        last += 30 * [bad]
    return [[loss_of(15.0), bad], last]


def write(
    folder: Path, seeds: int, choices: Sequence[Sequence[float]], test: Sequence[float] | None
) -> Results:
    """Write the records of one study, and read them.

    Args:
        choices, test: as of `Numbers`, of one study.
    """
    names = [
        (experiment, model, seed)
        for experiment in EXPERIMENTS
        for model in (STANDARD, DEEP)
        for seed in range(seeds)
    ]
    for number, (experiment, model, seed) in enumerate(names):
        own = losses(experiment, choices[number])
        on_test = None
        if test is not None:
            on_test = [loss_of(15.0), loss_of(test[number])][-len(own) :]
        synthetic.run(
            folder / f"{number:03d}", experiment, model, seed, losses=own, test_losses=on_test
        )
    return load(folder)


def template(seeds: int, epochs: int, tested: bool) -> Results:
    """The frames of a study of these seeds, whose figures `studies_of` replaces."""
    runs = len(EXPERIMENTS) * 2 * seeds
    choices = [[16.0] * (1 if run < 2 * seeds else epochs) for run in range(runs)]
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder), seeds, choices, [16.0] * runs if tested else None)


def studies_of(template: Results, numbers: Numbers) -> Results:
    """The frames of as many studies as there are numbers, each under a text of its own."""
    studies = len(numbers.choices[0])
    runs, phases, epochs = (
        pd.concat([frame] * studies, ignore_index=True)
        for frame in (template.runs, template.phases, template.epochs)
    )
    for one, frame in ((template.runs, runs), (template.phases, phases), (template.epochs, epochs)):
        of = np.repeat(np.arange(studies), len(one)).astype(str)
        frame["run"] = np.char.add(np.char.add(of, "/"), frame["run"].to_numpy(str))
    runs["corpus_fingerprint"] = np.repeat(np.arange(studies), len(template.runs)).astype(str)

    names = template.runs["run"].tolist()
    last = template.phases.drop_duplicates("run", keep="last").set_index("run")["phase"]
    own = template.epochs["phase"].eq(template.epochs["run"].map(last))
    chosen = np.zeros((studies, len(template.epochs)), bool)
    accuracy = np.tile(template.epochs["validation_accuracy_percent"].to_numpy(float), (studies, 1))
    chosen[:] = template.epochs["best"].to_numpy(bool)
    places = [np.flatnonzero(own & template.epochs["run"].eq(name)) for name in names]
    best = [values.argmax(axis=1) for values in numbers.choices]
    for rows, values, at in zip(places, numbers.choices, best, strict=True):
        rows = rows[: values.shape[1]]
        accuracy[:, rows] = values
        chosen[:, rows] = np.arange(len(rows)) == at[:, None]
    epochs["best"] = chosen.ravel()
    _set(epochs, "validation_", accuracy.ravel())

    ends = np.stack([values.max(axis=1) for values in numbers.choices], axis=1).ravel()
    _set(runs, "last_validation_", ends)
    at_end = phases["phase"].eq(np.tile(template.phases["run"].map(last).to_numpy(), studies))
    phases.loc[at_end, "best_epoch"] = np.stack(best, axis=1).ravel() + 1
    _set(phases, "validation_", ends, at_end)
    if numbers.test is not None:
        _set(runs, "last_test_", numbers.test.ravel())
    runs = with_changes(runs)
    return Results(runs, phases, epochs, template.exits.head(0), template.left_out)


def _set(frame: Any, prefix: str, accuracy: np.ndarray, rows: Any = slice(None)) -> None:
    """Put accuracies, and the losses that go with them, into a frame."""
    frame.loc[rows, f"{prefix}accuracy_percent"] = accuracy
    frame.loc[rows, f"{prefix}loss"] = loss_of(accuracy)


def judged(results: Results) -> Iterator[list[Comparison]]:
    """The claims of the studies in these frames, each judged as by a report of its own."""
    arms = arms_of(results)
    # Of two hundred settings one is read; plain strings are faster to read.
    aside = [c for c in arms.runs if c.startswith("config.") and c != "config.model.dim"]
    runs = arms.runs.drop(columns=aside)
    arms = replace(arms, runs=runs.astype(dict.fromkeys(runs.select_dtypes("string"), object)))
    curves = measures.curves(results, arms.runs)
    texts = arms.runs.set_index("run")["condition"]
    runs_of = arms.runs.groupby("condition")
    for (_, runs), (_, own) in zip(runs_of, curves.groupby(curves["run"].map(texts)), strict=True):
        yield comparisons.judge(comparisons.claimed(runs, own, MARGIN))


def simulate(
    seeds: int,
    distribution: str = "normal",
    *,
    studies: int = 2_000,
    true: float = 0.0,
    epochs: int = 1,
    tested: bool = False,
) -> dict[str, float]:
    """Judge simulated studies; the arguments are those of `drawn`.

    Returns:
        the share of plain 95 % intervals that hold the true difference; and the shares of studies
        in which all intervals of the verdicts do, with a false difference (one in what does not
        differ, or of the wrong sign), and with a false "same" in what differs by the margin or
        more; and the mean error of a difference between experiments.
    """
    one = template(seeds, epochs, tested)
    numbers = drawn(
        one, seeds, distribution, studies=studies, true=true, epochs=epochs, tested=tested
    )
    found = [
        own
        for first in range(0, studies, AT_ONCE)
        for own in judged(studies_of(one, numbers.of(slice(first, first + AT_ONCE))))
    ]
    assert len(found) == studies
    if distribution == "controls collapse":
        true -= COLLAPSE_SHARE * COLLAPSE_POINTS
    # The models in the original, then each of two controls in each model.
    truths = np.array([0.0, true, true, true, true])

    def of(figure: Callable[[Comparison], Any]) -> np.ndarray:
        return np.array([[figure(own) for own in family] for family in found])

    def holds(interval: Callable[[Comparison], stats.Interval]) -> np.ndarray:
        low, high, _ = np.moveaxis(of(interval), -1, 0)
        return (low <= truths) & (truths <= high)

    verdicts = of(lambda own: own.verdict)
    better, worse, same = (
        verdicts == word for word in (stats.Verdict.better, stats.Verdict.worse, stats.Verdict.same)
    )
    alone = holds(lambda own: own.judged.alone)
    wrong = (better & (truths <= 0)) | (worse & (truths >= 0))
    return {
        "plain 95 %": alone.mean(),
        "plain 95 %, controls": alone[:, 1:].mean(),
        "all together": holds(lambda own: own.judged.interval).all(axis=1).mean(),
        "false difference": wrong.any(axis=1).mean(),
        "false same": (same & (truths >= MARGIN)).any(axis=1).mean(),
        "mean error": (of(lambda own: own.accuracy.mean) - truths)[:, 1:].mean(),
    }


CELLS: list[dict[str, Any]] = [
    *({"seeds": seeds, "distribution": d} for d in DISTRIBUTIONS for seeds in (3, 5, 8, 20)),
    *({"seeds": seeds, "true": 0.1} for seeds in (3, 8)),
    *({"seeds": 20, "epochs": e, "tested": t} for e, t in ((3, False), (10, False), (10, True))),
]


def print_cells(
    description: str | None, simulate: Callable[..., Any], cells: list[dict[str, Any]], studies: int
) -> None:
    """A row for each cell of as many studies as the command line asks for, else `studies`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--studies", type=int, default=studies)
    studies = parser.parse_args().studies
    for cell in cells:
        found = simulate(**cell, studies=studies)
        print(cell, {name: round(float(value), 4) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    print_cells(__doc__, simulate, CELLS, studies=2_000)
