"""A search's trials in the report."""

from __future__ import annotations

import json
from pathlib import Path

from proglayer.files import everything
from proglayer.report.pictures import Gallery
from proglayer.report.trials import study_files, trials_section


def _leave(folder: Path, values: list[float | None], states: list[str], **more: object) -> None:
    trials = [
        {"number": number, "state": state, "value": value, "params": {"lr.base": 0.1}}
        for number, (value, state) in enumerate(zip(values, states, strict=True))
    ]
    study = {
        "study": "rates",
        "direction": "minimize",
        "objective": "phases.-1.best.validation_loss",
        "importances": {"lr.base": 0.75, "model.dim": 0.25},
        "trials": trials,
    }
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study | more))


def test_a_study_is_shown_once_with_all_its_trials(tmp_path: Path) -> None:
    _leave(tmp_path / "a", [3.0], ["complete"])
    states = ["complete", "complete", "pruned", "fail"]
    _leave(tmp_path / "b", [3.0, 2.5, None, None], states)
    _leave(tmp_path / "c", [None], ["fail"], study="widths", importances={})
    (tmp_path / "d").mkdir()
    (tmp_path / "d/study.json").write_text('{"study": "cut sh')
    files = study_files(str(tmp_path / name / "0_abc") for name in "abcd")
    assert len(files) == 4
    blocks = trials_section(files, Gallery(tmp_path / "figures", everything, png=False))
    text = str(blocks)
    assert text.count("Study rates") == 1
    assert "trials: 2 complete, 1 fail, 1 pruned" in text
    assert "best 2.5 in trial 1" in text
    assert "lr.base 0.75; model.dim 0.25" in text
    assert "Study widths" in text
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["search-history.svg", "search-importance.svg"]
    # What is to be as large as can be goes up.
    _leave(tmp_path / "e", [0.5, 0.7, 0.6], ["complete"] * 3, direction="maximize")
    upward = str(
        trials_section([tmp_path / "e/study.json"], Gallery(tmp_path / "up", everything, png=False))
    )
    assert "best 0.7 in trial 1" in upward


def test_without_a_search_there_is_no_section(tmp_path: Path) -> None:
    (tmp_path / "0_abc").mkdir()
    files = study_files([str(tmp_path / "0_abc")])
    assert trials_section(files, Gallery(tmp_path / "figures", everything)) == []
