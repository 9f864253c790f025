"""Who may import whom, and what start-up must not pay for."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys

import pytest

from .helpers import ROOT

PACKAGE = ROOT / "proglayer"

# Each may import from itself and from those before it.
LAYERS = (
    "ground", "data", "training", "store", "run", "results", "report", "exits", "launch",
    "hydra_plugins",
)  # fmt: skip
# The files beside the wings. Commands and the package's own face are no ground: they only hand on.
GROUND = {"config", "console", "errors", "files", "table"}

WITHOUT_TORCH = (
    "config", "console", "data.corpus", "training.cost", "training.growth", "training.plan",
    "training.stopping", "store.entries", "run.record", "run.progress", "run.setup", "results",
    "results.show", "report.stats", "report.early_exit", "exits.__main__", "launch.engines",
    "launch.main", "launch.planned", "launch.product", "launch.single", "launch.slurm",
    "launch.snapshot", "launch.sweep", "launch.search", "launch.job",
)  # fmt: skip


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "hydra_plugins").glob("*.py")]
}


def layer_of(module: str) -> str:
    """The wing of a module; `ground` for one beside the wings."""
    parts = module.split(".")
    if parts[0] == "hydra_plugins":
        return "hydra_plugins"
    return "ground" if parts[1] in GROUND else parts[1]


def imports_of(source: str, known: set[str]) -> set[str]:
    """The modules of ours that a source imports anywhere, for types as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module or "", *names}
    return found & known


IMPORTS = {
    name: imports_of(path.read_text(), set(MODULES)) - {name, "proglayer"}
    for name, path in MODULES.items()
}


def wrong_way(module: str, imports: set[str]) -> set[str]:
    """Those of `imports` that stand in a later layer than the module."""
    own = LAYERS.index(layer_of(module))
    return {other for other in imports if LAYERS.index(layer_of(other)) > own}


def test_a_wing_imports_only_from_those_before_it() -> None:
    wrong = {name: wrong_way(name, IMPORTS[name]) for name in MODULES.keys() - {"proglayer"}}
    assert not {name: others for name, others in wrong.items() if others}


def test_an_import_against_the_line_is_seen() -> None:
    source = "if TYPE_CHECKING:\n    from proglayer.run import run\n"
    assert wrong_way("proglayer.store.entries", imports_of(source, set(MODULES))) == {
        "proglayer.run",
        "proglayer.run.run",
    }


def test_there_are_no_circles() -> None:
    # A module of a wing may be imported by the wing's own face.
    arrows = {
        name: {other for other in imports if not name.startswith(f"{other}.")}
        for name, imports in IMPORTS.items()
    }
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_few_files_stand_beside_the_wings() -> None:
    beside = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(beside) <= 6
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(
        LAYERS[1:-1]
    )


def test_omegaconf_is_seen_at_the_entrance_only() -> None:
    for name, path in MODULES.items():
        entrance = ("proglayer", "proglayer.config")
        if name not in entrance and layer_of(name) not in ("launch", "hydra_plugins"):
            assert not re.search("omegaconf|from hydra", path.read_text()), name


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        (
            "import " + ", ".join(f"proglayer.{name}" for name in WITHOUT_TORCH),
            {"torch", "datasets", "matplotlib"},
        ),
        ("import proglayer.run.run, proglayer.training.build", {"transformers"}),
        (
            "import proglayer.launch.job, proglayer.launch.sweep, proglayer.report",
            {"matplotlib", "statsmodels", "scipy"},
        ),
        (
            "import proglayer.launch.engines, proglayer.launch.slurm, proglayer.launch.study",
            {"hydra", "omegaconf", "pandas"},  # in a worker
        ),
        (
            "sys.argv = ['train.py', '--help']; runpy.run_path('train.py', run_name='__main__')",
            {"torch", "datasets", "pandas", "scipy", "pyarrow"},
        ),
    ],
)
def test_what_a_user_waits_for_loads_nothing_heavy(code: str, heavy: set[str]) -> None:
    at_its_end = f"lambda: print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    code = f"import atexit, runpy, sys; atexit.register({at_its_end}); {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().endswith("[]"), done.stderr
