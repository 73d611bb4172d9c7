"""Where a run is, told from folders written by hand."""

import json
import os
import time

import pytest

from tests.made_run import MadeRun
from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.errors import RunError
from tpaw_ray.runs.claim import Claim
from tpaw_ray.runs.status import lines_of, status_of
from tpaw_ray.runs.store import MARKER, RunStore
from tpaw_ray.schema import Generation

TRAIN = [(f"{i}+1=", str(i + 1), str(i + 1)) for i in range(4)]
HELDOUT = [("2+2=", "4", "4")]
SAID = [("4", "4", True)]


@pytest.fixture
def made(tmp_path):
    return MadeRun(tmp_path, planned=3).start(TRAIN, HELDOUT).evaluate(0, SAID)


def told(made):
    return lines_of(status_of(made.store))


def test_what_is_done_and_what_is_to_come(made):
    rollout = made.store.rollout(Rollout(0, 0))
    made.store.write_rows(made.store.shard(rollout, 0), [], Generation)
    assert told(made) == [
        f"{made.store.root}: iteration 1 of 3",
        "  driver  none; `tpaw run` with the same config goes on",
        "  prompts       done",
        "  start model   done",
        "  evaluate 000  done",
        "  generate 000  1 of 2 shards",
        "  score         to come",
        "  pair          to come",
        "  update        to come",
        "  evaluate 001  to come",
    ]


def test_of_a_stage_whose_extent_is_not_known_what_is_there_is_told(made):
    made.store.remove(f"{made.store.path('prompts')}/{MARKER}")
    assert told(made)[2:] == ["  prompts       4 shards", "  start model   done", "  evaluate 000  done"]


def test_an_update_is_told_in_steps(made):
    made.iterate(0, ["2"] * 4)
    assert "  update        4 of 4 steps" in told(made)  # taken, but its checkpoint is not there
    made.store.commit(made.store.checkpoint(1))
    assert "  update        done" in told(made)


def end(made, checkpoint, when):
    path = f"{made.store.evaluation(checkpoint)}/{MARKER}"
    made.store.write_json(path, made.store.read_json(path) | {"ended": when})


def test_the_time_left_is_that_of_the_iterations_so_far(made):
    made.iterate(0, ["2"] * 4).evaluate(1, SAID)
    made.store.commit(made.store.iteration(0))
    now = time.time()
    end(made, 0, now - 700)
    end(made, 1, now - 100)
    found = status_of(made.store)
    assert (found.iteration, found.iterations) == (1, 3)
    assert found.seconds_left == pytest.approx(2 * 600 - 100, abs=5)
    assert "iteration 2 of 3, about 18 min " in told(made)[0]


def test_a_finished_run_says_so(made):
    for iteration in range(3):
        made.store.commit(made.store.iteration(iteration))
    assert told(made) == [f"{made.store.root}: all 3 iterations are done"]


def test_a_living_driver_is_told_of_and_a_silent_one_doubted(made):
    with Claim(made.store, print):
        assert f"process {os.getpid()} on" in told(made)[1] and "last heard of 0 s ago" in told(made)[1]
        path = made.store.path("driver.json")
        os.utime(path, (time.time() - 120,) * 2)
        assert "last heard of 2 min ago; it may have died" in told(made)[1]
        content = json.loads(made.store.read_bytes(path))
        content["holder"]["pid"] = 2**22 + 1  # no such process
        made.store.write_json(path, content)
        assert "has died; `tpaw run` with the same config goes on" in told(made)[1]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no run lies there \(no config\.yaml\)"):
        status_of(RunStore.named(str(tmp_path)))
