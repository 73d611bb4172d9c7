"""Who plays in an iteration of a run, by its config and by what the run has committed."""

from math import inf

from tpaw_ray.algorithm.team import Rollout, rollouts_of, team_at
from tpaw_ray.config import Config
from tpaw_ray.runs.store import RunStore


class Teams:
    """The players and opponents of every iteration up to the one after the last evaluated checkpoint."""

    def __init__(self, config: Config, store: RunStore) -> None:
        self.config = config
        self.store = store

    def players(self, iteration: int) -> tuple[int, ...]:
        """The frozen references, newest first; none where nothing is compared with the targets."""
        return () if self.config.team.data == "none" else self._members(iteration, self.config.team.size)

    def rollouts(self, iteration: int) -> tuple[Rollout, ...]:
        """What the update of an iteration learns from, newest first."""
        window = self.config.window
        return rollouts_of(self.config.team.data, iteration, self._members(iteration, window)[:window])

    def _members(self, iteration: int, size: int) -> tuple[int, ...]:
        selection = self.config.team.select
        return team_at(iteration, size, selection, self._ranking(iteration) if selection == "best" else ())

    def _ranking(self, iteration: int) -> list[int]:
        """The checkpoints before `iteration`, best first: by held-out accuracy, then by target log-probability, then newest."""

        def quality(checkpoint: int) -> tuple[float, float, int]:
            found = self.store.counts(self.store.evaluation(checkpoint))
            accuracy, logp = found["accuracy"], found["target_logp"]
            return -inf if accuracy is None else accuracy, -inf if logp is None else logp, checkpoint

        return sorted(range(iteration), key=quality, reverse=True)
