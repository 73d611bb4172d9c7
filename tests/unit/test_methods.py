"""Methods beside TPAW: what lies in a run's folder when preferences are given, when there are none, and who plays."""

import json

import pytest
import torch

from tests.tiny import tiny_tokenizer
from tpaw_ray.algorithm.team import GIVEN, Rollout
from tpaw_ray.config import resolve_config
from tpaw_ray.data.pairs import PairRecipe, pairs_of_shard
from tpaw_ray.data.prompts import prepare_prompts
from tpaw_ray.evaluation.questions import heldout_questions
from tpaw_ray.learner.batches import TripletLengths, unit_of
from tpaw_ray.learner.triplets import triplet_batch
from tpaw_ray.learner.worker import Tally
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.teams import Teams
from tpaw_ray.schema import Generation, Prompt

ROWS = [{"prompt": f"{n}+1?", "chosen": f"{n + 1}", "rejected": f"{n}" * (1 + n % 3)} for n in range(7)]


def config_of(tmp_path, **sections):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return resolve_config(
        {
            "run": {"name": "run", "root": str(tmp_path)},
            "model": {"path": str(tmp_path)},
            "data": {"path": str(path), "shard_size": 3, "validation_fraction": 0.0, "test_fraction": 0.0},
        },
        sections,
    )


def test_rejected_responses_lie_where_an_opponent_would_have_put_them(tmp_path):
    config, store, tokenizer = config_of(tmp_path, team={"data": "given"}), RunStore.open(str(tmp_path), "run"), tiny_tokenizer()
    prepare_prompts(config, store, tokenizer)
    assert store.is_committed(store.rollout(GIVEN))
    prompts, said = store.files(store.prompts("train")), store.files(store.rollout(GIVEN))
    assert [path.rsplit("/", 1)[1] for path in said] == [path.rsplit("/", 1)[1] for path in prompts]
    assert len(said) == 3
    found = []
    for asked, answered in zip(prompts, said, strict=True):
        for prompt, rejected in zip(store.read_rows(asked, Prompt), store.read_rows(answered, Generation), strict=True):
            assert prompt.prompt_id == rejected.prompt_id
            found.append((tokenizer.decode(list(prompt.target_tokens)), tokenizer.decode(list(rejected.generated_tokens))))
    assert found == [(f"{row['chosen']}<|end|>", f"{row['rejected']}<|end|>") for row in ROWS]


def test_all_methods_hold_out_the_same_prompts_of_preference_data(tmp_path):
    held_out = {}
    for kind in ("given", "replay", "none"):
        config = config_of(tmp_path, team={"data": kind}, data={"validation_fraction": 0.5, "prompt_length": 8, "max_length": 9})
        store = RunStore.open(str(tmp_path), kind)
        prepare_prompts(config, store, tiny_tokenizer())
        sums = store.checksums(store.path("prompts"))
        held_out[kind] = {name: digest for name, digest in sums.items() if name.startswith("validation/")}
        questions = heldout_questions(config, store, "validation", None)
        assert len(questions) == store.counts(store.path("prompts"))["validation"] > 1
    assert held_out["given"] == held_out["replay"] == held_out["none"] != {}


def test_a_pair_whose_rejected_response_is_too_long_is_left_out(tmp_path):
    config = config_of(tmp_path, team={"data": "given"})
    # user, the 4 characters of `0+1?`, end and assistant are 7 tokens; a response of one character and its end are 2
    config = config.model_copy(update={"data": config.data.model_copy(update={"prompt_length": 8, "max_length": 9})})
    counts = prepare_prompts(config, RunStore.open(str(tmp_path), "run"), tiny_tokenizer())
    assert (counts.train, counts.too_long) == (3, 4)  # rejected of one character: rows 0, 3, 6


def test_fine_tuning_pairs_are_targets_alone(tmp_path):
    config, store = config_of(tmp_path, team={"data": "none"}), RunStore.open(str(tmp_path), "run")
    prepare_prompts(config, store, tiny_tokenizer())
    assert not store.exists(store.rollout(GIVEN))
    recipe = PairRecipe(iteration=2, players=(), rollouts=(), reward_scale=0.1, eta=1.0, gamma=0.0)
    pairs = pairs_of_shard(store, recipe, "00000.parquet")
    prompts = store.read_rows(store.files(store.prompts("train"))[0], Prompt)
    assert [pair.target_tokens for pair in pairs] == [prompt.target_tokens for prompt in prompts]
    assert all(not pair.generated_tokens and not pair.players for pair in pairs)
    lengths = TripletLengths(prompt_id="a", prompt_length=7, target_length=9, generated_length=7)
    units = [unit_of([lengths] * 3, [index], share_prompts=True) for index in range(3)]
    assert units[0].lengths == (7, 2)
    batch = triplet_batch(pairs, units, share_prompts=True)
    assert (len(batch.target_B), len(batch.generated_B), len(batch.response_lengths_S)) == (3, 0, 3)


def test_metrics_of_targets_alone_are_a_mean_over_tokens(tmp_path, monkeypatch):
    from torch import distributed

    monkeypatch.setattr(distributed, "all_reduce", lambda tensor, op=None: None)  # a fake: one worker
    tally = Tally(0, torch.device("cpu"))
    config, store = config_of(tmp_path, team={"data": "none"}), RunStore.open(str(tmp_path), "run")
    prepare_prompts(config, store, tiny_tokenizer())
    recipe = PairRecipe(iteration=0, players=(), rollouts=(), reward_scale=0.1, eta=1.0, gamma=0.0)
    pairs = pairs_of_shard(store, recipe, "00000.parquet")
    lengths = TripletLengths(prompt_id="a", prompt_length=7, target_length=9, generated_length=7)
    batch = triplet_batch(pairs, [unit_of([lengths] * 3, [index]) for index in range(3)])
    logps = torch.tensor([-1.0, -2.0, -6.0])
    tally.add_targets(-logps, logps, batch)
    row = tally.metrics(players=[], seconds=1.0, iteration=0, epoch=0, step=0, steps=1, grad_norm=1.0, learning_rate=1.0)
    assert row.loss == pytest.approx(9 / 6)  # nats over all target tokens, two a target
    assert (row.triplets, row.target_logp, row.target_length) == (3, -3.0, 2.0)
    assert {row.target_reward, row.generated_reward, row.margin, row.generated_logp, row.newest_reward_max_abs} == {None}
    assert row.player_weights == []


def evaluated(store, checkpoint, accuracy, target_logp):
    store.commit(store.evaluation(checkpoint), accuracy=accuracy, target_logp=target_logp)


def test_the_best_are_ranked_by_accuracy_then_by_the_targets(tmp_path):
    config = config_of(
        tmp_path, team={"select": "best", "size": 3}, data={"validation_fraction": 0.5}, evaluation={"split": "validation"}
    )
    store = RunStore.open(str(tmp_path), "run")
    for checkpoint, (accuracy, logp) in enumerate([(0.5, -9.0), (0.4, -1.0), (0.5, -2.0), (None, -0.5), (0.1, -4.0)]):
        evaluated(store, checkpoint, accuracy, logp)
    teams = Teams(config, store)
    assert teams.players(5) == (5, 2, 0)
    assert teams.rollouts(5) == (Rollout(5, 5), Rollout(2, 2), Rollout(0, 0))
    assert teams.players(1) == (1, 0)


def test_a_team_of_all_learns_from_as_many_rounds_as_its_window_holds(tmp_path):
    teams = Teams(config_of(tmp_path, team={"select": "all", "window": 2}), RunStore.open(str(tmp_path), "run"))
    assert teams.players(3) == (3, 2, 1, 0)
    assert teams.rollouts(3) == (Rollout(3, 3), Rollout(2, 2))


def test_a_team_of_targets_alone_has_no_players(tmp_path):
    teams = Teams(config_of(tmp_path, team={"data": "none"}), RunStore.open(str(tmp_path), "run"))
    assert (teams.players(3), teams.rollouts(3)) == ((), ())
