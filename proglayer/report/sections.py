"""The sections of a report below its first screen, in the order in which a reader asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd

from proglayer.report import comparisons, early_exit, growth, ledger, page, pictures, study, tables
from proglayer.report.judged import MOST_CONDITIONS, MOST_VARIANTS, Condition, Judged
from proglayer.report.page import Block
from proglayer.report.pictures import Gallery
from proglayer.report.study import DEEP, METRICS, STANDARD, Frame, model_name, variant_name
from proglayer.results import Results
from proglayer.results.formatting import listed

Section = Callable[[Judged, Condition, Gallery], list[Block]]


def sections(judged: Judged, gallery: Gallery) -> list[Block]:
    """What compares within a condition: a section each, and in it every condition."""
    # A reader of one run, or of single seeds, came for its figures.
    nothing = not any((own["n"] > 1).any() for own in (judged.claims, judged.others))
    blocks: list[Block] = []
    for title, section, files in (
        ("The comparisons, in numbers", _comparisons, "comparisons.csv"),
        ("Phase by phase", _phases, "phases.csv"),
        ("From the first phase to the last", _changes, "changes.csv"),
        ("At the moment of growth", _growth, "growth.csv"),
        ("Learning curves", _learning_curves, "epochs.csv and exits.csv"),
        ("What exits are worth", _exits, "early_exit.csv and changed_layers.csv"),
        ("Compute", _compute, "ledger.csv, to_target.csv and speed_up.csv"),
    ):
        if inside := _per_condition(judged, gallery, section, files):
            opened = nothing and section is _phases
            blocks.append(page.Collapsible(title, inside, section=True, open=opened))
    return blocks


def _per_condition(judged: Judged, gallery: Gallery, section: Section, files: str) -> list[Block]:
    """A section for every condition, under its name if there are several, and what it leaves to
    these tables.
    """
    blocks: list[Block] = []
    for condition in judged.conditions[:MOST_CONDITIONS]:
        if inside := section(judged, condition, gallery):
            blocks += [page.Heading(f"On {condition.name}", level=3)] if judged.several else []
            blocks += inside
            blocks += page.left_to(files, len(condition.variants) - MOST_VARIANTS, "variants")
    others = [condition.name for condition in judged.conditions[MOST_CONDITIONS:]]
    return blocks and blocks + page.left_to(files, len(others), "conditions", listed(others, 6))


# --- comparisons, phases, changes -----------------------------------------------------------------


def _comparisons(judged: Judged, condition: Condition, _: Gallery) -> list[Block]:
    """The claims in numbers, and every other comparison."""
    blocks: list[Block] = []
    claims = judged.claims[judged.claims["condition"] == condition.name]
    if (claims["n"] > 0).any():
        blocks.append(
            tables.comparisons_table("The claims", claims[claims["comparisons"].map(bool)])
        )
        blocks.append(page.Bullets([f"{c.title}: {c.measured_by}." for c in comparisons.CLAIMS]))
    others = judged.others[judged.others["condition"] == condition.name]
    shown = others[others["a"].isin(condition.shown)]
    if len(shown):
        blocks.append(tables.comparisons_table("The other comparisons", shown))
        if judged.looks:
            blocks.append(
                page.note(
                    "The other comparisons are judged by plain tests with the seeds that the "
                    "claims took. As that number followed from what was seen, they describe "
                    "rather than settle."
                )
            )
    runs = condition.runs
    growing = runs.loc[runs["grows"], "variant"].unique().tolist()
    for experiment in (study.FROM_SCRATCH, study.KEEP_TRAINING):
        having = study.controls(runs, experiment)
        if lacking := [variant_name(v) for v in growing if having and v not in having]:
            blocks.append(
                page.note(
                    f"For {listed(lacking, 6)} there is no run of “{variant_name(experiment)}” "
                    f"with the same depth and width: run experiment={experiment} with the same "
                    "initial_layers, added_layers and model.dim."
                )
            )
    pairs = shown[shown["model"] != ""].drop_duplicates(["a", "b"])
    differs = {b: study.differing(runs, b) for b in pairs["b"].unique()}
    items = [
        f"{comparisons.label(row)}: {settings}"
        for row in pairs.to_dict("records")
        if (settings := differs[row["b"]].get(row["a"]))
    ]
    if items:
        title = "The settings in which the two differ"
        blocks.append(page.Collapsible(title, [page.Bullets(items)]))
    return blocks


def _phases(judged: Judged, condition: Condition, _: Gallery) -> list[Block]:
    """The founding experiment's tables, beside those of its published run where that compares."""
    runs = condition.runs
    published = study.like_the_original(runs)
    main = published or runs["variant"].iloc[0]
    blocks: list[Block] = []
    if published:
        own = runs[runs["variant"] == main]
        padded = listed(tables.unique(own["config.model.vocab_size"].dropna()), 3)
        others = study.differs_from_original(own)
        blocks.append(
            page.note(
                f"Published: {study.founding()['source']}. Here: {condition.name}, vocabulary "
                f"{listed(tables.unique(own['vocab_size']), 3)}"
                + (f" padded to {padded}" if padded else "")
                + (f", with its own {listed(others, 6)}" if others else "")
                + ". Figures of another text, vocabulary or machine do not compare with the "
                "published ones; the signs of the changes do. Best epoch, accuracy and perplexity "
                "are those of the phase's lowest validation loss; time is of training and "
                "evaluation."
            )
        )
    blocks += _tables_of(judged, condition, main, bool(published))
    for variant in condition.shown:
        if variant != main:
            inside = _tables_of(judged, condition, variant, published=False)
            blocks.append(page.Collapsible(variant_name(variant), inside))
    return blocks


def _tables_of(judged: Judged, condition: Condition, variant: str, published: bool) -> list[Block]:
    """Each model's phases in one variant, and the models beside each other."""
    asked = condition.asked[condition.asked["variant"] == variant]
    runs = condition.runs[condition.runs["variant"] == variant]
    of_founding = [study.published(model) for model in (STANDARD, DEEP)] if published else []
    blocks: list[Block] = []
    for model, own in runs.groupby("model", sort=False):
        lacking = Counter(asked.loc[asked["model"] == model, "lacks"].dropna())
        left_out = ", ".join(f"{count} {status}" for status, count in sorted(lacking.items()))
        title = f"{variant_name(variant)}, {model_name(str(model))}"
        own_tables = [tables.phase_table(title, own, judged.results.phases, left_out)]
        own_tables += [
            tables.phase_table(f"Published, {model_name(model)}", other, phases)
            for other, phases in of_founding
            if other["model"].iloc[0] == model
        ]
        blocks.append(page.SideBySide(own_tables))
    if {STANDARD, DEEP} <= set(runs["model"]):
        own_tables = [tables.model_table(variant_name(variant), runs)]
        if published:
            own_tables.append(tables.model_table("Published", pd.concat(r for r, _ in of_founding)))
        blocks.append(page.SideBySide(own_tables))
    return blocks


def _changes(judged: Judged, condition: Condition, gallery: Gallery) -> list[Block]:
    changes = condition.tables["changes"]
    if changes.empty:
        return []
    blocks: list[Block] = [page.note("Plus is an improvement, in every metric.")]
    if len(changes) > len(METRICS):
        arms = condition.of_shown(condition.runs).groupby(["variant", "model"], sort=False)
        drawn = []
        for metric in METRICS:
            rows = [
                {"label": variant_name(variant), "model": model, "seeds": arm[metric.change]}
                for (variant, model), arm in arms
            ]
            title = f"{metric.heading}: mean, 95 % interval, and seeds"
            name = f"changes-{metric.name}{condition.slug}"
            margin = metric.margin(judged.margins)
            drawn.append(pictures.forest(gallery, name, title, rows, margin, metric.unit))
        blocks.append(page.Pictures(drawn))
    return [*blocks, tables.changes_table(condition.of_shown(changes))]


# --- growth ---------------------------------------------------------------------------------------


def _growth(judged: Judged, condition: Condition, gallery: Gallery) -> list[Block]:
    """What growing did at once; when to grow, and how early the arms are in their final order."""
    if condition.tables["growth"].empty:
        return []
    growths = condition.of_shown(condition.tables["growth"])
    several = growths.groupby(["variant", "model"])["phase"].nunique().max() > 1
    rows = [
        {
            "label": variant_name(variant) + (f", phase {phase}" if several else ""),
            "model": model,
            "seeds": arm["shock_nats"],
        }
        for (variant, model, phase), arm in growths.groupby(
            ["variant", "model", "phase"], sort=False
        )
    ]
    blocks: list[Block] = []
    margin = judged.margins.nats
    if growths["shock_nats"].notna().any():
        title = "The loss at the moment of growth rose by: mean, 95 % interval, and seeds"
        name = f"growth{condition.slug}"
        blocks.append(
            page.Pictures(
                [pictures.forest(gallery, name, title, rows, margin, "nats", better="left")]
            )
        )
    scratch = study.controls(condition.runs, study.FROM_SCRATCH)
    mixing = growth.mixing(condition.runs, condition.curves, scratch, margin)
    blocks.append(tables.growth_table(growths, mixing))
    return [*blocks, *_timing(condition, gallery), *_ranking(condition, gallery)]


def _timing(condition: Condition, gallery: Gallery) -> list[Block]:
    """The loss against the moment of growth, where that was varied."""
    found = growth.timings(condition.runs, condition.curves)
    if not found:
        return []
    over = max(timing.longest for timing in found) - 1
    drawn = [
        pictures.over_seeds(
            gallery,
            f"valley{condition.slug}-{number}",
            f"{timing.title}: the loss against the moment of growth",
            timing.losses.melt(var_name="x", value_name="y"),
            "epochs before the growth",
            "validation loss (nats)",
        )
        for number, timing in enumerate(found, start=1)
    ]
    return [
        page.Heading("When to grow", level=3),
        *(page.Paragraph(timing.sentence()) for timing in found),
        page.note(
            "Losses are the lowest of the final depth within the operations that the shortest run "
            f"spent; the longest spent {100 * over:.1f} % more. Differences are paired by seed; "
            "their intervals hold together with 95 % for all pairs."
        ),
        page.Pictures(drawn),
    ]


def _ranking(condition: Condition, gallery: Gallery) -> list[Block]:
    """From which epoch on the arms of each model are in their final order."""
    blocks: list[Block] = []
    drawn: list[page.Picture] = []
    growing = condition.runs[condition.runs["grows"]]
    for model in condition.models:
        curves = condition.curves[condition.curves["model"] == model]
        arms = growing.loc[growing["model"] == model, "variant"].nunique()
        if arms < growth.FEWEST_RANKED or (ranks := growth.ranking(curves)).empty:
            continue
        blocks.append(
            page.Paragraph(
                f"{model_name(model)}: the order of the {curves['variant'].nunique()} arms is the "
                f"final one in every seed from epoch {growth.settled(ranks)} of "
                f"{ranks['step'].max()} on."
            )
        )
        if len(values := ranks.rename(columns={"step": "x", "tau": "y"}).dropna()):
            name = f"ranking-{_slug(model)}{condition.slug}"
            title = f"{model_name(model)}: how early the arms are in their final order"
            x_label, y_label = "epochs trained", "Kendall's tau with the final order"
            drawn.append(pictures.over_seeds(gallery, name, title, values, x_label, y_label))
    return blocks + ([page.Pictures(drawn)] if drawn else [])


# --- curves, exits, compute -----------------------------------------------------------------------


def _learning_curves(judged: Judged, condition: Condition, gallery: Gallery) -> list[Block]:
    phases: Frame = judged.results.phases
    names = phases[["run", "phase", "name"]].rename(columns={"name": "phase_name"})
    curves = condition.curves.merge(names, on=["run", "phase"], how="left")
    curves["phase_name"] = curves["phase_name"].astype(object).fillna("")
    known = curves.loc[np.isfinite(curves["loss"]), "loss"]
    limits = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    exits = _ends_of_exits(judged.results, condition)
    by_epoch: list[page.Picture] = []
    by_exits: list[page.Picture] = []
    for variant in condition.shown:
        slug, title = _slug(variant) + condition.slug, variant_name(variant)
        if len(own := curves[curves["variant"] == variant]):
            by_epoch.append(pictures.learning_curve(gallery, f"curve-{slug}", title, own, limits))
        if len(own := exits[exits["variant"] == variant]):
            by_exits.append(pictures.by_exit(gallery, f"exits-{slug}", title, own))
    blocks: list[Block] = []
    if by_epoch:
        blocks.append(page.Heading("Validation curves across phases", level=3))
        if study.has_seeds(condition.runs):
            blocks.append(
                page.note(
                    "Lines are means over seeds, bands one standard deviation to each side, as far "
                    "as all seeds trained."
                )
            )
        blocks.append(page.Pictures(by_epoch))
    if by_exits:
        text = (
            "What the shared head reads at every depth, at the best epoch of the first and the "
            "last phase; upright lines span the seeds."
        )
        blocks += [
            page.Heading("Accuracy by exit", level=3),
            page.note(text),
            page.Pictures(by_exits),
        ]
    return blocks


def _ends_of_exits(results: Results, condition: Condition) -> Frame:
    """Accuracy by exit after the first and the last phase of each run."""
    exits: Frame = results.exits.drop(columns=["variant", "model", "seed"])
    exits = exits.merge(condition.runs[["run", "variant", "model", "seed", "phases"]], on="run")
    exits = exits.rename(columns={"validation_accuracy_percent": "accuracy_percent"})
    last = (exits["phase"] == exits["phases"]).astype(bool)
    exits["when"] = np.select([last, exits["phase"] == 1], ["last", "first"], "between")
    return exits[exits["when"] != "between"].dropna(subset="accuracy_percent")


def _exits(judged: Judged, condition: Condition, gallery: Gallery) -> list[Block]:
    """What `python -m proglayer.exits` measured of these runs, if it did."""
    names = "exits_worth", "early_exit", "changed_layers"
    found = early_exit.Worth(*(condition.of_shown(condition.tables[name]) for name in names))
    if found.exits.empty:
        return []
    text = (
        "A token is predicted at the lowest exit that gives its guess at least so much "
        "probability, every layer having seen the tokens before. On the validation text; means "
        "over seeds with 95 % intervals."
    )
    drawn = early_exit.pictures(gallery, found, condition.slug)
    return [page.Bullets(early_exit.sentences(found)), page.note(text), page.Pictures(drawn)]


def _compute(judged: Judged, condition: Condition, gallery: Gallery) -> list[Block]:
    spent, reached, speed_up = (
        condition.of_shown(condition.tables[name]) for name in ("ledger", "to_target", "speed_up")
    )
    several = len(condition.variants) > 1
    blocks: list[Block] = [
        page.note(
            "Of training, in all phases and all their epochs, as if every phase had been trained "
            "for this run alone; operations are the matrix products (a multiply-add is two). Means "
            "over the seeds that completed."
        ),
        tables.spent_table(spent),
        *([tables.target_table(reached, condition.reference)] if several else []),
        *([tables.speed_up_table(speed_up)] if len(speed_up) else []),
        page.Heading("Loss against compute", level=3),
    ]
    if study.has_seeds(condition.runs):
        blocks.append(
            page.note(
                "The loss of the model in hand: means over all seeds, epoch by epoch. A large mark "
                "is the end of a phase, where its best epoch is restored; after it the line shows "
                "what growing did."
            )
        )
    blocks.append(_against(condition, gallery, ledger.FLOPS))
    if several:
        others = (ledger.BODY, ledger.TOKENS, ledger.SECONDS)
        inside = [_against(condition, gallery, measure) for measure in others]
        title = "Against operations without the head, tokens and time"
        blocks.append(page.Collapsible(title, inside))
    return blocks


def _against(condition: Condition, gallery: Gallery, measure: ledger.Measure) -> Block:
    """Pictures of the loss against one measure, a model each."""
    drawn = []
    curves = condition.of_shown(condition.curves).dropna(subset=measure.column)
    for model, own in curves.groupby("model", sort=False):
        name = f"loss-{_slug(f'{model}-{measure.column}')}{condition.slug}"
        title = f"{model_name(str(model))}: loss against {measure.name}"
        unit = f"{measure.name} ({measure.unit})" if measure.unit == "s" else measure.name
        drawn.append(
            pictures.against_compute(
                gallery, name, title, own, measure.column, unit, condition.shown
            )
        )
    return page.Pictures(drawn)


def _slug(text: str) -> str:
    """Text as a part of the name of a picture."""
    return page.anchor(text)[:60].strip("-") or "arm"
