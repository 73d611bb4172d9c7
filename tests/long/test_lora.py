"""A run whose checkpoints are LoRA adapters: one engine process for the whole team, killed and continued, exported, evaluated."""

import json
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.adapters import whole_model
from tests.e2e.test_run import tpaw, write_config
from tests.faults.runs import Victim, contents
from tests.tiny import merging_tokenizer, write_tiny_model
from tpaw_ray.faults import Place

OVERRIDES = ("iterations=3", "learner.learning_rate=0.01", "learner.save_steps=1", "learner.max_restarts=9")
PLACES = {
    "generate": (Place.ANSWER, "checkpoints/000/*"),
    "score": (Place.WRITTEN, "iterations/001/scores/player-001/*/*"),
    "update": (Place.STEP, "iterations/002/steps/000002/rank-0"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_tiny_model(folder / "model", tokenizer=merging_tokenizer())
    return folder


def config_of(folder, name):
    return write_config(folder, name, team={"size": 3, "data": "fresh"}, model={"lora": {"rank": 4}})


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Its run; the most engines' processes that there were at a time are in `engines.json` beside it."""
    run = Victim(["run", str(config_of(folder, "undisturbed")), *OVERRIDES], folder / "faults-undisturbed")
    run.start()
    most = 0
    while run.process.poll() is None:
        most = max(most, len(run.pids("ray::Opponent")))
        time.sleep(0.2)
    run.finish()
    (folder / "engines.json").write_text(str(most))
    return folder / "runs/undisturbed"


def test_one_engine_speaks_for_the_whole_team(folder, undisturbed):
    assert len(list((undisturbed / "iterations/002/rollouts").glob("opponent-*"))) == 3
    assert (folder / "engines.json").read_text() == "1"


def test_checkpoints_are_adapters_that_differ_and_the_start_model_is_whole(undisturbed):
    names = {path.name for path in (undisturbed / "checkpoints/000").iterdir()}
    assert "model.safetensors" in names and "adapter_config.json" not in names
    weights = []
    for number in (1, 2, 3):
        folder = undisturbed / f"checkpoints/{number:03d}"
        assert not (folder / "model.safetensors").exists()
        weights.append((folder / "adapter_model.safetensors").read_bytes())
    assert len(set(weights)) == 3
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if (row["iteration"], row["step"]) == (0, 0))
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the only player is the policy itself


@pytest.mark.parametrize("victim", ["driver", "opponent"])
def test_a_run_that_is_killed_ends_like_one_that_was_not(folder, undisturbed, victim):
    name = f"killed-{victim}"
    run = Victim(["run", str(config_of(folder, name)), *OVERRIDES], folder / f"faults-{name}")
    for _ in run.killed_at(PLACES, victim):
        pass
    run.finish()
    found, expected = contents(folder / "runs" / name), contents(undisturbed)
    assert {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)} <= {"config.yaml"}


def test_an_export_is_a_whole_model_with_the_adapter_in_its_weights(folder, undisturbed):
    done = tpaw("export", undisturbed, "--checkpoint", "3", "--to", folder / "exported")
    assert done.returncode == 0, done.stderr
    assert not list((folder / "exported").glob("adapter_*"))
    expected = whole_model(undisturbed / "checkpoints/000", undisturbed / "checkpoints/003").state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder / "exported").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_is_evaluated_like_any_checkpoint(undisturbed):
    done = tpaw("evaluate", "exact", undisturbed, "--checkpoint", "3", "--split", "test")
    assert done.returncode == 0, done.stderr
    (result,) = (undisturbed / "evaluations/003").glob("exact-*/result.json")
    committed = json.loads((undisturbed / "evaluations/003/committed.json").read_text())["counts"]
    found = json.loads(result.read_text())
    assert (found["judged"], found["accuracy"]["value"]) == (committed["judged"], committed["accuracy"])
