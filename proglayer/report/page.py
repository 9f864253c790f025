"""A document of plain blocks, as one self-contained HTML page and as Markdown.

Whoever builds a document gives plain text. `page.html.jinja` and `page.md.jinja` lay it out, and
everything is escaped on the way there, so that text from a configuration or a log can be given as
it is.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


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


def note(text: str) -> Paragraph:
    """What is said beside something else."""
    return Paragraph(text, muted=True)


def left_to(tables: str, number: int, noun: str, names: str = "") -> list[Block]:
    """What is not shown, if anything: how many, perhaps which, and in what tables they are."""
    if number <= 0:
        return []
    are = f"{noun} are" if number != 1 else f"{noun.removesuffix('s')} is"
    which = f" ({names})" if names else ""
    return [note(f"{number:,} more {are} in tables/: {tables}{which}.")]


def printable(text: str) -> str:
    """Text without what no page can show; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def to_html(title: str, lead: str, blocks: Sequence[Block]) -> str:
    """One page that needs nothing else and asks for nothing: style, script and figures inside."""
    style, script = (
        resources.files("proglayer.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this very script runs, and nothing is fetched, whatever the page may hold.
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assets = {"style": Markup(style), "script": Markup(script), "policy": policy}
    page = _templates().get_template("page.html.jinja")
    return page.render(title=title, lead=lead, blocks=blocks, **assets)


def to_markdown(title: str, lead: str, blocks: Sequence[Block]) -> str:
    """The same document as Markdown; its figures lie in `figures/` beside it."""
    page = _templates().get_template("page.md.jinja")
    return page.render(title=title, lead=lead, blocks_of_page=blocks)


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("proglayer.report", ""),
        autoescape=lambda name: name == "page.html.jinja",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    environment.filters |= {"anchor": anchor, "breakable": _breakable, "md": _marked}
    environment.filters |= {"kind": lambda block: type(block).__name__, "fence": _fence}
    return environment


def anchor(text: str) -> str:
    """Text as the name of an element or a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _breakable(text: str) -> Markup:
    """Escaped text that may break in the middle of names and paths."""
    escaped = str(escape(printable(text)))
    places = r"(?<=[a-z]_)(?=\w)|(?<=[/=])(?=\w)|(?<=,)(?=[^\W\d])"
    return Markup(re.sub(places, "<wbr>", escaped))


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


def _fence(code: str) -> str:
    """What encloses code in Markdown: more backticks than stand in it."""
    return "`" * max(3, *(1 + len(run) for run in re.findall("`+", code)), 0)
