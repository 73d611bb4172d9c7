"""The dual adaptive weights: `α` for targets (equation 2) and `β` for players (equation 4).

Axes: `B` triplet, `K` player. Rewards are in nats times `reward_scale`.
"""

from torch import Tensor, softmax, where


def target_weights(target_rewards_BK: Tensor, eta: float) -> Tensor:
    """`α_j = η` where the player gives the target no reward, else 1. Returns `[B, K]`.

    >>> import torch
    >>> target_weights(torch.tensor([[-0.5, 0.0, 0.5]]), eta=6.0)
    tensor([[6., 6., 1.]])
    """
    one = target_rewards_BK.new_ones(())
    return where(target_rewards_BK <= 0, one * eta, one)  # (2)


def player_weights(margins_BK: Tensor, gamma: float) -> Tensor:
    """`β_j = exp(-γ m_j) / Σ_k exp(-γ m_k)` over the team: the players that separate least weigh most. Returns `[B, K]`.

    >>> import torch
    >>> player_weights(torch.tensor([[1.0, 1.0]]), gamma=0.5)
    tensor([[0.5000, 0.5000]])
    """
    return softmax(-gamma * margins_BK, dim=-1)  # (4)
