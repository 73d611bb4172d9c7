"""A config as a Ray job: what is asked of the job server, and what is refused before; a real job server is in tests/cluster."""

import pytest
import yaml

from tpaw_ray.errors import ConfigError, ResourceError
from tpaw_ray.submit import STOP_S, job_of, submit


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "uploaded/jobs/small.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        yaml.safe_dump({"run": {"name": "small", "root": "/mnt/runs"}, "model": {"path": "/m"}, "data": {"path": "/d"}})
    )
    return path


def test_a_job_runs_the_config_of_the_uploaded_folder_with_its_overrides(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    job = job_of(config, ["objective.reward_scale=[0.2, 0.1]"], tmp_path / "uploaded", ["HF_TOKEN"], None)
    assert job.entrypoint == "python -m tpaw_ray run jobs/small.yaml 'objective.reward_scale=[0.2, 0.1]'"
    assert job.job_id.startswith("tpaw-small-")
    assert job.runtime_env == {
        "working_dir": str(tmp_path / "uploaded"),
        "env_vars": {"HF_TOKEN": "hf_secret", "RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
    }


def test_a_missing_secret_is_named(config, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment has no WANDB_API_KEY"):
        job_of(config, [], tmp_path / "uploaded", ["WANDB_API_KEY"], None)


def test_a_config_outside_the_uploaded_folder_is_refused(config, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="is not inside the working directory"):
        job_of(config, [], tmp_path / "other", [], None)


def test_a_run_that_would_vanish_with_the_job_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.root: found runs, which would lie in the job's own folder"):
        job_of(config, ["run.root=runs"], tmp_path / "uploaded", [], None)
    job_of(config, ["run.root=s3://bucket/runs"], tmp_path / "uploaded", [], None)


def test_a_job_server_that_is_not_there_is_told_of_and_no_other_is_asked(config, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:7")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8")
    job = job_of(config, [], tmp_path / "uploaded", [], "one")
    with pytest.raises(ResourceError, match=r"the job server at http://127\.0\.0\.1:9 took no job: .*http://127\.0\.0\.1:9"):
        submit(job, "http://127.0.0.1:9", print, print, follow=True)


class Lost:
    """Stands in for Ray's job client: takes the job, then loses the connection."""

    def __init__(self, address):
        pass

    def submit_job(self, **job):
        pass

    async def tail_job_logs(self, job_id):
        yield "a line\n"
        raise RuntimeError("connection reset")


def test_a_connection_that_is_lost_says_that_the_job_may_go_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Lost)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    job, shown = job_of(config, [], tmp_path / "uploaded", [], "one"), []
    with pytest.raises(ResourceError, match="one is out of sight, and may go on: connection reset"):
        submit(job, "http://127.0.0.1:9", print, shown.append, follow=True)
    assert shown == ["a line\n"]
