"""Every config in jobs/ is one that the command takes."""

from pathlib import Path

import pytest

from tpaw_ray.config import load_config

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_a_valid_config_named_like_its_run(path):
    assert load_config(path).run.name == path.stem.split("_")[0]


def test_the_jobs_of_the_readme_are_there():
    assert {"demo", "smollm2_gsm8k"} <= {path.stem for path in JOBS}
