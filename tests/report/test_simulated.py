"""The simulated studies go the way of a report: their figures might as well stand in records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from proglayer.report.comparisons import as_frames

from . import simulated


@pytest.mark.parametrize(("epochs", "tested"), [(1, False), (3, True)])
def test_a_study_put_into_the_frames_is_judged_as_its_records_are(
    tmp_path: Path, epochs: int, tested: bool
):
    one = simulated.template(3, epochs, tested)
    numbers = simulated.drawn(
        one, 3, "heavy tails", studies=2, true=0.1, epochs=epochs, tested=tested
    )
    both = list(simulated.judged(simulated.studies_of(one, numbers)))
    for study, in_frames in enumerate(both):
        choices = [own[study].tolist() for own in numbers.choices]
        test = None if numbers.test is None else numbers.test[study].tolist()
        records = simulated.write(tmp_path / str(study), 3, choices, test)
        (in_records,) = simulated.judged(records)
        assert [own.accuracy.n for own in in_records] == [3] * 5
        assert_same(as_frames(in_frames), as_frames(in_records))


def assert_same(one: Any, other: Any) -> None:
    for frame, expected in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(frame, expected)


@pytest.mark.parametrize("distribution", simulated.DISTRIBUTIONS)
def test_arrays_are_judged_as_a_report_judges(distribution: str):
    simulated.simulate(4, distribution, studies=20)


def test_a_growth_that_is_never_got_back_to_makes_no_difference():
    found = simulated.simulate(5, studies=40, gated=True)
    assert found["false difference"] <= 0.2
    assert abs(found["mean error"]) < 0.1


def test_choosing_among_more_epochs_flatters_on_the_text_that_chooses_and_not_on_another():
    on_validation = simulated.simulate(3, studies=30, epochs=10)
    on_test = simulated.simulate(3, studies=30, epochs=10, tested=True)
    assert on_validation["mean error"] < -0.08
    assert abs(on_test["mean error"]) < 0.05
