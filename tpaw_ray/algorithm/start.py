"""The weights at the start of an update, one triplet at a time in plain Python.

They are written into the pairs by data workers, which would take longer to import torch than to do this arithmetic.
"""

from collections.abc import Sequence
from math import exp


def start_weights(
    reference_target_logps: Sequence[float],
    reference_generated_logps: Sequence[float],
    *,
    reward_scale: float,
    eta: float,
    gamma: float,
) -> tuple[list[float], list[float]]:
    """`α` and `β` of a triplet before the first step, when the live policy is the newest player (the first of each list).

    Log-probabilities in nats, one a player. Returns one `α` and one `β` a player.

    >>> start_weights([-2.0, -1.0], [-3.0, -1.0], reward_scale=1.0, eta=6.0, gamma=0.0)
    ([6.0, 6.0], [0.5, 0.5])
    >>> start_weights([-1.0, -2.0], [-3.0, -3.0], reward_scale=1.0, eta=6.0, gamma=0.0)
    ([6.0, 1.0], [0.5, 0.5])
    """
    target_rewards = [reward_scale * (reference_target_logps[0] - logp) for logp in reference_target_logps]  # (1)
    generated_rewards = [reward_scale * (reference_generated_logps[0] - logp) for logp in reference_generated_logps]  # (1)
    alpha = [float(eta) if reward <= 0 else 1.0 for reward in target_rewards]  # (2)
    margins = [target - generated for target, generated in zip(target_rewards, generated_rewards, strict=True)]  # (3)
    smallest = min(margins)
    shares = [exp(-gamma * (margin - smallest)) for margin in margins]
    return alpha, [share / sum(shares) for share in shares]  # (4)
