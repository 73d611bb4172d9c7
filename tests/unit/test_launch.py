"""The start of a run: Ray comes up beside the checks, and which of two errors a user is told."""

import threading
from types import SimpleNamespace

import pytest

from tpaw_ray import launch, nodes
from tpaw_ray.config import resolve_config
from tpaw_ray.errors import CheckpointError, ResourceError, RunError
from tpaw_ray.experiment import testing
from tpaw_ray.experiment.testing import Asked, answer_test
from tpaw_ray.policy.directory import own_code
from tpaw_ray.runs.progress import Reporter


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Calls `launch` with stand-ins for Ray's start, the check and the run; returns what happened, in order."""
    run, data = {"name": "t", "root": str(tmp_path)}, {"path": "d"}

    def call(connect, check, **model):
        config = resolve_config({"run": run, "model": {"path": "m", **model}, "data": data, "iterations": 1})
        happened = []
        monkeypatch.setattr(launch, "check_folders", lambda config, store: tmp_path)
        monkeypatch.setattr(launch, "connect", lambda **_: connect())
        monkeypatch.setattr(launch, "check_start", lambda config, store, model: check())
        monkeypatch.setattr(launch, "play", lambda *_: happened.append("play"))
        monkeypatch.setattr(launch, "show", lambda *_: None)
        monkeypatch.setattr(launch, "wait_for_nodes", lambda *_: None)
        resources = {"CPU": 64.0}
        monkeypatch.setattr(
            launch, "ray", SimpleNamespace(cluster_resources=lambda: resources, shutdown=lambda: happened.append("shutdown"))
        )
        try:
            launch.launch(config, Reporter())
        except (CheckpointError, ResourceError, RunError) as error:
            happened.append(str(error))
        return happened

    return call


def failing(error):
    def fail():
        raise error

    return fail


def test_ray_starts_while_the_checks_run(begin):
    met = threading.Barrier(2, timeout=30)  # one after the other would never meet
    assert begin(met.wait, met.wait) == ["play", "shutdown"]


def test_a_failed_check_ends_the_run_and_ray(begin):
    assert begin(lambda: None, failing(CheckpointError("no model"))) == ["shutdown", "no model"]


def test_what_is_wrong_with_the_model_is_told_before_what_is_wrong_with_ray(begin):
    assert begin(failing(ResourceError("no Ray")), failing(CheckpointError("no model"))) == ["shutdown", "no model"]
    assert begin(failing(ResourceError("no Ray")), lambda: None) == ["shutdown", "no Ray"]


def test_that_a_models_own_code_runs_is_said_at_the_start(begin, tmp_path, capsys):
    assert begin(lambda: None, lambda: None) == ["play", "shutdown"]
    assert "trust_remote_code" not in capsys.readouterr().out
    (tmp_path / "t/config.yaml").unlink()
    assert begin(lambda: None, lambda: None, trust_remote_code=True) == ["play", "shutdown"]
    assert f"model.trust_remote_code is true: the Python code in {tmp_path} runs" in capsys.readouterr().out


def test_that_a_models_own_code_runs_is_said_before_the_test_split_is_asked(monkeypatch, capsys):
    data = {"run": {"name": "t"}, "data": {"path": "d"}}
    configs = [
        resolve_config({**data, "model": {"path": path, "trust_remote_code": path != "m"}}) for path in ("m", "a", "b", "a")
    ]
    monkeypatch.setattr(testing, "wait_for_nodes", lambda *_: None)
    monkeypatch.setattr(testing, "_guest", lambda *_: failing(RunError("enough"))())
    with pytest.raises(RunError, match="enough"):
        answer_test([Asked(config=config, store=None, checkpoint=0) for config in configs], Reporter())
    assert capsys.readouterr().out.splitlines() == [own_code("a"), own_code("b")]


def test_a_cluster_without_a_node_for_the_engines_is_told_before_the_test_split_is_asked(monkeypatch):
    monkeypatch.setattr(nodes, "cluster_nodes", lambda: [])
    config = resolve_config({"run": {"name": "t"}, "data": {"path": "d"}, "model": {"path": "m"}})
    with pytest.raises(ResourceError, match="the cluster has 0"):
        answer_test([Asked(config=config, store=None, checkpoint=0)], Reporter())


def test_a_run_folder_that_cannot_be_written_to_is_told(begin, tmp_path):
    def fill():
        (tmp_path / "t").write_text("a file where the run would lie")  # since it was checked

    ended, told = begin(fill, lambda: None)
    assert ended == "shutdown" and told.startswith(f"{tmp_path}/t/driver.json: cannot be written: ")
