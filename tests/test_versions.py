"""Libraries of versions that are not known to work together are named at start."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement

import proglayer
from proglayer.versions import unknown

from .helpers import ROOT, SHORT, Command

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_version_out_of_its_range_is_told_with_what_installs_another(
    train: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = ["hydra-core<1.1,>=1.0", 'joblib<1,>=0.1; extra == "joblib"', "nowhere-to-be-found>1"]
    needs += ['optuna<1; extra == "optuna"', "rich>=1"]
    monkeypatch.setattr(metadata, "requires", lambda _: needs)
    of_hydra = (
        f"warning: hydra-core {metadata.version('hydra-core')} is not known to work here "
        "(known: <1.1,>=1.0): pip install -c constraints.txt -e ."
    )
    of_joblib = (
        f"warning: joblib {metadata.version('joblib')} is not known to work here "
        "(known: <1,>=0.1): pip install -c constraints.txt -e '.[joblib]'"
    )
    plan = (*SHORT, "plan=true")
    assert train(*plan).err.splitlines() == [of_hydra]
    assert train("-m", *plan, "seed=1,2").err.splitlines() == [of_hydra]
    with_joblib = train("-m", *plan, "seed=1,2", "hydra/launcher=joblib")
    assert sorted(with_joblib.err.splitlines()) == [of_hydra, of_joblib]


def test_what_is_not_installed_as_a_package_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", nothing)
    assert list(unknown()) == []


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


@pytest.mark.parametrize("command", [["train.py", "--version"], ["-m", "proglayer"]])
def test_a_command_gives_our_version(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"proglayer {proglayer.__version__}\n")
