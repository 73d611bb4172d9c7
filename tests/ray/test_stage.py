"""How stages walk their shards on real Ray Data: answers as they come, errors as they are, tasks that die."""

import os
import signal
import time
from pathlib import Path

import pytest

from tpaw_ray.data.stage import ask_for_each_shard, for_each_shard
from tpaw_ray.errors import GenerationError


def rows_in(folder, count):
    return [{"index": index, "folder": str(folder)} for index in range(count)]


def note(row):
    """Leave a file of the shard, as a stage does."""
    (Path(row["folder"]) / str(row["index"])).touch()
    return 1


def noted(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


class Waits:
    """Shard 0 waits until the others' answers have reached the driver."""

    def __call__(self, row):
        seen = Path(row["folder"]) / "seen"
        deadline = time.monotonic() + 60
        while row["index"] == 0 and not seen.exists():
            assert time.monotonic() < deadline, "the answers of finished shards were held back"
            time.sleep(0.05)
        return note(row)


def test_an_answer_is_passed_on_while_other_shards_of_the_task_wait(ray_session, tmp_path):
    advanced = []

    def advance(count):
        advanced.append(count)
        if len(advanced) == 3:
            (tmp_path / "seen").touch()

    assert ask_for_each_shard(rows_in(tmp_path, 4), Waits(), name="wait", at_once=4, advance=advance) == 4
    assert noted(tmp_path) == [0, 1, 2, 3]


class Fails:
    """Shard 0 fails at once; the others take half a second each."""

    def __init__(self, error):
        self.error = error

    def __call__(self, row):
        if row["index"] == 0:
            raise self.error
        time.sleep(0.5)
        return note(row)


@pytest.mark.parametrize("error", [GenerationError("prompt 3f: refused"), KeyError("3f")], ids=["told", "unforeseen"])
def test_an_error_ends_the_stage_before_the_shards_that_wait(ray_session, tmp_path, error):
    with pytest.raises(Exception, match="3f") as caught:
        ask_for_each_shard(rows_in(tmp_path, 40), Fails(error), name="fail", at_once=2, advance=lambda count: None)
    assert (type(caught.value) is GenerationError) == isinstance(error, GenerationError)
    assert len(noted(tmp_path)) < 20


class Dies:
    """Shard 2 takes its process with it, the first time."""

    def __call__(self, row):
        fuse = Path(row["folder"]) / "fuse"
        if row["index"] == 2 and fuse.exists():
            fuse.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return note(row)


@pytest.mark.parametrize("walk", ["asked", "computed"])
def test_the_shards_of_a_task_that_died_are_done_again(ray_session, tmp_path, walk):
    (tmp_path / "fuse").touch()
    rows = rows_in(tmp_path, 5)
    if walk == "asked":
        done = ask_for_each_shard(rows, Dies(), name="die", at_once=1, advance=lambda count: None)
    else:
        done = for_each_shard(rows, Dies(), name="die", cpus=0.1, advance=lambda count: None)
    assert done == 5
    assert noted(tmp_path) == [0, 1, 2, 3, 4]


def test_with_several_askers_every_shard_is_asked_for_once(ray_session, tmp_path):
    assert ask_for_each_shard(rows_in(tmp_path, 70), note, name="ask", at_once=64, advance=lambda count: None) == 70
    assert noted(tmp_path) == list(range(70))
