"""The time that is left, from what is stored."""

from proglayer.launch.planned import PhaseProgress, estimate

# 4 epochs of 100 operations in 40 s: a second for 10.
DONE = PhaseProgress(flops=100, max_epochs=9, epochs=4, seconds=40.0, complete=True)


def seconds(workers: int, *runs: str, **phases: PhaseProgress) -> float | None:
    return estimate(phases, [list(run) for run in runs], workers)


def test_nothing_is_estimated_before_a_phase_is_complete() -> None:
    assert seconds(1, "a", a=PhaseProgress(100, 9)) is None
    assert seconds(1, "a", a=PhaseProgress(100, 9, epochs=3, seconds=30.0)) is None


def test_a_phase_takes_as_many_epochs_as_complete_ones_less_those_that_are_stored() -> None:
    assert seconds(1, "a", a=DONE) == 0
    assert seconds(1, "ab", a=DONE, b=PhaseProgress(200, 9)) == 4 * 20
    # Three stored epochs, of twice the operations, went as fast: one is left, not four.
    assert seconds(1, "ab", a=DONE, b=PhaseProgress(200, 9, epochs=3, seconds=60.0)) == 20
    # One that went on longer than others takes one more at least, and its limit at most.
    assert seconds(1, "ab", a=DONE, b=PhaseProgress(100, 9, epochs=6, seconds=60.0)) == 10
    assert seconds(1, "ab", a=DONE, b=PhaseProgress(100, 2)) == 20


def test_workers_share_runs_but_not_the_phases_of_one() -> None:
    b, c = PhaseProgress(100, 9), PhaseProgress(300, 9)
    assert seconds(1, "ab", "ac", a=DONE, b=b, c=c) == 40 + 120
    # The longer of both; a third worker has nothing to do.
    assert seconds(2, "ab", "ac", a=DONE, b=b, c=c) == 120
    assert seconds(3, "abc", a=DONE, b=b, c=c) == 160
