"""The cost model by hand, and against the operations that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tpaw_ray.config import resolve_config
from tpaw_ray.cost import Cost, Device, Lengths, forward_flops, iteration_cost, iteration_seconds, stage_devices
from tpaw_ray.plan import ModelSize, plan_iteration
from tpaw_ray.policy.batch import token_batch
from tpaw_ray.policy.logprobs import Policy

N, HELDOUT = 100, 10
LENGTHS = Lengths(prompt=30, target=20, generated=10)
SIZE = ModelSize(parameters=1000, hidden=4, layers=3, vocabulary=7, context=64, kv=2, tied=False)


def config_of(**sections):
    return resolve_config({"run": {"name": "t"}, "model": {"path": "m"}, "data": {"path": "d"}, **sections})


def costs_at(config, iteration):
    return iteration_cost(config, SIZE, LENGTHS, plan_iteration(config, iteration, N), prompts=N, heldout=HELDOUT)


@pytest.mark.parametrize("tied", [True, False])
def test_forward_operations_are_those_that_torch_counts(tied):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    size = ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden=32,
        layers=3,
        vocabulary=50,
        context=64,
        kv=16,
        tied=tied,
    )
    model.set_attn_implementation("eager")
    sequences, prompt, response = 4, 11, 9
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        Policy(model)(token_batch([[1] * prompt] * sequences, [[2] * response] * sequences))
    length = prompt + response
    # eager attention multiplies the whole square of which causal attention needs half
    upper_half = sequences * length * 2 * 3 * 32 * length
    norms = 7 * 32 * 2 * sequences * length  # 7 vectors of 32 are parameters, but scale instead of multiplying
    found = forward_flops(size, sequences, length, response)
    assert found + upper_half - norms == counter.get_total_flops()


def test_sequences_and_tokens_of_a_full_team_by_hand():
    costs = costs_at(config_of(learner={"epochs": 2}), 2)
    assert {stage: cost.sequences for stage, cost in costs.items()} == {
        "generate": N,
        "score": 6 * N,
        "update": 2 * 4 * N,
        "evaluate": 2 * HELDOUT,
    }
    # a target is 50 tokens with its prompt, a generated response 40: one target and 5 generations, 2 × (1 + 3) in the update
    assert costs["generate"].tokens == 40 * N
    assert costs["score"].tokens == (50 + 5 * 40) * N
    # the update runs a prompt once: 30 tokens, a target of 20, three generations of 10; without sharing 30 more for each of those
    assert costs["update"].tokens == 2 * (30 + 20 + 3 * 10) * N
    whole = costs_at(config_of(learner={"epochs": 2}, model={"path": "m", "attention": "sdpa"}), 2)
    assert whole["update"].tokens == 2 * (50 + 3 * 40) * N
    assert costs["evaluate"].tokens == (40 + 50) * HELDOUT


def test_an_update_costs_three_forwards_a_sequence_and_four_where_layers_are_recomputed():
    once = 2 * (forward_flops(SIZE, N, 50, 20) + forward_flops(SIZE, 3 * N, 40, 10) - forward_flops(SIZE, 3 * N, 30, 0))
    for recompute, passes in [(False, 3), (True, 4)]:
        costs = costs_at(config_of(learner={"epochs": 2, "gradient_checkpointing": recompute}), 2)
        assert costs["update"].flops == pytest.approx(passes * once)


def test_bytes_of_generation_by_hand():
    # 100 sequences of 10 new tokens in batches of 50 are 20 steps, each reads 1000 weights of 2 bytes: 40 000.
    # Each of the 1000 new tokens reads keys and values of 35 tokens on average, 3 layers × 2 wide × 2 bytes × 2: 840 000.
    costs = costs_at(config_of(opponents={"batch": 50}), 0)
    assert costs["generate"].bytes == 40_000 + 1000 * 35 * 3 * 2 * 2 * 2


def test_state_is_read_and_written_once_a_step():
    def moved(global_batch):
        return costs_at(config_of(learner={"epochs": 1, "global_batch": global_batch}), 0)["update"].bytes

    # RMSprop in bf16: gradient, moment and master weight of 4 bytes, read and written: 24 bytes a parameter and step
    assert moved(10) - moved(20) == pytest.approx((10 - 5) * 24 * 1000)


def test_time_is_bound_by_operations_or_by_memory_and_shared_by_devices():
    device = Device(flops_per_s=100.0, bytes_per_s=10.0)
    assert device.seconds(Cost(sequences=1, tokens=1, flops=1000.0, bytes=1.0), 2) == 5.0
    assert device.seconds(Cost(sequences=1, tokens=1, flops=1.0, bytes=1000.0), 4) == 25.0


def test_an_iteration_scores_beside_generation():
    config = config_of(opponents={"replicas": 2, "tensor_parallel": 2, "gpus": 1}, learner={"workers": 3})
    assert stage_devices(config) == {"generate": 4, "score": 1, "update": 3, "evaluate": 4}
    costs = {
        "generate": Cost(sequences=0, tokens=0, flops=40.0, bytes=0),
        "score": Cost(sequences=0, tokens=0, flops=30.0, bytes=0),
        "update": Cost(sequences=0, tokens=0, flops=60.0, bytes=0),
        "evaluate": Cost(sequences=0, tokens=0, flops=4.0, bytes=0),
    }
    # max(40 / 4, 30 / 1) + 60 / 3 + 4 / 4
    assert iteration_seconds(config, costs, Device(flops_per_s=1.0, bytes_per_s=1.0)) == 51.0
