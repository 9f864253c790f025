"""A table: rows, and for each column a label and a format.

One table is printed by rich, set as HTML by the page of a report, and its frame is written as CSV.
Cells are plain text: nothing in them is markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import rich.table
from rich.text import Text

from proglayer.console import one_line
from proglayer.errors import printable

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
# Text that folds keeps this width in a narrow table: that of the longest name of a model.
NARROW = 16


class Cell(NamedTuple):
    """The text of a cell, and what it is sorted by where that is not the text."""

    text: str
    sort: float | None = None


@dataclass(frozen=True)
class Column:
    """How one entry of the rows is shown.

    A figure stands right and keeps together, a name keeps together, prose folds.
    """

    name: str  # of the entry; also what the column is sorted by
    label: str
    form: str | Callable[[Any], str] = str  # a format specification, or a function of the entry
    of_row: Callable[[Row], str] | None = None  # gives the text where that takes more than an entry
    kind: Literal["name", "figure", "prose"] | None = None  # a figure if `form` is a specification
    minor: int = 0  # the columns with the highest give way first where room is scarce; 0: never
    style: Callable[[Row], str] | None = None  # rich's style of a cell

    @property
    def shown_as(self) -> str:
        """Return the kind; if none is named, a figure where numbers are formatted, else a name."""
        return self.kind or ("figure" if isinstance(self.form, str) else "name")

    def cell(self, row: Row) -> Cell:
        """Return the cell of a row; empty where the entry is missing."""
        value = row.get(self.name)
        if self.of_row:
            text = self.of_row(row)
        elif is_missing(value):
            text = ""
        else:
            text = format(value, self.form) if isinstance(self.form, str) else self.form(value)
        if self.shown_as != "figure":
            return Cell(text)
        return Cell(text, float(value) if isinstance(value, int | float) and text else None)


@dataclass(frozen=True)
class Table:
    """Rows under the labels of columns, with a title above and a note below."""

    rows: pd.DataFrame | Sequence[Row]
    columns: Sequence[Column]
    title: str = ""
    note: str = ""

    @cached_property
    def records(self) -> Sequence[Row]:
        """Return the rows as mappings."""
        frame: Any = self.rows
        return self.rows if isinstance(self.rows, Sequence) else frame.to_dict("records")

    @cached_property
    def cells(self) -> list[list[Cell]]:
        """Return the cells, row by row."""
        return [[column.cell(row) for column in self.columns] for row in self.records]

    def rich(self, width: int | None = None) -> rich.table.Table:
        """Set the table for a terminal; minor columns give way to fit into `width` characters."""
        gone = self._too_wide(width)
        title = Text(printable(self.title)) if self.title else None
        shown = rich.table.Table(title=title, title_justify="left", caption_justify="left")
        kept = [column for column in self.columns if column.label not in gone]
        for column in kept:
            justify = "right" if column.shown_as == "figure" else "left"
            fixed = column.shown_as != "prose"
            shown.add_column(Text(column.label), justify=justify, no_wrap=fixed, overflow="fold")
        for row in self.records:
            styles = [column.style(row) if column.style else "" for column in kept]
            texts = [one_line(column.cell(row).text) for column in kept]
            shown.add_row(*map(Text, texts, styles))
        hidden = f"not shown at this width: {', '.join(gone)}" if gone else ""
        shown.caption = printable("\n".join(filter(None, (self.note, hidden)))) or None
        return shown

    def _too_wide(self, width: int | None) -> list[str]:
        """Return the labels of the minor columns that must go to fit into `width`."""
        widths = {}
        for place, column in enumerate(self.columns):
            texts = [column.label, *(one_line(row[place].text) for row in self.cells)]
            most = max(Text(text).cell_len for text in texts)
            widths[column.label] = 3 + (min(most, NARROW) if column.shown_as == "prose" else most)
        gone: list[str] = []
        minor = sorted((c for c in self.columns if c.minor), key=lambda c: -c.minor)
        while width is not None and minor[len(gone) :] and 1 + sum(widths.values()) > width:
            gone.append(minor[len(gone)].label)
            del widths[gone[-1]]
        return gone


def is_missing(value: Any) -> bool:
    """Return whether a value is not known: None, NaN, or pandas' own words for it."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def csv_of(frame: pd.DataFrame) -> str:
    """Return a frame as CSV, lists in it as JSON."""
    texts = {
        name: [json.dumps(value) if isinstance(value, list) else value for value in frame[name]]
        for name in frame
        if frame[name].dtype == object
    }
    # With this line end, text that holds either character is put in quotes.
    return frame.assign(**texts).to_csv(None, index=False, lineterminator="\r\n")
