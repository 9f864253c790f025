"""The report of a study: verdicts, tables and pictures of any runs, as one page and as Markdown.

`python -m proglayer.report FOLDER... -o report/` writes `index.html` (self-contained), `report.md`,
`figures/` (SVG and PNG) and `tables/` (CSV). Nothing in it depends on when it was written: equal
runs give equal files. What the tables show of the study's frames is in `proglayer.report.tables`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from proglayer.report import ledger, study
from proglayer.report.page import (
    Block,
    Bullets,
    Code,
    Collapsible,
    Heading,
    Paragraph,
    Picture,
    Pictures,
    SideBySide,
    Table,
    Verdict,
    to_html,
    to_markdown,
)
from proglayer.report.pictures import (
    MOST_LINES,
    Gallery,
    against_compute,
    by_exit,
    course,
    forest,
    model_name,
    parameters,
)
from proglayer.report.study import DEEP, METRICS, STANDARD, Frame, Margins
from proglayer.report.tables import (
    changes_table,
    comparisons_table,
    model_table,
    parameters_table,
    phase_table,
    published_models_table,
    published_table,
    runs_table,
    speed_up_table,
    spent_table,
    target_table,
    unique,
    versions_table,
)
from proglayer.results.columns import COMPLETED, RUNNING, WAITING
from proglayer.results.formatting import listed, ranges, text_of
from proglayer.results.frames import Results, load, plain_values, write_csv

PAGE = "index.html"
MARKDOWN = "report.md"
TITLE = "Study report"

# What a page can hold and a reader can read; the rest is counted, and whole in the tables.
MOST_CONDITIONS = 4
MOST_VARIANTS = 12
MOST_MODELS = 4
MOST_RUNS = 500
MOST_ENDED = 100
MOST_TRACEBACKS = 10
MOST_COMMANDS = 20
LONGEST_TRACEBACK = 4_000


def write_report(
    folders: Sequence[str | Path],
    out: str | Path,
    margins: Margins | None = None,
    *,
    png: bool = True,
    overwrite: bool = True,
) -> Path:
    """Read the runs in `folders` and write their report into the folder `out`.

    Args:
        folders: sweeps, runs, or piles of both; see `proglayer.results.load`.
        margins: differences within them count as none.
        png: draw each figure as PNG, too. It takes long, and the page has no use of it.
        overwrite: also a report in `out` that was made from the very same runs by this very code;
            without it such a report is left as it is.

    Returns:
        the page's path.

    Raises:
        OSError: for a folder that is not there, or that cannot be written.
        ValueError: if the folders hold no run at all.
    """
    results = load(*folders)
    if results.runs.empty and results.left_out.empty:
        raise ValueError(f"no run in {', '.join(map(str, folders))}")
    out, margins = Path(out), margins or Margins()
    page = out / PAGE
    mark = f"<!-- made from {_all_it_depends_on(results, margins)} -->\n"
    if not overwrite and page.is_file() and page.read_bytes().endswith(mark.encode()):
        return page
    out.mkdir(parents=True, exist_ok=True)
    # It is written last, and so it being there means that the rest is, too.
    page.unlink(missing_ok=True)
    report = _Report(results, Gallery(out / "figures", png), out, margins)
    lead, blocks = report.document()
    report.write_tables()
    (out / MARKDOWN).write_text(to_markdown(TITLE, lead, blocks), encoding="utf-8")
    page.write_text(to_html(TITLE, lead, blocks, end=mark), encoding="utf-8")
    return page


def _all_it_depends_on(results: Results, margins: Margins) -> str:
    """A hash of what was read of the runs, how their sweeps were started, the margins, the code."""
    digest = hashlib.sha256(f"{margins} {results.fingerprint()}".encode())
    in_sweeps = results.runs.loc[results.runs["sweep"].notna(), "folder"]
    started = {Path(folder).parent / "multirun.yaml" for folder in in_sweeps.tolist()}
    code = [
        p for p in Path(__file__).parent.parent.rglob("*") if p.suffix in (".py", ".css", ".js")
    ]
    for path in (*sorted(started), *sorted(code)):
        digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class _Condition:
    """The runs that compare with each other, and their courses."""

    number: int
    name: str
    runs: Frame
    asked: Frame  # these, and those of their arms that did not complete
    curves: Frame

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(self.runs["variant"]))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(self.runs["model"]))

    @property
    def slug(self) -> str:
        return f"-{self.number + 1}" if self.number else ""


# What each variant is set against: an experiment, what that is, and how a control of the size of
# another variant is run.
REFERENCES = (
    (study.ORIGINAL, "the original", ""),
    (study.KEEP_TRAINING, "training on without growth", "initial_layers and model.dim"),
    (study.FROM_SCRATCH, "from scratch", "initial_layers, added_layers and model.dim"),
)


@dataclass(frozen=True, eq=False)
class _Findings:
    """What the runs of one condition say: the frames that its tables and pictures show."""

    hypotheses: list[study.Hypothesis]
    changes: Frame
    deep_minus_standard: dict[str, Frame]  # by the name of the figure
    against: dict[str, dict[str, Frame]]  # by the reference's experiment, then as above
    spent: Frame
    reference: str  # the variant whose loss is the target
    reached: Frame
    speed_up: Frame


class _Report:
    """One report in the making: what was read, what is drawn, the tables that go beside it."""

    def __init__(self, results: Results, gallery: Gallery, out: Path, margins: Margins) -> None:
        self.results = results
        self.gallery = gallery
        self.out = out
        self.margins = margins
        self.arms = study.arms(results)
        self.curves = ledger.curves(results, self.arms.runs)
        self.conditions = [
            self._condition(number, name) for number, name in enumerate(self.arms.conditions)
        ]
        # The largest first: it is what the study is about.
        self.conditions.sort(key=lambda condition: -len(condition.runs))
        self.findings = {c.number: self._findings(c) for c in self.conditions}

    def _condition(self, number: int, name: str) -> _Condition:
        runs = self.arms.of(number)
        curves = self.curves[self.curves["run"].isin(runs["run"])]
        told = runs[["run", "variant", "model", "seed", "grows"]]
        asked = self.arms.asked(number)
        return _Condition(number, name, runs, asked, curves.merge(told, on="run"))

    def _findings(self, condition: _Condition) -> _Findings:
        runs, asked, curves = condition.runs, condition.asked, condition.curves
        original = study.plain_variant(runs, study.ORIGINAL)
        scratch = study.plain_variant(runs, study.FROM_SCRATCH)
        reference = scratch or original or condition.variants[0]
        against: dict[str, dict[str, Frame]] = {}
        for experiment, _, _ in REFERENCES:
            references = study.controls(asked, experiment)
            if experiment == study.ORIGINAL:
                others = [v for v in condition.variants if v != original]
                references = dict.fromkeys(others, original) if original else {}
            if references:
                against[experiment] = {
                    metric.name: study.against(asked, references, metric, self.margins)
                    for metric in METRICS
                }
        return _Findings(
            hypotheses=study.hypotheses(asked, curves, self.margins),
            changes=study.changes(asked),
            deep_minus_standard={
                metric.name: study.deep_minus_standard(asked, metric, self.margins)
                for metric in METRICS
            },
            against=against,
            spent=ledger.spent(self.results, runs),
            reference=reference,
            reached=ledger.to_target(runs, curves, ledger.default_targets(runs, curves, reference)),
            speed_up=ledger.speed_up(runs, curves, study.controls(runs, study.FROM_SCRATCH)),
        )

    def write_tables(self) -> None:
        """The frames of the results, and what was found in all conditions, as CSV."""
        folder = self.out / "tables"
        self.results.to_csv(folder)
        tables: dict[str, list[Frame]] = {}

        def keep(name: str, condition: _Condition, table: Frame, **front: str) -> None:
            if len(table):
                front = {"condition": condition.name} | front
                own = table.drop(columns=list(front), errors="ignore")
                for place, (column, value) in enumerate(front.items()):
                    own.insert(place, column, value)
                tables.setdefault(name, []).append(own)

        for condition in self.conditions:
            found = self.findings[condition.number]
            for hypothesis in found.hypotheses:
                keep("hypotheses", condition, hypothesis.rows)
            keep("changes", condition, found.changes)
            for metric, table in found.deep_minus_standard.items():
                keep("deep_minus_standard", condition, table, metric=metric)
            for by_figure in found.against.values():
                for metric, table in by_figure.items():
                    keep("against", condition, table, metric=metric)
            keep("ledger", condition, found.spent)
            keep("to_target", condition, found.reached)
            keep("speed_up", condition, found.speed_up)
        for name, parts in tables.items():
            write_csv(pd.concat(parts, ignore_index=True), folder / f"{name}.csv")

    # --- the document -----------------------------------------------------------------------------

    def document(self) -> tuple[str, list[Block]]:
        """The lead, and everything below it."""
        blocks: list[Block] = []
        if self.conditions:
            blocks.append(Heading("What the data say"))
            blocks += self._per_condition(self._verdicts)
            for title, section, tables in (
                ("The founding experiment's tables", self._founding, "phases.csv"),
                ("From the first phase to the last", self._changes, "changes.csv"),
                ("Against the original and the controls", self._against, "against.csv"),
                ("Courses of training", self._courses, "epochs.csv and exits.csv"),
                ("Compute ledger", self._ledger, "ledger.csv, to_target.csv and speed_up.csv"),
            ):
                if inside := self._per_condition(section, tables):
                    blocks += [Heading(title), *inside]
        else:
            blocks.append(Heading("What the data say"))
            blocks.append(Paragraph("No run has completed yet: there is nothing to conclude from."))
        blocks.append(Heading("All runs"))
        blocks += self._all_runs()
        blocks += self._not_completed()
        blocks.append(Heading("How to reproduce it"))
        blocks += self._reproduce()
        return self._lead(), blocks

    def _per_condition(
        self, section: Callable[[_Condition], list[Block]], tables: str = ""
    ) -> list[Block]:
        """A section for every condition, each under its name if there are several.

        Of more than MOST_CONDITIONS only the verdicts are told; where the rest is, `tables` names.
        """
        blocks: list[Block] = []
        for condition in self.conditions[:MOST_CONDITIONS]:
            inside = section(condition)
            if inside and len(self.conditions) > 1:
                blocks.append(Heading(f"On {condition.name}", level=3))
            blocks += inside
        others = self.conditions[MOST_CONDITIONS:]
        if others and not tables:
            blocks += [Collapsible(f"On {c.name}", section(c)) for c in others]
        elif others and blocks:
            names = listed([c.name for c in others], 6)
            blocks.append(_left_to(tables, len(others), "conditions", names))
        return blocks

    def _lead(self) -> str:
        runs = self.results.runs
        counts = Counter(runs["status"].tolist())
        how = ", ".join(f"{number:,} {status}" for status, number in sorted(counts.items()))
        parts = [f"{_count(len(runs), 'run')}{f' ({how})' if how else ''}"]
        if len(self.arms.runs):
            arms = self.arms.runs
            of = f"{_count(arms['variant'].nunique(), 'variant')} and "
            parts.append(of + _count(arms["model"].nunique(), "model"))
            parts.append(f"seeds {ranges(arms['seed'])}")
            parts.append("on " + listed([c.name for c in self.conditions], 3))
        return "; ".join(parts) + "."

    # --- verdicts ---------------------------------------------------------------------------------

    def _verdicts(self, condition: _Condition) -> list[Block]:
        runs, margins = condition.runs, self.margins
        found = self.findings[condition.number].hypotheses
        blocks: list[Block] = []
        cards: list[Block] = []
        single = study.single_seeds(runs)
        if len(single):
            told = [
                f"{model_name(row.model)}: {row.accuracy_percent:.2f} % of {row.tokens:,} tokens, "
                f"±{row.error_points:.2f} points"
                for row in study.binomial_errors(single).itertuples()
            ]
            arms = zip(single["variant"], single["model"].map(model_name), strict=True)
            names = listed([f"{variant} ({model})" for variant, model in arms], 6)
            of = f"One seed of {names}" if study.has_seeds(runs) else "One seed"
            blocks.append(
                Paragraph(
                    f"{of}: nothing can be concluded. How much a figure would change with "
                    "another seed is not known; the size of the validation set alone leaves the "
                    "accuracy unsure by its binomial standard error"
                    + (f" ({'; '.join(told)})." if told else ".")
                )
            )
        for hypothesis in found:
            findings = [
                (row.verdict, f"{row.what}{f', {model_name(row.model)}' if row.model else ''}",
                 row.sentence)
                for row in hypothesis.rows.itertuples()
            ]  # fmt: skip
            if not findings:
                told = f"nothing to compare: it takes {hypothesis.missing}, with the same seeds"
                findings = [(hypothesis.outcome, "no completed runs of both", told)]
            cards.append(
                Verdict(hypothesis.outcome, hypothesis.title, hypothesis.measured_by, findings)
            )
        compared = sum(len(hypothesis.rows) for hypothesis in found)
        if not compared:
            title = "The founding experiment's claims: undecided, and what it takes to judge them"
            return [*blocks, Collapsible(title, cards)]
        blocks += cards
        blocks.append(
            Paragraph(
                f"A difference within ±{margins.points:g} points of accuracy counts as none "
                f"(perplexity: ±{margins.percent:.3g} %; loss: ±{margins.nats:g} nats). "
                "Supported and refuted: a difference at the 5 % level; equivalent: shown to lie "
                "within the margin; undecided is neither, and no finding of no difference. All "
                f"comparisons above ({compared}) are one family, corrected by Holm; intervals are "
                "of 95 % each, over seeds.",
                muted=True,
            )
        )
        return blocks

    # --- the founding experiment's tables ---------------------------------------------------------

    def _founding(self, condition: _Condition) -> list[Block]:
        runs = condition.runs
        alike = [
            v
            for v, own in runs.groupby("variant", sort=False)
            if not study.differs_from_original(own)
        ]
        original = study.plain_variant(runs, study.ORIGINAL)
        main = original or (alike[0] if alike else runs["variant"].iloc[0])
        blocks: list[Block] = []
        published = bool(original or alike)
        if published:
            own = runs[runs["variant"] == main]
            here = listed(unique(own["vocab_size"]), 3)
            padded = listed(unique(own["config.model.vocab_size"].dropna()), 3)
            others = study.differs_from_original(own)
            blocks.append(
                Paragraph(
                    f"Published: {study.founding()['source']}. Here: {condition.name}, vocabulary "
                    f"{here}"
                    + (f" padded to {padded}" if padded else "")
                    + (f", with its own {listed(others, 6)}" if others else "")
                    + ". Figures of another text, vocabulary or machine do not compare with "
                    "the published ones; the signs of the changes do. Best epoch, accuracy and "
                    "perplexity are those of the phase's lowest validation loss; time is of "
                    "training and evaluation.",
                    muted=True,
                )
            )
        blocks += self._tables_of(condition, main, published)
        others = [variant for variant in condition.variants if variant != main]
        for variant in others[:MOST_VARIANTS]:
            blocks.append(
                Collapsible(variant, self._tables_of(condition, variant, published=False))
            )
        if len(others) > MOST_VARIANTS:
            blocks.append(_left_to("phases.csv", len(others) - MOST_VARIANTS, "variants"))
        return blocks

    def _tables_of(self, condition: _Condition, variant: str, published: bool) -> list[Block]:
        runs = condition.runs[condition.runs["variant"] == variant]
        blocks: list[Block] = []
        for model in dict.fromkeys(runs["model"]):
            own = runs[runs["model"] == model]
            asked = condition.asked
            asked = asked[(asked["variant"] == variant) & (asked["model"] == model)]
            lacking = Counter(asked["lacks"].dropna())
            left_out = ", ".join(f"{count} {status}" for status, count in sorted(lacking.items()))
            title = f"{variant}, {model_name(model)}"
            tables = [phase_table(title, own, self.results.phases, left_out)]
            if published and model in study.founding()["published"]:
                tables.append(published_table(model))
            blocks.append(SideBySide(tables))
        if {STANDARD, DEEP} <= set(runs["model"]):
            tables = [model_table(variant, runs)]
            if published:
                tables.append(published_models_table())
            blocks.append(SideBySide(tables))
        return blocks

    # --- changes ----------------------------------------------------------------------------------

    def _changes(self, condition: _Condition) -> list[Block]:
        found = self.findings[condition.number]
        changes = found.changes
        if changes.empty:
            return []
        blocks: list[Block] = [Paragraph("Plus is an improvement, in every figure.", muted=True)]
        shown = condition.variants[:MOST_VARIANTS]
        if len(changes) > len(METRICS):
            pictures = []
            for metric in METRICS:
                rows = changes[(changes["metric"] == metric.name) & changes["variant"].isin(shown)]
                title = f"Change in {metric.name}: mean and 95 % interval"
                margin = metric.margin(self.margins)
                name = f"changes-{metric.name}{condition.slug}"
                pictures.append(forest(self.gallery, name, title, rows, margin, metric.unit))
            blocks.append(Pictures(pictures))
        blocks.append(changes_table(changes, shown))
        blocks += _cut(condition, "changes.csv and deep_minus_standard.csv")
        for metric in METRICS:
            told = found.deep_minus_standard[metric.name]
            if told.empty:
                continue
            table = comparisons_table(
                f"Change in {metric.name}, deep supervision − Standard, paired by seed, in "
                f"{metric.unit}",
                told,
                metric,
                {"variant": "Variant"},
                shown,
            )
            if metric is study.ACCURACY:
                blocks.append(table)
            else:
                blocks.append(Collapsible(f"The same for {metric.name}", [table]))
        return blocks

    def _against(self, condition: _Condition) -> list[Block]:
        """Each variant against the original, and against the controls of its size."""
        against = self.findings[condition.number].against
        blocks: list[Block] = []
        shown = condition.variants[:MOST_VARIANTS]
        growing = condition.runs.loc[condition.runs["grows"], "variant"].unique().tolist()
        for experiment, words, size in REFERENCES:
            if experiment not in against:
                continue
            found = against[experiment]
            blocks.append(Heading(f"Against {words}", level=3))
            first = next(iter(found.values()))
            alone = first["b"].nunique() == 1
            reference = first["b"].iloc[0] if alone else "its control"
            labels = {"a": "Variant", "model": "Model"} | ({} if alone else {"b": "Control"})
            for metric in METRICS:
                title = (
                    f"Final {metric.name}, variant − {reference}, paired by seed, in "
                    f"{metric.unit}; plus: the variant is better"
                )
                table = comparisons_table(title, found[metric.name], metric, labels, shown)
                if metric is study.ACCURACY:
                    blocks.append(table)
                else:
                    blocks.append(Collapsible(f"The same for {metric.name}", [table]))
            alone_standing = [v for v in growing if v not in set(first["a"])]
            if size and alone_standing:
                blocks.append(
                    Paragraph(
                        f"No such control of their depth and width was run for "
                        f"{listed(alone_standing, 6)}: it takes experiment={experiment} with their "
                        f"{size}.",
                        muted=True,
                    )
                )
            told = first[first["a"].isin(shown) & (first["differs"] != "")].drop_duplicates("a")
            items = [f"{row.a}, {row.b}: {row.differs}" for row in told.itertuples()]
            if items:
                blocks.append(Collapsible("The settings in which the two differ", [Bullets(items)]))
        return blocks + (_cut(condition, "against.csv") if blocks else [])

    # --- courses ----------------------------------------------------------------------------------

    def _courses(self, condition: _Condition) -> list[Block]:
        shown = condition.variants[:MOST_VARIANTS]
        phases: Frame = self.results.phases
        names = phases[["run", "phase", "name"]].rename(columns={"name": "phase_name"})
        curves = condition.curves.merge(names, on=["run", "phase"], how="left")
        curves["phase_name"] = curves["phase_name"].astype(object).fillna("")
        exits = _ends_of_exits(self.results, condition)
        courses: list[Picture] = []
        by_exits: list[Picture] = []
        for number, variant in enumerate(shown):
            slug = f"{_slug(variant)}{condition.slug}" or str(number)
            own = curves[curves["variant"] == variant]
            if len(own):
                name = self._free(f"course-{slug}")
                courses.append(course(self.gallery, name, variant, own))
            own_exits = exits[exits["variant"] == variant]
            if len(own_exits):
                name = self._free(f"exits-{slug}")
                by_exits.append(by_exit(self.gallery, name, variant, own_exits))
        blocks: list[Block] = []
        if courses:
            blocks.append(Heading("Validation curves across phases", level=3))
            if study.has_seeds(condition.runs):
                most = condition.runs.groupby(["variant", "model"]).size().max()
                first = f"the first {MOST_LINES} " if most > MOST_LINES else ""
                blocks.append(
                    Paragraph(
                        f"Thin lines are {first}seeds; the thick line with marks is the mean of "
                        "all of them, as far as all of them trained.",
                        muted=True,
                    )
                )
            blocks.append(Pictures(courses))
        if by_exits:
            blocks.append(Heading("Accuracy by exit", level=3))
            blocks.append(
                Paragraph(
                    "What the shared head reads at every depth, at the best epoch of the first "
                    "and the last phase; upright lines span the seeds.",
                    muted=True,
                )
            )
            blocks.append(Pictures(by_exits))
        return blocks + _cut(condition, "epochs.csv and exits.csv")

    def _free(self, name: str) -> str:
        """A file name that no picture has yet."""
        number, free = 1, name
        while free in self.gallery.names:
            number += 1
            free = f"{name}-{number}"
        return free

    # --- compute ----------------------------------------------------------------------------------

    def _ledger(self, condition: _Condition) -> list[Block]:
        runs, found = condition.runs, self.findings[condition.number]
        shown = condition.variants[:MOST_VARIANTS]
        blocks: list[Block] = [
            Paragraph(
                "Of training, in all phases and all their epochs, as if every phase had been "
                "trained for this run alone; operations are the matrix products (a multiply-add "
                "is two). Means over the seeds that completed.",
                muted=True,
            ),
            spent_table(found.spent[found.spent["variant"].isin(shown)]),
        ]
        if len(condition.variants) > 1:
            reached = found.reached[found.reached["variant"].isin(shown)]
            blocks.append(target_table(reached, found.reference))
        if len(found.speed_up):
            gains = found.speed_up[found.speed_up["variant"].isin(shown)]
            blocks.append(speed_up_table(gains))
        blocks += _cut(condition, "ledger.csv, to_target.csv and speed_up.csv")
        blocks.append(Heading("Loss against compute", level=3))
        if study.has_seeds(runs):
            blocks.append(
                Paragraph(
                    "Means over all seeds, epoch by epoch; a seed that has stopped counts with "
                    "what it spent and reached.",
                    muted=True,
                )
            )
        blocks.append(self._against_compute(condition, ledger.FLOPS))
        if undrawn := condition.models[MOST_MODELS:]:
            names = listed([model_name(model) for model in undrawn], 6)
            blocks.append(_left_to("epochs.csv", len(undrawn), "models", names))
        if len(condition.variants) > 1:
            others = (ledger.BODY, ledger.TOKENS, ledger.SECONDS)
            inside = [self._against_compute(condition, measure) for measure in others]
            title = "Against operations without the head, tokens and time"
            blocks.append(Collapsible(title, inside))
        trained = _trained_parameters(self.results, condition, shown)
        if len(trained):
            title = "Parameters that train, phase by phase"
            blocks.append(Heading(title, level=3))
            blocks.append(parameters_table(trained))
            name = f"parameters{condition.slug}"
            blocks.append(Pictures([parameters(self.gallery, name, title, trained)]))
        return blocks

    def _against_compute(self, condition: _Condition, measure: ledger.Measure) -> Block:
        """Pictures of the loss against one measure, a model each."""
        shown = condition.variants[:MOST_VARIANTS]
        pictures = []
        for model in condition.models[:MOST_MODELS]:
            own = condition.curves[
                (condition.curves["model"] == model) & condition.curves["variant"].isin(shown)
            ]
            if own[measure.column].notna().any():
                name = _slug(f"loss-{model}-{measure.column}") + condition.slug
                name = self._free(name)
                title = f"{model_name(model)}: loss against {measure.name}"
                unit = f"{measure.name} ({measure.unit})" if measure.unit == "s" else measure.name
                pictures.append(
                    against_compute(self.gallery, name, title, own, measure.column, unit, shown)
                )
        return Pictures(pictures)

    # --- runs -------------------------------------------------------------------------------------

    def _all_runs(self) -> list[Block]:
        runs = self.results.runs
        variants = dict(zip(self.arms.runs["run"], self.arms.runs["variant"], strict=True))
        return [runs_table(runs.head(MOST_RUNS), len(runs), variants)]

    def _not_completed(self) -> list[Block]:
        """Runs that ended otherwise, and what could not be read, with reasons."""
        runs = self.results.runs
        told: Frame = runs[~runs["status"].isin([COMPLETED, RUNNING, WAITING])]
        blocks: list[Block] = []
        if len(told):
            # Failures first: an interruption cures itself.
            told = told.sort_values("status", kind="stable")
            rows = [
                [row["run"], row["status"], text_of(row["overrides"]), text_of(row["reason"])]
                for row in told.head(MOST_ENDED).to_dict("records")
            ]
            columns = [("Run", "name"), ("Status", "name")]
            columns += [("Overrides", "prose"), ("Reason", "prose")]
            title = "Runs that ended otherwise"
            blocks.append(Table(title, columns, rows, sortable=True))
            if len(told) > MOST_ENDED:
                blocks.append(_left_to("runs.csv", len(told) - MOST_ENDED, "runs"))
            for row in told[told["traceback"].notna()].head(MOST_TRACEBACKS).to_dict("records"):
                text = row["traceback"]
                if len(text) > LONGEST_TRACEBACK:
                    text = f"...{text[-LONGEST_TRACEBACK:]}"
                blocks.append(Collapsible(f"Traceback of {row['run']}", [Code(text)]))
        left_out = self.results.left_out
        if len(left_out):
            rows = left_out[["folder", "kind", "reason"]].head(MOST_ENDED).to_numpy().tolist()
            columns = [("Folder", "name"), ("Kind", "name"), ("Reason", "prose")]
            blocks.append(Table("Left out, for it cannot be read", columns, rows))
            if len(left_out) > MOST_ENDED:
                blocks.append(_left_to("left_out.csv", len(left_out) - MOST_ENDED, "folders"))
        return [Heading("What did not complete"), *blocks] if blocks else []

    # --- how to reproduce it ----------------------------------------------------------------------

    def _reproduce(self) -> list[Block]:
        runs = self.results.runs
        commands = _commands(runs)
        blocks: list[Block] = []
        if commands:
            blocks.append(Code("\n".join(commands[:MOST_COMMANDS])))
            if len(commands) > MOST_COMMANDS:
                blocks.append(_left_to("runs.csv", len(commands) - MOST_COMMANDS, "commands"))
        blocks.append(versions_table(runs))
        blocks.append(
            Bullets(
                [
                    "The same seeds on the same kind of machine, with the same number of threads "
                    "and the same versions, give the same figures bit for bit; elsewhere they "
                    "differ by rounding.",
                    "tables/ beside this page holds the runs, phases, epochs and exits, and every "
                    "comparison made here, as CSV; figures/ holds the pictures as SVG"
                    f"{' and PNG' if self.gallery.png else ''}.",
                ]
            )
        )
        return blocks


# --- frames ---------------------------------------------------------------------------------------


def _ends_of_exits(results: Results, condition: _Condition) -> Frame:
    """Accuracy by exit after the first and the last phase of each run."""
    exits = results.exits.merge(condition.runs[["run", "variant", "model", "seed", "phases"]])
    exits = exits.rename(columns={"validation_accuracy_percent": "accuracy_percent"})
    last = (exits["phase"] == exits["phases"]).fillna(False).astype(bool)
    first = (exits["phase"] == 1) & ~last
    told = pd.concat([exits[first].assign(when="first"), exits[last].assign(when="last")])
    return told.dropna(subset="accuracy_percent")


def _trained_parameters(results: Results, condition: _Condition, shown: Sequence[str]) -> Frame:
    """What trains in each phase of each variant: layers, embedding, head; whatever the model."""
    runs = condition.runs[condition.runs["variant"].isin(shown)].drop_duplicates("variant")
    padded = runs["config.model.vocab_size"].astype("float64")
    table = padded.fillna(runs["vocab_size"].astype("float64")) * runs["config.model.dim"]
    own = runs[["run", "variant"]].assign(table=table.astype("float64"))
    own["order"] = range(len(own))
    told: Frame = results.phases.merge(own, on="run").sort_values(["order", "phase"], kind="stable")
    told["embedding"] = told["table"].where(told["rate_embedding"].notna(), 0.0)
    told["head"] = told["table"].where(told["rate_head"].notna(), 0.0)
    told["layers"] = told["parameters_trainable"].astype("float64") - told[
        ["embedding", "head"]
    ].sum(axis=1)
    told["total"] = told["parameters_total"].astype("float64")
    told["label"] = [
        f"{variant}, {phase} {text_of(name)}".rstrip()
        for variant, phase, name in zip(told["variant"], told["phase"], told["name"], strict=True)
    ]
    told = told[["label", "layers", "embedding", "head", "total"]].dropna()
    return told[(told["layers"] >= 0) & (told["total"] > 0)].reset_index(drop=True)


def _commands(runs: Frame) -> list[str]:
    """The command of each sweep, and of each run that was none of a sweep's."""
    commands: dict[str, None] = {}
    swept: dict[str, str | None] = {}
    columns = [plain_values(runs[name]) for name in ("sweep", "folder", "overrides")]
    for sweep, folder, overrides in zip(*columns, strict=True):
        if sweep is not None:
            if sweep not in swept:
                swept[sweep] = _sweep_command(os.path.dirname(folder))
            if swept[sweep] is not None:
                commands[str(swept[sweep])] = None
                continue
        commands[f"python train.py {overrides or ''}".strip()] = None
    return list(commands)


def _sweep_command(folder: str) -> str | None:
    """What a sweep was started with, as Hydra recorded it; None where that cannot be read."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with open(os.path.join(folder, "multirun.yaml"), encoding="utf-8") as file:
            given = yaml.load(file, loader)["hydra"]["overrides"]["task"]
        return f"python train.py -m {shlex.join(map(str, given))}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        return None


# --- words ----------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _left_to(tables: str, number: int, noun: str, names: str = "") -> Paragraph:
    """What is not shown: how many, perhaps which, and in what tables they are."""
    are = f"{noun} are" if number != 1 else f"{noun.removesuffix('s')} is"
    which = f" ({names})" if names else ""
    return Paragraph(f"{number:,} more {are} in tables/: {tables}{which}.", muted=True)


def _cut(condition: _Condition, tables: str) -> list[Block]:
    """That a section does not show all variants, if it does not."""
    more = len(condition.variants) - MOST_VARIANTS
    return [_left_to(tables, more, "variants")] if more > 0 else []


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "arm"
