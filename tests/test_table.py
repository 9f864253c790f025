"""One table: cells as text, on a terminal of any width, and as CSV."""

from __future__ import annotations

import io

import pandas as pd
from rich.console import Console

from proglayer.table import Column, Table, csv_of, is_missing

ROWS = pd.DataFrame(
    {
        "name": ["a [bold]b", "long name, long name"],
        "loss": [1.5, None],
        "seeds": pd.array([3, None], dtype="Int64"),
    }
)
COLUMNS = (
    Column("name", "Name", kind="prose"),
    Column("loss", "Loss", ".2f", minor=1),
    Column("seeds", "Seeds", "d"),
    Column("loss", "Both", of_row=lambda row: f"{row['name'][0]}{row['loss']:.0f}", minor=2),
)


def printed(table: Table, width: int) -> str:
    out = Console(file=io.StringIO(), width=200, highlight=False)
    out.print(table.rich(width))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


def test_a_cell_is_text_and_empty_where_nothing_is_known() -> None:
    cells = Table(ROWS, COLUMNS).cells
    assert [cell.text for cell in cells[0]] == ["a [bold]b", "1.50", "3", "a2"]
    assert [cell.text for cell in cells[1]] == ["long name, long name", "", "", "lnan"]
    assert [cell.sort for cell in cells[0]] == [None, 1.5, 3.0, None]
    assert [is_missing(v) for v in (None, float("nan"), pd.NA, pd.NaT, 0, "", [])] == [
        *[True] * 4,
        *[False] * 3,
    ]


def test_minor_columns_give_way_in_their_order_and_text_is_no_markup() -> None:
    table = Table(ROWS, COLUMNS, note="A note.")
    assert "a [bold]b" in printed(table, 200)
    assert "not shown" not in printed(table, 200)
    for width, gone in ((38, "Both"), (30, "Both, Loss"), (3, "Both, Loss")):
        text = " ".join(printed(table, width).split())
        assert text.endswith(f"not shown at this width: {gone}")
        assert "A note." in text
        assert "Seeds" in text


def test_lists_are_json_in_a_csv_file() -> None:
    frame = pd.DataFrame({"text": ["=x", None], "plain": [-1.5, 2.0], "list": [[1], ["a"]]})
    assert csv_of(frame) == 'text,plain,list\r\n=x,-1.5,[1]\r\n,2.0,"[""a""]"\r\n'
