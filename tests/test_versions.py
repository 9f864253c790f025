"""What is installed: pinned versions, declared libraries, our own version."""

from __future__ import annotations

import ast
import itertools
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement

import proglayer

from .helpers import ROOT, Command

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_pinned_versions_are_in_the_known_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["optional-dependencies"].values()
    needed = [*PROJECT["dependencies"], *itertools.chain.from_iterable(extras)]
    for requirement in map(Requirement, needed):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_every_library_that_is_imported_is_declared() -> None:
    files = [*(ROOT / "proglayer").glob("*.py"), *(ROOT / "hydra_plugins").glob("*.py")]
    imported: set[str] = set()
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(f.read_text())) for f in files):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    imported -= {*sys.stdlib_module_names, "proglayer", "hydra_plugins"}
    extras = PROJECT["optional-dependencies"].values()
    needed = [*PROJECT["dependencies"], *itertools.chain.from_iterable(extras)]
    declared = {Requirement(line).name.lower().replace("_", "-") for line in needed}
    sold_as = metadata.packages_distributions()
    for module in imported & sold_as.keys():
        names = {name.lower().replace("_", "-") for name in sold_as[module]}
        assert names & declared, f"{module} comes with {names}"


def test_the_command_gives_our_version(train: Command) -> None:
    assert train("--version").out.startswith(f"proglayer {proglayer.__version__}\n")
