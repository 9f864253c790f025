"""A study that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from .. import synthetic


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original and a control, both models, three seeds."""
    folder = tmp_path_factory.mktemp("study") / "sweep"
    return synthetic.sweep(folder, ("original", "control_from_scratch"), seeds=(1, 2, 3))
