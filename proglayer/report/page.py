"""A document of plain blocks, as one self-contained HTML page and as Markdown.

Whoever builds a document gives plain text; everything is escaped here, in one place for each
format, so that text from a configuration or a log can be given as it is.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple


class Cell(NamedTuple):
    """Text of a table's cell, and what it is sorted by where that is not the text."""

    text: str
    sort: float | str | None = None


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str
    muted: bool = False


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]
    muted: bool = False


@dataclass(frozen=True)
class Code:
    """Text to copy or to read as it stands."""

    text: str


@dataclass(frozen=True)
class Finding:
    """A claim, what of it was compared, the verdicts, and one sentence with their numbers."""

    claim: str
    compared: str
    verdicts: Sequence[str]
    sentence: str


@dataclass(frozen=True)
class Summary:
    """The findings and the picture of them: what a reader sees first."""

    findings: Sequence[Finding]
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Table:
    """A table. `strong` names rows (by number) that sum up the others.

    A column is its title and its kind: a figure is set right, a name keeps together, prose wraps.
    With ` screen` after its kind it gives way in print.
    """

    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""
    sortable: bool = False
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class SideBySide:
    """Tables that stand beside each other where there is room."""

    tables: Sequence[Table]


@dataclass(frozen=True)
class Picture:
    """A figure: SVG to put into a page, what it shows in words, and the name of its files."""

    name: str
    title: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Pictures:
    items: Sequence[Picture]


@dataclass(frozen=True)
class Collapsible:
    """Blocks that a reader opens; on paper they are open. A section has a heading of level 2."""

    title: str
    blocks: Sequence[Block]
    section: bool = False
    open: bool = False


Block = (
    Heading
    | Paragraph
    | Bullets
    | Code
    | Summary
    | Table
    | SideBySide
    | Picture
    | Pictures
    | Collapsible
)


def printable(text: str) -> str:
    """Text without what no page can show; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


# --- HTML -----------------------------------------------------------------------------------------


def to_html(title: str, lead: str, blocks: Sequence[Block], end: str = "") -> str:
    """One page that needs nothing else and asks for nothing: style, script and figures inside.

    `end` is HTML that goes to its very end.
    """
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this very script runs, and nothing is fetched, whatever the page may hold.
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    body = "\n".join(map(_html, blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{_escape(title)}</h1>\n<p>{_escape(lead)}</p>\n"
        f"</header>\n<main>\n{body}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n{end}"
    )


def _asset(name: str) -> str:
    return resources.files("proglayer.report").joinpath(name).read_text(encoding="utf-8")


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _breakable(text: str) -> str:
    """Escaped text that may break in the middle of names and paths."""
    return re.sub(r"(?<=[a-z]_)(?=\w)|(?<=[/=])(?=\w)|(?<=,)(?=[^\W\d])", "<wbr>", _escape(text))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            # Those of level 3 come again for every condition, and nothing refers to them.
            name = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{name}>{_escape(text)}</h{level}>"
        case Paragraph(text, muted):
            mark = ' class="muted"' if muted else ""
            return f"<p{mark}>{_escape(text)}</p>"
        case Bullets(items, muted):
            mark = ' class="muted"' if muted else ""
            return f"<ul{mark}>" + "".join(f"<li>{_escape(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f'<pre tabindex="0"><code>{_escape(text)}</code></pre>'
        case Summary(findings, pictures):
            rows = "".join(
                f"<li><b>{_escape(f.claim)}</b> {' '.join(map(_badge, f.verdicts))}<br>"
                f'<span class="muted">{_escape(f.compared)}</span><br>{_breakable(f.sentence)}</li>'
                for f in findings
            )
            figures = "".join(map(_html, pictures))
            return f'<div class="summary"><ul>{rows}</ul><div>{figures}</div></div>'
        case Table():
            return _html_table(block)
        case SideBySide(tables):
            return f'<div class="side-by-side">{"".join(map(_html_table, tables))}</div>'
        case Picture(name, title, alt, svg):
            return (
                f'<figure id="figure-{_anchor(name)}" role="group" aria-label="{_escape(alt)}">'
                f"<figcaption>{_escape(title)}</figcaption>{svg}</figure>"
            )
        case Pictures(items):
            return f'<div class="pictures">{"".join(map(_html, items))}</div>'
        case Collapsible(title, blocks, section, is_open):
            inside = "\n".join(map(_html, blocks))
            opened = " open" * is_open
            name = f' id="{_anchor(title)}" class="section"' if section else ""
            head = f"<h2>{_escape(title)}</h2>" if section else _escape(title)
            return f"<details{name}{opened}><summary>{head}</summary>\n{inside}\n</details>"


def _badge(outcome: str) -> str:
    return f'<span class="badge {_anchor(outcome.split()[0])}">{_escape(outcome)}</span>'


def _html_table(table: Table) -> str:
    marks = [f' class="{kind}"' for _, kind in table.columns]
    heads = []
    for (name, _), mark in zip(table.columns, marks, strict=True):
        title = _escape(name)
        inside = f'<button type="button">{title}</button>' if table.sortable else title
        heads.append(f'<th scope="col"{mark}>{inside}</th>')
    rows = []
    for number, row in enumerate(table.rows):
        cells = []
        for cell, mark in zip(row, marks, strict=True):
            text, sort = cell if isinstance(cell, Cell) else (cell, None)
            key = "" if sort is None or not table.sortable else f' data-sort="{_escape(str(sort))}"'
            cells.append(f"<td{mark}{key}>{_breakable(text)}</td>")
        strong = ' class="strong"' if number in table.strong else ""
        rows.append(f"<tr{strong}>{''.join(cells)}</tr>")
    note = f'<p class="muted">{_escape(table.note)}</p>' if table.note else ""
    kind = ' class="sortable"' if table.sortable else ""
    body = "\n".join(rows)
    return (
        f'<div class="table"><p class="caption">{_escape(table.title)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_escape(table.title)}">'
        f"<table{kind}>"
        f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>{body}</tbody></table></div>"
        f"{note}</div>"
    )


# --- Markdown -------------------------------------------------------------------------------------


def to_markdown(title: str, lead: str, blocks: Sequence[Block]) -> str:
    """The same document as Markdown; its figures lie in `figures/` beside it."""
    parts = [f"# {_marked(title)}", _marked(lead), *map(_markdown, blocks)]
    return "\n\n".join(parts) + "\n"


def _marked(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    line = " ".join(printable(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Only what begins a block or encloses something needs a backslash; the rest stays readable.
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)
    line = re.sub(r"^([#+\-=])(?=[#+\-=\s]|$)", r"\\\1", line)
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)
    # No address becomes a link by itself.
    return re.sub(r"(?i)(://|www\.|@)", lambda m: m[0][0] + "<!-- -->" + m[0][1:], line)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_marked(text)}"
        case Paragraph(text, _):
            return _marked(text)
        case Bullets(items, _):
            return "\n".join(f"- {_marked(item)}" for item in items)
        case Code(text):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{printable(text)}\n{fence}"
        case Summary(findings, pictures):
            rows = [
                f"- **{_marked(f.claim)}: {_marked('; '.join(f.verdicts))}.** "
                f"({_marked(f.compared)}) {_marked(f.sentence)}"
                for f in findings
            ]
            return "\n\n".join(["\n".join(rows), *map(_markdown, pictures)])
        case Table():
            return _markdown_table(block)
        case SideBySide(tables):
            return "\n\n".join(map(_markdown_table, tables))
        case Picture(name, title, alt, _):
            return f"**{_marked(title)}**\n\n![{_marked(alt)}](figures/{name}.svg)"
        case Pictures(items):
            return "\n\n".join(map(_markdown, items))
        case Collapsible(title, blocks, section, _):
            head = f"## {_marked(title)}" if section else f"**{_marked(title)}**"
            return "\n\n".join([head, *map(_markdown, blocks)])


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rows = []
    for number, row in enumerate(table.rows):
        cells = [_marked(cell.text if isinstance(cell, Cell) else cell) for cell in row]
        strong = number in table.strong
        rows.append(line([f"**{cell}**" if strong and cell else cell for cell in cells]))
    parts = [
        f"**{_marked(table.title)}**",
        "\n".join(
            [
                line([_marked(title) for title, _ in table.columns]),
                line(["---:" if kind.startswith("figure") else "---" for _, kind in table.columns]),
                *rows,
            ]
        ),
    ]
    return "\n\n".join(parts + ([_marked(table.note)] if table.note else []))
