"""A stage whose tasks write where this node does not look says so instead of asking for ever."""

import pytest

from tpaw_ray.config import resolve_config
from tpaw_ray.errors import RunError
from tpaw_ray.opponents import rollouts
from tpaw_ray.opponents.messages import Sampling
from tpaw_ray.opponents.rollouts import Questions, generate
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt
from tpaw_ray.scoring import pool
from tpaw_ray.scoring.pool import ScorerPool
from tpaw_ray.scoring.shards import target_shards


@pytest.fixture
def store(tmp_path):
    store = RunStore.open(str(tmp_path), "run")
    prompt = Prompt(prompt_id="0", row=0, prompt_tokens=[1], target_tokens=[2], reference_answer=None)
    store.write_rows(store.shard(store.prompts("train"), 0), [prompt], Prompt)
    return store


class Elsewhere:
    """Stands in for the Ray Data stage: its tasks leave nothing here."""

    def __init__(self):
        self.calls = 0

    def __call__(self, shards, work, **_):
        self.calls += 1
        return len(shards)


def test_rollouts_that_do_not_appear_end_the_stage(store, monkeypatch):
    stage = Elsewhere()
    monkeypatch.setattr(rollouts, "ask_for_each_shard", stage)
    output = store.path("rollout")
    questions = Questions(
        split="train",
        limit=None,
        iteration=0,
        opponent=0,
        sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1),
        run_seed=0,
        output=output,
    )
    with pytest.raises(RunError, match=f"{output}/00000.parquet: was written where this node does not see it"):
        generate(store, questions, [], lambda count: None, at_once=1)
    assert stage.calls == 1


def test_scores_that_do_not_appear_end_the_stage(store, monkeypatch):
    stage = Elsewhere()
    monkeypatch.setattr(pool, "ask_for_each_shard", stage)
    scorers = ScorerPool(resolve_config({"run": {"name": "run"}, "model": {"path": "m"}, "data": {"path": "d"}}), store)
    scorers.scorers = [None]  # without its actors
    with pytest.raises(RunError, match=r"run\.root must be a shared folder"):
        scorers.score(target_shards(store, 0, "train", store.target_scores(0)), lambda count: None)
    assert stage.calls == 1
