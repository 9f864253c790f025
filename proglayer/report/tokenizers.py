"""What arms come to with different tokenizers, in the one measure that compares: bits per byte.

A loss, a perplexity and an accuracy are per token, so they hold within one tokenizer only: runs of
different tokenizers are different conditions, which nothing else in a report compares.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from proglayer.report import stats
from proglayer.report.study import Arms, Frame
from proglayer.results.formatting import tokenizer_of

# The settings by which one text becomes other tokens or windows.
_OF_TOKENS = ("tokenizer", "tokenizer_revision", "lowercase", "min_count", "max_vocab")
_OF_WINDOWS = ("seq_len", "samples", "validation_samples", "cache_dir")
_NOT_THE_TEXT = {f"config.data.{name}" for name in (*_OF_TOKENS, *_OF_WINDOWS)}


def across(arms: Arms) -> Frame:
    """The arms of each text that was cut by several tokenizers.

    Returns:
        one row per text, tokenizer, condition, variant and model: `text` (a number), `tokenizer`,
        `condition` (its name), `variant`, `model`, `seeds`; `mean` and `sd` of the bits per byte on
        the text that is judged on (nan where they are not recorded); `bytes` of that text; the
        share `unknown` of its words; and of the difference to the first tokenizer of the same
        text, within seeds, `difference`, `low` and `high` (95 % interval).
    """
    runs = arms.runs
    names = ["text", "tokenizer", "condition", "variant", "model"]
    if runs.empty:
        return pd.DataFrame(columns=names)
    text = [c for c in runs if c.startswith("config.data.") and c not in _NOT_THE_TEXT]
    runs = runs.assign(
        text=runs.groupby(["corpus", *text], dropna=False, sort=False).ngroup(),
        tokenizer=[tokenizer_of(row) for row in runs.to_dict("records")],
        condition=runs["condition"].map(dict(enumerate(arms.conditions))),
        bytes=runs["validation_bytes"].where(runs["judged_on"] != "test", runs["test_bytes"]),
        unknown=runs["validation_unknown"] / runs["validation_tokens"],
    )
    several = runs.groupby("text")["tokenizer"].transform("nunique") > 1
    runs = runs[several]
    rows: list[dict[str, Any]] = []
    first: dict[tuple[Any, ...], Any] = {}
    for key, arm in runs.groupby(names, sort=False):
        own = arm.set_index("seed")["end_bits_per_byte"].astype("float64")
        summary = stats.summary(own.to_numpy())
        row = dict(zip(names, key, strict=True))
        of = (row["text"], row["variant"], row["model"])
        reference = first.setdefault(of, own)
        difference = stats.summary((own - reference).dropna().to_numpy())
        rows.append(
            row
            | {"seeds": len(arm), "mean": summary.mean, "sd": summary.sd}
            | {name: float(arm[name].astype("float64").mean()) for name in ("bytes", "unknown")}
            | {
                "difference": np.nan if reference is own else difference.mean,
                "low": difference.low,
                "high": difference.high,
            }
        )
    return pd.DataFrame(rows)
