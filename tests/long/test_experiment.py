"""`tpaw experiment` as a user types it: two methods, two seeds, two settings, on real runs; interrupted, continued, run again.

Took 29 minutes on two cores that had much else to do.
"""

import json
from statistics import fmean

import pytest
import yaml

from tests.e2e.test_experiment import RATES, SEEDS, TUNED, write_experiment
from tests.e2e.test_run import fingerprints, interrupt_when, press_ctrl_c, tpaw
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Answer, Prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def done(folder):
    """The experiment's folder and what the command said, after an interruption in the middle of the tuning runs."""
    path = write_experiment(folder)
    begun = folder / "experiments/both/tuning/tpaw_learning_rate-0.0001_seed-7/checkpoints/000/committed.json"
    code, _, err, left = interrupt_when(begun, press_ctrl_c, "experiment", path)
    assert (code, left) == (130, []), err[-3000:]
    assert "the same command continues" in err
    ended = tpaw_in_time("experiment", path)
    assert ended.returncode == 0, (ended.stdout[-3000:], ended.stderr[-3000:])
    return folder / "experiments/both", ended.stdout


def tpaw_in_time(*arguments):
    return tpaw(*arguments, timeout=3000)


def read(done, name="experiment.json"):
    return json.loads((done[0] / name).read_text())


def test_the_protocol_says_in_which_order_validation_and_test_were_used(done):
    protocol = read(done)["protocol"]
    assert [event["event"] for event in protocol] == ["tuned", "chosen", "trained", "testing", "tested"]
    assert [event["at"] for event in protocol] == sorted(event["at"] for event in protocol)
    first_final = min(path.stat().st_mtime for path in (done[0] / "final").glob("*/config.yaml"))
    assert (done[0] / "choices.json").stat().st_mtime <= first_final


def test_every_method_is_tuned_on_the_whole_grid_by_the_last_iterations_validation_accuracy(done):
    for method, choice in read(done)["choices"].items():
        points = {point["settings"]["learner.learning_rate"]: point for point in choice["points"]}
        assert set(points) == set(RATES)
        for rate, point in points.items():
            run = RunStore.open(str(done[0] / "tuning"), f"{method}_learning_rate-{rate}_seed-{TUNED}")
            counts = run.counts(run.evaluation(1))
            assert (point["accuracy"], point["target_logp"]) == (counts["accuracy"], counts["target_logp"])
        best = max(points.values(), key=lambda point: (point["accuracy"], point["target_logp"]))
        assert choice["settings"] == best["settings"]
        for seed in SEEDS:
            config = yaml.safe_load((done[0] / f"final/{method}_seed-{seed}/config.yaml").read_text())
            assert config["learner"]["learning_rate"] == best["settings"]["learner.learning_rate"]
            assert config["run"]["seed"] == seed


def test_the_tables_values_are_the_test_splits_answers_judged_again(done):
    rows = {row["method"]: row for row in read(done)["table"]}
    assert list(rows) == ["start", "tpaw", "spin"]
    for method in ("tpaw", "spin"):
        for seed, value in zip(SEEDS, rows[method]["last"]["values"], strict=True):
            run = RunStore.open(str(done[0] / "final"), f"{method}_seed-{seed}")
            prompts = {row.prompt_id: row for path in run.files(run.prompts("test")) for row in run.read_rows(path, Prompt)}
            answers = run.read_rows(run.path("tested", "001", "answers", "00000.parquet"), Answer)
            assert {answer.prompt_id for answer in answers} == prompts.keys() and len(answers) == 32
            last_digits = {answer.prompt_id: [char for char in answer.text if char in "0123456789"][-1:] for answer in answers}
            right = [last_digits[prompt_id] == [prompt.reference_answer] for prompt_id, prompt in prompts.items()]
            assert value == fmean(right)
    for comparison in rows["tpaw"]["comparisons"]:
        other = rows[comparison["to"]][comparison["on"]]["mean"]
        assert comparison["difference"] == pytest.approx(rows["tpaw"][comparison["on"]]["mean"] - other)


def test_the_test_split_is_answered_by_chosen_checkpoints_only_and_by_the_start_once_a_seed(done):
    tested = sorted(str(path.relative_to(done[0])) for path in done[0].glob("*/*/tested/*"))
    assert tested == [
        "final/spin_seed-0/tested/001",
        "final/spin_seed-1/tested/001",
        "final/tpaw_seed-0/tested/000",
        "final/tpaw_seed-0/tested/001",
        "final/tpaw_seed-1/tested/000",
        "final/tpaw_seed-1/tested/001",
    ]


def test_the_same_command_again_shows_the_table_and_leaves_every_run_as_it_is(done, folder):
    before = {path: fingerprints(path) for path in (done[0] / "tuning", done[0] / "final")}
    again = tpaw_in_time("experiment", folder / "both.yaml")
    assert again.returncode == 0 and "nothing to do" in again.stdout and "paired by seed" in again.stdout
    assert {path: fingerprints(path) for path in before} == before
    assert "| tpaw | 2 |" in (done[0] / "table.md").read_text()


def test_each_run_is_an_ordinary_one_that_its_own_command_knows(done):
    config = done[0] / "logs/final/spin_seed-1/config.yaml"
    known = tpaw_in_time("run", config)
    assert known.returncode == 0 and "nothing to do" in known.stdout
