"""The simulated studies are judged as a report judges their records."""

from __future__ import annotations

import pytest

from . import simulated

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.mark.parametrize("distribution", simulated.DISTRIBUTIONS)
def test_arrays_are_judged_as_a_report_judges(distribution: str):
    simulated.simulate(4, distribution, studies=simulated.CHECKED)


def test_choosing_among_more_epochs_flatters_on_the_text_that_chooses_and_not_on_another():
    on_validation = simulated.simulate(3, studies=30, epochs=10)
    on_test = simulated.simulate(3, studies=30, epochs=10, tested=True)
    assert on_validation["mean error"] < -0.08
    assert abs(on_test["mean error"]) < 0.05
