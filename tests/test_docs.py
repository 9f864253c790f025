"""The documentation site: everything in it is there, and nothing of it is elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import re

from .helpers import ROOT


def test_the_pages_name_commands_and_files_that_are_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if page.name == "notes.md":  # they name what was once there
            continue
        text = page.read_text()
        for path in re.findall(r"`((?:conf|docs|proglayer|scripts|tests)/[\w./-]+)`", text):
            if not path.endswith(("default.yaml", "/")):
                assert (ROOT / path).exists(), f"{page.name} names {path}"
        for module in re.findall(r"python -m (proglayer[.\w]*)", text):
            assert importlib.util.find_spec(f"{module}.__main__"), f"{page.name}: {module}"


def test_the_architecture_names_what_there_is() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    package = ROOT / "proglayer"
    tops = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    names = [
        name
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", text)
        if name.split(".")[0] in tops and not name.endswith((".py", ".json", ".csv", ".md"))
    ]
    assert len(names) > 50
    classes: dict[str, object] = {}
    for name in names:
        parts = name.split(".")
        thing: object = importlib.import_module("proglayer")
        for depth, part in enumerate(parts, start=1):
            # A function can bear the name of its module, as in `run.run.run`.
            path = package.joinpath(*parts[:depth])
            if path.is_dir() or path.with_suffix(".py").exists():
                thing = importlib.import_module(".".join(["proglayer", *parts[:depth]]))
            else:
                assert hasattr(thing, part), f"there is no {name}"
                thing = getattr(thing, part)
            classes[part] = thing
    for name, method in re.findall(r"`([A-Z]\w+)\.(\w+)`", text):
        assert hasattr(classes[name], method), f"there is no {name}.{method}"
    for path in re.findall(r"`((?:\w+/)+[\w.]*)`", text):
        assert (ROOT / path).exists() or (package / path).exists(), f"there is no {path}"
