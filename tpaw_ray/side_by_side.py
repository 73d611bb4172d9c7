"""Stages that run at the same time."""

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any


def side_by_side(*works: Callable[[], Any], stop: Callable[[], object]) -> list[Any]:
    """Call functions at the same time, each in a thread; returns what they return, in order.

    One may wait for what another makes, so the first error, or Ctrl-C, calls `stop`, which must make the others end. That error
    is raised once they have.

    >>> side_by_side(lambda: 1, lambda: 2, stop=lambda: None)
    [1, 2]
    """
    with ThreadPoolExecutor(len(works)) as threads:
        calls = [threads.submit(work) for work in works]
        try:
            ended, _ = wait(calls, return_when=FIRST_EXCEPTION)
            for call in calls:
                if call in ended:
                    call.result()
        except BaseException:
            stop()
            raise
    return [call.result() for call in calls]
