"""Who plays at iteration `t`: the team of checkpoints and the rollouts its update learns from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Selection = Literal["last", "spaced", "all", "best"]


@dataclass(frozen=True, order=True)
class Rollout:
    """One pass of an opponent over all training prompts.

    `iteration` is when it was generated, `opponent` the checkpoint that spoke. Replayed rollouts keep the iteration
    in which they were made, there `iteration == opponent`.
    """

    iteration: int
    opponent: int


def team_at(iteration: int, size: int, selection: Selection = "last", ranking: Sequence[int] = ()) -> tuple[int, ...]:
    """The checkpoints in the team at an iteration, newest first. The newest, from which the update starts, always plays.

    `last` is the paper's: `t, t-1, …, max(0, t-K+1)`. `spaced` takes every second, `t, t-2, t-4, …`, `all` every checkpoint,
    `best` the newest and the first `K-1` of `ranking`, which names the earlier checkpoints, best first.

    >>> team_at(0, 3), team_at(1, 3), team_at(5, 3)
    ((0,), (1, 0), (5, 4, 3))
    >>> team_at(5, 2, "spaced"), team_at(5, 2, "all"), team_at(5, 3, "best", ranking=[1, 4, 0, 2, 3])
    ((5, 3), (5, 4, 3, 2, 1, 0), (5, 4, 1))
    """
    if iteration < 0:
        raise ValueError(f"iteration must be 0 or more, found {iteration}")
    if size < 1:
        raise ValueError(f"team size must be 1 or more, found {size}")
    if selection == "best":
        if not set(range(iteration)) <= set(ranking):
            raise ValueError(f"iteration {iteration}: expected a ranking of all earlier checkpoints, found {list(ranking)}")
        return tuple(sorted((iteration, *ranking[: size - 1]), reverse=True))
    if selection == "all":
        return tuple(range(iteration, -1, -1))
    return tuple(range(iteration, -1, -2 if selection == "spaced" else -1))[:size]


def replayed_rollouts(opponents: Sequence[int]) -> tuple[Rollout, ...]:
    """`D_t ∪ D_{t-1} ∪ …` of the paper: what each opponent said when it was the newest.

    >>> replayed_rollouts(team_at(1, 3))
    (Rollout(iteration=1, opponent=1), Rollout(iteration=0, opponent=0))
    """
    return tuple(Rollout(opponent, opponent) for opponent in opponents)


def fresh_rollouts(iteration: int, opponents: Sequence[int]) -> tuple[Rollout, ...]:
    """Every opponent generates anew in this iteration.

    >>> fresh_rollouts(1, team_at(1, 3))
    (Rollout(iteration=1, opponent=1), Rollout(iteration=1, opponent=0))
    """
    return tuple(Rollout(iteration, opponent) for opponent in opponents)


GIVEN = Rollout(0, 0)
"""Where the rejected responses of given preference data lie: they serve every iteration."""


def rollouts_of(
    data: Literal["replay", "fresh", "given", "none"], iteration: int, opponents: Sequence[int]
) -> tuple[Rollout, ...]:
    """What the update of an iteration learns from, beside the targets; newest first.

    >>> rollouts_of("given", 1, (1, 0)), rollouts_of("none", 1, (1, 0))
    ((Rollout(iteration=0, opponent=0),), ())
    """
    if data == "none":
        return ()
    if data == "given":
        return (GIVEN,)
    return replayed_rollouts(opponents) if data == "replay" else fresh_rollouts(iteration, opponents)
