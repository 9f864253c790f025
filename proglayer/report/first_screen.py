"""The first screen of a report: a sentence for each claim, one picture, and what both rest on."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from proglayer.console import counted
from proglayer.report import comparisons, page, sequential, study
from proglayer.report.judged import MOST_CONDITIONS, Judged
from proglayer.report.page import Block
from proglayer.report.pictures import Gallery, forest
from proglayer.report.study import Frame, Margins, model_name, variant_name
from proglayer.results.formatting import listed

MOST_JUDGED = 12
# What two, three, ... equal looks make of 5 %: Armitage, McPherson & Rowe (1969).
LOOKS_PERCENT = (5.0, 8.3, 10.7, 12.6, 14.2)


def first_screen(judged: Judged, gallery: Gallery, looks_before: Sequence[int]) -> list[Block]:
    """One sentence for each claim, one picture of all of them, and what both rest on."""
    blocks: list[Block] = [page.Heading("What was found")]
    if not judged.conditions:
        return [*blocks, page.Paragraph("No run has completed yet: nothing can be concluded.")]
    claims, others = (own[own["n"] > 1] for own in (judged.claims, judged.others))
    by_claim = pd.concat(
        [judged.claims[judged.claims["claim"] == claim.title] for claim in comparisons.CLAIMS]
    )
    of_claims = _findings(judged, by_claim, ["claim", "condition"])
    parts: dict[str, list[Block]] = {}
    original = study.ORIGINAL in judged.arms.runs["experiment"].to_numpy()
    if len(others) and not (len(claims) and original):
        # A study of one's own: what it compares is what it is about.
        pairs = ["condition", "a", "b", "measured"]
        findings = _findings(judged, others.head(MOST_JUDGED), pairs)
        parts["The study's own comparisons"] = _shown(judged, gallery, "others", others, findings)
    if len(claims):
        own = _shown(judged, gallery, "claims", claims, of_claims)
        parts["The founding experiment's claims"] = own
    for title, inside in parts.items():
        blocks += [page.Heading(title, level=3)] if len(parts) > 1 else []
        blocks += inside
    singles = [text for c in judged.conditions if (text := _single_seeds(c.runs))]
    if parts:
        notes = [sequential.in_words(judged.looks)] if judged.looks else []
        notes += [
            f"On {condition.name}: {text}" if judged.several else text
            for condition in judged.conditions[:MOST_CONDITIONS]
            if (text := _noise_of_text(condition.runs, judged.margins))
        ]
        notes += filter(None, [_second_look(judged, looks_before)])
        blocks.append(page.Bullets([*notes, *singles], muted=True))
    else:
        nothing = "Nothing was compared: it takes two variants, or both models, of like seeds."
        blocks += [page.Paragraph(text) for text in singles or [nothing]]
    if not len(claims):
        title = "What it takes to test the founding experiment's claims"
        blocks.append(page.Collapsible(title, [page.Summary(of_claims, [])]))
    return blocks


def _findings(judged: Judged, made: Frame, by: list[str]) -> list[page.Finding]:
    """A finding for each claim or pair, in each condition."""
    claims = {claim.title: claim for claim in comparisons.CLAIMS}
    findings = []
    for _, rows in made.groupby(by, sort=False):
        first = rows.iloc[0]
        claim = claims.get(first["claim"])
        title, what = (
            (claim.title, claim.short) if claim else (comparisons.label(first), first["measured"])
        )
        on = f", on {first['condition']}" if judged.several else ""
        verdicts = list(dict.fromkeys(rows["verdict"]))
        findings.append(page.Finding(title, what + on, verdicts, comparisons.answer(rows)))
    return findings


def _shown(
    judged: Judged, gallery: Gallery, name: str, made: Frame, findings: Sequence[page.Finding]
) -> list[Block]:
    """What was found in these comparisons, one picture of them, and what it rests on."""
    rows = [
        {
            "label": comparisons.label(row)
            + (f", {row['measured']}" if row["measured"].startswith("at ") else "")
            + (f", on {row['condition']}" if judged.several else ""),
            **{name: row[name] for name in ("model", "mean", "low", "high")},
            "seeds": row["comparisons"][study.ACCURACY.name].differences,
        }
        for row in made.head(MOST_JUDGED).to_dict("records")
    ]
    margins, title = judged.margins, "Differences in accuracy"
    picture = forest(gallery, name, title, rows, margins.points, "points of accuracy")
    rests_on = [comparisons.how_judged(made, margins), *comparisons.limits(made)]
    return [
        page.Summary(findings, [picture]),
        *page.left_to("comparisons.csv", len(made) - MOST_JUDGED, "comparisons"),
        page.Bullets(rests_on, muted=True),
    ]


# --- what the findings rest on --------------------------------------------------------------------


def _single_seeds(runs: Frame) -> str:
    """That of one seed nothing can be concluded, and what its text alone leaves unsure."""
    single = study.single_seeds(runs)
    if single.empty:
        return ""
    errors = [
        f"{model_name(row.model)}: {row.accuracy_percent:.2f} % of {row.tokens:,} tokens, "
        f"±{row.error_points:.2g} points"
        for row in study.binomial_errors(single).itertuples()
    ]
    arms = zip(single["variant"].map(variant_name), single["model"].map(model_name), strict=True)
    names = listed([f"{variant} ({model})" for variant, model in arms], 6)
    of = f"One seed of {names}" if study.has_seeds(runs) else "One seed"
    return (
        f"{of}: nothing can be concluded. Another seed may give other figures; how much, one seed "
        "cannot show. The size of the text alone leaves the accuracy unsure by its binomial "
        "standard error" + (f" ({'; '.join(errors)})." if errors else ".")
    )


def _noise_of_text(runs: Frame, margins: Margins) -> str:
    """What the size of the text leaves unsure of every difference, and whether the margin is less.

    It belongs beside the margin, for seeds that read one text share it.
    """
    errors = study.binomial_errors(runs)
    if errors.empty:
        return ""
    tokens, error = errors["tokens"].min(), errors["error_of_difference"].max()
    why = ""
    if not (tested := runs["judged_on"].iloc[0] == "test"):
        windows = runs["test_windows"].notna()
        why = "not all have a test text" if windows.any() else "they have no test text"
        why = "some were tested on another text" if windows.all() else why
        why = f", which also chose the epochs of these runs ({why})"
    text = (
        f"Judged on {'a test' if tested else 'the validation'} text of {tokens:,} tokens{why}. "
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
    return text


def _second_look(judged: Judged, looks_before: Sequence[int]) -> str:
    """A warning where seeds were added to some that a report had already shown."""
    if judged.looks:
        return ""
    if sequential.sweeps_with_looks(judged.results):
        return (
            "Some of these runs are of a study that was looked at while seeds were added. "
            "Joined with others, its looks are not paid for here: its own report judges it."
        )
    if not looks_before:
        return ""
    error = LOOKS_PERCENT[min(len(looks_before), len(LOOKS_PERCENT) - 1)]
    seeds = listed(list(map(str, looks_before)), 20)
    return (
        f"Second look: {counted(len(looks_before), 'report')} (of {seeds} seeds) had already shown "
        "part of these runs when the others began. If more seeds were run because of what they "
        f"showed, false differences occur in up to about {error:g} % of such studies instead of "
        "5 %. Judge new seeds alone, or have hydra/sweeper=settle add seeds, which pays for its "
        "looks."
    )
