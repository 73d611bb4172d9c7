"""Which numbers an iteration has to score, and when an old number may be read."""

import pytest

from tpaw_ray.algorithm.team import replayed_rollouts, team_at
from tpaw_ray.config import resolve_config
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt, Score
from tpaw_ray.scoring.shards import generation_shards, is_scored, score_key, shards_to_score, target_shards

N = 4


def config_with(**sections):
    return resolve_config({"run": {"name": "t"}, "model": {"path": "m"}, "data": {"path": "d"}}, sections)


def write_prompts(store, target=(7, 5)):
    prompts = [
        Prompt(prompt_id=str(i), row=i, prompt_tokens=[i], target_tokens=list(target), reference_answer=None) for i in range(N)
    ]
    store.write_rows(store.shard(store.prompts("train"), 0), prompts, Prompt)


def write_checkpoint(store, number, weights=b"weights"):
    store.write_bytes(f"{store.checkpoint(number)}/model.safetensors", weights + bytes([number]))
    store.commit(store.checkpoint(number))


def write_rollout(store, rollout, said=(8, 5)):
    rows = [
        Generation(
            prompt_id=str(i),
            iteration=rollout.iteration,
            opponent=rollout.opponent,
            generated_tokens=list(said),
            finish_reason="stop",
        )
        for i in range(N)
    ]
    store.write_rows(store.shard(store.rollout(rollout), 0), rows, Generation)


def score(store, config, shard):
    """Numbers of a shard as a scorer leaves them, without the model."""
    rows = [Score(player=shard.player, response_id=str(i), logp=-1.0) for i in range(N)]
    store.write_rows(shard.output, rows, Score, key=score_key(shard, store, config))


@pytest.fixture
def store(tmp_path):
    store = RunStore.open(str(tmp_path), "run")
    write_prompts(store)
    write_checkpoint(store, 0)
    return store


def open_shards(store, config, iteration):
    return shards_to_score(store, config, iteration, team_at(iteration, 3), replayed_rollouts(team_at(iteration, 3)))


def test_a_full_team_scores_six_sequences_a_prompt_of_which_four_are_the_newest_players(store):
    config = config_with()
    counts = []
    for iteration in range(4):
        write_checkpoint(store, iteration)
        write_rollout(store, replayed_rollouts([iteration])[0])
        shards = open_shards(store, config, iteration)
        counts.append([shard.player for shard in shards])
        for shard in shards:
            assert not is_scored(shard, store, config)
            score(store, config, shard)
    # 0: targets and a round. 1: the new player on targets and two rounds, the old one on the new round. From 2 on 4 + 1 + 1.
    assert counts == [[0, 0], [1, 1, 1, 0], [2, 2, 2, 2, 1, 0], [3, 3, 3, 3, 2, 1]]


def test_a_players_work_begins_with_what_is_there_and_ends_with_the_new_rollout(store):
    for iteration in range(3):
        write_checkpoint(store, iteration)
    names = [shard.output.split("scores/")[1].rsplit("/", 1)[0] for shard in open_shards(store, config_with(), 2)]
    assert [name for name in names if name.startswith("player-002")] == [
        "player-002/targets",
        "player-002/rollout-000-000",
        "player-002/rollout-001-001",
        "player-002/rollout-002-002",
    ]


CHANGES = {
    "weights": lambda store: write_checkpoint(store, 0, b"other weights"),
    "target tokens (template, tokenizer, lengths)": lambda store: write_prompts(store, target=(7, 9, 5)),
    "generated tokens": lambda store: write_rollout(store, replayed_rollouts([0])[0], said=(9, 5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_number_is_stale_once_what_it_was_made_from_has_changed(store, change):
    config, rollout = config_with(), replayed_rollouts([0])[0]
    write_rollout(store, rollout)
    targets = target_shards(store, 0, "train", store.target_scores(0))
    said = generation_shards(store, 0, store.rollout(rollout), store.rollout_scores(0, rollout))
    for shard in targets + said:
        score(store, config, shard)
        assert is_scored(shard, store, config)
    CHANGES[change](store)
    stale = [shard for shard in targets + said if not is_scored(shard, store, config)]
    assert stale == (said if change == "generated tokens" else targets + said)


@pytest.mark.parametrize(
    "sections",
    [{"learner": {"precision": "fp32"}}, {"model": {"attention": "sdpa"}}, {"scoring": {"gpus": 1}}],
    ids=["precision", "attention", "device"],
)
def test_a_number_is_stale_under_another_way_of_computing(store, sections):
    (shard,) = target_shards(store, 0, "train", store.target_scores(0))
    score(store, config_with(), shard)
    assert is_scored(shard, store, config_with(learner={"global_batch": 7}))
    assert not is_scored(shard, store, config_with(**sections))


def test_a_stale_number_of_an_earlier_iteration_is_made_again(store):
    config = config_with()
    for iteration in range(2):
        write_checkpoint(store, iteration)
        write_rollout(store, replayed_rollouts([iteration])[0])
        for shard in open_shards(store, config, iteration):
            score(store, config, shard)
    assert [shard.output for shard in open_shards(store, config, 1) if "iterations/000" in shard.output] == []
    write_rollout(store, replayed_rollouts([0])[0], said=(9, 9, 5))
    again = [shard.output for shard in open_shards(store, config, 1) if not is_scored(shard, store, config)]
    assert [path.split("iterations/")[1].rsplit("/", 1)[0] for path in again] == [
        "001/scores/player-001/rollout-000-000",
        "000/scores/player-000/rollout-000-000",
    ]


def test_numbers_without_a_key_or_cut_short_do_not_count(store):
    config = config_with()
    (shard,) = target_shards(store, 0, "train", store.target_scores(0))
    store.write_rows(shard.output, [Score(player=0, response_id="0", logp=-1.0)], Score)
    assert not is_scored(shard, store, config)
    store.write_bytes(shard.output, b"PAR1 cut")
    assert not is_scored(shard, store, config)
