"""How threads wait is set before torch is loaded, unless the user's environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .helpers import ROOT

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
PRINT = f"import os, proglayer; print([os.environ.get(name) for name in {NAMES}])"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "[None, '1000', '1']"),
        ({"OMP_WAIT_POLICY": "active"}, "['active', None, None]"),
        ({"GOMP_SPINCOUNT": "7"}, "[None, '7', None]"),
        ({"KMP_BLOCKTIME": "200"}, "[None, None, '200']"),
    ],
)
def test_the_users_environment_goes_first(given: dict[str, str], expected: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", PRINT],
        cwd=ROOT,
        env=inherited | given,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("module", ["proglayer.training.trainer", "proglayer.run"])
def test_it_is_set_before_torch_is_loaded(module: str) -> None:
    code = (
        "import sys, importlib.abc, os\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print('torch after', os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"import {module}\nimport torch\n"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=inherited, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[0] == "torch after 1000", done.stderr
