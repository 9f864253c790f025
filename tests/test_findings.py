"""The page of findings says what its data say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from .helpers import ROOT


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    found = importlib.util.spec_from_file_location("findings", ROOT / "scripts" / "findings.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_text_and_pictures_are_those_of_the_data(findings: ModuleType, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert findings.render(tmp_path) == page
    shown = re.findall(r"\]\(findings/(.*?)\)", page)
    assert len(shown) >= 4
    for name in shown:
        assert b"<svg " in (tmp_path / name).read_bytes()
        assert (ROOT / "docs" / "findings" / name).is_file()


def test_the_data_do_not_say_where_they_come_from(findings: ModuleType) -> None:
    for part in (*findings.PARTS, "asked", "settled"):
        runs = findings.read(part).runs
        assert len(runs)
        for column in set(findings.PLACE) & set(runs):
            assert runs[column].isna().all()
        text = runs.to_json()
        assert not re.search(r'["=]\\?/', text), "an absolute path"
        assert "hydra.sweep.dir" not in text
