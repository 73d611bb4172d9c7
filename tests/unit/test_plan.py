"""The work ahead, counted by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpaw_ray.algorithm.team import rollouts_of, team_at
from tpaw_ray.config import resolve_config
from tpaw_ray.plan import (
    GIB,
    RUNTIME_BYTES,
    ModelSize,
    checkpoint_bytes,
    learner_bytes,
    multiplies_bf16,
    num_askers,
    opponent_bytes,
    plan_iteration,
    shards_asked,
    start_bytes,
    step_checkpoint_bytes,
)
from tpaw_ray.runs.store import RunStore

N = 100


def config_of(**sections):
    return resolve_config({"run": {"name": "t"}, "model": {"path": "m"}, "data": {"path": "d"}, **sections})


def counts(config, iterations=4):
    """(players, generate, score, triplets) of each iteration, sequences in units of `N` prompts."""
    plans = [plan_iteration(config, iteration, N) for iteration in range(iterations)]
    return [(plan.players, plan.generate / N, plan.score / N, plan.triplets / N) for plan in plans]


def test_a_replaying_team_of_three_scores_2_then_4_then_6_n():
    # iteration 0: player 0 scores targets and round 0                                         1 + 1     = 2
    # iteration 1: player 1 targets, rounds 1 and 0; player 0 round 1                          3 + 1     = 4
    # iteration 2: player 2 targets, rounds 2, 1 and 0; players 1 and 0 round 2                4 + 1 + 1 = 6
    # iteration 3: player 3 targets, rounds 3, 2 and 1; players 2 and 1 round 3                4 + 1 + 1 = 6
    config = config_of(team={"size": 3, "data": "replay"})
    assert counts(config) == [(1, 1, 2, 1), (2, 1, 4, 2), (3, 1, 6, 3), (3, 1, 6, 3)]


def test_fresh_opponents_are_all_generated_and_scored_anew():
    # iteration 1: opponents 1 and 0 speak; player 1 scores targets and both, player 0 both    3 + 2     = 5
    # iteration 2: opponents 2, 1, 0 speak; player 2 targets and three, players 1 and 0 three  4 + 3 + 3 = 10
    config = config_of(team={"size": 3, "data": "fresh"})
    assert counts(config) == [(1, 1, 2, 1), (2, 2, 5, 2), (3, 3, 10, 3), (3, 3, 10, 3)]


def test_spin_learns_from_two_rounds_with_one_player():
    # from iteration 1 on the one player is new: targets, its own round and the one before     1 + 2     = 3
    assert counts(config_of(team={"size": 1, "window": 2})) == [(1, 1, 2, 1), (1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2)]


def test_without_a_team_every_iteration_scores_targets_and_one_round():
    assert counts(config_of(team={"size": 1})) == [(1, 1, 2, 1)] * 4


def test_a_window_smaller_than_the_team_learns_from_fewer_rounds():
    # iteration 2: player 2 scores targets and round 2, players 1 and 0 round 2                2 + 1 + 1 = 4
    assert counts(config_of(team={"size": 3, "window": 1})) == [(1, 1, 2, 1), (2, 1, 3, 1), (3, 1, 4, 1), (3, 1, 4, 1)]


def test_steps_and_update_sequences_by_hand():
    # 300 triplets in steps of 64 are ⌈4.69⌉ = 5 steps an epoch; 2 epochs; 1 target and 3 generations a prompt
    plan = plan_iteration(config_of(learner={"epochs": 2, "global_batch": 64}), 2, N)
    assert (plan.triplets, plan.steps, plan.update) == (300, 10, 2 * 4 * N)
    # 128 triplets fill 2 steps exactly
    assert plan_iteration(config_of(learner={"epochs": 1, "global_batch": 64}), 0, 128).steps == 2


@given(
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 5)),
    st.sampled_from(["replay", "fresh", "given", "none"]),
    st.sampled_from(["last", "spaced", "all"]),
)
def test_the_plan_counts_the_score_files_that_are_new_and_none_is_missing(size, window, data, select):
    config = config_of(team={"size": size, "window": window, "data": data, "select": select}, iterations=7)
    store, made = RunStore.open("runs", "t"), set()
    for iteration in range(7):
        rollouts = rollouts_of(data, iteration, team_at(iteration, config.window, select)[: config.window])
        needed = set()
        for player in () if data == "none" else team_at(iteration, size, select):
            needed |= {store.target_scores(player), *(store.rollout_scores(player, rollout) for rollout in rollouts)}
        now = {path for path in needed if path.startswith(store.iteration(iteration))}
        assert needed - now <= made
        assert plan_iteration(config, iteration, N).score == N * len(now)
        made |= now


def test_memory_of_a_worker_by_hand():
    # 1000 parameters, bf16, 2 workers, ZeRO 2: weights 2 B; gradients 4 B / 2; RMSprop's moment and master 8 B / 2 → 8 000 B.
    # Activations: 10 tokens × 4 hidden × 2 B × (3 layers × 1 + 24) = 2 160 B. Head: 3 × 512 × 7 × 4 B = 43 008 B.
    size = ModelSize(parameters=1000, hidden=4, layers=3, vocabulary=7, context=64, kv=4, tied=False)
    config = config_of(learner={"workers": 2, "zero_stage": 2, "micro_batch_tokens": 10})
    assert learner_bytes(size, config.learner) == 8000 + 2160 + 43008 + RUNTIME_BYTES
    assert checkpoint_bytes(size, config) == 2000
    adamw = config_of(learner={"workers": 1, "precision": "fp32", "optimizer": "adamw", "micro_batch_tokens": 10}).learner
    # fp32: weights 4, gradients 4, two moments 8, no master copy → 16 000 B; activations are twice as wide
    assert learner_bytes(size, adamw) == 16000 + 4320 + 43008 + RUNTIME_BYTES


def test_memory_with_adapters_and_with_offload_by_hand():
    # An adapter of 100 parameters: weights (1000 + 100 of them count as one model) 2 B; states of the adapter alone, 4 + 4 + 4 B.
    size = ModelSize(parameters=1000, hidden=4, layers=3, vocabulary=7, context=64, kv=4, tied=False, adapter=100)
    config = config_of(learner={"micro_batch_tokens": 10}, model={"path": "m", "lora": {"rank": 4}})
    assert size.trained == 100
    assert learner_bytes(size, config.learner) == 2000 + 1200 + 2160 + 43008 + RUNTIME_BYTES
    assert (checkpoint_bytes(size, config), start_bytes(size, config)) == (200, 2000)
    # between steps what is trained and RMSprop's moment are saved, both in fp32 whatever the precision
    assert step_checkpoint_bytes(size, config.learner) == 100 * (4 + 4)
    assert opponent_bytes(size, config) == (1000 + 3 * 100) * 2 + GIB + RUNTIME_BYTES
    whole = replace(size, adapter=0)

    def held(**learner):
        return (
            learner_bytes(whole, config_of(learner={"micro_batch_tokens": 10, **learner}).learner) - 2160 - 43008 - RUNTIME_BYTES
        )

    assert held(gpus=1) == 2000 + 12000
    assert held(gpus=1, offload="optimizer") == 2000
    assert held(gpus=1, zero_stage=3, offload="parameters") == 0
    assert held(zero_stage=3, offload="parameters") == 2000 + 12000  # on a CPU it is the same memory


def test_an_engine_is_asked_for_two_full_batches_and_at_least_two_shards():
    def asked(**sections):
        return shards_asked(config_of(**sections))

    # batch 256: 512 prompts an engine; 8 engines 4096, of shards of 1024 half at a time; shards of 32 need 16 for one engine
    assert asked() == 2
    assert asked(opponents={"replicas": 8}) == 8
    assert asked(data={"path": "d", "shard_size": 32}) == 16
    assert [num_askers(shards) for shards in (1, 32, 33, 256)] == [1, 1, 2, 8]


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("", False),
    ],
)
def test_a_processor_says_whether_it_multiplies_in_bf16(cpuinfo, expected):
    assert multiplies_bf16(cpuinfo) == expected
