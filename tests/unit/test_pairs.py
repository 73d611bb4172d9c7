"""The join of a shard: every number lands with its prompt, rollout and player."""

from dataclasses import replace

import pytest
import torch

from tpaw_ray.algorithm.objective import team_loss
from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.data.pairs import PairRecipe, pairs_of_shard
from tpaw_ray.errors import RunError
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt, Score

SHARD = "00001.parquet"
PROMPTS = ("p2", "p0", "p1")
RECIPE = PairRecipe(iteration=2, players=(2, 1), rollouts=(Rollout(2, 2), Rollout(1, 1)), reward_scale=0.1, eta=6.0, gamma=0.5)


def target_logp(player, prompt_id):
    """A number that says whose it is: player 2, prompt p1 is −52.1."""
    return -50.0 - player - int(prompt_id[1]) / 10


def generated_logp(player, rollout, prompt_id):
    return -100.0 * rollout.opponent - 10.0 * player - int(prompt_id[1])


@pytest.fixture
def store(tmp_path):
    """Tables of one shard. Every table but the prompts lists its rows in another order."""
    store = RunStore.open(str(tmp_path), "demo")
    prompts = [
        Prompt(prompt_id=key, row=row, prompt_tokens=[4, row], target_tokens=[20 + row, 5], reference_answer=None)
        for row, key in enumerate(PROMPTS)
    ]
    store.write_rows(f"{store.prompts('train')}/{SHARD}", prompts, Prompt)
    for player in RECIPE.players:
        scores = [Score(player=player, response_id=key, logp=target_logp(player, key)) for key in sorted(PROMPTS)]
        store.write_rows(f"{store.target_scores(player)}/{SHARD}", scores, Score)
        for rollout in RECIPE.rollouts:
            scores = [Score(player=player, response_id=key, logp=generated_logp(player, rollout, key)) for key in sorted(PROMPTS)]
            store.write_rows(f"{store.rollout_scores(player, rollout)}/{SHARD}", scores, Score)
    for rollout in RECIPE.rollouts:
        said = [
            Generation(
                prompt_id=key,
                iteration=rollout.iteration,
                opponent=rollout.opponent,
                generated_tokens=[rollout.opponent, int(key[1]), 5],
                finish_reason="stop",
            )
            for key in reversed(PROMPTS)
        ]
        store.write_rows(f"{store.rollout(rollout)}/{SHARD}", said, Generation)
    return store


def test_prompts_keep_their_order_and_rollouts_come_newest_first(store):
    found = [(pair.prompt_id, pair.iteration, pair.opponent) for pair in pairs_of_shard(store, RECIPE, SHARD)]
    assert found == [("p2", 2, 2), ("p2", 1, 1), ("p0", 2, 2), ("p0", 1, 1), ("p1", 2, 2), ("p1", 1, 1)]


def test_tokens_are_those_of_the_prompt_and_of_the_rollout(store):
    pairs = pairs_of_shard(store, RECIPE, SHARD)
    assert [(pair.prompt_tokens, pair.target_tokens, pair.generated_tokens) for pair in pairs] == [
        ([4, 0], [20, 5], [2, 2, 5]),
        ([4, 0], [20, 5], [1, 2, 5]),
        ([4, 1], [21, 5], [2, 0, 5]),
        ([4, 1], [21, 5], [1, 0, 5]),
        ([4, 2], [22, 5], [2, 1, 5]),
        ([4, 2], [22, 5], [1, 1, 5]),
    ]


def test_scores_land_with_their_player_rollout_and_prompt(store):
    pairs = pairs_of_shard(store, RECIPE, SHARD)
    assert all(pair.players == [2, 1] for pair in pairs)
    assert [pair.reference_target_logps for pair in pairs] == [
        [-52.2, -51.2],
        [-52.2, -51.2],
        [-52.0, -51.0],
        [-52.0, -51.0],
        [-52.1, -51.1],
        [-52.1, -51.1],
    ]
    assert [pair.reference_generated_logps for pair in pairs] == [
        [-222.0, -212.0],
        [-122.0, -112.0],
        [-220.0, -210.0],
        [-120.0, -110.0],
        [-221.0, -211.0],
        [-121.0, -111.0],
    ]


def test_start_weights_by_hand(store):
    # Newest player 2 is the policy: its rewards are 0, so α = 6, and m = 0.
    # Player 1: P(y) = 0.1·(−52.2 + 51.2) = −0.1, α = 6; P(y_gen) = 0.1·(−222 + 212) = −1, m = 0.9.
    # β = 1, e^−0.45 = 0.6376282 over 1.6376282 = 0.6106392, 0.3893608
    first = pairs_of_shard(store, RECIPE, SHARD)[0]
    assert first.start_alpha == [6.0, 6.0]
    assert first.start_beta == pytest.approx([0.6106392, 0.3893608], abs=1e-6)


def test_start_weights_equal_those_of_the_loss_while_the_policy_is_the_newest_player(store):
    recipe = replace(RECIPE, reward_scale=0.7, eta=3.0, gamma=0.2)
    pairs = pairs_of_shard(store, recipe, SHARD)
    targets_BK, generated_BK = (
        torch.tensor([getattr(pair, name) for pair in pairs], dtype=torch.float64)
        for name in ("reference_target_logps", "reference_generated_logps")
    )
    live = team_loss(targets_BK[:, 0], generated_BK[:, 0], targets_BK, generated_BK, reward_scale=0.7, eta=3.0, gamma=0.2)
    assert live.target_weights_BK.tolist() == [pair.start_alpha for pair in pairs]
    start_beta_BK = torch.tensor([pair.start_beta for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(live.player_weights_BK, start_beta_BK, rtol=1e-14, atol=1e-14)


def test_players_are_kept_in_the_order_of_the_recipe(store):
    pairs = pairs_of_shard(store, replace(RECIPE, players=(1,)), SHARD)
    assert pairs[0].players == [1]
    assert pairs[0].reference_target_logps == [-51.2]
    assert pairs[0].start_beta == [1.0]


def test_a_missing_table_is_named(store):
    path = f"{store.rollout_scores(1, Rollout(2, 2))}/{SHARD}"
    store.filesystem.delete_file(path)
    with pytest.raises(RunError) as raised:
        pairs_of_shard(store, RECIPE, SHARD)
    assert path in str(raised.value)
