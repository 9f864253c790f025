"""What MkDocs runs while it builds the site: pages made from `conf/` and from the schema.

The recipes are the opening comments of the files in `conf/experiment`, the settings those of
`proglayer.config` with their bounds, the values of `conf/` and the comments beside them: what is
written once there is read here.
"""

from __future__ import annotations

import csv
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from proglayer.config import Config  # noqa: E402

CONF = ROOT / "conf"
# The files whose values a run has when nothing is chosen, and what of the schema they set; before
# them those of other choices, which have settings of their own.
OTHERS = {"model/causal_lm": "model", "data/hub": "data", "data/text": "data"}
DEFAULTS = {
    "config": "",
    "model/standard": "model",
    "data/pydocs": "data",
    "phase/grow_once": "phase",
    "growth/random": "growth",
    "freeze/existing": "freeze",
    "lr/reduced": "lr",
}
SECTIONS = (
    ("The founding experiment", "original"),
    ("Its follow-ups", ""),
    ("Its controls", "control_"),
    ("Published recipes, and questions about them", "recipe/"),
)
LABELS = ("Cost", "Expect", "Time", "Departs from it")
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# -- what MkDocs calls -----------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for name, text in (("recipes.md", recipes()), ("settings.md", settings())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put drawn diagrams in the place of Mermaid's text, which a reader would need a network for,
    and leave links to files of the code as text.
    """
    markdown = DIAGRAM.sub(lambda found: _drawn(found[1], page), markdown)
    return re.sub(r"\[([^]]*)\]\(\.\./(?!.*\.md)[^)]*\)", r"\1", markdown)


def diagram_file(text: str) -> str:
    """The name of the picture of a diagram: its text's hash, so that an old one is not shown."""
    return f"diagram-{hashlib.sha256(text.encode()).hexdigest()[:8]}.svg"


def _drawn(text: str, page: Page) -> str:
    name = diagram_file(text)
    if not (ROOT / "docs" / "pictures" / name).exists():
        raise PluginError(
            f"{page.file.src_path}: a diagram is not drawn: run python scripts/draw_diagrams.py"
        )
    # A click shows it in its own size.
    return f"[![Diagram](pictures/{name}){{ .diagram }}](pictures/{name})"


# -- recipes ---------------------------------------------------------------------------------------


def recipes() -> str:
    """The page of all files of conf/experiment: what each asks, its command, what to expect."""
    parts = [
        "# Recipes",
        "Each is a file of `conf/experiment`: a question as a few settings, with a command that is "
        "complete. `plan=true` shows what it would train and what that costs, and a report at its "
        "end says what came of it. **Came to** is what it came to at the default size of the "
        "embedded corpus: test accuracy at the end, with a 95 % interval over so many seeds. Few "
        "seeds show a direction and decide nothing: see the [findings](findings.md) for what does.",
    ]
    came_to = _came_to()
    files = {
        path.relative_to(CONF / "experiment").with_suffix("").as_posix(): path
        for path in sorted((CONF / "experiment").rglob("*.yaml"))
    }
    for title, prefix in SECTIONS:
        own = [
            name for name in files if (name.startswith(prefix) if prefix else _is_follow_up(name))
        ]
        parts.append(f"## {title}")
        parts += [_recipe(name, files[name], came_to.get(name, "")) for name in own]
    return "\n\n".join(parts) + "\n"


def _is_follow_up(name: str) -> bool:
    return not any(name.startswith(prefix) for _, prefix in SECTIONS if prefix)


def _came_to() -> dict[str, str]:
    """What the runs of an experiment came to, by its name, from the data of the findings."""
    found: dict[str, list[str]] = {}
    with (ROOT / "docs" / "findings" / "recipes.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):

            def over_seeds(name: str, form: str, row: dict[str, str] = row) -> str:
                mean, low, high = (float(row[name + end] or "nan") for end in ("", "_low", "_high"))
                interval = f" ({low:{form}} to {high:{form}})" if low == low else ""
                return f"{mean:{form}}{interval}"

            seeds = f"{row['seeds']} seed{'s' * (row['seeds'] != '1')}"
            accuracy = over_seeds("last_test_accuracy_percent", ".2f")
            text = f"{row['model'].replace('_', ' ')} {accuracy} % of test accuracy"
            if row["test_accuracy_change_points"]:
                text += f", a change of {over_seeds('test_accuracy_change_points', '+.2f')} points"
            found.setdefault(row["experiment"], []).append(f"{text}, {seeds}")
    return {name: "**Came to** " + "; ".join(texts) + "." for name, texts in found.items()}


def _recipe(name: str, path: Path, came_to: str) -> str:
    """One recipe, from the comment that its file opens with, and what it came to."""
    question, command, rest = opening(path)
    lines = [f"### {name}", question, f"```\n{command}\n```", *rest, came_to]
    return "\n\n".join(line for line in lines if line)


def opening(path: Path) -> tuple[str, str, list[str]]:
    """The parts of the comment that a file of settings opens with: what it asks, its command, and
    what it says after that, a paragraph for each label.
    """
    before: list[str] = []
    command: list[str] = []
    after: list[list[str]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").removesuffix("\\").rstrip()
        if text.strip() == "@package _global_":
            continue
        if text.startswith("   ") and after == [[]]:
            command.append(text.strip())
        elif not command:
            before.append(text.strip())
        elif text:
            after[-1].append(text)
        elif after[-1]:
            after.append([])
    rest = [paragraph for lines in after if lines for paragraph in _paragraphs(lines)]
    return " ".join(filter(None, before)), _commands(command), rest


def _commands(lines: list[str]) -> str:
    """Commands as they are copied: each begins a line, and what follows of it is set in."""
    said = " \\\n    ".join(lines)
    return said.replace(" \\\n    python ", "\npython ")


def _paragraphs(lines: list[str]) -> list[str]:
    """Lines of a comment as paragraphs, one for each label; a command where all are set in."""
    if all(line.startswith("   ") for line in lines):
        return ["```\n" + _commands([line.strip() for line in lines]) + "\n```"]
    text = " ".join(
        f"`{line.strip()}`" if line.startswith("   ") else line.strip() for line in lines
    )
    labels = "|".join(LABELS)
    said = re.split(rf"(?<=\.) (?=(?:{labels})\b)|^(?=(?:{labels})\b)", text)
    return [re.sub(rf"^({labels})\b", r"**\1**", each) for each in said if each]


# -- settings --------------------------------------------------------------------------------------


def settings() -> str:
    """The page of all settings: what each takes, its value when nothing is given, what it means."""
    values, comments = _values_and_comments()
    parts = [
        "# Settings",
        "Every setting of a run, as it is written on the command line: `python train.py "
        "lr.base=3e-3`. Values are those without any choice of a group; `python train.py --cfg job "
        "experiment=...` prints those of a choice. What is out of its bounds is refused before "
        "anything starts, in one line.",
    ]
    for section, schema in _sections():
        parts.append(f"## {section or 'A run'}")
        if section:
            parts.append(" ".join(schema["description"].split()))
        rows = ["| setting | takes | value | |", "|---|---|---|---|"]
        for name, kind in _leaves(schema, f"{section}." if section else ""):
            value = values.get(name, _MISSING)
            shown = "" if value is _MISSING else f"`{_yaml(value)}`"
            takes = _takes(kind)
            said = _comment(comments.get(name, ""), takes) or _choices_are(kind)
            cells = f"`{name}`", takes, shown, said
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows))
    parts.append(_groups())
    parts.append("## Sweepers and launchers")
    parts.append(
        "Written `hydra/sweeper=settle hydra.sweeper.most=30`; each is a file of `conf/hydra`."
    )
    for part in ("sweeper", "launcher"):
        parts += [_engine(part, path) for path in sorted((CONF / "hydra" / part).glob("*.yaml"))]
    return "\n\n".join(parts) + "\n"


_MISSING = object()
# Of the files of sweepers and launchers: what Hydra and `launch` read, and lists of settings.
NO_SETTINGS = (".defaults", "._target_", "._recursive_", ".design", ".engine", ".blocks")


def _engine(part: str, path: Path) -> str:
    """A sweeper or launcher: what its file opens with, and its settings."""
    about, command, rest = opening(path)
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    comments = _comments(text, f"hydra.{part}")
    rows = [
        f"| `{name}` | `{_yaml(value)}` | {comments.get(name, '')} |"
        for name, value in _flat(content, f"hydra.{part}").items()
        if not isinstance(value, dict) and not name.endswith(NO_SETTINGS)
    ]
    lines = [
        f"### hydra/{part}={path.stem}",
        about,
        f"```\n{command}\n```" if command else "",
        *rest,
    ]
    if rows:
        lines.append("\n".join(["| setting | value | |", "|---|---|---|", *rows]))
    return "\n\n".join(line for line in lines if line)


def _groups() -> str:
    """The choices of each group, with the first line of its file's comment."""
    rows = ["## Groups", "Written `group=choice`.", "| group | choice | |\n|---|---|---|"]
    lines = []
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        if folder.name in ("experiment", "hydra", "local"):
            continue
        for file in sorted(folder.glob("*.yaml")):
            comment = []
            for line in file.read_text(encoding="utf-8").splitlines():
                if not line.startswith("# ") or line.startswith("#   "):
                    break
                if not line.startswith("# @package"):
                    comment.append(line.removeprefix("# "))
            text = re.split(r"(?<=\.) (?=[A-Z])", " ".join(comment).replace("|", "\\|"))[0]
            lines.append(f"| `{folder.name}` | `{file.stem}` | {text} |")
    return "\n\n".join(rows) + "\n" + "\n".join(lines)


# As JSON Schema has it: types, bounds, choices and descriptions.
SCHEMA = Config.model_json_schema()


def _sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schema itself, then each of its parts."""
    yield "", SCHEMA
    for name, part in SCHEMA["properties"].items():
        if "properties" in (part := _followed(part)):
            yield name, part


def _leaves(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each setting of a part of the schema with what it says of it."""
    for name, kind in schema["properties"].items():
        kind = _followed(kind)
        if "properties" not in kind:
            yield prefix + name, kind
        elif prefix:
            yield from _leaves(kind, f"{prefix}{name}.")


def _followed(kind: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind


def _takes(kind: dict[str, Any]) -> str:
    kind = _followed(kind)
    if "anyOf" in kind:
        options = [_takes(option) for option in kind["anyOf"] if option.get("type") != "null"]
        null = ", or null" if len(options) < len(kind["anyOf"]) else ""
        return " or ".join(dict.fromkeys(options)) + null
    if "enum" in kind:
        return ", ".join(kind["enum"])
    words = {"integer": "a whole number", "number": "a number", "boolean": "true, false"}
    words |= {"array": "a list", "string": "text"}
    bounds = (
        ("from {}", "minimum"),
        ("above {}", "exclusiveMinimum"),
        ("to {}" if "minimum" in kind else "up to {}", "maximum"),
        ("below {}", "exclusiveMaximum"),
    )
    said = [text.format(_digits(kind[end])) for text, end in bounds if end in kind]
    return " ".join([words[kind["type"]], *said])


def _digits(end: float) -> str:
    return f"{end:,}" if isinstance(end, int) and end < 10**12 else f"{end:g}"


def _comment(text: str, takes: str) -> str:
    """The comment beside a setting, without the choices that stand in the column before it."""
    text = re.sub(rf"^{re.escape(takes.removesuffix(', or null'))}(: |; |$)", "", text)
    return re.sub(r"docs/(\w+\.md)", r"[more](\1)", text)


def _choices_are(kind: dict[str, Any]) -> str:
    """Return what the choices of a setting are about, by the schema."""
    options = map(_followed, kind.get("anyOf", (kind,)))
    return next((" ".join(o.get("description", "").split()) for o in options if "enum" in o), "")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _values_and_comments() -> tuple[dict[str, Any], dict[str, str]]:
    """What `conf/` gives each setting, and the comment that stands beside it."""
    values: dict[str, Any] = {}
    comments: dict[str, str] = {}
    for file, prefix in (OTHERS | DEFAULTS).items():
        text = (CONF / f"{file}.yaml").read_text(encoding="utf-8")
        values |= _flat(yaml.safe_load(text), prefix)
        said = _comments(text, prefix)
        if file in OTHERS:
            said = {name: f"{file.replace('/', '=')}: {text}" for name, text in said.items()}
        comments |= said
    return values, comments


def _comments(text: str, prefix: str) -> dict[str, str]:
    """The comment beside each setting of a file of settings, with its further lines."""
    comments: dict[str, str] = {}
    path = [(-1, prefix)] if prefix else []
    for line in text.splitlines():
        if path and (more := re.match(r" {20,}# ?(\S.*)", line)):
            name = ".".join(part for _, part in path)
            comments[name] = f"{comments.get(name, '')} {more[1]}".strip()
        found = re.match(r"( *)([a-z_0-9]+):(?: ([^#]*))?(?:# (.*))?$", line)
        if not found or line.startswith("defaults"):
            continue
        indent = len(found[1])
        path = [each for each in path if each[0] < indent] + [(indent, found[2])]
        if found[4]:
            comments[".".join(name for _, name in path)] = found[4].strip()
    return comments


def _flat(value: Any, name: str) -> dict[str, Any]:
    flat = {name: value}
    if isinstance(value, dict):
        for key, part in value.items():
            flat |= _flat(part, f"{name}.{key}" if name else str(key))
    return flat
