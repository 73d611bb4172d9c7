"""Rows in trackers: the real tools, each read back by its own reader, offline."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_schema_and_store import STEP
from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.config import resolve_config
from tpaw_ray.errors import ConfigError, RunError
from tpaw_ray.runs.continuation import check_same_run
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.store import RunStore
from tpaw_ray.tracking import follow
from tpaw_ray.tracking.entries import Reached, of_step
from tpaw_ray.tracking.follow import Trackers, subject_of

TOOLS = ("tensorboard", "wandb", "mlflow", "trackio")
OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(autouse=True, scope="session")
def offline(tmp_path_factory):
    """No tool may reach out. Set before any is imported: trackio reads its folder then."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**OFFLINE, "TRACKIO_DIR": str(tmp_path_factory.mktemp("trackio"))}.items():
            patch.setenv(name, value)
        for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "WANDB_API_KEY"):
            patch.delenv(name, raising=False)
        yield


def config_of(tmp_path, *to, **sections):
    base = {"run": {"name": "t", "root": str(tmp_path)}, "model": {"path": "m"}, "data": {"path": "d"}, "iterations": 2}
    return resolve_config({**base, "tracking": {"to": list(to)}, **sections})


def rows_at(iteration, *steps):
    """Steps whose loss says which they are: step 2 of iteration 1 has 1.25."""
    return [replace(STEP, iteration=iteration, step=step, loss=iteration + step / 8) for step in steps]


def evaluate(store, checkpoint, accuracy):
    counts = {"sequences": 8, "tokens": 80, "seconds": 1.0}
    store.commit(store.evaluation(checkpoint), **counts, accuracy=accuracy, judged=4, target_logp=-30.5 + checkpoint)


def finish(store, iteration, steps, accuracy):
    """Commit an iteration of so many steps, and the evaluation of the checkpoint it made."""
    counts = {"sequences": 8, "tokens": 80, "seconds": 1.0}
    store.commit(store.rollout(Rollout(iteration, iteration)), **counts)
    store.commit(f"{store.iteration(iteration)}/scores", **counts)
    MetricsLog(store).write_update(iteration, rows_at(iteration, *range(steps)))
    store.commit(store.learner(iteration), **counts)
    store.commit(store.checkpoint(iteration + 1))
    evaluate(store, iteration + 1, accuracy)


# Readers: by metric, the (step, value) that stand there, in the order in which they came.


def in_tensorboard(store):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(store.path("tracking/tensorboard"))
    found.Reload()
    return {name: [(point.step, point.value) for point in found.Scalars(name)] for name in found.Tags()["scalars"]}


def end_wandb():
    """What the end of a driver's process does: W&B's own process writes its files to the end, and ends."""
    import wandb

    wandb.teardown()


def in_wandb(store):
    """By our reader of offline files, since W&B's own is written in Go."""
    from tpaw_ray.tracking.to_wandb import history

    end_wandb()
    found = {}
    for path in sorted(Path(store.path("tracking/wandb")).glob("offline-run-*/run-*.wandb")):
        for row in history(path):
            for name in row.keys() - {"step"}:
                found.setdefault(name, []).append((row["step"], row[name]))
    return found


def mlflow_client(store):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"file:{store.path('tracking/mlflow')}")


def mlflow_run(client):
    (run,) = client.search_runs([client.get_experiment_by_name("tpaw").experiment_id])
    return run


def in_mlflow(store):
    client = mlflow_client(store)
    run = mlflow_run(client)
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def in_trackio(store):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    known = store.read_json(store.path("tracking.json"))["id"]
    (run,) = [run for run in trackio.Api().runs("tpaw") if run.name == known]
    found = {}
    for row in SQLiteStorage.get_logs("tpaw", run_id=run.id):
        for name in row.keys() - {"step", "timestamp"}:
            found.setdefault(name, []).append((row["step"], row[name]))
    return found


READERS = {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow, "trackio": in_trackio}


def losses(count, others=()):
    """Losses of `count` steps of iteration 0, then of iteration 1."""
    return [(step + 1, step / 8) for step in range(count)] + [(count + step + 1, 1 + step / 8) for step in others]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_run_and_its_continuation_are_one_run_of_the_tracker_with_every_row_once(tool, tmp_path):
    config, said = config_of(tmp_path, tool), []
    store = RunStore.open(str(tmp_path), "t")
    evaluate(store, 0, 0.25)
    with Trackers(config, store, said.append) as trackers:
        trackers.take(rows_at(0, 0, 1))
        trackers.take(rows_at(0, 2))
        finish(store, 0, steps=3, accuracy=0.5)
        trackers.follow()
        trackers.take(rows_at(1, 0, 1))  # the update of iteration 1 is under way
    end_wandb()
    with Trackers(config, store, said.append) as trackers:  # which is taken anew
        trackers.take(rows_at(1, 0, 1, 2))
        finish(store, 1, steps=3, accuracy=0.75)
        trackers.follow()
    end_wandb()
    with Trackers(config, store, said.append):
        pass
    assert said == []
    found = READERS[tool](store)
    assert found["train/loss"] == losses(3, range(3))
    assert found["checkpoint/accuracy"] == [(0, 0.25), (3, 0.5), (6, 0.75)]
    assert found["checkpoint/target_logp"] == [(0, -30.5), (3, -29.5), (6, -28.5)]
    assert found["train/player_weight/1"] == [(step, 0.5) for step in range(1, 7)]
    assert "train/grad_norm" not in found  # null: DeepSpeed computed none


DRIVER = """
import os, signal, sys
from tests.unit.test_trackers import *
config, store = config_of(sys.argv[1], *TOOLS), RunStore.open(sys.argv[1], "t")
trackers = Trackers(config, store, print).__enter__()
trackers.take(rows_at(0, 0, 1, 2))
for line in trackers._lines:
    line._thread.submit(print).result()  # they were handed over; what each tool made of them by now is its own affair
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_of_the_driver_no_tracker_lacks_a_row_or_has_one_twice(tmp_path):
    store = RunStore.open(str(tmp_path), "t")
    evaluate(store, 0, 0.25)
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert ended.returncode == -9, ended.stderr
    assert "warning" not in ended.stdout
    with Trackers(config_of(tmp_path, *TOOLS), store, print) as trackers:
        trackers.take(rows_at(0, 0, 1, 2, 3))
        finish(store, 0, steps=4, accuracy=0.5)
        trackers.follow()
    for tool in TOOLS:
        found = READERS[tool](store)
        assert found["train/loss"] == losses(4), tool
        assert found["checkpoint/accuracy"] == [(0, 0.25), (4, 0.5)], tool


def test_an_event_cut_short_by_a_kill_is_sent_again(tmp_path):
    config, store = config_of(tmp_path, "tensorboard"), RunStore.open(str(tmp_path), "t")
    with Trackers(config, store, print) as trackers:
        trackers.take(rows_at(0, 0, 1, 2))
    (path,) = Path(store.path("tracking/tensorboard")).glob("events.*")
    os.truncate(path, path.stat().st_size - 10)
    with Trackers(config, store, print) as trackers:
        trackers.take(rows_at(0, 0, 1, 2, 3))
    assert in_tensorboard(store)["train/loss"] == losses(4)


def test_offline_files_of_many_blocks_are_read_whole_and_cut_ones_as_far_as_they_go(tmp_path):
    from tpaw_ray.tracking.to_wandb import history

    config, store = config_of(tmp_path, "wandb"), RunStore.open(str(tmp_path), "t")
    with Trackers(config, store, print) as trackers:
        trackers.take(rows_at(0, *range(150)))
    end_wandb()
    (path,) = Path(store.path("tracking/wandb")).glob("offline-run-*/run-*.wandb")
    size = path.stat().st_size
    assert size > 3 * 32768
    assert [row["step"] for row in history(path)] == list(range(1, 151))
    for cut in (size // 2, 32768 + 3, 32768 - 1):
        os.truncate(path, cut)
        steps = [row["step"] for row in history(path)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) < 150 * cut / size + 1
    assert steps


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tracker_asked_for_late_gets_the_whole_run(tool, tmp_path):
    store = RunStore.open(str(tmp_path), "t")
    evaluate(store, 0, 0.25)
    finish(store, 0, steps=3, accuracy=0.5)
    finish(store, 1, steps=2, accuracy=0.75)
    with Trackers(config_of(tmp_path, tool), store, print):
        pass
    found = READERS[tool](store)
    assert found["train/loss"] == losses(3, range(2))
    assert found["checkpoint/number"] == [(0, 0), (3, 1), (5, 2)]


def test_a_run_made_anew_under_the_same_name_is_another_run_of_the_tracker(tmp_path):
    config, stores = config_of(tmp_path, "trackio"), [RunStore.open(str(tmp_path / place), "t") for place in "ab"]
    for store in stores:
        with Trackers(config, store, print) as trackers:
            trackers.take(rows_at(0, 0))
    assert [in_trackio(store)["train/loss"] for store in stores] == [[(1, 0.0)], [(1, 0.0)]]


@pytest.mark.parametrize(
    ("name", "content"), [("tracking.json", b"[]"), ("tracking.json", b'{"id": 3}'), ("environment.json", b"[1]")]
)
def test_a_damaged_note_of_the_run_is_named(tmp_path, name, content):
    store = RunStore.open(str(tmp_path), "t")
    store.write_bytes(store.path(name), content)
    with pytest.raises(RunError, match=rf"^{store.path(name)}: the run is damaged there"):
        subject_of(config_of(tmp_path, "tensorboard"), store)


def test_the_config_and_the_environment_go_along(tmp_path):
    config, store = config_of(tmp_path, *TOOLS, objective={"eta": 3.5}), RunStore.open(str(tmp_path), "t")
    store.write_json(store.path("environment.json"), {"packages": {"torch": "9.8.7"}, "commit": None})
    with Trackers(config, store, print) as trackers:
        trackers.take(rows_at(0, 0))
    params = mlflow_run(mlflow_client(store)).data.params
    assert (params["objective.eta"], params["environment.packages.torch"]) == ("3.5", "9.8.7")
    end_wandb()
    (path,) = Path(store.path("tracking/wandb")).glob("offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert b'"eta":3.5' in content.replace(b" ", b"")
    assert b"9.8.7" in content
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(store.path("tracking/tensorboard"))
    found.Reload()
    text = make_ndarray(found.Tensors("config")[0].tensor_proto).item().decode()
    assert "      eta: 3.5\n" in text and "torch: 9.8.7" in text
    import trackio

    known = store.read_json(store.path("tracking.json"))["id"]
    (run,) = [run for run in trackio.Api().runs("tpaw") if run.name == known]
    assert (run.config["objective"]["eta"], run.config["environment"]["packages"]["torch"]) == (3.5, "9.8.7")


def test_a_server_that_is_gone_is_warned_of_once_and_the_others_get_every_row(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        said, store = [], RunStore.open(str(tmp_path), "t")
        with Trackers(config_of(tmp_path, "mlflow", "tensorboard"), store, said.append) as trackers:
            for step in range(3):
                trackers.take(rows_at(0, step))
    (warning,) = said
    assert warning.startswith("warning: tracking.to: mlflow failed: ") and "the run goes on without it" in warning
    assert in_tensorboard(store)["train/loss"] == losses(3)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the next driver finds a place to write to
    finish(store, 0, steps=3, accuracy=0.5)
    with Trackers(config_of(tmp_path, "mlflow"), store, said.append):
        pass
    assert in_mlflow(store)["train/loss"] == losses(3)


class Failing:
    """A fake tracker, which takes one entry and fails ever after."""

    reached = Reached()
    calls = 0

    def log(self, entries):
        self.calls += 1
        if self.calls > 1:
            raise OSError("the server hung up")

    def close(self):
        raise AssertionError("a tracker that failed is left alone")


def test_a_tracker_that_fails_later_is_warned_of_once_and_left_alone(tmp_path, monkeypatch):
    tracker, said = Failing(), []
    monkeypatch.setitem(follow.OPENERS, "mlflow", lambda subject: tracker)
    store = RunStore.open(str(tmp_path), "t")
    with Trackers(config_of(tmp_path, "mlflow"), store, said.append) as trackers:
        for step in range(4):
            trackers.take(rows_at(0, step))
    assert tracker.calls == 2
    assert len(said) == 1 and "mlflow failed: the server hung up" in said[0]


def test_a_warning_of_a_tracker_does_not_repeat_the_password_of_its_address(tmp_path, monkeypatch):
    def opener(subject):
        raise OSError("API request to http://me:swordfish@127.0.0.1:9/api failed")

    said = []
    monkeypatch.setitem(follow.OPENERS, "mlflow", opener)
    with Trackers(config_of(tmp_path, "mlflow"), RunStore.open(str(tmp_path), "t"), said.append):
        pass
    assert len(said) == 1 and "API request to http://…@127.0.0.1:9/api failed" in said[0]


def test_wandb_without_a_key_is_a_warning_and_asks_nobody(tmp_path, monkeypatch):
    """In a process of its own: W&B reads its mode once."""
    program = (
        "import sys; from tests.unit.test_trackers import *\n"
        "with Trackers(config_of(sys.argv[1], 'wandb'), RunStore.open(sys.argv[1], 't'), print): pass"
    )
    environment = {**os.environ, "WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
    )
    assert found.returncode == 0, found.stderr
    assert "wandb failed: no API key is set: set WANDB_API_KEY, or WANDB_MODE=offline" in found.stdout


def test_a_tracker_whose_package_is_missing_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "find_spec", lambda name: None if name == "mlflow" else object())
    follow.check_installed(config_of(tmp_path, "tensorboard", "wandb"))
    with pytest.raises(ConfigError, match=r"^tracking.to: mlflow is asked for.*pip install 'tpaw-ray\[trackers\]'"):
        follow.check_installed(config_of(tmp_path, "tensorboard", "mlflow"))


def test_nothing_is_imported_and_nothing_written_unless_asked_for(tmp_path):
    program = (
        "import sys; from tpaw_ray.config import resolve_config\n"
        "from tpaw_ray.runs.store import RunStore; from tpaw_ray.tracking.follow import Trackers\n"
        "config = resolve_config({'run': {'name': 't', 'root': sys.argv[1]}, 'model': {'path': 'm'}, 'data': {'path': 'd'}})\n"
        "with Trackers(config, RunStore.open(sys.argv[1], 't'), print) as trackers: trackers.take([])\n"
        "print([name for name in ('tensorboard', 'wandb', 'mlflow', 'trackio') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_tracking_may_change_on_a_run_that_was_begun(tmp_path):
    store = RunStore.open(str(tmp_path), "t")
    store.write_bytes(store.path("config.yaml"), json.dumps(config_of(tmp_path).model_dump(mode="json")).encode())
    store.commit(store.path("prompts"))
    check_same_run(config_of(tmp_path, "wandb"), store)


def test_a_run_in_an_object_store_has_its_local_trackers_in_the_working_directory(tmp_path, monkeypatch, bucket):
    monkeypatch.chdir(tmp_path)
    store = RunStore.open(bucket, "t")
    config = config_of(tmp_path, "tensorboard", run={"name": "t", "root": bucket})
    subject = subject_of(config, store)
    assert subject.folder == tmp_path / "tracking" / subject.id
    assert subject_of(config, store).id == subject.id  # kept in the store
    with Trackers(config, store, print) as trackers:
        trackers.take(rows_at(0, 0))
    assert list((tmp_path / "tracking" / subject.id / "tensorboard").glob("events.*"))


def test_steps_are_counted_over_iterations(tmp_path):
    (row,) = rows_at(1, 2)
    entry = of_step({**row.__dict__, "grad_norm": 2.5}, before=10)
    assert (entry.step, entry.checkpoint, entry.values["train/loss"], entry.values["train/grad_norm"]) == (13, None, 1.25, 2.5)
    assert list(entry.values)[-1] == "train/loss"
