"""`tpaw plan`: what it counts, what it warns of, and how each problem is told before anything starts."""

import json
import re

import pytest
import yaml

from tpaw_ray import cli
from tpaw_ray.config import load_config
from tpaw_ray.forecast import forecast
from tpaw_ray.runs.store import RunStore


def rows(count, start=0):
    return [{"question": f"{i}+1=", "answer": f"#### {i + 1}"} for i in range(start, start + count)]


@pytest.fixture
def config_file(tmp_path, tiny_model):
    """Writes a config that can run, with changes by dotted key, and the data beside it."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(5, 100)))
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "run": {"name": "t", "root": str(tmp_path / "runs")},
                "model": {"path": str(tiny_model)},
                "data": {
                    "path": str(tmp_path / "train.jsonl"),
                    "heldout_path": str(tmp_path / "heldout.jsonl"),
                    "validation_fraction": 0.0,
                    "prompt_length": 40,
                    "max_length": 80,
                },
                "iterations": 3,
                "sampling": {"max_new_tokens": 16},
                "evaluation": {"split": "test"},
                "learner": {"global_batch": 8, "epochs": 1, "precision": "fp32"},
            }
        )
    )
    return path


@pytest.fixture
def plan(monkeypatch, capsys, config_file):
    """Runs `tpaw plan` on the config with overrides; returns exit code, standard output and standard error."""

    def call(*overrides):
        monkeypatch.setattr("sys.argv", ["tpaw", "plan", str(config_file), *overrides])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code or 0, told.out, told.err

    return call


def test_a_forecast_counts_prompts_and_sequences_by_hand(config_file):
    found = forecast(load_config(config_file))
    assert (found.survey.counts.train, found.survey.counts.test, found.survey.judged) == (20, 5, 5)
    assert [(it.generate, it.score, it.triplets, it.steps) for it in found.iterations] == [
        (20, 40, 20, 3), (20, 80, 40, 5), (20, 120, 60, 8),
    ]  # fmt: skip
    # `<|user|>`, `9+1=`, `<|end|>`, `<|assistant|>` are 7 tokens, `19+1=` one more; `#### 20` and the end are 8
    assert (found.survey.max_prompt_tokens, found.survey.max_target_tokens) == (8, 8)
    assert found.survey.mean_prompt_tokens == 7.5
    assert found.start.ends == (5,)
    assert found.warnings == ()


def test_plan_prints_tokens_and_with_a_devices_rates_hours(plan):
    _, out, _ = plan()
    # 20 prompts of 7.5 tokens; 9 targets of 7 tokens and 11 of 8, 7.55. Three rounds of generation are 60 sequences of 15.05.
    assert re.search(r"generate +│ +60 +│ +903 ", out)
    assert "hours" not in out
    _, out, _ = plan("--tflops=0.1", "--bandwidth=10")
    assert "hours, start-up aside" in out
    code, _, err = plan("--tflops=0.1")
    assert code == 2 and "--tflops and --bandwidth go together" in err


def test_plan_prints_the_work_and_writes_nothing(plan, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = plan()
    assert (code, err) == (0, "")
    assert "20 train, 0 validation, 5 test" in out
    assert "'<|end|>'" in out
    assert "new, 3 iterations" in out
    assert "every checkpoint answers 5 held-out prompts" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["model.path=/nowhere"], 4, "model.path: no directory /nowhere"),
        (["data.path=/nowhere.jsonl"], 3, "/nowhere.jsonl: no such file or folder"),
        (["data.max_length=512"], 4, "made for at most 256 tokens"),
        (["data.prompt_length=5", "data.max_length=60"], 3, "no training prompts are left of 25 rows"),
        (["opponents.gpus=1"], 6, "the config needs 1 GPU at the same time, the cluster has 0"),
        (["learner.workers=4000"], 6, "CPU at the same time"),
        (["model.chat_template='{% if %}'"], 2, "not a valid Jinja template"),
        (["run.root=ftp://host/runs"], 5, "found an address of 'ftp'; expected a folder, s3://"),
        (["run.root={tmp}/train.jsonl/runs"], 5, "cannot be made: .*train.jsonl is not a folder"),
        (["objective.etta=1"], 2, "objective.etta: unknown key"),
        (["preset=tpav"], 2, "expected one of tpaw, spin"),
    ],
)
def test_a_problem_is_told_on_standard_error_with_its_exit_code(plan, tmp_path, overrides, code, message):
    found, out, err = plan(*(override.replace("{tmp}", str(tmp_path)) for override in overrides))
    assert found == code
    assert err.startswith("error: ") and "Traceback" not in err
    assert re.search(message, err)
    assert "the work ahead" not in out


def test_a_malformed_row_is_named_before_anything_starts(plan, tmp_path):
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"question": "1+1="}\n')
    code, _, err = plan()
    assert code == 3
    assert "train.jsonl, row 20 (line 21): answer: missing" in err


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["evaluation.split=validation"], "no prompts are held out for validation"),
        (["evaluation.answer_pattern=Answer (.*)"], "accuracy stays empty"),
        (["data.prompt_length=7"], "15 of 25 rows are too long"),
        (["learner.global_batch=64"], "a learner.global_batch of 64 is more than the first iteration's 20 triplets"),
        (["sampling.max_new_tokens=100"], "responses end at data.max_length"),
        (["opponents.cpu_cache_gib=100000"], "this machine has"),
    ],
)
def test_a_doubt_is_a_warning(plan, overrides, warning):
    code, out, _ = plan(*overrides)
    assert code == 0
    assert warning in out


@pytest.mark.parametrize(
    ("precision", "hardware", "warned"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_a_precision_that_the_processor_only_emulates_is_a_doubt(plan, monkeypatch, precision, hardware, warned):
    monkeypatch.setattr("tpaw_ray.forecast.multiplies_bf16", lambda: hardware)
    _, out, _ = plan(f"learner.precision={precision}")
    assert ("learner.precision is bf16, in which this CPU cannot multiply" in out) == warned


def test_an_existing_run_with_another_config_is_refused_and_with_the_same_it_goes_on(plan, config_file, tmp_path):
    from tpaw_ray.config import dump_config

    run = tmp_path / "runs/t"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config(config_file)))
    code, _, _ = plan("objective.gamma=0.1")
    assert code == 0  # nothing was made of it yet
    (run / "prompts").mkdir()
    code, _, err = plan("objective.gamma=0.1")
    assert code == 5 and "objective.gamma: started with 0.5, now 0.1" in err
    code, out, _ = plan("iterations=7", "opponents.batch=16")
    assert code == 0 and "goes on after 0 of 7 iterations" in out
    (run / "config.yaml").write_text("{")
    code, _, err = plan()
    assert code == 5 and "the run is damaged there" in err


def test_a_config_of_an_earlier_version_counts_missing_fields_with_their_defaults(plan, config_file, tmp_path):
    run = tmp_path / "runs/t"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config_file.read_text())  # holds no defaults
    assert plan()[0] == 0


def test_a_cluster_that_cannot_be_reached_is_told(plan, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    code, _, err = plan()
    assert code == 6
    assert "the cluster at nowhere cannot be reached: Invalid address format" in err


def test_a_plan_for_an_object_store_looks_whether_it_may_write_there_and_leaves_nothing(plan, bucket):
    code, out, err = plan(f"run.root={bucket}/runs")
    assert (code, err) == (0, "")
    assert f"{bucket}/runs/t: new, 3 iterations" in out
    assert "GiB free" not in out
    assert RunStore.open(f"{bucket}/runs", "t").files(bucket) == []


def test_a_plan_for_a_bucket_that_is_not_there_names_it(plan, s3):
    code, _, err = plan("run.root=s3://no-such-bucket")
    assert code == 5
    assert "s3://no-such-bucket/t.writable: cannot be written" in err and "bucket does not exist" in err
