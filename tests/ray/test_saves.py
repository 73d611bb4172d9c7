"""Step checkpoints under every ZeRO stage: updates that break off and go on, in one process that is a whole group."""

import json
import subprocess
import sys

import pytest

CASES = {
    "zero-0-rmsprop": {"zero_stage": 0},
    "zero-1-adamw": {"zero_stage": 1, "optimizer": "adamw", "schedule": "cosine"},
    "zero-2-rmsprop": {"zero_stage": 2},
    "zero-2-bf16": {"zero_stage": 2, "precision": "bf16", "optimizer": "adamw"},
    "zero-3-adamw": {"zero_stage": 3, "optimizer": "adamw"},
    "zero-3-rmsprop": {"zero_stage": 3},
    "zero-3-offload": {"zero_stage": 3, "offload": "parameters"},
    "zero-1-offload": {"zero_stage": 1, "offload": "optimizer", "optimizer": "adamw"},
    "zero-0-lora": {"zero_stage": 0, "lora": {"rank": 4}},
    "zero-1-lora-bf16": {"zero_stage": 1, "precision": "bf16", "lora": {"rank": 4}},
    "zero-2-lora": {"zero_stage": 2, "lora": {"rank": 4}},
    "zero-3-lora": {"zero_stage": 3, "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("saves")
    script = [sys.executable, "-m", "tests.ray.saving", str(root), str(tiny_model), json.dumps(CASES)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "outcomes.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_an_update_that_goes_on_ends_with_the_same_weights_and_metrics_bit_for_bit(outcomes, case):
    found = outcomes[case]
    assert found["remarks"] == ["iteration 0: the update goes on after step 2"]
    assert found["taken_again"] == [2, 3, 4, 5]
    assert found["metrics_equal"] and found["weights_equal"]
    assert found["kept"] == ["000004"]  # one step checkpoint at a time, none after the last step


def test_a_damaged_step_checkpoint_is_named_and_the_update_begins_anew(outcomes):
    damaged = outcomes["damaged"]
    (remark,) = damaged["remarks"]
    assert damaged["file"] in remark and "differs from what was committed" in remark
    assert damaged["weights_equal"]


def test_a_step_checkpoint_of_another_group_is_left_alone(outcomes):
    other = outcomes["other group"]
    (remark,) = other["remarks"]
    assert "is of another group of workers; the update begins anew" in remark
    assert other["weights_equal"]


def test_gradients_that_are_not_numbers_stop_the_update_before_anything_is_saved(outcomes):
    assert "step 0: loss" in outcomes["spoiled"]["told"] and "gradient norm nan; prompts" in outcomes["spoiled"]["told"]
    assert outcomes["spoiled"]["left"] == [False, False]
