"""The notebook runs from its first cell to its last, and what it reads is what was trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from .helpers import ROOT, SHORT

NOTEBOOK = ROOT / "notebooks" / "original.ipynb"


def test_the_notebook_runs_and_reads_what_it_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plt.switch_backend("agg")
    monkeypatch.setenv("PROGLAYER_STORE", str(tmp_path / "stages"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(NOTEBOOK.parent)
    small = {"seeds": "1,2", "overrides": [*SHORT, "threads=1"], "folder": tmp_path / "sweep"}
    names: dict[str, Any] = {}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code), "outputs are not committed"
    for cell in code:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= small
    plt.close("all")
    assert names["root"] == ROOT
    assert names["changes"]["count"].to_dict() == {"standard": 2, "deep_supervision": 2}
    assert list(names["by_exit"].index) == [1, 2, 3, 4]
    curve = names["axes"].lines
    assert len(curve) == 4 + 2, "a line for each run, and two for the legend"
    assert all(len(line.get_xdata()) == 5 for line in curve[:4]), "2 epochs, the growth, 2 epochs"
    difference = names["difference"]
    assert sorted(difference.index) == [1, 2]
    assert len(names["model"].layers) == 4
