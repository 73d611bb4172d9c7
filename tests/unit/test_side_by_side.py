"""Stages at the same time: what comes back, and that an error in one ends the other."""

import threading

import pytest

from tpaw_ray.side_by_side import side_by_side


def test_both_run_at_the_same_time_and_results_keep_their_order():
    meet = threading.Barrier(2, timeout=30)

    def work(value):
        meet.wait()  # each waits for the other, so one after the other would never end
        return value

    assert side_by_side(lambda: work("a"), lambda: work("b"), stop=lambda: None) == ["a", "b"]


@pytest.mark.parametrize("failing_first", [True, False])
def test_an_error_stops_the_other_and_is_the_one_that_is_raised(failing_first):
    stopped = threading.Event()

    def fails():
        raise ValueError("reason")

    def waits():
        assert stopped.wait(30)
        raise KeyError("ended because it was stopped")

    works = (fails, waits) if failing_first else (waits, fails)
    with pytest.raises(ValueError, match="reason"):
        side_by_side(*works, stop=stopped.set)
    assert stopped.is_set()


def test_nothing_is_stopped_where_all_goes_well():
    stopped = threading.Event()
    side_by_side(lambda: None, lambda: None, stop=stopped.set)
    assert not stopped.is_set()
