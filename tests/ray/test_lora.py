"""A team of adapters on real Ray: one engine and one scorer for all checkpoints, against models with merged weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from tests.adapters import LORA, whole_model, write_adapter
from tests.ray.test_opponents import DRAWN, END, GREEDY, SETTINGS, at_work, questions
from tests.ray.test_scoring import naive, rows
from tests.tiny import engines
from tpaw_ray.config import resolve_config
from tpaw_ray.errors import CheckpointError
from tpaw_ray.opponents.roster import Roster, ask
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt, Score
from tpaw_ray.scoring.pool import ScorerPool
from tpaw_ray.scoring.shards import target_shards

TEAM = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model):
    """A run's start model and three adapters on it, and prompts with targets."""
    store = RunStore.open(str(tmp_path_factory.mktemp("lora")), "run")
    shutil.copytree(tiny_model, store.checkpoint(0))
    store.commit(store.checkpoint(0))
    for number in TEAM[1:]:
        with store.making(store.checkpoint(number)) as folder:
            write_adapter(tiny_model, folder, seed=number)
        store.commit(store.checkpoint(number))
    prompts = [
        Prompt(
            prompt_id=one.prompt_id,
            row=row,
            prompt_tokens=one.prompt_tokens,
            target_tokens=[7 + row, 9, END],
            reference_answer=None,
        )
        for row, one in enumerate(questions(5, longest=9))
    ]
    store.write_rows(store.shard(store.prompts("train"), 0), prompts, Prompt)
    return store


@pytest.fixture(scope="module")
def models(store, tiny_model):
    """Each checkpoint as a whole model."""
    adapters = (whole_model(tiny_model, Path(store.checkpoint(number))) for number in TEAM[1:])
    return [AutoModelForCausalLM.from_pretrained(tiny_model).eval(), *adapters]


def adapter_of(store, number):
    return store.checkpoint(number) if number else ""


@pytest.fixture(scope="module")
def engine(ray_session, store):
    """One engine of the start model, with room for fewer adapters than there are."""
    start = store.checkpoint(0)
    with at_work(Roster(replace(SETTINGS, lora_rank=LORA.rank, adapters=2), engines(1))) as roster:
        roster.host(0, start, f"{start}/committed.json")
        roster.wait_ready(0)
        yield roster.opponents(0)


def test_one_engine_speaks_as_every_checkpoint_of_the_team(engine, store, models):
    def greedy(model, prompt):
        tokens = []
        while len(tokens) < GREEDY.max_new_tokens and END not in tokens:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([prompt + tokens])).logits[0, -1].argmax()))
        return tokens

    asked = questions(24)
    speakers = [index % len(TEAM) for index in range(len(asked))]  # all in one call, the start model's own among them
    requests = [replace(one, adapter=adapter_of(store, number)) for one, number in zip(asked, speakers, strict=True)]
    responses = ask(engine, 0, requests, GREEDY)
    for request, number, response in zip(requests, speakers, responses, strict=True):
        assert response.generated_tokens == greedy(models[number], request.prompt_tokens), (request.prompt_id, number)
    assert ray.get(engine[0].stats.remote()).sequences == len(asked)


def test_seeds_decide_an_adapters_responses_whoever_speaks_beside_it(engine, store):
    alone = ask(engine, 0, [replace(one, adapter=adapter_of(store, 2)) for one in questions(8)], DRAWN)
    others = [replace(one, prompt_id=f"other-{one.prompt_id}", adapter=adapter_of(store, 1)) for one in questions(8)]
    together = ask(engine, 0, [*others, *(replace(one, adapter=adapter_of(store, 2)) for one in questions(8))], DRAWN)
    assert together[8:] == alone
    assert [one.generated_tokens for one in together[:8]] != [one.generated_tokens for one in alone]


def test_an_adapter_that_is_not_there_is_named_and_the_engine_goes_on(engine, store):
    missing = store.checkpoint(7)
    with pytest.raises(CheckpointError, match=rf"{missing}: no adapter_config\.json"):
        ask(engine, 0, [replace(questions(1)[0], adapter=missing)], GREEDY)
    assert len(ask(engine, 0, questions(2), GREEDY)) == 2


def test_one_scorer_switches_between_the_players_of_the_team(ray_session, store, models):
    config = resolve_config(
        {
            "run": {"name": "run", "root": store.root.rsplit("/", 1)[0]},
            "model": {"path": "-", "lora": LORA.model_dump()},
            "data": {"path": "-"},
            "learner": {"precision": "fp32"},
            "scoring": {"threads": 1, "batch_tokens": 64},
        }
    )
    pool = ScorerPool(config, store)
    try:
        for turn, player in enumerate((2, 0, 3, 1, 0, 2)):
            output = store.path(f"targets-{turn}")
            pool.score(target_shards(store, player, "train", output), lambda count: None)
            prompts = {row.prompt_id: row for row in rows(store, store.prompts("train"), Prompt)}
            with torch.no_grad():
                for score in rows(store, output, Score):
                    prompt = prompts[score.response_id]
                    expected = naive(models[player], prompt.prompt_tokens, prompt.target_tokens)
                    assert score.logp == pytest.approx(expected, abs=1e-3), (turn, player)
    finally:
        pool.close()
