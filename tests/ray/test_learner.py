"""The learner on real Ray Train and DeepSpeed, against a plain PyTorch loop that shares none of its code."""

import math
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tpaw_ray.config import resolve_config
from tpaw_ray.errors import DivergedError, LearnerError
from tpaw_ray.learner.group import Learner
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Pair

END = 5
LEARNING_RATE = 1e-3
GLOBAL_BATCH = 8


def config_of(root, lora=None, **learner):
    return resolve_config(
        {
            "run": {"name": "run", "root": str(root)},
            "model": {"path": "-", "lora": lora or {}},
            "data": {"path": "-"},
            "learner": {
                "precision": "fp32",
                "gradient_checkpointing": False,
                "learning_rate": LEARNING_RATE,
                "global_batch": GLOBAL_BATCH,
                "epochs": 2,
                "micro_batch_tokens": 128,
                "max_restarts": 0,
                "threads": 1,
            }
            | learner,
        }
    )


def naive_logp(model, prompt, response):
    logps = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response))


def random_ids(numbers, low, high):
    return [numbers.randrange(6, 70) for _ in range(numbers.randint(low, high))]


def make_pairs(model, rounds, players):
    """11 prompts, `rounds` generations each; players differ from the model by fixed amounts.

    The newest player is not the model itself: rounding would decide the sign of a reward of 0, and so its target weight.
    """
    numbers = random.Random(rounds)
    pairs = []
    for prompt_id in range(11):
        prompt, target = random_ids(numbers, 4, 9), [*random_ids(numbers, 3, 8), END]
        for round_ in range(rounds):
            said = [*random_ids(numbers, 3, 12), END]
            with torch.no_grad():
                logps = [naive_logp(model, prompt, response).item() for response in (target, said)]
            pairs.append(
                Pair(
                    prompt_id=str(prompt_id),
                    iteration=round_,
                    opponent=round_,
                    prompt_tokens=prompt,
                    target_tokens=target,
                    generated_tokens=said,
                    players=players,
                    reference_target_logps=[logps[0] + 0.5 + 2.0 * j for j in range(len(players))],
                    reference_generated_logps=[logps[1] - 0.5 - 1.0 * j for j in range(len(players))],
                    start_alpha=[6.0] * len(players),
                    start_beta=[1.0 / len(players)] * len(players),
                )
            )
    return pairs


def make_run(root, tiny_model, pairs):
    store = RunStore.open(str(root), "run")
    shutil.copytree(tiny_model, store.checkpoint(0))
    half = len(pairs) // 2
    store.write_rows(store.shard(store.pairs(0), 0), pairs[:half], Pair)
    store.write_rows(store.shard(store.pairs(0), 1), pairs[half:], Pair)
    store.commit(store.pairs(0), pairs=len(pairs))
    return store


def learn(config, store):
    rows = []
    learner = Learner(config, store)
    learner.update(0, lambda news: rows.extend(news.rows))
    learner.close()
    return rows, load_file(f"{store.checkpoint(1)}/model.safetensors")


def plain_update(model, pairs, order):
    """RMSprop on equation (5), one triplet at a time, with the weights as plain numbers."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE)
    warmup, losses = math.ceil(0.1 * len(order)), []
    for number, step in enumerate(order):
        factor = number / warmup if number < warmup else (len(order) - number) / (len(order) - warmup)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        total = torch.zeros(())
        for index in step:
            pair = pairs[index]
            target = naive_logp(model, pair.prompt_tokens, pair.target_tokens)
            said = naive_logp(model, pair.prompt_tokens, pair.generated_tokens)
            rewards = [
                (0.1 * (target - one), 0.1 * (said - other))
                for one, other in zip(pair.reference_target_logps, pair.reference_generated_logps, strict=True)
            ]
            powers = [math.exp(-0.5 * (one - other).item()) for one, other in rewards]
            for (one, other), power in zip(rewards, powers, strict=True):
                alpha = 6.0 if one.item() <= 0 else 1.0
                total = total + power / sum(powers) * torch.log1p(torch.exp(-(alpha * one - other)))
        loss = total / len(step)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


@pytest.fixture(scope="module")
def team_pairs(tiny_model):
    from transformers import AutoModelForCausalLM

    return make_pairs(AutoModelForCausalLM.from_pretrained(tiny_model), rounds=2, players=[1, 0])


@pytest.fixture(scope="module")
def one_worker(ray_session, tiny_model, team_pairs, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    store = make_run(root, tiny_model, team_pairs)
    rows, weights = learn(config_of(root, zero_stage=2), store)
    return store, rows, weights


def test_update_equals_a_plain_pytorch_loop(one_worker, tiny_model, team_pairs):
    from transformers import AutoModelForCausalLM

    from tpaw_ray.learner.batches import epoch_steps

    _, rows, weights = one_worker
    order = [step for epoch in range(2) for step in epoch_steps([p.prompt_id for p in team_pairs], GLOBAL_BATCH, f"42/0/{epoch}")]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    losses = plain_update(model, team_pairs, order)
    assert [row.loss for row in rows] == pytest.approx(losses, rel=1e-3)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_metrics_of_a_step_say_what_happened(one_worker):
    store, rows, _ = one_worker
    assert [row.triplets for row in rows] == [8, 8, 6, 8, 8, 6]
    first = rows[0]
    assert first.target_weight_share == 1.0  # both players give the target a negative reward
    assert first.newest_reward_max_abs == pytest.approx(0.05, abs=1e-4)
    assert first.target_reward == pytest.approx(-0.15, abs=1e-4)  # mean of 0.1 · −0.5 and 0.1 · −2.5
    assert first.generated_reward == pytest.approx(0.1, abs=1e-4)  # mean of 0.1 · 0.5 and 0.1 · 1.5
    # margins −0.1 and −0.4: the older player weighs e^0.15 as much as the newer
    assert first.player_weights == pytest.approx([1 / (1 + math.exp(0.15)), 1 / (1 + math.exp(-0.15))], abs=1e-4)
    assert rows[0].learning_rate == 0.0 and rows[1].learning_rate == LEARNING_RATE
    assert all(row.grad_norm > 0 and row.tokens_per_s > 0 for row in rows)
    assert sum(row.sequences for row in rows) >= 2 * (11 + 22)
    assert store.counts(store.learner(0))["sequences"] == sum(row.sequences for row in rows)


def test_checkpoint_is_a_hugging_face_directory(one_worker, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    store, _, weights = one_worker
    checkpoint = store.checkpoint(1)
    store.verify(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.state_dict().keys() >= weights.keys() == load_file(f"{tiny_model}/model.safetensors").keys()
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id == END


def test_an_update_on_targets_alone_is_the_mean_over_their_tokens(ray_session, tiny_model, team_pairs, tmp_path):
    from transformers import AutoModelForCausalLM

    from tpaw_ray.learner.batches import epoch_steps

    lists = ("generated_tokens", "players", "reference_target_logps", "reference_generated_logps", "start_alpha", "start_beta")
    nobody = {name: [] for name in lists}
    targets = [Pair(**vars(pair) | nobody) for pair in team_pairs[::2]]  # each prompt once
    order = [step for epoch in range(2) for step in epoch_steps([p.prompt_id for p in targets], GLOBAL_BATCH, f"42/0/{epoch}")]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer, losses = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE), []
    for number, step in enumerate(order):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (number if number < 1 else (len(order) - number) / (len(order) - 1))
        tokens = sum(len(targets[index].target_tokens) for index in step)
        loss = -sum(naive_logp(model, targets[index].prompt_tokens, targets[index].target_tokens) for index in step) / tokens
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    rows, weights = learn(config_of(tmp_path, workers=2), make_run(tmp_path, tiny_model, targets))
    assert [row.loss for row in rows] == pytest.approx(losses, rel=1e-3)
    assert [row.sequences for row in rows] == [8, 3, 8, 3]
    assert {row.margin for row in rows} == {None}
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stage", [2, 3])
def test_two_workers_make_the_same_update_as_one(one_worker, tiny_model, team_pairs, tmp_path, stage):
    _, rows, weights = one_worker
    found_rows, found = learn(config_of(tmp_path, zero_stage=stage, workers=2), make_run(tmp_path, tiny_model, team_pairs))
    assert [row.loss for row in found_rows] == pytest.approx([row.loss for row in rows], rel=1e-4)
    assert [row.grad_norm for row in found_rows] == pytest.approx([row.grad_norm for row in rows], rel=1e-3)
    for name, expected in weights.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_first_loss_of_one_player_is_ln_2_and_bf16_trains(ray_session, tiny_model, tmp_path):
    from tpaw_ray.policy.logprobs import Policy
    from tpaw_ray.policy.model import load_model
    from tpaw_ray.scoring.scorer import response_logps

    policy = Policy(load_model(str(tiny_model), precision="bf16")).eval()
    pairs = []
    for pair in make_pairs(policy.model.float(), rounds=1, players=[0]):
        policy.model.bfloat16()
        prompt = pair.prompt_tokens
        logps = response_logps(policy, [prompt, prompt], [pair.target_tokens, pair.generated_tokens], 4096, "cpu")
        pairs.append(
            Pair(**vars(pair) | {"reference_target_logps": logps[:1], "reference_generated_logps": logps[1:]})  # the scorer's own
        )
    store = make_run(tmp_path, tiny_model, pairs)
    rows, weights = learn(config_of(tmp_path, precision="bf16", gradient_checkpointing=True, learning_rate=1e-4), store)
    assert rows[0].loss == pytest.approx(math.log(2), abs=0.02)
    assert rows[-1].margin > 0.01  # the last steps prefer the targets
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_loss_that_is_not_a_number_stops_the_update_and_names_prompts(ray_session, tiny_model, team_pairs, tmp_path):
    spoiled = [Pair(**vars(pair) | {"reference_target_logps": [math.nan, 0.0]}) for pair in team_pairs]
    store = make_run(tmp_path, tiny_model, spoiled)
    learner = Learner(config_of(tmp_path, max_restarts=2), store)
    rows = []
    with pytest.raises(DivergedError, match=r"iteration 0, step 0: loss nan.*prompts \d"):
        learner.update(0, lambda news: rows.extend(news.rows))
    learner.close()
    assert rows == []  # and it was not tried again
    assert not store.exists(store.checkpoint(1))


def test_an_update_that_is_broken_off_ends_at_once_and_makes_no_checkpoint(ray_session, tmp_path, tiny_model, team_pairs):
    store = make_run(tmp_path, tiny_model, team_pairs)
    learner = Learner(config_of(tmp_path), store)
    with ThreadPoolExecutor(1) as thread:
        update = thread.submit(learner.update, 0, lambda rows: None)
        learner.break_off()
        with pytest.raises(LearnerError, match=r"iteration 0: the (update was broken off|learner ended without its checkpoint)"):
            update.result(timeout=60)
    assert not store.is_committed(store.checkpoint(1))


def test_deepspeed_compiles_nothing_for_the_learner_and_leaves_nothing_in_shared_memory(one_worker):
    from deepspeed.comm.torch import TorchBackend

    import tpaw_ray.learner.engine  # noqa: F401

    assert TorchBackend.__init__.__globals__["build_shm_op"]() is None
    assert not list(Path("/dev/shm").glob("deepspeed*"))
