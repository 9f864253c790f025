"""The report of a study: verdicts, tables and pictures of any runs, as one page and as Markdown.

`python -m proglayer.report FOLDER... -o report/` writes `index.html` (self-contained), `report.md`,
`figures/` (SVG and PNG) and `tables/` (CSV). Nothing in it depends on when it was written: equal
runs give equal files. What the tables show of the study's frames is in `proglayer.report.tables`.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from proglayer import files
from proglayer.console import counted
from proglayer.errors import ConfigError
from proglayer.report import (
    comparisons,
    early_exit,
    growth,
    ledger,
    sequential,
    stats,
    study,
    tokenizers,
)
from proglayer.report.page import (
    Block,
    Bullets,
    Code,
    Collapsible,
    Finding,
    Heading,
    Paragraph,
    Picture,
    Pictures,
    SideBySide,
    Summary,
    Table,
    anchor,
    to_html,
    to_markdown,
)
from proglayer.report.pictures import (
    Gallery,
    against_compute,
    by_exit,
    forest,
    learning_curve,
    over_seeds,
)
from proglayer.report.study import DEEP, METRICS, STANDARD, Frame, Margins, model_name, variant_name
from proglayer.report.tables import (
    changes_table,
    comparisons_table,
    growth_table,
    model_table,
    parameters_table,
    phase_table,
    published_models_table,
    published_table,
    runs_table,
    speed_up_table,
    spent_table,
    target_table,
    tokenizers_table,
    unique,
    versions_table,
)
from proglayer.report.trials import study_files, trials_section
from proglayer.results import Results, load, plain_values, write_csv
from proglayer.results.formatting import listed, ranges, text_of
from proglayer.store.reading import read_yaml
from proglayer.store.record import RunState

PAGE = "index.html"
MARKDOWN = "report.md"
TITLE = "Study report"
FIGURES_IN = "figures"
TABLES_IN = "tables"
LOOKS = "looks"
# The overrides of Hydra's that say which jobs a sweep has.
OF_SWEEPER = ("hydra/sweeper", "hydra.sweeper")
# Settings of Hydra that name a function, which is then called.
NAMES_CODE = ("_target_", "custom_search_space")
# Whoever names the folder of a report.
NAMED_BY = "-o or hydra.run.dir"

NOT_SETTLED = (
    "The other comparisons are judged by plain tests with the seeds that the claims took. As that "
    "number followed from what was seen, they describe rather than settle."
)

# What a page can hold and a reader can read; the rest is counted, and whole in the tables.
MOST_CONDITIONS = 4
MOST_VARIANTS = 12
MOST_JUDGED = 12
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
) -> Path:
    """Read the runs in `folders` and write their report into the folder `out`.

    Args:
        folders: sweeps, runs, or piles of both; see `proglayer.results.load`.
        margins: differences within them count as none; None for the usual ones, or those of a
            study that was looked at again and again.
        png: draw each figure as PNG, too. It takes long, and the page has no use of it.

    Returns:
        the page's path.

    Raises:
        OSError: for a folder that is not there, or that cannot be written.
        ConfigError: if the folders hold no run at all, or for another margin than a study's own.
        RecordError: for looks at a study that cannot be read.
    """
    results = load(*folders)
    if results.runs.empty and not results.failures:
        raise ConfigError(f"no run in {', '.join(map(str, folders))}")
    looks = sequential.looks_of(results)
    if looks and margins and margins.points != looks.margin:
        raise ConfigError(
            f"--margin={margins.points:g}: this study was looked at with a margin of "
            f"{looks.margin:g} points: leave that out, or give --margin={looks.margin:g}"
        )
    out, margins = Path(out), margins or (Margins(points=looks.margin) if looks else Margins())
    seen = _seen(out)
    ours = _open_folder(out)
    report = _Report(results, Gallery(out / FIGURES_IN, ours, png), out, margins, looks, seen)
    lead, blocks = report.document()
    report.write_tables(ours)
    markdown = to_markdown(TITLE, lead, blocks).encode()
    files.write_over(out / MARKDOWN, markdown, ours, NAMED_BY)
    files.write_over(out / PAGE, to_html(TITLE, lead, blocks).encode(), ours, NAMED_BY)
    return out / PAGE


def _open_folder(out: Path) -> files.Ours:
    """Make a folder ready for a report, and give what knows the files of one there.

    It is a report's where the page is; a page that says so stands there until the report is done,
    which is written last. Raises NotOursError where other files have the names of a report's.
    """
    page = out / PAGE
    out.mkdir(parents=True, exist_ok=True)
    if not files.is_ours(page, _is_page):
        for name in (PAGE, MARKDOWN, FIGURES_IN, TABLES_IN):
            files.check_ours(out / name, lambda _: False, NAMED_BY)
    unfinished = f"<!DOCTYPE html>\n<title>{TITLE}</title>\n<p>It is being written.</p>\n"
    files.write_over(page, unfinished.encode(), _is_page, NAMED_BY)
    return lambda _: files.is_ours(page, _is_page)


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return f"<title>{TITLE}</title>".encode() in file.read(8192)


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

    @property
    def shown(self) -> list[str]:
        """The variants that a page has room for."""
        return self.variants[:MOST_VARIANTS]

    def of_shown(self, table: Frame) -> Frame:
        """The rows of these variants."""
        return table[table["variant"].isin(self.shown)]

    def more_variants(self, tables: str) -> list[Block]:
        """That a section does not show all variants, if it does not."""
        return _left_to(tables, len(self.variants) - MOST_VARIANTS, "variants")


@dataclass(frozen=True, eq=False)
class _Compute:
    """What the runs of one condition spent, and what they got for that."""

    spent: Frame
    reference: str  # the variant whose final loss is the target
    reached: Frame
    speed_up: Frame


class _Report:
    """One report in the making: what was read, what is drawn, the tables that go with it."""

    def __init__(
        self,
        results: Results,
        gallery: Gallery,
        out: Path,
        margins: Margins,
        looks: sequential.Looks | None,
        seen: _Seen | None,
    ) -> None:
        self.results = results
        self.gallery = gallery
        self.out = out
        self.margins = margins
        self.looks = looks
        self.arms = study.arms(results)
        self.looks_before = _looks_before(seen, self.arms.runs) if seen and not looks else []
        self.curves = ledger.curves(results, self.arms.runs)
        self.conditions = [
            self._condition(number, name) for number, name in enumerate(self.arms.conditions)
        ]
        # The largest first: it is what the study is about.
        self.conditions.sort(key=lambda condition: -len(condition.runs))
        claims, others = [], []
        for condition in self.conditions:
            own = comparisons.claimed(condition.asked, condition.curves, margins)
            rest = comparisons.others(condition.asked, own, margins)
            claims += [replace(question, condition=condition.name) for question in own]
            others += [replace(question, condition=condition.name) for question in rest]
        if looks is None:
            self.claims = comparisons.judge(claims)
        else:
            asked = [(condition.name, condition.asked) for condition in self.conditions]
            self.claims = sequential.judge(asked, self.curves, margins, looks)
        self.others = comparisons.judge(others)
        self.tokenizers = tokenizers.across(self.arms)
        self.compute = {c.number: self._compute(c) for c in self.conditions}

    def _condition(self, number: int, name: str) -> _Condition:
        runs = self.arms.of(number)
        curves = self.curves[self.curves["run"].isin(runs["run"])]
        arms = runs[["run", "variant", "model", "seed", "grows"]]
        return _Condition(number, name, runs, self.arms.asked(number), curves.merge(arms, on="run"))

    def _compute(self, condition: _Condition) -> _Compute:
        runs, curves = condition.runs, condition.curves
        original = study.plain_variant(runs, study.ORIGINAL)
        scratch = study.plain_variant(runs, study.FROM_SCRATCH)
        reference = scratch or original or condition.variants[0]
        return _Compute(
            ledger.spent(self.results, runs),
            reference,
            ledger.to_target(runs, curves, ledger.default_targets(runs, reference)),
            ledger.speed_up(runs, curves, study.controls(runs, study.FROM_SCRATCH)),
        )

    def write_tables(self, ours: files.Ours) -> None:
        """The frames of the results, and what was found in all conditions, as CSV."""
        folder = self.out / TABLES_IN
        self.results.to_csv(folder, ours)
        tables: dict[str, list[Frame]] = {LOOKS: [pd.DataFrame({"seeds": self.looks_before})]}

        def keep(name: str, condition: _Condition, table: Frame) -> None:
            if len(table):
                own = table.assign(condition=condition.name)
                columns = ["condition", *table.columns]
                tables.setdefault(name, []).append(own[columns])

        for condition in self.conditions:
            compute = self.compute[condition.number]
            keep("changes", condition, study.changes(condition.asked))
            keep("growth", condition, growth.growths(self.results, condition.runs))
            worth = early_exit.worth(condition.runs)
            keep("exits_worth", condition, worth.exits)
            keep("early_exit", condition, worth.early_exit)
            keep("changed_layers", condition, worth.changed_layers)
            keep("ledger", condition, compute.spent)
            keep("to_target", condition, compute.reached)
            keep("speed_up", condition, compute.speed_up)
        judged = pd.concat([self.claims, self.others], ignore_index=True)
        if len(judged):
            described, by_seed = comparisons.described(judged)
            tables["comparisons"] = [described]
            if len(by_seed):
                tables["differences"] = [by_seed]
        if len(self.tokenizers):
            tables["tokenizers"] = [self.tokenizers]
        for name, parts in tables.items():
            write_csv(pd.concat(parts, ignore_index=True), folder / f"{name}.csv", ours)

    # --- the document -----------------------------------------------------------------------------

    def document(self) -> tuple[str, list[Block]]:
        """The lead, and everything below it."""
        blocks: list[Block] = self._first_screen()
        # A reader of one run, or of single seeds, came for its figures.
        nothing = not any(len(own[own["n"] > 1]) for own in (self.claims, self.others))
        if between := self._between_tokenizers():
            title = "Between tokenizers"
            blocks.append(Collapsible(title, between, section=True, open=True))
        for title, section, tables in (
            ("The comparisons, in numbers", self._comparisons, "comparisons.csv"),
            (self._title_of_phases(), self._founding, "phases.csv"),
            ("From the first phase to the last", self._changes, "changes.csv"),
            ("At the moment of growth", self._growth, "growth.csv"),
            ("Learning curves", self._learning_curves, "epochs.csv and exits.csv"),
            ("What exits are worth", self._exits, "early_exit.csv and changed_layers.csv"),
            ("Compute", self._ledger, "ledger.csv, to_target.csv and speed_up.csv"),
        ):
            if inside := self._per_condition(section, tables):
                opened = nothing and section == self._founding
                blocks.append(Collapsible(title, inside, section=True, open=opened))
        runs = self.results.runs
        in_sweeps = runs.loc[runs["sweep"].notna(), "folder"]
        if trials := trials_section(study_files(in_sweeps), self.gallery):
            blocks.append(Collapsible("Search", trials, section=True, open=True))
        blocks.append(Collapsible("All runs", self._all_runs(), section=True))
        if ended := self._not_completed():
            blocks.append(Collapsible("What did not complete", ended, section=True, open=True))
        blocks.append(Collapsible("How to reproduce it", self._reproduce(), section=True))
        return self._lead(), blocks

    def _between_tokenizers(self) -> list[Block]:
        """Bits per byte of the texts that were cut by several tokenizers."""
        if self.tokenizers.empty:
            return []
        blocks: list[Block] = [
            Paragraph(
                "Loss, perplexity and accuracy are per token: between tokenizers they do not "
                "compare, and no comparison of theirs is made here. Bits per byte of the text do."
            )
        ]
        if self.tokenizers["mean"].isna().all():
            return [*blocks, Paragraph("None of these runs recorded them.")]
        blocks.append(tokenizers_table(self.tokenizers.head(MOST_RUNS)))
        return blocks + _left_to("tokenizers.csv", len(self.tokenizers) - MOST_RUNS, "arms")

    def _per_condition(
        self, section: Callable[[_Condition], list[Block]], tables: str
    ) -> list[Block]:
        """A section for every condition, each under its name if there are several.

        `tables` names where the rest of more than MOST_CONDITIONS is.
        """
        blocks: list[Block] = []
        for condition in self.conditions[:MOST_CONDITIONS]:
            inside = section(condition)
            if inside and len(self.conditions) > 1:
                blocks.append(Heading(f"On {condition.name}", level=3))
            blocks += inside
        others = self.conditions[MOST_CONDITIONS:]
        names = listed([c.name for c in others], 6)
        return blocks and blocks + _left_to(tables, len(others), "conditions", names)

    def _lead(self) -> str:
        runs = self.results.runs
        counts = Counter(runs["status"].tolist())
        how = ", ".join(f"{number:,} {status}" for status, number in sorted(counts.items()))
        parts = [f"{counted(len(runs), 'run')}{f' ({how})' if how else ''}"]
        if len(self.arms.runs):
            arms = self.arms.runs
            of = f"{counted(arms['variant'].nunique(), 'variant')} and "
            parts.append(of + counted(arms["model"].nunique(), "model"))
            parts.append(f"seeds {ranges(arms['seed'])}")
            parts.append("on " + listed([c.name for c in self.conditions], 3))
        return "; ".join(parts) + "."

    # --- the first screen -------------------------------------------------------------------------

    def _first_screen(self) -> list[Block]:
        """One sentence for each claim, one picture of all of them, and what both rest on."""
        blocks: list[Block] = [Heading("What was found")]
        if not self.conditions:
            return [*blocks, Paragraph("No run has completed yet: nothing can be concluded.")]
        singles = [text for condition in self.conditions if (text := _single_seeds(condition))]
        claims, others = (own[own["n"] > 1] for own in (self.claims, self.others))
        parts: dict[str, list[Block]] = {}
        original = study.ORIGINAL in self.arms.runs["experiment"].to_numpy()
        if len(others) and not (len(claims) and original):
            # A study of one's own: what it compares is what it is about.
            findings = self._findings_of_others(others.head(MOST_JUDGED))
            parts["The study's own comparisons"] = self._judged("others", others, findings)
        if len(claims):
            own = self._judged("claims", claims, self._findings())
            parts["The founding experiment's claims"] = own
        for title, inside in parts.items():
            blocks += [Heading(title, level=3)] if len(parts) > 1 else []
            blocks += inside
        notes = [sequential.in_words(self.looks)] if self.looks else []
        if len(claims) or len(others):
            for condition in self.conditions[:MOST_CONDITIONS]:
                prefix = f"On {condition.name}: " if len(self.conditions) > 1 else ""
                notes += [prefix + text for text in _noise_of_text(condition, self.margins)]
            notes += [text for text in (self._second_look(),) if text]
            blocks.append(Bullets([*notes, *singles], muted=True))
        else:
            nothing = "Nothing was compared: it takes two variants, or both models, of like seeds."
            blocks += [Paragraph(text) for text in singles or [nothing]]
        if not len(claims):
            title = "What it takes to test the founding experiment's claims"
            blocks.append(Collapsible(title, [Summary(self._findings(), [])]))
        return blocks

    def _judged(self, name: str, made: Frame, findings: Sequence[Finding]) -> list[Block]:
        """What was found in these comparisons, one picture of them, and what it rests on."""
        several = len(self.conditions) > 1
        rows = [
            {
                "label": comparisons.label(row)
                + (f", {row['measured']}" if row["measured"].startswith("at ") else "")
                + (f", on {row['condition']}" if several else ""),
                **{name: row[name] for name in ("model", "mean", "low", "high")},
                "seeds": row["comparisons"][study.ACCURACY.name].differences.tolist(),
            }
            for row in made.head(MOST_JUDGED).to_dict("records")
        ]
        title = "Differences in accuracy"
        margin = self.margins.points
        picture = forest(self.gallery, name, title, rows, margin, "points of accuracy")
        return [
            Summary(findings, [picture]),
            *_left_to("comparisons.csv", len(made) - MOST_JUDGED, "comparisons"),
            Bullets(
                [comparisons.how_judged(made, self.margins), *comparisons.limits(made)], muted=True
            ),
        ]

    def _second_look(self) -> str:
        if self.looks:
            return ""
        if sequential.sweeps_with_looks(self.results):
            return (
                "Some of these runs are of a study that was looked at while seeds were added. "
                "Joined with others, its looks are not paid for here: its own report judges it."
            )
        return _second_look(self.arms.runs, self.out, self.looks_before)

    def _findings(self) -> list[Finding]:
        findings = []
        for claim in comparisons.CLAIMS:
            own = self.claims[self.claims["claim"] == claim.title]
            for condition, rows in own.groupby("condition", sort=False):
                on = f", on {condition}" if len(self.conditions) > 1 else ""
                verdicts = list(dict.fromkeys(rows["verdict"]))
                sentence = comparisons.answer(rows)
                findings.append(Finding(claim.title, f"{claim.short}{on}", verdicts, sentence))
        return findings

    def _findings_of_others(self, made: Frame) -> list[Finding]:
        """A finding for each pair of variants, or of models, in each condition."""
        findings = []
        for _, rows in made.groupby(["condition", "a", "b", "measured"], sort=False):
            first = rows.iloc[0]
            on = f", on {first['condition']}" if len(self.conditions) > 1 else ""
            verdicts = list(dict.fromkeys(rows["verdict"]))
            sentence = comparisons.answer(rows)
            findings.append(
                Finding(comparisons.label(first), f"{first['measured']}{on}", verdicts, sentence)
            )
        return findings

    def _comparisons(self, condition: _Condition) -> list[Block]:
        """The claims in numbers, and every other comparison."""
        blocks: list[Block] = []
        claims = self.claims[self.claims["condition"] == condition.name]
        if (claims["n"] > 0).any():
            blocks.append(comparisons_table("The claims", claims[claims["comparisons"].map(bool)]))
            blocks.append(Bullets([f"{c.title}: {c.measured_by}." for c in comparisons.CLAIMS]))
        others = self.others[self.others["condition"] == condition.name]
        shown = others[others["a"].isin(condition.shown)]
        if len(shown):
            blocks.append(comparisons_table("The other comparisons", shown))
            if self.looks:
                blocks.append(_note(NOT_SETTLED))
        runs = condition.runs
        growing = runs.loc[runs["grows"], "variant"].unique().tolist()
        for experiment in (study.FROM_SCRATCH, study.KEEP_TRAINING):
            having = study.controls(runs, experiment)
            if lacking := [variant_name(v) for v in growing if having and v not in having]:
                blocks.append(
                    Paragraph(
                        f"For {listed(lacking, 6)} there is no run of "
                        f"“{variant_name(experiment)}” with the same depth and width: run "
                        f"experiment={experiment} with the same initial_layers, added_layers and "
                        "model.dim.",
                        muted=True,
                    )
                )
        pairs = shown[shown["model"] != ""].drop_duplicates(["a", "b"])
        differs = {b: study.differing(runs, b) for b in pairs["b"].unique()}
        items = [
            f"{comparisons.label(row)}: {differs[row['b']][row['a']]}"
            for row in pairs.to_dict("records")
            if differs[row["b"]].get(row["a"])
        ]
        if items:
            blocks.append(Collapsible("The settings in which the two differ", [Bullets(items)]))
        return blocks and blocks + condition.more_variants("comparisons.csv")

    # --- the founding experiment's tables ---------------------------------------------------------

    def _title_of_phases(self) -> str:
        published = any(_like_the_original(c.runs) for c in self.conditions)
        return "The founding experiment's tables" if published else "Phase by phase"

    def _founding(self, condition: _Condition) -> list[Block]:
        runs = condition.runs
        published = _like_the_original(runs)
        main = published or runs["variant"].iloc[0]
        blocks: list[Block] = []
        if published:
            own = runs[runs["variant"] == main]
            here = listed(unique(own["vocab_size"]), 3)
            padded = listed(unique(own["config.model.vocab_size"].dropna()), 3)
            others = study.differs_from_original(own)
            blocks.append(
                _note(
                    f"Published: {study.founding()['source']}. Here: {condition.name}, vocabulary "
                    f"{here}"
                    + (f" padded to {padded}" if padded else "")
                    + (f", with its own {listed(others, 6)}" if others else "")
                    + ". Figures of another text, vocabulary or machine do not compare with "
                    "the published ones; the signs of the changes do. Best epoch, accuracy and "
                    "perplexity are those of the phase's lowest validation loss; time is of "
                    "training and evaluation."
                )
            )
        blocks += self._tables_of(condition, main, bool(published))
        others = [variant for variant in condition.variants if variant != main]
        for variant in others[:MOST_VARIANTS]:
            inside = self._tables_of(condition, variant, published=False)
            blocks.append(Collapsible(variant_name(variant), inside))
        return blocks + _left_to("phases.csv", len(others) - MOST_VARIANTS, "variants")

    def _tables_of(self, condition: _Condition, variant: str, published: bool) -> list[Block]:
        runs = condition.runs[condition.runs["variant"] == variant]
        blocks: list[Block] = []
        for model in dict.fromkeys(runs["model"]):
            own = runs[runs["model"] == model]
            asked = condition.asked
            asked = asked[(asked["variant"] == variant) & (asked["model"] == model)]
            lacking = Counter(asked["lacks"].dropna())
            left_out = ", ".join(f"{count} {status}" for status, count in sorted(lacking.items()))
            title = f"{variant_name(variant)}, {model_name(model)}"
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
        changes = study.changes(condition.asked)
        if changes.empty:
            return []
        blocks: list[Block] = [_note("Plus is an improvement, in every metric.")]
        if len(changes) > len(METRICS):
            pictures = []
            for metric in METRICS:
                rows = condition.of_shown(changes[changes["metric"] == metric.name])
                rows = rows[rows["n"] > 0].to_dict("records")
                for row in rows:
                    arm = (condition.runs["variant"] == row["variant"]) & (
                        condition.runs["model"] == row["model"]
                    )
                    row["seeds"] = condition.runs.loc[arm, metric.change].dropna().tolist()
                    row["label"] = variant_name(row["variant"])
                title = f"{metric.heading}: mean, 95 % interval, and seeds"
                name = f"changes-{metric.name}{condition.slug}"
                margin = metric.margin(self.margins)
                pictures.append(forest(self.gallery, name, title, rows, margin, metric.unit))
            blocks.append(Pictures(pictures))
        blocks.append(changes_table(changes, condition.shown))
        return blocks + condition.more_variants("changes.csv")

    # --- growth -----------------------------------------------------------------------------------

    def _growth(self, condition: _Condition) -> list[Block]:
        growths = condition.of_shown(growth.growths(self.results, condition.runs))
        if growths.empty:
            return []
        several = growths.groupby(["variant", "model"])["phase"].nunique().max() > 1
        rows = []
        for (variant, model, phase), arm in growths.groupby(
            ["variant", "model", "phase"], sort=False
        ):
            shock = stats.summary(arm["shock_nats"])
            label = variant_name(variant) + (f", phase {phase}" if several else "")
            seeds = arm["shock_nats"].dropna().tolist()
            if shock.n:
                rows.append({"label": label, "model": model, "seeds": seeds, **vars(shock)})
        scratch = study.controls(condition.runs, study.FROM_SCRATCH)
        mixing = growth.mixing(condition.runs, condition.curves, scratch, self.margins.nats)
        blocks: list[Block] = [growth_table(growths, mixing)]
        if rows:
            title = "The loss at the moment of growth rose by: mean, 95 % interval, and seeds"
            name, margin = f"growth{condition.slug}", self.margins.nats
            picture = forest(self.gallery, name, title, rows, margin, "nats", better="left")
            blocks.insert(0, Pictures([picture]))
        return blocks + condition.more_variants("growth.csv") + self._timing(condition)

    def _timing(self, condition: _Condition) -> list[Block]:
        """When to grow, where that was varied, and how early the arms are in their final order."""
        blocks: list[Block] = []
        pictures: list[Picture] = []
        if found := growth.timings(condition.runs, condition.curves):
            blocks.append(Heading("When to grow", level=3))
            blocks += [Paragraph(timing.sentence()) for timing in found]
            over = max(timing.longest for timing in found) - 1
            blocks.append(
                _note(
                    "Losses are the lowest of the final depth within the operations that the "
                    f"shortest run spent; the longest spent {100 * over:.1f} % more. Differences "
                    "are paired by seed; their intervals hold together with 95 % for all pairs."
                )
            )
        for number, timing in enumerate(found[:MOST_MODELS], start=1):
            name = f"valley{condition.slug}-{number}"
            values = timing.losses.melt(var_name="x", value_name="y")
            title = f"{timing.title}: the loss against the moment of growth"
            x_label, y_label = "epochs before the growth", "validation loss (nats)"
            pictures.append(over_seeds(self.gallery, name, title, values, x_label, y_label))
        growing = condition.runs[condition.runs["grows"]]
        for model in condition.models[:MOST_MODELS]:
            arms = growing.loc[growing["model"] == model, "variant"].nunique()
            curves = condition.curves[condition.curves["model"] == model]
            if arms < growth.FEWEST_RANKED or (ranks := growth.ranking(curves)).empty:
                continue
            blocks.append(
                Paragraph(
                    f"{model_name(model)}: the order of the {curves['variant'].nunique()} arms is "
                    f"the final one in every seed from epoch {growth.settled(ranks)} of "
                    f"{ranks['step'].max()} on."
                )
            )
            name = _slug(f"ranking-{model}") + condition.slug
            values = ranks.rename(columns={"step": "x", "tau": "y"}).dropna()
            if len(values):
                title = f"{model_name(model)}: how early the arms are in their final order"
                x_label, y_label = "epochs trained", "Kendall's tau with the final order"
                pictures.append(over_seeds(self.gallery, name, title, values, x_label, y_label))
        return blocks + ([Pictures(pictures)] if pictures else [])

    # --- learning curves --------------------------------------------------------------------------

    def _learning_curves(self, condition: _Condition) -> list[Block]:
        phases: Frame = self.results.phases
        names = phases[["run", "phase", "name"]].rename(columns={"name": "phase_name"})
        curves = condition.curves.merge(names, on=["run", "phase"], how="left")
        curves["phase_name"] = curves["phase_name"].astype(object).fillna("")
        known = curves.loc[np.isfinite(curves["loss"]), "loss"]
        limits = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        exits = _ends_of_exits(self.results, condition)
        by_epoch: list[Picture] = []
        by_exits: list[Picture] = []
        for number, variant in enumerate(condition.shown):
            slug = f"{_slug(variant)}{condition.slug}" or str(number)
            own = curves[curves["variant"] == variant]
            if len(own):
                name = f"curve-{slug}"
                by_epoch.append(
                    learning_curve(self.gallery, name, variant_name(variant), own, limits)
                )
            own_exits = exits[exits["variant"] == variant]
            if len(own_exits):
                name = f"exits-{slug}"
                by_exits.append(by_exit(self.gallery, name, variant_name(variant), own_exits))
        blocks: list[Block] = []
        if by_epoch:
            blocks.append(Heading("Validation curves across phases", level=3))
            if study.has_seeds(condition.runs):
                blocks.append(
                    Paragraph(
                        "Lines are means over seeds, bands one standard deviation to each side, "
                        "as far as all seeds trained.",
                        muted=True,
                    )
                )
            blocks.append(Pictures(by_epoch))
        if by_exits:
            blocks.append(Heading("Accuracy by exit", level=3))
            blocks.append(
                _note(
                    "What the shared head reads at every depth, at the best epoch of the first "
                    "and the last phase; upright lines span the seeds."
                )
            )
            blocks.append(Pictures(by_exits))
        return blocks + condition.more_variants("epochs.csv and exits.csv")

    def _exits(self, condition: _Condition) -> list[Block]:
        """What `python -m proglayer.exits` measured of these runs, if it did."""
        found = early_exit.worth(condition.of_shown(condition.runs))
        if found.exits.empty:
            return []
        note = (
            "A token is predicted at the lowest exit that gives its guess at least so much "
            "probability, every layer having seen the tokens before. On the validation text; means "
            "over seeds with 95 % intervals."
        )
        pictures = early_exit.pictures(self.gallery, found, condition.slug)
        blocks = [Bullets(early_exit.sentences(found)), _note(note)]
        return [*blocks, Pictures(pictures), *condition.more_variants("early_exit.csv")]

    # --- compute ----------------------------------------------------------------------------------

    def _ledger(self, condition: _Condition) -> list[Block]:
        runs, found = condition.runs, self.compute[condition.number]
        blocks: list[Block] = [
            _note(
                "Of training, in all phases and all their epochs, as if every phase had been "
                "trained for this run alone; operations are the matrix products (a multiply-add "
                "is two). Means over the seeds that completed."
            ),
            spent_table(condition.of_shown(found.spent)),
        ]
        if len(condition.variants) > 1:
            blocks.append(target_table(condition.of_shown(found.reached), found.reference))
        if len(found.speed_up):
            blocks.append(speed_up_table(condition.of_shown(found.speed_up)))
        blocks += condition.more_variants("ledger.csv, to_target.csv and speed_up.csv")
        blocks.append(Heading("Loss against compute", level=3))
        if study.has_seeds(runs):
            blocks.append(
                _note(
                    "The loss of the model in hand: means over all seeds, epoch by epoch. A large "
                    "mark is the end of a phase, where its best epoch is restored; after it the "
                    "line shows what growing did."
                )
            )
        blocks.append(self._against_compute(condition, ledger.FLOPS))
        undrawn = [model_name(model) for model in condition.models[MOST_MODELS:]]
        blocks += _left_to("epochs.csv", len(undrawn), "models", listed(undrawn, 6))
        if len(condition.variants) > 1:
            others = (ledger.BODY, ledger.TOKENS, ledger.SECONDS)
            inside = [self._against_compute(condition, measure) for measure in others]
            title = "Against operations without the head, tokens and time"
            blocks.append(Collapsible(title, inside))
        trained = _trained_parameters(self.results, condition)
        return blocks + ([parameters_table(trained)] if len(trained) else [])

    def _against_compute(self, condition: _Condition, measure: ledger.Measure) -> Block:
        """Pictures of the loss against one measure, a model each."""
        pictures = []
        for model in condition.models[:MOST_MODELS]:
            curves = condition.of_shown(condition.curves)
            own = curves[curves["model"] == model]
            if own[measure.column].notna().any():
                name = _slug(f"loss-{model}-{measure.column}") + condition.slug
                title = f"{model_name(model)}: loss against {measure.name}"
                unit = f"{measure.name} ({measure.unit})" if measure.unit == "s" else measure.name
                pictures.append(
                    against_compute(
                        self.gallery, name, title, own, measure.column, unit, condition.shown
                    )
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
        unfinished: Frame = runs[
            ~runs["status"].isin([RunState.completed, RunState.running, RunState.waiting])
        ]
        blocks: list[Block] = []
        if len(unfinished):
            # Failures first: an interruption cures itself.
            unfinished = unfinished.sort_values("status", kind="stable")
            rows = [
                [row["run"], row["status"], text_of(row["overrides"]), text_of(row["reason"])]
                for row in unfinished.head(MOST_ENDED).to_dict("records")
            ]
            columns = [("Run", "name"), ("Status", "name")]
            columns += [("Overrides", "prose"), ("Reason", "prose")]
            title = "Runs that ended otherwise"
            blocks.append(Table(title, columns, rows, sortable=True))
            blocks += _left_to("runs.csv", len(unfinished) - MOST_ENDED, "runs")
            for row in (
                unfinished[unfinished["traceback"].notna()].head(MOST_TRACEBACKS).to_dict("records")
            ):
                text = row["traceback"]
                if len(text) > LONGEST_TRACEBACK:
                    text = f"...{text[-LONGEST_TRACEBACK:]}"
                blocks.append(Collapsible(f"Traceback of {row['run']}", [Code(text)]))
        left_out = self.results.left_out
        if len(left_out):
            rows = left_out[["folder", "kind", "reason"]].head(MOST_ENDED).to_numpy().tolist()
            columns = [("Folder", "name"), ("Kind", "name"), ("Reason", "prose")]
            blocks.append(Table("Left out, for it cannot be read", columns, rows))
            blocks += _left_to("left_out.csv", len(left_out) - MOST_ENDED, "folders")
        return blocks

    # --- how to reproduce it ----------------------------------------------------------------------

    def _reproduce(self) -> list[Block]:
        runs = self.results.runs
        commands = _commands(runs)
        blocks: list[Block] = []
        if commands:
            blocks.append(Code("\n".join(commands[:MOST_COMMANDS])))
            blocks += _left_to("runs.csv", len(commands) - MOST_COMMANDS, "commands")
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


def _like_the_original(runs: Frame) -> str | None:
    """The variant that the founding experiment's published figures stand beside, if there is one.

    The original, or else one with its settings.
    """
    alike = (
        str(variant)
        for variant, own in runs.groupby("variant", sort=False)
        if not study.differs_from_original(own)
    )
    return study.plain_variant(runs, study.ORIGINAL) or next(alike, None)


def _ends_of_exits(results: Results, condition: _Condition) -> Frame:
    """Accuracy by exit after the first and the last phase of each run."""
    exits = results.exits.drop(columns=["variant", "model", "seed"])
    exits = exits.merge(condition.runs[["run", "variant", "model", "seed", "phases"]])
    exits = exits.rename(columns={"validation_accuracy_percent": "accuracy_percent"})
    last = (exits["phase"] == exits["phases"]).fillna(False).astype(bool)
    first = (exits["phase"] == 1) & ~last
    shown = pd.concat([exits[first].assign(when="first"), exits[last].assign(when="last")])
    return shown.dropna(subset="accuracy_percent")


def _trained_parameters(results: Results, condition: _Condition) -> Frame:
    """What trains in each phase of each variant: layers, embedding, head; whatever the model."""
    runs = condition.of_shown(condition.runs).drop_duplicates("variant")
    padded = runs["config.model.vocab_size"].astype("float64")
    table = padded.fillna(runs["vocab_size"].astype("float64")) * runs["config.model.dim"]
    own = runs[["run", "variant"]].assign(table=table.astype("float64"))
    own["order"] = range(len(own))
    part: Frame = results.phases.drop(columns="variant").merge(own, on="run")
    part = part.sort_values(["order", "phase"], kind="stable")
    part["embedding"] = part["table"].where(part["rate_embedding"].notna(), 0.0)
    part["head"] = part["table"].where(part["rate_head"].notna(), 0.0)
    part["layers"] = part["parameters_trainable"].astype("float64") - part[
        ["embedding", "head"]
    ].sum(axis=1)
    part["total"] = part["parameters_total"].astype("float64")
    part["label"] = [
        f"{variant_name(variant)}, {phase} {text_of(name)}".rstrip()
        for variant, phase, name in zip(part["variant"], part["phase"], part["name"], strict=True)
    ]
    part = part[["label", "layers", "embedding", "head", "total"]].dropna()
    return part[(part["layers"] >= 0) & (part["total"] > 0)].reset_index(drop=True)


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
        words = shlex.join(filter(_only_sets, shlex.split(overrides or "")))
        commands[f"python train.py {words}".strip()] = None
    return list(commands)


def _sweep_command(folder: str) -> str | None:
    """What a sweep was started with, as Hydra recorded it; None where that cannot be read."""
    try:
        given = read_yaml(Path(folder, "multirun.yaml"))["hydra"]["overrides"]
        of_hydra = map(str, given.get("hydra") or [])
        words = [*of_hydra, *map(str, given["task"])]
        return f"python train.py -m {shlex.join(filter(_only_sets, words))}"
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _only_sets(override: str) -> bool:
    """Whether an override sets what a run or a search does, and names no code to run: a folder may
    come from elsewhere, and its command is there to be pasted.
    """
    key = override.lstrip("+~").partition("=")[0]
    if override.startswith("-") or any(name in override for name in NAMES_CODE):
        return False
    return not key.startswith("hydra") or key.startswith(OF_SWEEPER)


# --- sentences ------------------------------------------------------------------------------------


def _single_seeds(condition: _Condition) -> str:
    """That of one seed nothing can be concluded, and what its text alone leaves unsure."""
    single = study.single_seeds(condition.runs)
    if single.empty:
        return ""
    errors = [
        f"{model_name(row.model)}: {row.accuracy_percent:.2f} % of {row.tokens:,} tokens, "
        f"±{row.error_points:.2g} points"
        for row in study.binomial_errors(single).itertuples()
    ]
    arms = zip(single["variant"].map(variant_name), single["model"].map(model_name), strict=True)
    names = listed([f"{variant} ({model})" for variant, model in arms], 6)
    of = f"One seed of {names}" if study.has_seeds(condition.runs) else "One seed"
    return (
        f"{of}: nothing can be concluded. Another seed may give other figures; how much, one seed "
        "cannot show. The size of the text alone leaves the accuracy unsure by its binomial "
        "standard error" + (f" ({'; '.join(errors)})." if errors else ".")
    )


def _noise_of_text(condition: _Condition, margins: Margins) -> list[str]:
    """What the size of the text leaves unsure of every difference, and whether the margin is less.

    It belongs beside the margin, for seeds that read one text share it.
    """
    errors = study.binomial_errors(condition.runs)
    if errors.empty:
        return []
    tokens, error = errors["tokens"].min(), errors["error_of_difference"].max()
    tested = condition.runs["judged_on"].iloc[0] == "test"
    windows = condition.runs["test_windows"].notna()
    why = "some were tested on another text" if windows.all() else "not all have a test text"
    why = why if windows.any() else "they have no test text"
    text = (
        f"Judged on {'a test' if tested else 'the validation'} text of {tokens:,} tokens"
        f"{'' if tested else f', which also chose the epochs of these runs ({why})'}. "
        "Another text of that size would "
        f"move a difference with a standard error of about {error:.2g} points or less (McNemar's, "
        "for models that err unrelatedly; the more they agree, the less it is); more seeds do not "
        "lower that."
    )
    if margins.points < 2 * error:
        text += (
            f" The margin of {margins.points:g} points is below what this text can surely show: "
            "the verdicts hold for this text, not for the language."
        )
    return [text]


# What two, three, ... equal looks make of 5 %: Armitage, McPherson & Rowe (1969).
LOOKS_PERCENT = (5.0, 8.3, 10.7, 12.6, 14.2)


@dataclass(frozen=True)
class _Seen:
    """What an earlier report in the same folder had: of all runs, and of completed ones, the names
    of their folders; and how many seeds each report before it had, after which seeds were added.
    """

    listed: frozenset[str]
    completed: frozenset[str]
    looks: tuple[int, ...]


def _place(folder: str) -> str:
    """What a run's folder is called in its sweep's, from wherever the report is made."""
    return "/".join(Path(folder).parts[-2:])


def _seen(out: Path) -> _Seen | None:
    if not files.is_ours(out / PAGE, _is_page):
        return None
    try:
        runs = pd.read_csv(out / TABLES_IN / "runs.csv", usecols=["folder", "status"], dtype=str)
        looks = pd.read_csv(out / TABLES_IN / f"{LOOKS}.csv")["seeds"]
    except (OSError, ValueError, KeyError):
        return None
    completed = runs["folder"][runs["status"] == RunState.completed]
    return _Seen(
        frozenset(map(_place, runs["folder"])),
        frozenset(map(_place, completed)),
        tuple(int(seeds) for seeds in looks),
    )


def _looks_before(seen: _Seen, runs: Frame) -> list[int]:
    """How many seeds earlier reports of a part of these runs had when more seeds were added."""
    places = runs["folder"].map(_place)
    if not places.isin(seen.completed).any():
        return []
    runs = runs.assign(before=places.isin(seen.completed), added=~places.isin(seen.listed))
    arms = runs.groupby(["condition", "variant", "model"])[["before", "added"]].sum()
    more = arms[(arms["before"] > 1) & (arms["added"] > 0)]
    return [*seen.looks, *([int(more["before"].max())] if len(more) else [])]


def _second_look(runs: Frame, out: Path, looks_before: Sequence[int]) -> str:
    """A warning where seeds were added to some that a report had already shown."""
    batches: dict[str, list[Any]] = {}
    for row in runs[["sweep", "folder", "started", "ended"]].to_dict("records"):
        folder = Path(row["folder"])
        batch = folder.parent if isinstance(row["sweep"], str) else folder
        seen = batches.setdefault(str(batch), [row["started"], row["ended"]])
        seen[0], seen[1] = min(seen[0], row["started"]), max(seen[1], row["ended"])
    looks = len(looks_before)
    for batch, (_, ended) in batches.items():
        report = Path(batch) / "report" / PAGE
        later = any(started > ended for started, _ in batches.values())
        looks += later and report.is_file() and report.parent.resolve() != out.resolve()
    if not looks:
        return ""
    error = LOOKS_PERCENT[min(looks, len(LOOKS_PERCENT) - 1)]
    seeds = f" (of {listed(list(map(str, looks_before)), 20)} seeds)" if looks_before else ""
    return (
        f"Second look: {counted(looks, 'report')}{seeds} had already shown part of these runs when "
        "the others began. If more seeds were run because of what they showed, false differences "
        f"occur in up to about {error:g} % of such studies instead of 5 %. Judge new seeds alone, "
        "or have hydra/sweeper=settle add seeds, which pays for its looks."
    )


def _left_to(tables: str, number: int, noun: str, names: str = "") -> list[Block]:
    """What is not shown, if anything: how many, perhaps which, and in what tables they are."""
    if number <= 0:
        return []
    are = f"{noun} are" if number != 1 else f"{noun.removesuffix('s')} is"
    which = f" ({names})" if names else ""
    return [_note(f"{number:,} more {are} in tables/: {tables}{which}.")]


def _note(text: str) -> Block:
    return Paragraph(text, muted=True)


def _slug(text: str) -> str:
    return anchor(text)[:60].strip("-") or "arm"
