"""What the committed studies of docs/findings say does not move.

`verdicts.json` holds their figures as the code gave them before it was rebuilt. What has changed
since: epoch 0 of a grown phase, the model before its first step, no longer counts as an epoch of
training where a loss is reached; and differences in loss are a - b, so that a minus is better.
"""

from __future__ import annotations

import json
import math
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from proglayer.report import arms, measures, sequential, study
from proglayer.report.comparisons import Comparison
from proglayer.results import Results

from ..helpers import ROOT

FINDINGS = ROOT / "docs" / "findings"
GOLDEN = json.loads((Path(__file__).parent / "verdicts.json").read_text())


def read(part: str) -> Results:
    """The data of a part, as scripts/findings.py wrote them."""
    with zipfile.ZipFile(FINDINGS / part / "frames.zip") as own:
        frames = {
            name: pd.read_parquet(BytesIO(own.read(f"{name}.parquet")))
            for name in ("runs", "phases", "epochs", "exits", "left_out")
        }
    return Results(**frames)


def rows(frame: pd.DataFrame, *names: str) -> list[list[Any]]:
    """The names of each row as text, then its numbers."""
    numbers = [c for c in frame if c not in names and pd.api.types.is_numeric_dtype(frame[c].dtype)]
    return [
        [*(str(row[name]) for name in names), *(row[name] for name in numbers)]
        for row in frame.to_dict("records")
    ]


def figures(own: Comparison) -> dict[str, Any]:
    pairs, judged = own.accuracy, own.judged
    found = {
        **{name: getattr(own, name) for name in ("condition", "a", "b", "model")},
        "claim": own.claim and own.claim.name,
        "kind": "none" if own.not_made and not own.b else own.kind.name,
        "budgets": [budget.name for budget in own.budgets],
        "verdict": own.verdict.name,
        "left_out": dict(pairs.left_out),
        "n": pairs.n,
        "interval": [*judged.interval],
        "alone": [*judged.alone][:2],
        "p": [pairs.p, judged.p_adjusted, pairs.equivalence_p, judged.equivalence_p_adjusted],
        "levels": [judged.levels.family, judged.levels.each] if pairs.n > 1 else None,
        "look": own.look,
    }
    if own.pairs:
        found["accuracy"] = [pairs.mean, pairs.sd, pairs.margin]
        found["loss"] = [own.loss.mean, own.loss.sd]
        found["text"] = own.text
    return found


def figures_of(condition: study.Condition) -> dict[str, Any]:
    runs, curves = condition.runs, condition.curves
    text = runs["judged_on"].iloc[0]
    ends = [f"last_{text}_{name}" for name in ("accuracy_percent", "loss", "bits_per_byte")]
    ends += [metric.change(text) for metric in arms.Metric]
    grouped = runs.groupby(["variant", "model"], sort=False)
    growths = condition.tables["growth"].drop(columns=["seed", "run", "layers"])
    growths = growths.groupby(["variant", "model", "phase"], sort=False).mean().reset_index()
    return {
        "name": condition.name,
        "lacking": len(condition.asked) - len(runs),
        "arms": rows(
            grouped[ends].mean().assign(n=grouped.size()).reset_index(), "variant", "model"
        ),
        "ledger": rows(condition.tables["ledger"], "variant", "model"),
        "speed_up": rows(condition.tables["speed_up"], "variant", "model"),
        "growths": rows(growths, "variant", "model"),
        "timings": [
            [t.best, t.budget, t.longest, t.losses.mean().tolist(), list(t.shares.values())]
            for t in measures.timings(runs, curves)
        ],
    }


def all_figures(part: str) -> dict[str, Any]:
    results, looks = read(part), sequential.read_looks(FINDINGS / part)
    judged = study.judge_study(results, looks.margin if looks else arms.MARGIN, looks)
    return {
        "conditions": [figures_of(own) for own in judged.conditions],
        "claims": [figures(own) for own in judged.claims],
        "others": [figures(own) for own in judged.others],
    }


def plain(value: Any) -> Any:
    """Numbers as JSON has them, with seven digits."""
    if isinstance(value, dict):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.7g}") if math.isfinite(value) else str(float(value))
    return value.item() if isinstance(value, np.generic) else value


def assert_same(found: Any, frozen: Any, where: str) -> None:
    if isinstance(frozen, dict):
        assert found.keys() == frozen.keys(), where
        for key in frozen:
            assert_same(found[key], frozen[key], f"{where}.{key}")
    elif isinstance(frozen, list):
        assert len(found) == len(frozen), where
        for number, pair in enumerate(zip(found, frozen, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(frozen, float):
        assert found == pytest.approx(frozen, rel=1e-5, abs=1e-9), where
    else:
        assert found == frozen, where


@pytest.mark.parametrize("part", GOLDEN)
def test_the_verdicts_of_the_findings_do_not_move(part: str) -> None:
    assert_same(plain(all_figures(part)), GOLDEN[part], part)
