"""`tpaw submit`: a config's run as a Ray job. Submitted again, the run goes on.

Ray uploads the working directory without what `.gitignore` and `.rayignore` name, starts `python -m tpaw_ray run` in it on the
head node, and stops it by SIGTERM, after which the run may take `STOP_S` to write down what can be continued.
"""

import asyncio
import os
import shlex
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpaw_ray.config import Config, load_config
from tpaw_ray.errors import INTERRUPTED, ConfigError, ResourceError

STOP_S = 150
"""How long a stopped run may take to end by itself: a store that does not answer is tried for over a minute."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of Ray's job server."""

    job_id: str
    entrypoint: str
    runtime_env: dict[str, Any]


def job_of(config_file: Path, overrides: Sequence[str], working_dir: Path, secrets: Sequence[str], job_id: str | None) -> Job:
    """The job of a config. `secrets` are names of environment variables that go along with their values.

    Raises:
        ConfigError: when the config is wrong, lies outside the working directory, or keeps the run in the job's own folder; or
            when a secret is not set.
    """
    config = load_config(config_file, overrides)
    root, file = working_dir.resolve(), config_file.resolve()
    if not file.is_relative_to(root):
        raise ConfigError(f"{config_file}: is not inside the working directory {root}, which is all that the job gets")
    if not (os.path.isabs(config.run.root) or "://" in config.run.root):
        raise ConfigError(
            f"run.root: found {config.run.root}, which would lie in the job's own folder and vanish with it; expected a folder "
            "that every node sees, by its full path, or s3://bucket/prefix"
        )
    if missing := [name for name in secrets if not os.environ.get(name)]:
        raise ConfigError(f"--secret {missing[0]}: the environment has no {missing[0]}; set it, or leave the option out")
    variables = {name: os.environ[name] for name in secrets}
    return Job(
        job_id=job_id or _new_id(config),
        entrypoint=shlex.join(["python", "-m", "tpaw_ray", "run", str(file.relative_to(root)), *overrides]),
        runtime_env={
            "working_dir": str(root),
            "env_vars": variables | {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
        },
    )


def submit(job: Job, address: str | None, say: Callable[[str], object], show: Callable[[str], object], *, follow: bool) -> int:
    """Submit a job and follow its log to its end; returns the exit code of the run, 0 where it is not followed.

    `address` is that of the job server, by default `RAY_API_SERVER_ADDRESS` or `RAY_ADDRESS`; `show` gets the log's text as it
    comes.

    Raises:
        ResourceError: when the job server cannot be reached, refuses the token or the job, or the job never ran.
    """
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes its variables before what it is told
    try:
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(address)
        client.submit_job(entrypoint=job.entrypoint, submission_id=job.job_id, runtime_env=job.runtime_env)
    except Exception as error:  # requests', Ray's and bare ones, for whatever the server answered
        server = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
        raise ResourceError(f"the job server at {server} took no job: {error}") from error
    say(f"submitted {job.job_id}; `ray job logs -f {job.job_id}` shows it, `ray job stop {job.job_id}` ends it")
    if not follow:
        return 0
    try:
        asyncio.run(_follow(client, job.job_id, show))
        info = client.get_job_info(job.job_id)
    except KeyboardInterrupt:
        say(f"{job.job_id} goes on; `ray job stop {job.job_id}` ends it")
        return INTERRUPTED
    except Exception as error:  # aiohttp's, Ray's and bare ones, when the connection is lost
        raise ResourceError(f"{job.job_id} is out of sight, and may go on: {error}; `ray job logs -f {job.job_id}`") from error
    if info.driver_exit_code is None and info.status != "STOPPED":
        raise ResourceError(f"{job.job_id}: {str(info.status).lower()}: {info.message}")
    say(f"{job.job_id}: {str(info.status).lower()}" + ("; the same command continues it" if info.driver_exit_code else ""))
    return INTERRUPTED if info.status == "STOPPED" else int(info.driver_exit_code or 0)


async def _follow(client: Any, job_id: str, show: Callable[[str], object]) -> None:
    async for text in client.tail_job_logs(job_id):
        show(text)


def _new_id(config: Config) -> str:
    return f"tpaw-{config.run.name}-{uuid.uuid4().hex[:8]}"
