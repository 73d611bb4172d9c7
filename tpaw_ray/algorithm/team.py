"""Who plays at iteration `t`: the team of checkpoints and the rollouts its update learns from."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Rollout:
    """One pass of an opponent over all training prompts.

    `iteration` is when it was generated, `opponent` the checkpoint that spoke. Replayed rollouts keep the iteration
    in which they were made, there `iteration == opponent`.
    """

    iteration: int
    opponent: int


def team_at(iteration: int, size: int) -> tuple[int, ...]:
    """The checkpoints in the team at an iteration, newest first: `t, t-1, …, max(0, t-K+1)`.

    >>> team_at(0, 3), team_at(1, 3), team_at(5, 3)
    ((0,), (1, 0), (5, 4, 3))
    """
    if iteration < 0:
        raise ValueError(f"iteration must be 0 or more, found {iteration}")
    if size < 1:
        raise ValueError(f"team size must be 1 or more, found {size}")
    return tuple(range(iteration, max(-1, iteration - size), -1))


def replayed_rollouts(iteration: int, window: int) -> tuple[Rollout, ...]:
    """`D_t ∪ D_{t-1} ∪ …` of the paper: the last `window` rounds, each generated once by its own checkpoint.

    >>> replayed_rollouts(1, 3)
    (Rollout(iteration=1, opponent=1), Rollout(iteration=0, opponent=0))
    """
    return tuple(Rollout(member, member) for member in team_at(iteration, window))


def fresh_rollouts(iteration: int, window: int) -> tuple[Rollout, ...]:
    """Every one of the last `window` checkpoints generates anew in this iteration.

    >>> fresh_rollouts(1, 3)
    (Rollout(iteration=1, opponent=1), Rollout(iteration=1, opponent=0))
    """
    return tuple(Rollout(iteration, member) for member in team_at(iteration, window))
