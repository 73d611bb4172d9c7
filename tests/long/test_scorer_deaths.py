"""Scorers that die often, of many shards or of one."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ray.test_scoring import pool, store  # noqa: F401
from tpaw_ray.errors import RunError
from tpaw_ray.faults import Place
from tpaw_ray.scoring.pool import RETRIES
from tpaw_ray.scoring.shards import generation_shards, is_scored, target_shards


def test_deaths_are_counted_by_shard(pool, store, holding):  # noqa: F811
    work = target_shards(store, 0, "train", store.path("targets"))
    work += generation_shards(store, 0, store.path("rollout"), store.path("generated"))
    places = {str(number): store.inside(shard.output) for number, shard in enumerate(work)}
    for name, place in places.items():
        holding.arm(Place.SCORE, place, name)
    with ThreadPoolExecutor(1) as thread:
        scoring = thread.submit(pool.score, work, lambda count: None)
        for _ in work:  # each scorer dies three times, once a shard
            pid = holding.wait()
            name = next(iter(holding.caught()))
            os.kill(pid, signal.SIGKILL)
            holding.let_go(name)
        scoring.result(timeout=120)
    assert all(is_scored(shard, store, pool.config) for shard in work)
    poison = work[1].output
    store.remove(poison)
    with ThreadPoolExecutor(1) as thread:
        scoring = thread.submit(pool.score, work, lambda count: None)
        for _ in range(RETRIES + 1):
            holding.kill_at(Place.SCORE, store.inside(poison))
        with pytest.raises(RunError, match=f"{poison}: its scorer died {RETRIES + 1} times"):
            scoring.result(timeout=120)
