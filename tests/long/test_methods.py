"""Fine-tuning, then preferences that are given, then a team of the best, as a user types it."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.e2e.test_run import tpaw, write_config
from tests.tiny import merging_tokenizer, write_tiny_model
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    write_tiny_model(folder / "model", tokenizer=merging_tokenizer())
    return folder


@pytest.fixture(scope="module")
def tuned(folder):
    """The run of `tpaw sft`."""
    ended = tpaw("sft", write_config(folder, "mine"), "learner.epochs=2", "learner.learning_rate=1e-3")
    assert ended.returncode == 0, ended.stderr
    return RunStore.open(str(folder / "runs"), "mine-sft")


def rows_of(store):
    return json.loads(store.read_bytes(store.path("summary.json")))["iterations"]


def steps_of(store):
    return [json.loads(line) for line in store.read_bytes(store.path("metrics.jsonl")).splitlines()]


def test_fine_tuning_makes_targets_likelier_and_asks_no_opponent(tuned):
    start, end = rows_of(tuned)
    assert end["target_logp"] > start["target_logp"] + 1
    assert (end["target_reward"], end["margin"], end["sequences"]["generate"], end["sequences"]["score"]) == (None, None, 0, 0)
    assert not tuned.exists(f"{tuned.iteration(0)}/rollouts")
    steps = steps_of(tuned)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_dpo_starts_from_it_and_prefers_what_was_chosen(folder, tuned):
    config = yaml.safe_load(write_config(folder, "dpo").read_text())
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    preferred = [{"prompt": row["question"], "chosen": row["answer"], "rejected": f"{row['answer']}0"} for row in rows]
    (folder / "preferred.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferred))
    config |= {"iterations": 1, "model": {"path": tuned.checkpoint(1)}}
    config["data"]["path"] = str(folder / "preferred.jsonl")
    (folder / "dpo.yaml").write_text(yaml.safe_dump(config))
    ended = tpaw("run", folder / "dpo.yaml", "preset=dpo", "learner.epochs=2")
    assert ended.returncode == 0, ended.stderr
    store = RunStore.open(str(folder / "runs"), "dpo")
    steps = steps_of(store)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-3)  # the reference is the start
    assert steps[-1]["margin"] > steps[0]["margin"]
    assert rows_of(store)[1]["sequences"]["generate"] == 0
    started, made = (load_file(f"{path}/model.safetensors") for path in (store.checkpoint(0), tuned.checkpoint(1)))
    assert all(torch.equal(started[name], made[name]) for name in made)
    again = tpaw("run", folder / "dpo.yaml", "preset=dpo", "learner.epochs=2")
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_a_team_of_the_best_brings_back_earlier_players_and_rounds(folder):
    config = yaml.safe_load(write_config(folder, "best").read_text())
    config["data"] |= {"validation_fraction": 0.3}
    config |= {"iterations": 4, "evaluation": {"split": "validation"}, "team": {"size": 2, "select": "best"}}
    (folder / "best.yaml").write_text(yaml.safe_dump(config))
    ended = tpaw("run", folder / "best.yaml")
    assert ended.returncode == 0, ended.stderr
    store = RunStore.open(str(folder / "runs"), "best")
    rows = rows_of(store)
    for iteration in range(1, 4):
        best = max(range(iteration), key=lambda number: (rows[number]["accuracy"] or 0, rows[number]["target_logp"], number))
        pair = store.read_rows(store.files(store.pairs(iteration))[0], Pair)[0]
        assert pair.players == [iteration, best]
        store.verify(f"{store.iteration(iteration - 1)}/scores")
