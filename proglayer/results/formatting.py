"""Numbers and lists as text, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd


def duration(seconds: Any) -> str:
    """Seconds for people: 8.4 s, 12 min 30 s, 3 h 5 min; nothing for what is not known."""
    if pd.isna(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds > 1e12:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def number_text(value: Any, form: str) -> str:
    """A number as Python's `form` has it; nothing for one that is not known."""
    return "" if pd.isna(value) else format(value, form)


def pair(row: Mapping[str, Any], name: str, form: str) -> str:
    """The metric after the first phase and after the last, as far as they are known."""
    first, last = number_text(row[f"first_{name}"], form), number_text(row[f"last_{name}"], form)
    return first if last in ("", first) else f"{first} → {last}"


def tokenizer_of(row: Mapping[str, Any]) -> str:
    """What cut a run's text, with the size of its vocabulary; records without it are of words."""
    name, size = text_of(row["tokenizer"]) or "words", number_text(row["vocab_size"], ",d")
    return f"{name} ({size})" if size else name


def text_of(value: Any) -> str:
    """A value as text; nothing for one that is missing."""
    return "" if pd.isna(value) else str(value)


def listed(names: Sequence[str], most: int) -> str:
    """Names with commas between them, and how many more there are than `most`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def ranges(numbers: Iterable[Any]) -> str:
    """Whole numbers for people: 1-5, 8."""
    parts: list[list[int]] = []
    for own in sorted({int(n) for n in numbers if not pd.isna(n)}):
        if parts and own == parts[-1][1] + 1:
            parts[-1][1] = own
        else:
            parts.append([own, own])
    texts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in parts]
    return listed(texts, 12)
