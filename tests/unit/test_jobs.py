"""Every config in jobs/ is one that the command takes."""

from pathlib import Path

import pytest

from tpaw_ray.config import load_config, read_mapping
from tpaw_ray.experiment.design import load_design
from tpaw_ray.experiment.phases import final_runs, tuning_runs

ALL = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
EXPERIMENTS = [path for path in ALL if "methods" in read_mapping(path)]
JOBS = [path for path in ALL if "run" in read_mapping(path)]
BASES = {path.parent / base for path in EXPERIMENTS if isinstance(base := read_mapping(path)["base"], str)}


def test_every_file_in_jobs_is_a_job_or_an_experiment_or_the_base_of_one():
    assert BASES and sorted([*EXPERIMENTS, *JOBS, *BASES]) == ALL


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_a_valid_config_named_like_its_run(path):
    assert load_config(path).run.name in (path.stem, path.stem.split("_")[0])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_an_experiment_in_jobs_is_one_that_the_command_takes(path, quick):
    design = load_design(path, quick=quick)
    assert design.name.startswith(path.stem.replace("_", "-"))
    assert tuning_runs(design) and final_runs(design, {method: design.points(method)[0] for method in design.methods})


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_study_has_as_many_runs_as_its_file_says(path):
    design = load_design(path)
    tuning, final = tuning_runs(design), final_runs(design, {method: design.points(method)[0] for method in design.methods})
    assert f"{len(tuning) + len(final)} runs: {len(tuning)} for tuning" in path.read_text(encoding="utf-8")


def test_the_jobs_of_the_readme_are_there():
    assert {"demo", "smollm2_gsm8k"} <= {path.stem for path in JOBS}
