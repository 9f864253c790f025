"""What every test relies on: no network, one thread, no traces in the user's own folders."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .helpers import ROOT, Command, Done

# The hub libraries read this when they are imported, so it is set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The models of the tests are tiny: a second thread gains them nothing, and on a busy machine
# waiting for it makes a matrix product of microseconds take milliseconds. Read when torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it puts into the background deaf to SIGINT, which the commands under test
# would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def stage_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps trained phases out of the checkout's `multirun/.store`, in a store of this session."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROGLAYER_STORE", str(folder))
        patch.setenv("PROGLAYER_CACHE", str(tmp_path_factory.mktemp("corpora")))
        yield folder


@pytest.fixture(scope="session")
def wikitext2_folder() -> Path:
    """A folder with `wiki.train.raw` and `wiki.valid.raw`; skips where none is named."""
    named = os.environ.get("PROGLAYER_TEST_WIKITEXT2")
    if not named:
        pytest.skip("PROGLAYER_TEST_WIKITEXT2 names no folder with the WikiText-2 raw files")
    return Path(named)


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """Made-up records by the dozen need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """`python train.py ...` in this process, with the output under `tmp_path`."""
    import runpy

    from hydra.core.global_hydra import GlobalHydra

    def command(*arguments: str) -> Done:
        GlobalHydra.instance().clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PROGLAYER_STORE", str(tmp_path / "stages"))
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return command


def pytest_xdist_auto_num_workers() -> int:
    # One more than there are cores, as what a scheduler is tested with mostly waits.
    return min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2, 3) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What waits for a scheduler begins first: others have the cores meanwhile.
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
