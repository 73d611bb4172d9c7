"""The Ray Data stage that has scorers work through shards. The scorers live as long as the run: they import torch once."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray

from tpaw_ray.config import Config
from tpaw_ray.data.stage import ask_for_each_shard
from tpaw_ray.errors import RunError
from tpaw_ray.placement import options_of, scorers_of
from tpaw_ray.plan import SCORER_SHARDS
from tpaw_ray.processes import model_process
from tpaw_ray.runs.store import RunStore
from tpaw_ray.scoring.scorer import Scorer
from tpaw_ray.scoring.shards import ScoreShard, is_scored

WITHOUT_END = -1
"""Ray replaces a scorer's process as often as it dies: a run lasts days."""
RETRIES = 3
"""How often a shard is asked for again whose scorer died; what ends every scorer ends the run. They are counted here: Ray counts
every call in vain to a scorer whose node is lost, and takes half a minute to know."""


class ScorerPool:
    """The scorers of a run. They live from `start` to `close`. A shard whose numbers stand is not done again.

    Example: `ScorerPool(config, store).score(target_shards(store, 0, "train", store.target_scores(0)), advance)`.
    """

    def __init__(self, config: Config, store: RunStore) -> None:
        self.config = config
        self.store = store
        self.scorers: list[Any] = []

    def start(self) -> list[Any]:
        """The scorers, started if they are not there."""
        if not self.scorers:
            wanted = scorers_of(self.config)
            actor: Any = ray.remote(Scorer).options(
                **options_of(wanted),
                max_restarts=WITHOUT_END,
                max_task_retries=WITHOUT_END,
                max_concurrency=SCORER_SHARDS,
                runtime_env=model_process(wanted.gpus),
            )
            self.scorers = [actor.remote(self.config, self.store) for _ in range(wanted.number)]
        return list(self.scorers)

    def score(self, shards: Iterable[ScoreShard], advance: Callable[[int], None]) -> float:
        """Score what is not scored yet, in the order given; calls `advance(sequences)` as shards finish.

        Returns the seconds that the busiest scorer worked, without those in which it waited for generations.

        Raises:
            CheckpointError: when a player's model cannot be loaded or used.
            RunError: when a table cannot be read, a shard ends every scorer, or what was written does not appear in the folder.
        """
        scorers, wanted = self.start(), list(shards)
        asked: list[dict[str, Any]] = []
        while missing := [asdict(shard) for shard in wanted if not is_scored(shard, self.store, self.config)]:
            if missing == asked:
                output = missing[0]["output"]
                raise RunError(f"{output}: was written where this node does not see it; run.root must be a shared folder")
            ask_for_each_shard(
                [{"index": index, **shard} for index, shard in enumerate(missing)],
                _AskScorer(scorers, self.store, self.config),
                name="score",
                at_once=SCORER_SHARDS * len(scorers),
                advance=advance,
            )
            asked = missing
        if not asked:
            return 0.0
        try:
            return max(ray.get([scorer.rest.remote() for scorer in scorers]))
        except ray.exceptions.RayActorError as error:
            raise RunError(f"a scorer was ended when its work was done: {error}") from error

    def close(self) -> None:
        """End the scorers, whatever they do."""
        while self.scorers:
            ray.kill(self.scorers.pop())


class _AskScorer:
    """One shard's work, as Ray Data carries it to a process that waits while a scorer computes."""

    def __init__(self, scorers: Sequence[Any], store: RunStore, config: Config) -> None:
        self.scorers, self.store, self.config = list(scorers), store, config

    def __call__(self, row: dict[str, Any]) -> int:
        shard = ScoreShard(**{key: value for key, value in row.items() if key != "index"})
        scorer = self.scorers[row["index"] % len(self.scorers)]
        try:
            for attempt in range(RETRIES + 1):
                if attempt:
                    ray.get(scorer.__ray_ready__.remote())  # when there is a process again; raises if there will be none
                if is_scored(shard, self.store, self.config):  # done by a task or a scorer that died later
                    return shard.take
                with suppress(ray.exceptions.RayActorError):
                    return int(ray.get(scorer.score.options(max_task_retries=0).remote(shard)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            raise RunError(f"{shard.output}: its scorer was ended: {error}") from error
        raise RunError(f"{shard.output}: its scorer died {RETRIES + 1} times while it made this file")
