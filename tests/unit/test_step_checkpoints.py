"""Which step checkpoint an update goes on from; with workers it is tried in `tests/ray/test_saves.py`."""

import errno
from pathlib import Path

import pytest

from tpaw_ray.config import resolve_config
from tpaw_ray.errors import RunError
from tpaw_ray.learner.saves import StepCheckpoints
from tpaw_ray.runs.address import told
from tpaw_ray.runs.store import RunStore


@pytest.fixture
def store(tmp_path):
    """A run with step checkpoints after steps 4 and 8 of iteration 0."""
    store = RunStore.open(str(tmp_path), "run")
    for steps in ("000004", "000008"):
        directory = f"{store.steps(0)}/{steps}"
        store.write_bytes(f"{directory}/values-0.safetensors", steps.encode())
        store.commit(directory)
    return store


def newest(store):
    """The step checkpoint that is taken, and what is said."""
    config = resolve_config({"run": {"name": "run"}, "model": {"path": "m"}, "data": {"path": "d"}})
    said = []
    return StepCheckpoints(config, store, 0, said.append)._newest(), said


def test_the_newest_whole_one_counts(store):
    assert newest(store) == ("000008", [])
    path = Path(store.steps(0), "000008/values-0.safetensors")
    path.write_bytes(b"000009")
    name, (remark,) = newest(store)
    assert name == "000004" and str(path) in remark and "differs from what was committed" in remark


def test_one_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(store, monkeypatch):
    def fail(_, path):
        with told(path, "read"):
            raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(RunStore, "_measure", fail)
    with pytest.raises(RunError, match=r"000008/values-0\.safetensors: cannot be read: Input/output error"):
        newest(store)
