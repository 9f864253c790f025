"""Who may import whom, and what start-up must not pay for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import ROOT

PACKAGE = ROOT / "proglayer"

# module -> what it may import of the package, at the top of the file or inside a function.
MAY_IMPORT = {
    "__init__": {"experiment"},
    # plain data and disk
    "config": {"versions"},
    "plan": {"config"},
    "stages": set(),
    "record": {"stages"},
    "snapshot": {"stages"},
    "launchers": {"machine", "snapshot"},
    "versions": set(),
    "corpus": {"config", "sources"},
    "sources": {"config"},
    # tensors
    "streams": set(),
    "model": set(),
    "loss": set(),
    "growth": {"model", "plan", "streams"},
    "optim": {"model", "plan"},
    "trainer": {"corpus", "loss", "model", "optim", "plan", "streams"},
    "loggers": {"config", "record"},
    "trajectory": {"corpus", "model", "optim", "plan", "stages", "trainer"},
    "machine": {"config", "snapshot", "trajectory", "__init__"},
    "slots": {"config", "trajectory"},
    # people
    "display": {"plan", "trainer"},
    "columns": {"config", "record"},
    "scan": {"columns", "display", "record"},
    "reading": {"columns", "record", "scan"},
    "cache": {"columns", "record", "scan"},
    "results": {"cache", "columns", "reading", "record", "scan"},
    "words": set(),
    "summary": {"columns", "display", "reading", "record", "results", "words"},
    "stats": set(),
    "study": {"columns", "display", "reading", "results", "stats"},
    "ledger": {"results", "stats", "study"},
    "page": set(),
    "figures": {"page", "study"},
    "tables": {"figures", "ledger", "page", "results", "stats", "study", "words"},
    "report": {"columns", "figures", "ledger", "page", "results", "study", "tables", "words"},
    # jobs
    "experiment": {
        "config",
        "corpus",
        "display",
        "growth",
        "loggers",
        "machine",
        "model",
        "plan",
        "record",
        "slots",
        "stages",
        "trainer",
        "trajectory",
    },
    "floor": {"loss", "plan"},
    "measure": {
        "__init__",
        "config",
        "corpus",
        "floor",
        "growth",
        "loss",
        "machine",
        "optim",
        "plan",
        "trainer",
    },
    "estimate": {"measure", "plan", "sweep", "trainer"},
    "overhead": {"config"},
    "bench": {
        "__init__",
        "config",
        "display",
        "entrance",
        "estimate",
        "machine",
        "measure",
        "overhead",
        "plan",
        "sweep",
    },
    "sweep": {
        "__init__",
        "config",
        "corpus",
        "display",
        "entrance",
        "launchers",
        "machine",
        "plan",
        "record",
        "stages",
        "summary",
        "trajectory",
        "versions",
    },
    "search": {
        "config",
        "display",
        "entrance",
        "launchers",
        "record",
        "stages",
        "sweep",
        "versions",
    },
    "entrance": {
        "config",
        "corpus",
        "display",
        "experiment",
        "launchers",
        "machine",
        "plan",
        "record",
        "report",
        "snapshot",
        "sources",
        "stages",
        "versions",
    },
    "workers": {"config", "launchers", "record", "stages"},
    "ray": {"config", "launchers", "record", "stages"},
    "slurm": {"config", "display", "launchers", "record", "stages"},
}
WITHOUT_TORCH = (
    "config",
    "plan",
    "stages",
    "record",
    "corpus",
    "display",
    "results",
    "stats",
    "summary",
    "launchers",
    "slurm",
    "snapshot",
    "sweep",
    "search",
    "entrance",
)


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere.

    Types apart, and what it takes to be run as a command: nobody who imports it pays for that.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "__name__ == '__main__'",
        ):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "proglayer":
            parts = (node.module or "").split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found |= {name if (PACKAGE / f"{name}.py").exists() else "__init__" for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("proglayer.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_are_the_ones_agreed(path: Path) -> None:
    assert imports(path) <= MAY_IMPORT[path.stem]


def test_there_are_no_circles() -> None:
    done: set[str] = set()
    left = {
        name: allowed - {"__init__"} for name, allowed in MAY_IMPORT.items() if name != "__init__"
    }
    while left:
        ready = {name for name, needs in left.items() if needs <= done}
        assert ready, f"a circle among {sorted(left)}"
        done |= ready
        left = {name: needs for name, needs in left.items() if name not in ready}


def test_omegaconf_is_seen_at_the_entrance_only() -> None:
    seers = {
        path.stem
        for path in PACKAGE.glob("*.py")
        if "omegaconf" in path.read_text() or "from hydra" in path.read_text()
    }
    assert seers <= {
        "bench",
        "config",
        "entrance",
        "launchers",
        "ray",
        "search",
        "slurm",
        "sweep",
        "workers",
    }


def test_what_a_user_waits_for_does_not_load_torch() -> None:
    code = (
        "import sys, "
        + ", ".join(f"proglayer.{name}" for name in WITHOUT_TORCH)
        + "; heavy = {'torch', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules); "
        "print(sorted(heavy - {'scipy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, runpy, atexit; sys.argv = ['train.py', '--help']; "
        "atexit.register(lambda: print({'torch', 'datasets', 'pandas', 'scipy', 'pyarrow'} "
        "& set(sys.modules), file=sys.stderr)); "
        "runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().endswith("set()"), done.stderr
