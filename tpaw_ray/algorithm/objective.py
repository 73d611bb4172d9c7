"""The TPAW objective, equations (1) to (5) of the paper (ACL 2026, arXiv 2605.09922).

Axes: `B` triplet `(x, y, y_gen)`, `K` player of the team.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tpaw_ray.algorithm.weights import player_weights, target_weights


@dataclass(frozen=True, kw_only=True)
class TeamLoss:
    """The loss of a batch of triplets with everything that went into it.

    `loss` is the mean of `losses_B`; the other fields are `[B, K]`: rewards in nats × `reward_scale`, weights without unit.
    """

    loss: Tensor
    losses_B: Tensor
    target_rewards_BK: Tensor
    generated_rewards_BK: Tensor
    target_weights_BK: Tensor
    player_weights_BK: Tensor


def team_loss(
    policy_target_logps_B: Tensor,
    policy_generated_logps_B: Tensor,
    reference_target_logps_BK: Tensor,
    reference_generated_logps_BK: Tensor,
    *,
    reward_scale: float,
    eta: float,
    gamma: float,
    detach_weights: bool = True,
) -> TeamLoss:
    """The team's loss on triplets, from summed response log-probabilities in nats.

    Args:
        policy_target_logps_B: `log π_θ(y|x)`, shape `[B]`, float32 or wider.
        policy_generated_logps_B: `log π_θ(y_gen|x)`, shape `[B]`.
        reference_target_logps_BK: `log π_{θ_j}(y|x)` of every player, shape `[B, K]`.
        reference_generated_logps_BK: `log π_{θ_j}(y_gen|x)`, shape `[B, K]`.
        reward_scale: `λ` of equation (1).
        eta: `η` of equation (2), 1 switches target weighting off.
        gamma: `γ` of equation (4), 0 weighs all players alike.
        detach_weights: keep gradients from flowing through `α` and `β`.

    Raises:
        ValueError: for shapes that do not fit or tensors narrower than float32.

    Example: the first step of an update with one player has reward 0 everywhere, so the loss is `ln 2`.

    >>> zero = torch.zeros(1)
    >>> round(team_loss(zero, zero, zero[:, None], zero[:, None], reward_scale=0.1, eta=6.0, gamma=0.5).loss.item(), 4)
    0.6931
    """
    _check(policy_target_logps_B, policy_generated_logps_B, reference_target_logps_BK, reference_generated_logps_BK)
    target_rewards_BK = reward_scale * (policy_target_logps_B[:, None] - reference_target_logps_BK)  # (1)
    generated_rewards_BK = reward_scale * (policy_generated_logps_B[:, None] - reference_generated_logps_BK)  # (1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_weights):
        target_weights_BK = target_weights(target_rewards_BK, eta)  # (2)
        margins_BK = target_rewards_BK - generated_rewards_BK  # (3)
        player_weights_BK = player_weights(margins_BK, gamma)  # (4)
    return weighted_loss(target_rewards_BK, generated_rewards_BK, target_weights_BK, player_weights_BK)


def weighted_loss(
    target_rewards_BK: Tensor, generated_rewards_BK: Tensor, target_weights_BK: Tensor, player_weights_BK: Tensor
) -> TeamLoss:
    """Equation (5) under given weights: live ones, or the ones from the start of the update (`weights: frozen`).

    All arguments are `[B, K]`.
    """
    separations_BK = target_weights_BK * target_rewards_BK - generated_rewards_BK
    losses_B = (player_weights_BK * softplus(-separations_BK)).sum(dim=-1)  # (5), ℓ(z) = log(1 + exp(−z)) = softplus(−z)
    return TeamLoss(
        loss=losses_B.mean(),
        losses_B=losses_B,
        target_rewards_BK=target_rewards_BK,
        generated_rewards_BK=generated_rewards_BK,
        target_weights_BK=target_weights_BK,
        player_weights_BK=player_weights_BK,
    )


def target_loss(policy_target_logps_B: Tensor) -> Tensor:
    """The loss of fine-tuning on targets alone, in nats a response: `−log π_θ(y|x)`, shape `[B]`.

    >>> target_loss(torch.tensor([-2.0]))
    tensor([2.])
    """
    return -policy_target_logps_B


def _check(*logps: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in logps]
    policy, reference = shapes[0], shapes[2]
    if len(policy) != 1 or len(reference) != 2 or shapes != [policy, policy, reference, reference] or policy[0] != reference[0]:
        raise ValueError(f"expected policy logps [B], [B] and reference logps [B, K], [B, K]; found {shapes}")
    if 0 in reference:
        raise ValueError(f"expected at least one triplet and one player; found reference shape {reference}")
    for tensor in logps:
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"log-probabilities must be float32 or wider, found {tensor.dtype}")
