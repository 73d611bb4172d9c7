"""A worker group of which one dies: Ray Train starts it again, and the update goes on where it was saved."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from safetensors.torch import load_file

from tests.ray.test_learner import config_of, learn, make_pairs, make_run
from tpaw_ray.faults import Place
from tpaw_ray.learner.group import Learner


def test_an_update_whose_worker_dies_goes_on_and_ends_with_the_same_weights_bit_for_bit(
    ray_session, holding, tiny_model, tmp_path
):
    """Two workers under ZeRO 3: the second is killed a step after a save, then the first before a save is marked."""
    from transformers import AutoModelForCausalLM

    team_pairs = make_pairs(AutoModelForCausalLM.from_pretrained(tiny_model), rounds=2, players=[1, 0])
    learner = {"zero_stage": 3, "workers": 2, "optimizer": "adamw"}
    undisturbed, weights = learn(config_of(tmp_path / "a", **learner), make_run(tmp_path / "a", tiny_model, team_pairs))
    store = make_run(tmp_path / "b", tiny_model, team_pairs)
    group = Learner(config_of(tmp_path / "b", save_steps=2, max_restarts=2, **learner), store)
    rows, remarks = [], []
    with ThreadPoolExecutor(1) as thread:
        update = thread.submit(group.update, 0, lambda news: (rows.extend(news.rows), remarks.extend(news.remarks)))
        holding.kill_at(Place.STEP, "iterations/000/steps/000003/rank-1")
        holding.kill_at(Place.MARK, "iterations/000/steps/000004")
        update.result(timeout=120)
    group.close()
    assert remarks == ["iteration 0: the update goes on after step 2"] * 2
    assert_same_steps({row.step: row for row in rows}.values(), undisturbed)
    assert_same_weights(load_file(f"{store.checkpoint(1)}/model.safetensors"), weights)


def assert_same_steps(rows, expected):
    """All that was measured, but for the seconds."""
    timed = ("seconds", "tokens_per_s")
    found, wanted = ([{k: v for k, v in asdict(row).items() if k not in timed} for row in some] for some in (rows, expected))
    assert found == wanted


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
