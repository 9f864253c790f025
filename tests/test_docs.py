"""The documentation site: everything in it is there, and nothing of it is elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from types import ModuleType

import pytest

from proglayer.config import setting_names

from .helpers import ROOT


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["site_hooks"] = module
    spec.loader.exec_module(module)
    return module


def test_each_recipe_is_shown_with_its_question_and_command(hooks: ModuleType) -> None:
    page = hooks.recipes()
    for path in (ROOT / "conf" / "experiment").rglob("*.yaml"):
        name = path.relative_to(ROOT / "conf" / "experiment").with_suffix("").as_posix()
        section = page.split(f"\n### {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
        question, command, rest = hooks.opening(path)
        assert question in section
        assert command.startswith("python train.py ")
        assert name in command, "its own command"
        assert f"```\n{command}\n```" in section
        assert any(line.startswith("**Expect**") for line in rest)


def test_each_setting_is_shown_with_its_value_and_bounds(hooks: ModuleType) -> None:
    page = hooks.settings()
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", page, re.MULTILINE))
    sections = {
        name for name in setting_names() if any(n.startswith(f"{name}.") for n in setting_names())
    }
    assert set(setting_names()) - sections <= rows.keys()
    assert rows["lr.base"].startswith("a number above 0 up to 1e+15 | `0.001` |")
    assert rows["model.dim"].startswith("a whole number from 1 to 65,536, or null | `64` |")
    assert rows["phase.patience"].endswith("before a phase stops")
    assert rows["device"].startswith("auto, cpu, cuda, mps | `auto` |")
    assert rows["loss.normalize"].endswith("so that a round's mean is the full loss")
    assert rows["growth"].endswith("are zero (Wu et al. 2024).")
    assert "@package" not in page


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
