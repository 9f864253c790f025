"""Render `docs/findings.md` and its pictures from the data in `docs/findings/`.

    python scripts/findings.py
    python scripts/findings.py claims=DIR,DIR asked=DIR settled=DIR losses=DIR one_layer=DIR \
        operators=DIR timing=DIR rotating=DIR wikitext=DIR recipes=DIR exits=DIR

The second form first replaces the data of the parts that it names by what runs in those folders
came to (of `depth` and `depth-again` only the data of their seeds): the data frames of
`proglayer.results`, without what says where they ran; for `exits`, the tables that
`proglayer.exits` wrote; for `recipes`, what each experiment file came to, which the site shows
beside it. The text is `docs/findings/findings.md.jinja`; every number in it is an expression over
the data.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd

from proglayer.report import early_exit, measures, sequential, stats, words
from proglayer.report.arms import DEEP, MARGIN, ORIGINAL, STANDARD, Metric
from proglayer.report.arms import arms as arms_of
from proglayer.report.comparisons import Comparison, Kind, judge
from proglayer.report.pictures import Picture, forest, learning_curve, lines
from proglayer.report.study import judge_study
from proglayer.results import Results, load
from proglayer.run.record import RunState

FINDINGS = Path(__file__).resolve().parents[1] / "docs" / "findings"
ZIP = "frames.zip"
FRAMES = ("runs", "phases", "epochs", "exits", "left_out")
TABLES = ("exits", "early_exit", "changed_layers")
# Where and when a run was made, which is nobody's business, and what it wrote of its making.
PLACE = (
    *("folder", "host", "node", "scheduler", "scheduler_job", "sweep", "platform", "started"),
    *("ended", "last_sign", "reason", "traceback", "git_commit", "git_changed", "git_difference"),
)
ENDS = [metric.last("test") for metric in Metric]
ACCURACY, LOSS = ENDS
CHANGE = Metric.accuracy.change("test")
# The loss at a growth.
BOTH = ["validation_loss_before", "validation_loss_after"]
# The study where depth pays: its arms, by what sets them apart on the command line.
SCRATCH, SHALLOW = "phase=from_scratch", "phase=from_scratch added_layers=0"
LOSSES = "phase.initial.exit_weights={} phase.grown.exit_weights={}"
EPOCHS = "phase.initial.max_epochs={} phase.grown.max_epochs={}"
OPERATORS = ("random", "copy", "stack", "zero", "gate")
CONTROL = "six layers from scratch"
DEPTH_ARMS = {
    CONTROL: f"{SCRATCH} phase.initial.max_epochs=15",
    "six layers, fewer epochs": f"{SCRATCH} phase.initial.max_epochs=11",
    "two layers": f"{SHALLOW} phase.initial.max_epochs=15",
    "two layers, more epochs": f"{SHALLOW} phase.initial.max_epochs=31",
    **{f"`{name}`": f"growth={name}" for name in OPERATORS},
    "frozen": "freeze=existing phase.grown.max_epochs=9",
    "frozen, more epochs": "freeze=existing phase.grown.max_epochs=11",
    "gradually unfrozen": "freeze=gradual phase.grown.max_epochs=3",
    "exits after": f"freeze=existing {LOSSES.format('last', 'uniform')}",
    "exits before": f"freeze=existing {LOSSES.format('uniform', 'last')}",
    "exits before and after": f"freeze=existing {LOSSES.format('uniform', 'uniform')}",
    **{
        f"`stack` after {before}": f"growth=stack {EPOCHS.format(before, after)}"
        for before, after in ((3, 10), (9, 8), (12, 7))
    },
}
# Its comparisons: the title of a question, and of each comparison what the losses of arms are
# weighted by. The family holds those of what layers do as well.
Weighted = dict[str, float]
TWO_BY_TWO = ("frozen", "exits after", "exits before", "exits before and after")
DEPTH_QUESTIONS: dict[str, dict[str, Weighted]] = {
    "Does depth pay? Six layers − two": {
        "at equal tokens": {CONTROL: 1, "two layers": -1},
        "at equal operations": {"six layers, fewer epochs": 1, "two layers, more epochs": -1},
    },
    "Does growing reach training from scratch?": {
        f"`{name}`, at equal {budget}": {f"`{name}`": 1, control: -1}
        for budget, control in (
            ("operations", "six layers, fewer epochs"),
            ("tokens", CONTROL),
        )
        for name in OPERATORS
    },
    "Does freezing cost anything, and does unfreezing win it back?": {
        "frozen − nothing frozen, at equal tokens": {"frozen": 1, "`random`": -1},
        "frozen − nothing frozen, at equal operations": {"frozen, more epochs": 1, "`random`": -1},
        "gradually unfrozen − frozen": {"gradually unfrozen": 1, "frozen": -1},
        "gradually unfrozen − nothing frozen": {"gradually unfrozen": 1, "`random`": -1},
    },
    "Does deep supervision make a model easier to deepen? A loss at every layer": {
        name: dict(zip(TWO_BY_TWO, weights, strict=True))
        for name, weights in {
            "before the growth": (-0.5, -0.5, 0.5, 0.5),
            "after the growth": (-0.5, 0.5, -0.5, 0.5),
            "both beyond their sum": (1, -1, -1, 1),
        }.items()
    },
    "When to grow? By `stack`, against after 6 epochs": {
        f"after {before}": {f"`stack` after {before}": 1, "`stack`": -1} for before in (3, 9, 12)
    },
}
# What of them is asked of a second text again.
AGAIN = {
    "Does depth pay? Six layers − two": ("at equal tokens",),
    "Does growing reach training from scratch?": tuple(
        f"`{name}`, at equal operations" for name in OPERATORS
    ),
    "Does freezing cost anything, and does unfreezing win it back?": (
        "frozen − nothing frozen, at equal tokens",
        "gradually unfrozen − frozen",
    ),
}
# Grown models and their control, whose layers are left out and swapped.
USING = ("`stack`", "`random`")
USES = ("left out", "swapped with the next")
USING_DEPTH = "Do grown models use their depth differently? The rise of the loss − from scratch"
# What is better or worse of a rise.
RISES = {stats.Verdict.better: "larger", stats.Verdict.worse: "smaller"}
# What the comparisons of a question are called in a picture, before what sets them apart.
WORDS = ("six layers − two, ", "", "", "a loss at every layer ", "stack, grown ")
PICTURED = dict(zip(DEPTH_QUESTIONS, WORDS, strict=True))
# Whose loss on the way is drawn, and where it is below what.
HIGHEST = 2.0
CURVES = ("two layers, more epochs", "`random`", "`stack`", "frozen, more epochs", CONTROL)
OPPOSITE = {stats.Verdict.better, stats.Verdict.worse}
SETTLED = OPPOSITE | {stats.Verdict.same}
# What a run ended with on the test text.
ENDED = ("loss", "bits_per_byte", "accuracy_percent")
# What is said of its texts.
TEXTS = {"depth": "Where depth pays", "depth-again": "Again on WikiText-2"}
# The parts with its data, and how many arms a seed has there.
DEPTH_PARTS = {"depth": len(DEPTH_ARMS), "depth-again": 10}
SEEDS = 8
NATS = 0.02
PLANNED = sum(map(len, DEPTH_QUESTIONS.values())) + len(USING) * len(USES)
# The 2 x 2: the loss of the initial phase, then that of the grown one.
CELLS = {"last": "last layer", "uniform": "every layer"}


def take(part: str, folders: list[str]) -> None:
    """Replace the data of a part by what the runs in `folders` came to."""
    if part == "exits":
        (FINDINGS / part).mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            shutil.copyfile(Path(folders[0]) / f"{name}.csv", FINDINGS / part / f"{name}.csv")
        return
    if part in ("asked", "settled"):
        (FINDINGS / part).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folders[0]) / sequential.LOOKS, FINDINGS / part / sequential.LOOKS)
    results = load(*folders).distinct()
    if part == "recipes":
        by_experiment(results).to_csv(FINDINGS / "recipes.csv", index=False, float_format="%.4f")
        return
    if part in DEPTH_PARTS:
        results = whole_seeds(results, part)
    runs = results.runs
    empty = {name: pd.Series(pd.NA, runs.index, dtype="object") for name in PLACE if name in runs}
    runs = runs.assign(**empty)
    for path in runs["config.data.path"].dropna().unique():
        for name in ("config.data.path", "overrides"):
            runs[name] = runs[name].str.replace(path, "FOLDER", regex=False)
    results = replace(results, runs=runs)
    if part in DEPTH_PARTS and (FINDINGS / part / ZIP).exists():
        known = read(part)
        others = known.runs[~known.runs["seed"].isin(runs["seed"])]["run"]
        frames = {
            name: pd.concat([own[own["run"].isin(others)], getattr(results, name)])
            for name, own in known.frames().items()
            if name != "left_out"
        }
        results = replace(results, **frames)
    write(part, results)


def whole_seeds(results: Results, part: str) -> Results:
    """Return what completed of the seeds of which all arms have ended, and keep what their layers
    and exits are worth.
    """
    runs = results.runs[results.runs["status"].isin([RunState.completed, RunState.failed])]
    runs = runs.assign(arm=runs["overrides"].map(arm_of))
    ended = runs.groupby("seed")["arm"].nunique() == DEPTH_PARTS[part]
    runs = runs[runs["seed"].isin(ended[ended].index) & (runs["status"] == RunState.completed)]
    keep_exits(part, runs)
    frames = {name: own for name, own in results.frames().items() if name != "left_out"}
    frames = {name: own[own["run"].isin(runs["run"])] for name, own in frames.items()}
    return replace(results, **frames)


def keep_exits(part: str, runs: pd.DataFrame) -> None:
    """Add what layers and exits are worth, in the arms that are asked, to the tables of a part."""
    runs = runs[runs["arm"].isin([*USING, CONTROL])]
    found = early_exit.worth(runs.assign(variant=runs["arm"], model=STANDARD))
    if found.exits.empty:
        return
    (FINDINGS / part).mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        table, path = getattr(found, name), FINDINGS / part / f"{name}.csv"
        if path.exists():
            known = pd.read_csv(path)
            table = pd.concat([known[~known["seed"].isin(table["seed"])], table])
        table.to_csv(path, index=False, float_format="%.6f")


def write(part: str, results: Results) -> None:
    """Write the frames of a part, all in one file: a column's description is half of a small one's
    size, and alike in all.
    """
    (FINDINGS / part).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(FINDINGS / part / ZIP, "w", zipfile.ZIP_DEFLATED) as own:
        for name, frame in results.frames().items():
            content = frame.to_parquet(index=False, compression=None, write_statistics=False)
            named = zipfile.ZipInfo(f"{name}.parquet")  # without the time
            own.writestr(named, content, zipfile.ZIP_DEFLATED, compresslevel=9)


def by_experiment(results: Results) -> pd.DataFrame:
    """What the runs of each experiment file came to, a row for each model."""
    runs = arms_of(results).runs
    rows = []
    for (experiment, model), arm in runs.groupby(["experiment", "model"], sort=True):
        own: dict[str, Any] = {"experiment": experiment, "model": model, "seeds": len(arm)}
        for name in (ACCURACY, CHANGE, LOSS):
            found = stats.summary(arm[name])
            own |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(own)
    return pd.DataFrame(rows).sort_values(["experiment", "model"], ascending=[True, False])


def read(part: str) -> Results:
    """The data of a part."""
    with zipfile.ZipFile(FINDINGS / part / ZIP) as own:
        return Results(
            **{name: pd.read_parquet(BytesIO(own.read(f"{name}.parquet"))) for name in FRAMES}
        )


def answer(several: list[Comparison]) -> str:
    """Return a sentence on a claim: what was found in each model."""
    parts = []
    for one in several:
        model = one.model and words.model_name(one.model)
        head = ", ".join(filter(None, (words.budget_text(one), model)))
        parts.append(f"{head}: {words.clause(one)}" if head else words.clause(one))
    return words.sentence("; ".join(parts)) + "."


def compared(a: Any, b: Any, name: str = "") -> Comparison:
    """Compare two columns of accuracies by seed."""
    pairs = stats.paired(a, b, margin=MARGIN)
    return Comparison(Kind.ends, name, "", "", {Metric.accuracy: pairs}, text="test")


class Claims:
    """The founding experiment, its follow-ups and controls, under both models."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.study = judge_study(results, MARGIN, None)
        (condition,) = self.study.conditions
        self.runs, self.curves = condition.runs, condition.curves
        self.first = self.runs.iloc[0]
        self.others = len(self.study.others)
        assert not any(own.settled for own in self.study.others), "the page says so"
        self.seconds = float(results.phases.drop_duplicates("stage")["train_seconds"].sum())

    def answers(self) -> list[tuple[str, str]]:
        """Each claim with its sentence."""
        return [
            (title, answer([own for own in self.study.claims if own.claim is claim]))
            for claim, title in words.TITLES.items()
        ]

    def seeds(self, experiment: str) -> int:
        """The seeds that both models completed."""
        own = self.runs[self.runs["experiment"] == experiment]
        return int(own.groupby("seed")["model"].nunique().eq(2).sum())

    def change(self, experiment: str, model: str, column: str = CHANGE) -> stats.Summary:
        """The change in accuracy of an arm over its seeds, or another figure of theirs."""
        own = (self.runs["experiment"] == experiment) & (self.runs["model"] == model)
        return stats.summary(self.runs.loc[own, column])

    def end(self, experiment: str, model: str) -> stats.Summary:
        """The accuracy that an arm ended with, over its seeds, in percent."""
        return self.change(experiment, model, ACCURACY)

    def limits(self) -> list[str]:
        """What so many seeds can show, and what it takes to settle the claims."""
        return words.limits([own for own in self.study.claims if own.tested])

    def rows(self) -> list[dict[str, Any]]:
        """One for each experiment: in each model its depths, accuracies and change."""
        rows = []
        for experiment in dict.fromkeys(self.runs["experiment"]):
            own = self.runs[self.runs["experiment"] == experiment]
            models = {}
            for model in (STANDARD, DEEP):
                arm = own[own["model"] == model]
                if len(arm):
                    models[model] = {
                        "end": stats.summary(arm[ACCURACY]),
                        "loss": stats.summary(arm[LOSS]),
                        "change": stats.summary(arm[CHANGE]),
                    }
            first = own.iloc[0]
            name = words.variant_name(experiment)
            rows.append({"name": name, "first": first, "seeds": self.seeds(experiment), **models})
        return rows

    def pictures(self) -> list[Picture]:
        """The changes of every arm, the claims' differences, and the original's curves."""
        grown = self.runs[self.runs["phases"] > 1]
        changes = []
        for (variant, model), arm in grown.groupby(["variant", "model"], sort=False):
            values = arm[CHANGE]
            found = stats.summary(values)
            # Of two seeds an interval is so wide that the others cannot be read beside it.
            low, high = (found.low, found.high) if found.n > 2 else (found.mean, found.mean)
            row = {"label": words.variant_name(str(variant)), "model": model}
            row |= {"mean": found.mean, "low": low, "high": high, "seeds": values.tolist()}
            changes.append(row)
        differences = [
            {
                "label": words.label(own),
                "model": own.model,
                "mean": own.accuracy.mean,
                "low": own.judged.interval.low,
                "high": own.judged.interval.high,
                "seeds": own.accuracy.differences.tolist(),
            }
            for own in self.study.claims
            if own.tested
        ]
        names = self.results.phases[["run", "phase", "name"]]
        own = self.runs.loc[self.runs["experiment"] == ORIGINAL, "run"]
        curves = self.curves[self.curves["run"].isin(own)].merge(names, on=["run", "phase"])
        curves = curves.rename(columns={"name": "phase_name"}).astype({"phase_name": object})
        losses = curves["validation_loss"]
        limits = float(losses.min()), float(losses.max())
        unit, margin = "points of accuracy (right: better)", MARGIN
        return [
            forest("change-by-arm", "Change by arm", changes, margin, unit),
            forest("claims", "Differences in accuracy", differences, margin, unit),
            learning_curve("learning-curves", "The original", curves, limits),
        ]


class Settled:
    """A study that added seeds until its claims were settled, or it was stopped."""

    def __init__(self, results: Results, part: str) -> None:
        looks = sequential.read_looks(FINDINGS / part)
        assert looks is not None
        study = judge_study(results, looks.margin, looks)
        self.looks = looks
        self.rows = [own for own in study.claims if own.accuracy.n]
        self.runs = study.arms.runs
        self.first = self.runs.iloc[0]
        self.hours = float(results.phases.drop_duplicates("stage")["train_seconds"].sum()) / 3600
        self.exits = results.exits
        at_end = results.phases["best_epoch"] == results.phases["epochs"]
        self.last_is_best = int(at_end.groupby(results.phases["run"]).all().sum())

    def level_of(self, family: int) -> float:
        """The level that the first comparison would have been judged at in such a family."""
        look = self.looks.at.index(self.rows[0].look)
        return self.looks.levels(look, family).each

    def before_growth(self, model: str) -> list[float]:
        """The validation accuracy of each exit at the end of the first phase, in percent."""
        own = self.exits[(self.exits["model"] == model) & (self.exits["phase"] == 1)]
        return own.groupby("layer")["validation_accuracy_percent"].mean().tolist()

    def title(self, own: Comparison) -> str:
        """The claim of a comparison, and what it compares."""
        assert own.claim
        return f"{words.TITLES[own.claim]}: {words.described_as(own)}"


class Timing:
    """When to grow, at an equal budget."""

    def __init__(self, results: Results) -> None:
        runs = arms_of(results).runs
        (self.found,) = measures.timings(runs, measures.curves(results, runs))
        self.sentence = words.timing_text(self.found)
        self.windows = int(runs["train_windows"].iloc[0])
        phases = results.phases
        self.epochs = int(phases["epochs"].sum())
        self.trained = int(phases.drop_duplicates("stage")["epochs"].sum())

    def pictures(self) -> list[Picture]:
        """The valley: the loss at the equal budget against the moment of growth."""
        values = self.found.losses.melt(var_name="x", value_name="y")
        axes = "epochs before the growth", "validation loss (nats)"
        return [lines("growth-timing", "The moment of growth", values, *axes)]


class Rotating:
    """A curriculum that reads two exits a step against the loss at all of them, by patience."""

    def __init__(self, results: Results) -> None:
        runs = arms_of(results).runs
        runs["curriculum"] = runs["config.loss.curriculum"].astype(str)
        runs["patience"] = runs["config.phase.patience"].astype(int)
        self.windows = int(runs["train_windows"].iloc[0])
        self.vocabulary = int(runs["config.model.vocab_size"].iloc[0])
        heads = results.phases.merge(runs[["run", "curriculum", "patience"]], on="run")
        per_epoch = heads["train_flops_head"] / heads["epochs"]
        share = per_epoch.groupby(heads["curriculum"]).mean()
        self.head_share = float(share["rotate"] / share["all"])
        self.epochs = heads.groupby(["patience", "curriculum"])["epochs"].mean()
        self.fewest_epochs = int(heads.loc[heads["curriculum"] == "rotate", "epochs"].min())
        values = ENDS
        self.ends, self.loss_rise, self.clause, self.found = {}, {}, {}, {}
        for patience, own in runs.groupby("patience"):
            both = own.pivot_table(index="seed", columns="curriculum", values=values).dropna()
            self.seeds = len(both)
            self.ends[patience] = {name: stats.summary(both[name]) for name in both}
            accuracy, loss = (both[name] for name in values)
            (found,) = judge([compared(accuracy["rotate"], accuracy["all"])])
            self.clause[patience] = words.clause(found)
            self.found[patience] = found
            self.loss_rise[patience] = stats.summary(loss["rotate"] - loss["all"])


class Wikitext:
    """The original on WikiText-2 at the founding size."""

    def __init__(self, results: Results) -> None:
        runs = arms_of(results).runs
        self.runs = runs[runs["model"] == STANDARD]
        self.change = stats.summary(self.runs[CHANGE])
        self.on_validation = stats.summary(self.runs[Metric.accuracy.change("validation")])
        self.windows = int(runs["train_windows"].iloc[0])
        self.listed, self.completed = len(results.runs), len(runs)
        deep = runs[runs["model"] == DEEP].iloc[0]
        self.deep_seed, self.deep_change = deep["seed"], deep[CHANGE]
        self.same_seed = float(self.runs.loc[self.runs["seed"] == deep["seed"], CHANGE].iloc[0])


class Losses:
    """The 2 x 2 of losses: what the initial and the grown phase are trained with."""

    def __init__(self, results: Results) -> None:
        runs = arms_of(results).runs
        names = [f"config.phase.{phase}.exit_weights" for phase in ("initial", "grown")]
        known = runs[names].astype(str)
        runs = runs.assign(initial=known[names[0]], grown=known[names[1]])
        self.values = {
            metric: runs.pivot_table(index="seed", columns=["initial", "grown"], values=metric)
            for metric in ENDS
        }
        # At the end of the initial phase, which both grown ones share.
        self.first = {
            metric: runs.pivot_table(
                index="seed", columns="initial", values=metric.replace("last", "first")
            )
            for metric in ENDS
        }
        # Seeds that have all four cells.
        self.values = {name: cells.dropna() for name, cells in self.values.items()}
        accuracy = self.values[ACCURACY]
        self.seeds = len(accuracy)
        first, last = CELLS
        effects = {
            "trained with exits before the growth": accuracy[last].mean(axis=1)
            - accuracy[first].mean(axis=1),
            "growing with exits": accuracy.xs(last, axis=1, level=1).mean(axis=1)
            - accuracy.xs(first, axis=1, level=1).mean(axis=1),
            "both beyond their sum": (accuracy[last, last] - accuracy[last, first])
            - (accuracy[first, last] - accuracy[first, first]),
        }
        self.effects = judge(
            compared(own, pd.Series(0.0, own.index), name) for name, own in effects.items()
        )

        loss = self.values[LOSS]
        by_initial = {name: loss[name, last] - loss[name, first] for name in CELLS}
        self.by_initial = {name: stats.summary(own) for name, own in by_initial.items()}
        self.loss_interaction = stats.summary(by_initial[last] - by_initial[first])

    def loss_effect(self, initial: str) -> stats.Summary:
        """What exits in the grown phase change in loss, after such an initial phase."""
        return self.by_initial[initial]

    def cell(self, initial: str, grown: str, metric: str = ACCURACY) -> stats.Summary:
        """A figure of a cell over its seeds."""
        return stats.summary(self.values[metric][initial, grown])


class OneLayer:
    """A model of one layer from scratch, against the three layers of the initial phase of the 2 x 2
    of losses, seed by seed.
    """

    def __init__(self, results: Results) -> None:
        runs = arms_of(results).runs.set_index("seed")
        three = Losses(read("losses"))
        self.seeds, self.epochs = len(runs), runs["epochs"].mean()
        self.end = {metric: stats.summary(runs[metric]) for metric in ENDS}
        self.three = {
            (cell, metric): stats.summary(three.first[metric][cell] - runs[metric])
            for cell in CELLS
            for metric in ENDS
        }


class Operators:
    """Growth operators: what happens at the growth, and where it ends."""

    def __init__(self, results: Results) -> None:
        runs = arms_of(results).runs
        self.runs = runs.assign(init=runs["config.growth.init"].astype(str))
        phases = results.phases[results.phases["validation_loss_after"].notna()]
        self.runs = self.runs.merge(
            phases[["run", *BOTH, "tokens_to_recovery"]],
            on="run",
        )
        by_seed = self.runs.pivot_table(index="seed", columns="init", values=ACCURACY)
        others = [name for name in by_seed if name != "random"]
        self.seeds = len(by_seed)
        made = judge(compared(by_seed[name], by_seed["random"], name) for name in others)
        self.against_random = {own.a: own for own in made}

    def rows(self) -> list[dict[str, Any]]:
        """One for each operator."""
        rows = []
        for init, arm in self.runs.groupby("init"):
            before, after = (arm[name] for name in BOTH)
            shock = after - before
            back = arm["tokens_to_recovery"].astype("float64")
            rows.append(
                {
                    "init": init,
                    "seeds": len(arm),
                    "shock": stats.summary(shock),
                    "values": shock.tolist(),
                    "recovered": int(back.notna().sum()),
                    "tokens": float(back.median()) if back.notna().all() else None,
                    "end": stats.summary(arm[ACCURACY]),
                    "loss": stats.summary(arm[LOSS]),
                    "against_random": self.against_random.get(str(init)),
                }
            )
        return sorted(rows, key=lambda row: row["shock"].mean)

    def pictures(self) -> list[Picture]:
        """The rise of the loss at the growth, by operator."""
        rows = [
            {
                "label": row["init"],
                "model": "",
                "mean": -row["shock"].mean,
                "low": -row["shock"].high,
                "high": -row["shock"].low,
                "seeds": [-value for value in row["values"]],
            }
            for row in self.rows()
        ]
        title = "The change of the loss at the growth"
        return [forest("growth-shock", title, rows, 0.0, "fall of the loss, nats (right: better)")]


class Depths:
    """What depth is worth by bytes, from scratch: the calibration of the study where depth pays."""

    def __init__(self, results: Results) -> None:
        runs = results.runs
        self.windows = int(runs["train_windows"].iloc[0])
        self.seq_len = int(runs["seq_len"].iloc[0])
        self.test_windows = int(runs["test_windows"].iloc[0])
        norms = runs.set_index("run")["config.model.norm"]
        self.epochs = results.epochs.assign(norm=results.epochs["run"].map(norms))

    def losses(self, norm: str, layers: int) -> list[float]:
        """The validation loss after each epoch, in nats a byte."""
        own = self.epochs[(self.epochs["norm"] == norm) & (self.epochs["layers"] == layers)]
        return own.sort_values("epoch")["validation_loss"].tolist()

    def rows(self) -> list[dict[str, Any]]:
        """One for each model."""
        which = self.epochs[["norm", "layers"]].drop_duplicates()
        return [
            {"norm": norm, "layers": layers, "losses": self.losses(norm, layers)}
            for norm, layers in sorted(which.itertuples(index=False))
        ]

    def gain(self, norm: str) -> float:
        """What six layers are better than two after the last epoch, in nats a byte."""
        return self.losses(norm, 2)[-1] - self.losses(norm, 6)[-1]


class Found(NamedTuple):
    """A comparison of the study where depth pays; its judgement is None before all seeds ended."""

    label: str
    pairs: stats.Pairs
    judged: stats.Judgement | None
    of_rises: bool = False

    @property
    def word(self) -> str:
        """What was found, of a rise of the loss that it is larger or smaller; empty without
        judgement.
        """
        if self.judged is None:
            return ""
        verdict = self.judged.verdict
        return RISES.get(verdict, str(verdict)) if self.of_rises else str(verdict)

    @property
    def text(self) -> str:
        """What is said of it."""
        if self.judged is None:
            return f"{interval(stats.summary(self.pairs.differences), 3, True)}, not judged"
        low, high = self.judged.interval[:2]
        size = f"{self.pairs.mean:+.3f} nats"
        if self.judged.verdict is stats.Verdict.same:
            size = f"within ±{self.pairs.margin:g} nats"
        confidence = words.percent(self.judged.interval.confidence)
        known = f"{confidence} interval {low:+.3f} to {high:+.3f}, {words.seeds_text(self.pairs)}"
        return f"**{self.word}**, {size} ({known})"


class Depth:
    """The study where depth pays: all arms of whole seeds, judged once when all seeds have ended.

    asked: of each question the comparisons that are made of this text.
    family: how many comparisons share the error.
    """

    def __init__(self, part: str, asked: Mapping[str, Collection[str]], family: int) -> None:
        self.part, self.family, results = part, family, read(part)
        runs = results.runs.assign(arm=results.runs["overrides"].map(arm_of))
        self.seeds = sorted(runs["seed"].unique())
        self.whole = len(self.seeds) == SEEDS
        last = results.phases.sort_values("phase").drop_duplicates("run", keep="last")
        last["selected"] = last["best_epoch"] - last["epochs"]  # from the end
        names = ["run", "selected", *(f"test_{name}" for name in ENDED)]
        self.runs = runs.merge(last[names], on="run")
        self.epochs = results.epochs
        self.flops = self.runs.groupby("arm")["flops"].mean()
        self.loss = self.runs.pivot_table(index="seed", columns="arm", values="test_loss")
        phases = results.phases.drop_duplicates("stage")
        seconds = phases["train_seconds"] + phases["evaluation_seconds"]
        self.hours = float(seconds.sum()) / 3600
        made: list[tuple[str, str, pd.Series]] = []
        for question, labels in asked.items():
            for label in labels:
                weights = DEPTH_QUESTIONS[question][label]
                better = sum(-weight * self.loss[arm] for arm, weight in weights.items())
                made.append((question, label, better))
        self.exits = Exits(part, "variant") if (FINDINGS / part / "exits.csv").exists() else None
        made += self._uses()
        pairs = [stats.paired(own, 0 * own, margin=NATS) for *_, own in made]
        judged: list[stats.Judgement | None] = [None] * len(pairs)
        if self.whole:
            judged[:] = stats.judge(pairs, stats.Levels(family, stats.ALPHA / family))
            if judged[0] is None or judged[0].verdict is not stats.Verdict.better:
                judged[1:] = [None] * (len(pairs) - 1)  # there is nothing to reach
        self.questions: dict[str, list[Found]] = {}
        for (question, label, _), pair, own in zip(made, pairs, judged, strict=True):
            found = Found(label, pair, own, question == USING_DEPTH)
            self.questions.setdefault(question, []).append(found)

    def _uses(self) -> Iterator[tuple[str, str, pd.Series]]:
        """Yield what the loss rises by without new layers, and with two swapped, more than in the
        model from scratch.
        """
        if not self.exits:
            return
        changed = self.exits.found.changed_layers
        changed = changed[(changed["change"] != "left out") | (changed["layer"] > 2)]
        rises = changed.pivot_table("loss_rise", "seed", ["change", "variant"])
        for change in USES:
            for name in USING:
                more = rises[change, name] - rises[change, CONTROL]
                yield USING_DEPTH, f"{name}: layers {change}", more

    def selected(self, arm: str) -> str:
        """Return the first and the last of the epochs that seeds selected in an arm."""
        own = self.runs[self.runs["arm"] == arm]
        first, last = (own["epochs"] + own["selected"]).agg(["min", "max"])
        return f"{first:.0f} to {last:.0f}" if first < last else f"{first:.0f}"

    def alike(self, arm: str, other: str) -> int:
        """Count the seeds in which two arms come to the same model."""
        return int((self.loss[arm] == self.loss[other]).sum())

    def size(self, name: str, word: str) -> str:
        """Return the size of a comparison, once it is seen that `word` is what was found."""
        found = dict(self.named())[name]
        assert found.word == word, f"{name} is {found.word}"
        return f"{abs(found.pairs.mean):.3f}"

    def named(self) -> Iterator[tuple[str, Found]]:
        """Yield all comparisons with a name that tells them apart without their question."""
        for question, comparisons in self.questions.items():
            for found in comparisons:
                yield f"{PICTURED.get(question, '')}{found.label}", found

    def replication(self, first: Depth) -> str:
        """Return which verdicts of the first text hold here, as the plan has it."""
        there = {name: found.judged for name, found in first.named()}
        said = []
        for name, found in self.named():
            judged, word = there[name], "open here"
            if judged is None or judged.verdict not in SETTLED:
                word = "nothing to replicate"
            elif found.judged and found.judged.verdict is judged.verdict:
                word = "replicated"
            elif found.judged and {found.judged.verdict, judged.verdict} == OPPOSITE:
                word = "contradicted"
            said.append((word, name))
        return by_word(said)

    def surviving(self, families: int) -> str:
        """Say how many verdicts stand at a level that pays for all families of the page, and name
        the others.
        """
        levels = stats.Levels(self.family, stats.ALPHA / self.family / families)
        settled = [(n, f) for n, f in self.named() if f.judged and f.judged.verdict in SETTLED]
        again = stats.judge([found.pairs for _, found in settled], levels)
        fallen = [
            (found.word, name)
            for (name, found), own in zip(settled, again, strict=True)
            if found.judged and own.verdict is not found.judged.verdict
        ]
        stand = f"{len(settled) - len(fallen)} of {len(settled)} verdicts"
        return f"{stand}; these fall: {by_word(fallen)}" if fallen else stand

    def pictures(self) -> list[Picture]:
        """Draw the comparisons, those of layers apart, and the loss on the way of some arms."""
        rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for name, found in self.named():
            sign = -1 if found.of_rises else 1  # what rises less is drawn on the right
            seeds = sign * found.pairs.differences
            row = {"label": name.replace("`", ""), "model": "", "seeds": seeds}
            if found.judged:
                low, high = sorted(sign * edge for edge in found.judged.interval[:2])
                row |= {"low": low, "high": high}
            rows[found.of_rises].append(row)
        title, unit = "What each comparison comes to", "better by, nats a byte"
        drawn = [forest(f"{self.part}-comparisons", title, rows[False], NATS, unit)]
        if self.exits:
            title, unit = "Layers left out and swapped", "the loss rises less by, nats a byte"
            drawn.append(forest(f"{self.part}-layers", title, rows[True], NATS, unit))
            drawn += self.exits.pictures(f"{self.part}-early-exit")
        curves = self.epochs.merge(self.runs[["run", "arm"]], on="run")
        # Not what is evaluated before the first step, nor the first epochs, far above the others.
        late = (curves["epoch"] > 0) & (curves["validation_loss"] < HIGHEST)
        # Without more epochs in a study that has no such arm.
        arms = [arm if arm in self.loss else arm.removesuffix(", more epochs") for arm in CURVES]
        curves = curves[curves["arm"].isin(arms) & late]
        curves = curves.assign(
            arm=pd.Categorical(curves["arm"].str.strip("`"), [arm.strip("`") for arm in arms]),
            at=curves["cumulative_epochs"], x=curves["flops"] / 1e12, y=curves["validation_loss"],
        )  # fmt: skip
        axes = "operations, T (10¹²)", "validation loss, nats a byte"
        way = "The loss on the way"
        return [*drawn, lines(f"{self.part}-curves", way, curves.sort_values("arm"), *axes)]

    def rows(self) -> list[dict[str, Any]]:
        """One for each arm, the lowest loss first."""
        rows = []
        for arm, own in self.runs.groupby("arm"):
            row = {"arm": arm, "epochs": own["epochs"].iloc[0], "flops": self.flops[arm]}
            row["selected"] = self.selected(arm)
            for name in ENDED:
                row[name] = stats.summary(own[f"test_{name}"])
            rows.append(row)
        return sorted(rows, key=lambda row: row["loss"].mean)


def by_word(said: Iterable[tuple[str, str]]) -> str:
    """Join comparisons: what was found stands once before those of which it was, and so does the
    budget that they are at, after those that have none.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for word, label in said:
        what, budget, which = label.partition(", at equal ")
        own = found.setdefault(word, {})
        own.setdefault(f"at equal {which} " if budget else "", []).append(what)
    return "; ".join(
        f"**{word}**: " + ", ".join(budget + ", ".join(own[budget]) for budget in sorted(own))
        for word, own in found.items()
    )


def arm_of(overrides: str) -> str:
    """Return the arm of the study where depth pays that these overrides are of."""
    kept = ("phase", "growth", "freeze", "added_layers")
    own = " ".join(text for text in overrides.split() if text.startswith(kept))
    return {text: name for name, text in DEPTH_ARMS.items()}[own]


class Exits:
    """What exits and layers are worth, as `proglayer.exits` measured it.

    by: the column that tells the arms apart.
    """

    def __init__(self, part: str, by: str) -> None:
        tables = {name: pd.read_csv(FINDINGS / part / f"{name}.csv") for name in TABLES}
        self.found, self.by = early_exit.Worth(**tables), by

    def of(self, arm: str, column: str) -> list[stats.Summary]:
        """A column of the table by exit, bottom first, over seeds."""
        own = self.found.exits[self.found.exits[self.by] == arm]
        return [stats.summary(layer[column]) for _, layer in own.groupby("layer")]

    def without(self, arm: str) -> list[stats.Summary]:
        """What the loss rises by without each layer, bottom first."""
        changed = self.found.changed_layers
        own = changed[(changed[self.by] == arm) & (changed["change"] == "left out")]
        return [stats.summary(layer["loss_rise"]) for _, layer in own.groupby("layer")]

    def difference(self, arm: str, exit: int, other: int) -> stats.Summary:
        """The difference in validation accuracy of two exits of the grown model, in points."""
        own = self.found.exits[self.found.exits[self.by] == arm]
        by = own.pivot_table("accuracy_percent", "seed", "layer")
        return stats.summary(by[exit] - by[other])

    def sentences(self) -> list[str]:
        """How many layers each model needs."""
        return [words.sentence(text) for text in words.needed_texts(self.found)]

    def pictures(self, name: str = "early-exit") -> list[Picture]:
        """Accuracy against layers used."""
        early = self.found.early_exit
        early = early.assign(at=early["threshold"], x=early["layers"], y=early["accuracy_percent"])
        early["arm"] = early[self.by].map(words.model_name).str.strip("`")
        axes = "layers used, mean over tokens", "validation accuracy (%)"
        return [lines(name, "Early exit", early, *axes)]


PARTS = {
    "depths": Depths,
    "claims": Claims,
    "wikitext": Wikitext,
    "losses": Losses,
    "one_layer": OneLayer,
    "operators": Operators,
    "timing": Timing,
    "rotating": Rotating,
}


def surviving(family: list[Comparison], families: int) -> list[str]:
    """Name what is settled in a family at a level that pays for all families of the page."""
    named = []
    for own in family:
        judged, name = own.judged, own.a if own.kind is Kind.ends else words.described_as(own)
        same = own.verdict is stats.Verdict.same
        p = judged.equivalence_p_adjusted if same else judged.p_adjusted
        if own.settled and p <= stats.ALPHA / families:
            named.append(f"{name}: {own.verdict}")
    return named


def interval(found: stats.Summary, digits: int = 2, sign: bool = False) -> str:
    """A mean with its 95 % interval."""
    form = f"{'+' if sign else ''}.{digits}f"
    if not found.n:
        return ""
    if not np.isfinite(found.low):
        return format(found.mean, form)
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def render(pictures: Path = FINDINGS) -> str:
    """Draw the pictures into a folder. Returns the text."""
    parts: dict[str, Any] = {part: made(read(part)) for part, made in PARTS.items()}
    parts |= {part: Settled(read(part), part) for part in ("asked", "settled")}
    parts["exits"] = Exits("exits", "model")
    parts["depth"] = Depth("depth", DEPTH_QUESTIONS, PLANNED)
    parts["depth_again"] = Depth("depth-again", AGAIN, sum(map(len, AGAIN.values())))
    studies = parts["depth"], parts["depth_again"]
    drawn = [parts[part] for part in ("claims", "operators", "timing", "exits")]
    for part in (*drawn, *studies):
        for picture in part.pictures():
            (pictures / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    families: list[list[Comparison]] = [
        parts["claims"].study.claims,
        parts["claims"].study.others,
        parts["losses"].effects,
        list(parts["operators"].against_random.values()),
        *([own] for own in parts["rotating"].found.values()),
        *(parts[part].rows for part in ("asked", "settled")),
    ]
    number = len(families) + len(studies)
    named = [own for family in families for own in surviving(family, number)]
    standing = {"At the founding size": "; ".join(named)}
    standing |= {TEXTS[study.part]: study.surviving(number) for study in studies}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FINDINGS),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "interval": interval,
        "fixed": lambda value, digits: f"{value + 0:.{digits}f}",
        "size": lambda value: f"{abs(value):.2f}",
        "thousands": lambda value: f"{value:,}",
    }
    return environment.get_template("findings.md.jinja").render(
        **parts,
        cells=CELLS,
        clause=words.clause,
        margin=MARGIN,
        nats=NATS,
        planned=PLANNED,
        using=(*USING, CONTROL),
        families=number,
        surviving=standing,
    )


def main(arguments: list[str]) -> None:
    """Take new data for the parts that the arguments name, then write the page."""
    for argument in arguments:
        part, _, folders = argument.partition("=")
        take(part, folders.split(","))
    (FINDINGS.parent / "findings.md").write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
