"""Scorers on real Ray: their numbers against a naive forward pass, and what they leave alone."""

import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import ray
import torch

from tpaw_ray.config import resolve_config
from tpaw_ray.errors import CheckpointError, RunError
from tpaw_ray.processes import model_process
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt, Score
from tpaw_ray.scoring.pool import ScorerPool
from tpaw_ray.scoring.shards import generation_shards, target_shards

END = 5


def ids(numbers, low, high):
    return [numbers.randrange(6, 70) for _ in range(numbers.randint(low, high))]


@pytest.fixture
def store(tmp_path, tiny_model):
    """Three shards of prompts with targets and a rollout, and a checkpoint."""
    store, numbers = RunStore.open(str(tmp_path), "run"), random.Random(0)
    shutil.copytree(tiny_model, store.checkpoint(0))
    store.commit(store.checkpoint(0))
    for shard in range(3):
        prompts = [
            Prompt(
                prompt_id=f"{shard}-{row}",
                row=row,
                prompt_tokens=ids(numbers, 2, 9),
                target_tokens=[*ids(numbers, 1, 9), END],
                reference_answer=None,
            )
            for row in range(5)
        ]
        said = [
            Generation(
                prompt_id=prompt.prompt_id,
                iteration=0,
                opponent=0,
                generated_tokens=[*ids(numbers, 0, 9), END],
                finish_reason="stop",
            )
            for prompt in reversed(prompts)  # an order of their own: rows are joined by id
        ]
        store.write_rows(store.shard(store.prompts("train"), shard), prompts, Prompt)
        store.write_rows(store.shard(store.path("rollout"), shard), said, Generation)
    return store


@pytest.fixture
def pool(ray_session, store):
    config = resolve_config(
        {
            "run": {"name": "run", "root": os.path.dirname(store.root)},
            "model": {"path": "-"},
            "data": {"path": "-"},
            "learner": {"precision": "fp32"},
            "scoring": {"workers": 2, "threads": 1, "batch_tokens": 64},
        }
    )
    pool = ScorerPool(config, store)
    yield pool
    pool.close()


def naive(model, prompt, response):
    logps = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


def rows(store, directory, kind):
    return [row for path in store.files(directory) for row in store.read_rows(path, kind)]


def test_scores_equal_a_naive_forward_pass_and_are_made_once(pool, store, tiny_model):
    from transformers import AutoModelForCausalLM

    advanced = []
    work = target_shards(store, 0, "train", store.path("targets"))
    work += generation_shards(store, 0, store.path("rollout"), store.path("generated"))
    started = time.perf_counter()
    assert 0 < pool.score(work, advanced.append) < time.perf_counter() - started
    assert sorted(advanced) == [5] * 6
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompts = {row.prompt_id: row for row in rows(store, store.prompts("train"), Prompt)}
    said = {row.prompt_id: row.generated_tokens for row in rows(store, store.path("rollout"), Generation)}
    with torch.no_grad():
        for score in rows(store, store.path("targets"), Score):
            prompt = prompts[score.response_id]
            assert score.logp == pytest.approx(naive(model, prompt.prompt_tokens, prompt.target_tokens), abs=1e-3)
            assert score.player == 0
        for score in rows(store, store.path("generated"), Score):
            prompt = prompts[score.response_id]
            assert score.logp == pytest.approx(naive(model, prompt.prompt_tokens, said[score.response_id]), abs=1e-3)
    assert len(rows(store, store.path("generated"), Score)) == 15
    # One finished shard is lost: it alone is made again, with the same numbers.
    lost = store.shard(store.path("targets"), 1)
    before = store.read_rows(lost, Score)
    os.remove(lost)
    pool.score(work, advanced.append)
    assert advanced[6:] == [5]
    assert store.read_rows(lost, Score) == before
    assert pool.score(work, advanced.append) == 0.0
    assert len(advanced) == 7


def test_a_scorer_follows_behind_the_rollout_that_is_being_written(pool, store):
    coming = store.shard(store.path("rollout"), 2)
    rows_to_come = store.read_rows(coming, Generation)
    os.remove(coming)
    work = generation_shards(store, 0, store.path("rollout"), store.path("generated"))
    advanced, waited = [], 3.0

    def advance(count):
        advanced.append(count)
        if len(advanced) == 2:  # both that were there are scored; only now the third is written
            time.sleep(waited)
            assert not store.exists(work[2].output)
            store.write_rows(coming, rows_to_come, Generation)

    started = time.perf_counter()
    worked = pool.score(work, advance)
    assert worked < time.perf_counter() - started - waited  # waiting is not work
    assert advanced == [5] * 3
    assert {score.response_id for score in rows(store, store.path("generated"), Score)} == {
        f"{shard}-{row}" for shard in range(3) for row in range(5)
    }


def test_closing_ends_scorers_that_wait_for_a_rollout(pool, store):
    os.remove(store.shard(store.path("rollout"), 0))
    work = generation_shards(store, 0, store.path("rollout"), store.path("generated"))
    with ThreadPoolExecutor(1) as thread:
        scoring = thread.submit(pool.score, work[:1], lambda count: None)
        assert wait([scoring], timeout=3).not_done
        pool.close()
        with pytest.raises(RunError, match="its scorer was ended"):
            scoring.result(timeout=60)


def test_a_player_that_cannot_be_loaded_is_named(pool, store):
    with pytest.raises(CheckpointError, match=r"checkpoints/007: no config\.json"):
        pool.score(target_shards(store, 7, "train", store.path("targets")), lambda count: None)


def test_a_scorers_process_has_the_environment_of_one_that_runs_a_model(pool):
    for scorer in pool.start():
        found = ray.get(scorer.__ray_call__.remote(lambda _: dict(os.environ)))
        assert found.items() >= model_process(0)["env_vars"].items()
