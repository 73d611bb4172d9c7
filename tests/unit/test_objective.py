"""Equations (1) to (5), by hand, against a slow plain-Python reference, and in the limits the paper names."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_ray.algorithm.objective import team_loss, weighted_loss
from tpaw_ray.algorithm.start import start_weights
from tpaw_ray.algorithm.weights import player_weights, target_weights

LOGPS = st.floats(-400.0, -0.01)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def of(arguments, **settings):
    """`team_loss` of four nested lists in float64."""
    return team_loss(*map(f64, arguments), **settings)


def reference_loss(arguments, *, reward_scale, eta, gamma):
    """Equations (1) to (5) with loops and `math` alone; returns the fields of `TeamLoss` as nested lists."""
    policy_targets, policy_generated, reference_targets, reference_generated = arguments
    found = defaultdict(list)
    for b in range(len(policy_targets)):
        target_rewards, generated_rewards, alphas = [], [], []
        for j in range(len(reference_targets[b])):
            target_rewards.append(reward_scale * (policy_targets[b] - reference_targets[b][j]))
            generated_rewards.append(reward_scale * (policy_generated[b] - reference_generated[b][j]))
            alphas.append(eta if target_rewards[j] <= 0 else 1.0)
        margins = [target - generated for target, generated in zip(target_rewards, generated_rewards, strict=True)]
        smallest = min(margins)
        unnormalised = [math.exp(-gamma * (margin - smallest)) for margin in margins]
        betas = [value / sum(unnormalised) for value in unnormalised]
        loss = 0.0
        for j in range(len(margins)):
            z = alphas[j] * target_rewards[j] - generated_rewards[j]
            loss += betas[j] * (math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z)))
        found["target_rewards_BK"].append(target_rewards)
        found["generated_rewards_BK"].append(generated_rewards)
        found["target_weights_BK"].append(alphas)
        found["player_weights_BK"].append(betas)
        found["losses_B"].append(loss)
    found["loss"] = sum(found["losses_B"]) / len(found["losses_B"])
    return dict(found)


@st.composite
def logps(draw):
    """Log-probabilities of realistic size: responses of up to 400 nats, players within 40 nats of the policy, some equal."""
    num_triplets, num_players = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shift = st.one_of(st.just(0.0), st.floats(-40.0, 40.0))
    policies = [[draw(LOGPS) for _ in range(num_triplets)] for _ in range(2)]
    references = [[[logp + draw(shift) for _ in range(num_players)] for logp in policy] for policy in policies]
    return (*policies, *references)


SETTINGS = st.fixed_dictionaries(
    {"reward_scale": st.floats(0.01, 5.0), "eta": st.floats(1.0, 10.0), "gamma": st.floats(0.0, 5.0)}
)
TEAM = ([-10.0, -21.0], [-30.0, -24.5], [[-10.0, -14.0], [-20.0, -26.0]], [[-31.0, -28.0], [-25.5, -24.0]])
"""Two triplets, two players. The first triplet's first player has a target reward of exactly 0."""


def test_two_triplets_two_players_by_hand():
    # λ = 0.1, η = 6, γ = 0.5
    # triplet 0:  P(y)     = 0.1·(−10+10), 0.1·(−10+14) = 0.0, 0.4        α = 6 (0 counts as not positive), 1
    #             P(y_gen) = 0.1·(−30+31), 0.1·(−30+28) = 0.1, −0.2       m = −0.1, 0.6
    #             β = e^0.05, e^−0.3 = 1.0512711, 0.7408182 over 1.7920893 = 0.5866176, 0.4133824
    #             z = 6·0.0 − 0.1, 1·0.4 + 0.2 = −0.1, 0.6     ℓ = ln(1+e^0.1), ln(1+e^−0.6) = 0.7443967, 0.4374880
    #             0.5866176·0.7443967 + 0.4133824·0.4374880 = 0.4366762 + 0.1808498 = 0.6175260
    # triplet 1:  P(y)     = 0.1·(−21+20), 0.1·(−21+26) = −0.1, 0.5       α = 6, 1
    #             P(y_gen) = 0.1·(−24.5+25.5), 0.1·(−24.5+24) = 0.1, −0.05        m = −0.2, 0.55
    #             β = e^0.1, e^−0.275 = 1.1051709, 0.7595721 over 1.8647430 = 0.5926666, 0.4073334
    #             z = −0.6 − 0.1, 0.5 + 0.05 = −0.7, 0.55      ℓ = ln(1+e^0.7), ln(1+e^−0.55) = 1.1031860, 0.4554888
    #             0.5926666·1.1031860 + 0.4073334·0.4554888 = 0.6538215 + 0.1855358 = 0.8393573
    # L = (0.6175260 + 0.8393573) / 2 = 0.7284416
    found = of(TEAM, reward_scale=0.1, eta=6.0, gamma=0.5)
    close = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(found.target_rewards_BK, f64([[0.0, 0.4], [-0.1, 0.5]]), **close)
    torch.testing.assert_close(found.generated_rewards_BK, f64([[0.1, -0.2], [0.1, -0.05]]), **close)
    torch.testing.assert_close(found.target_weights_BK, f64([[6.0, 1.0], [6.0, 1.0]]), **close)
    torch.testing.assert_close(found.player_weights_BK, f64([[0.5866176, 0.4133824], [0.5926666, 0.4073334]]), **close)
    torch.testing.assert_close(found.losses_B, f64([0.6175260, 0.8393573]), **close)
    assert found.loss.item() == pytest.approx(0.7284416, abs=2e-6)


@settings(max_examples=150)
@given(logps(), SETTINGS)
def test_every_output_equals_the_plain_python_reference(arguments, values):
    found = of(arguments, **values)
    for name, expected in reference_loss(arguments, **values).items():
        torch.testing.assert_close(
            getattr(found, name), f64(expected), rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_loss_is_large_and_finite_where_exp_overflows():
    # z = 6 · 5 · (−400) − 0 = −12000, ℓ(z) = 12000 + ln(1 + e^−12000) = 12000
    found = of(([-400.0], [-1.0], [[0.0]], [[-1.0]]), reward_scale=5.0, eta=6.0, gamma=0.5)
    assert found.loss.item() == 12000.0


def spin_loss(policy_target, policy_generated, reference_target, reference_generated, scale):
    """SPIN's equation (4.7): ℓ(λ log π/π_t (y) − λ log π/π_t (y'))."""
    z = scale * (policy_target - reference_target) - scale * (policy_generated - reference_generated)
    return math.log(1 + math.exp(-z))


def test_one_player_without_target_weighting_is_spins_loss():
    arguments = ([-50.0, -80.0], [-60.0, -70.0], [[-55.0], [-75.0]], [[-58.0], [-71.0]])
    expected = [spin_loss(-50.0, -60.0, -55.0, -58.0, 0.1), spin_loss(-80.0, -70.0, -75.0, -71.0, 0.1)]
    for gamma in (0.0, 0.5):  # a player alone has weight 1 under every γ
        found = of(arguments, reward_scale=0.1, eta=1.0, gamma=gamma)
        torch.testing.assert_close(found.losses_B, f64(expected))
        assert found.loss.item() == pytest.approx(sum(expected) / 2)


def trl_sigmoid_loss(policy_target_B, policy_generated_B, reference_target_B, reference_generated_B, beta):
    """The loss that TRL's `DPOTrainer` computes for models whose responses have these log-probabilities.

    Its own code runs; only the models are stand-ins, which give a response of one token all of its log-probability.
    """
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    def model_with(logps_S):
        def forward(**_):
            token = torch.zeros(len(logps_S), 1)
            return SimpleNamespace(entropy=token, mean_logits=token, is_top1=token.bool(), log_probs=logps_S[:, None])

        forward.training = True
        return forward

    defaults = DPOConfig
    stand_in = torch.nn.Module()
    stand_in.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=stand_in,
        ref_model=model_with(torch.cat([reference_target_B, reference_generated_B])),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value),
        aux_loss_enabled=False,
        ld_alpha=defaults.ld_alpha,
        precompute_ref_logps=False,
        f_divergence_type=getattr(defaults.f_divergence_type, "value", defaults.f_divergence_type),
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=defaults.use_weighting,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    num_sequences = 2 * len(policy_target_B)
    inputs = {
        "input_ids": torch.ones(num_sequences, 2, dtype=torch.long),
        "attention_mask": torch.ones(num_sequences, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * num_sequences),
    }
    policy = model_with(torch.cat([policy_target_B, policy_generated_B]))
    return DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)


def test_one_player_without_target_weighting_equals_trls_dpo_loss_and_gradient():
    generator = torch.Generator().manual_seed(0)
    references = [-100 * torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2)]
    policies = [(logps + torch.randn(8, generator=generator, dtype=torch.float64) * 10).requires_grad_() for logps in references]
    theirs = trl_sigmoid_loss(*policies, *references, beta=0.1)
    columns = [logps[:, None] for logps in references]
    ours = team_loss(*policies, *columns, reward_scale=0.1, eta=1.0, gamma=0.5).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert abs(ours.item() - math.log(2)) > 0.01
    for mine, trls in zip(torch.autograd.grad(ours, policies), torch.autograd.grad(theirs, policies), strict=True):
        torch.testing.assert_close(mine, trls, rtol=1e-12, atol=0)


def test_first_loss_of_one_player_is_ln_2():
    policy = ([-50.0, -3.0], [-60.0, -7.0])
    found = of((*policy, [[-50.0], [-3.0]], [[-60.0], [-7.0]]), reward_scale=0.1, eta=6.0, gamma=0.5)
    assert found.losses_B.tolist() == [math.log(2)] * 2
    assert found.loss.item() == math.log(2)


def test_without_gamma_every_player_has_the_same_weight():
    arguments = ([-10.0], [-20.0], [[-11.0, -40.0, -3.0]], [[-21.0, -5.0, -90.0]])
    found = of(arguments, reward_scale=0.1, eta=6.0, gamma=0.0)
    torch.testing.assert_close(found.player_weights_BK, f64([[1 / 3, 1 / 3, 1 / 3]]))


def test_large_gamma_puts_all_weight_on_the_smallest_margin():
    # margins 0.1·(1−1) = 0, 0.1·(30+15) = 4.5, 0.1·(−7−70) = −7.7
    arguments = ([-10.0], [-20.0], [[-11.0, -40.0, -3.0]], [[-21.0, -5.0, -90.0]])
    found = of(arguments, reward_scale=0.1, eta=6.0, gamma=1e6)
    assert found.player_weights_BK.tolist() == [[0.0, 0.0, 1.0]]


@given(logps(), SETTINGS)
@settings(max_examples=50)
def test_player_weights_sum_to_one(arguments, values):
    sums_B = of(arguments, **values).player_weights_BK.sum(1)
    torch.testing.assert_close(sums_B, torch.ones_like(sums_B))


@given(logps(), SETTINGS, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_the_loss_does_not_change_when_players_are_permuted(arguments, values, random):
    order = list(range(len(arguments[2][0])))
    random.shuffle(order)
    permuted = (*arguments[:2], *([[row[j] for j in order] for row in table] for table in arguments[2:]))
    found, expected = of(permuted, **values), of(arguments, **values)
    torch.testing.assert_close(found.losses_B, expected.losses_B)
    torch.testing.assert_close(found.player_weights_BK, expected.player_weights_BK[:, order])


@given(logps(), SETTINGS, st.floats(-50.0, 50.0))
@settings(max_examples=50)
def test_a_constant_on_both_reference_logps_of_a_player_leaves_its_margin(arguments, values, constant):
    shifted = (*arguments[:2], *([[row[0] + constant, *row[1:]] for row in table] for table in arguments[2:]))
    found, expected = of(shifted, **values), of(arguments, **values)
    margins = [loss.target_rewards_BK - loss.generated_rewards_BK for loss in (found, expected)]
    torch.testing.assert_close(margins[0], margins[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.player_weights_BK, expected.player_weights_BK, rtol=1e-7, atol=1e-9)


def finite_differences(loss, policies, step=1e-6):
    """Central differences of a scalar function of two `[B]` tensors."""
    gradients = []
    for which in range(2):
        gradient = torch.zeros_like(policies[which])
        for index in range(len(gradient)):
            sides = []
            for sign in (1, -1):
                moved = [policy.clone() for policy in policies]
                moved[which][index] += sign * step
                sides.append(loss(*moved).item())
            gradient[index] = (sides[0] - sides[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


AWAY_FROM_THE_KINK = ([-10.0, -21.0], [-30.0, -24.5], [[-9.0, -14.0], [-20.0, -26.0]], [[-31.0, -28.0], [-25.5, -24.0]])
RECIPE = {"reward_scale": 0.7, "eta": 6.0, "gamma": 0.5}


def gradients_of(arguments, detach_weights):
    policies = [f64(values).requires_grad_() for values in arguments[:2]]
    loss = team_loss(*policies, *map(f64, arguments[2:]), **RECIPE, detach_weights=detach_weights).loss
    return torch.autograd.grad(loss, policies)


def test_detached_gradient_equals_differences_with_the_weights_held_fixed():
    policies, references = list(map(f64, AWAY_FROM_THE_KINK[:2])), list(map(f64, AWAY_FROM_THE_KINK[2:]))
    start = team_loss(*policies, *references, **RECIPE)

    def held(target_B, generated_B):
        rewards = [
            RECIPE["reward_scale"] * (logps[:, None] - table)
            for logps, table in zip((target_B, generated_B), references, strict=True)
        ]
        return weighted_loss(*rewards, start.target_weights_BK, start.player_weights_BK).loss

    for found, expected in zip(gradients_of(AWAY_FROM_THE_KINK, True), finite_differences(held, policies), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_undetached_gradient_equals_differences_of_the_whole_loss():
    policies, references = list(map(f64, AWAY_FROM_THE_KINK[:2])), list(map(f64, AWAY_FROM_THE_KINK[2:]))

    def whole(target_B, generated_B):
        return team_loss(target_B, generated_B, *references, **RECIPE).loss

    for found, expected in zip(gradients_of(AWAY_FROM_THE_KINK, False), finite_differences(whole, policies), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@given(logps(), SETTINGS, st.floats(-30.0, 30.0), st.floats(-30.0, 30.0))
@settings(max_examples=50)
def test_player_weights_do_not_depend_on_the_policy(arguments, values, target_shift, generated_shift):
    # m_j = λ (log π(y) − log π(y_gen)) − λ (log π_j(y) − log π_j(y_gen)): the first part is the same for all players, and
    # cancels in (4). So β is a function of the frozen references alone, and only α is live.
    targets, generated, *references = arguments
    moved = ([logp + target_shift for logp in targets], [logp + generated_shift for logp in generated], *references)
    found, expected = of(moved, **values), of(arguments, **values)
    torch.testing.assert_close(found.player_weights_BK, expected.player_weights_BK, rtol=1e-7, atol=1e-9)


def test_detached_and_undetached_gradients_agree_because_no_weight_depends_smoothly_on_the_policy():
    for detached, whole in zip(gradients_of(TEAM, True), gradients_of(TEAM, False), strict=True):
        torch.testing.assert_close(detached, whole, rtol=1e-12, atol=1e-15)


def test_undetached_loss_passes_gradcheck():
    references = list(map(f64, AWAY_FROM_THE_KINK[2:]))
    policies = [f64(values).requires_grad_() for values in AWAY_FROM_THE_KINK[:2]]
    assert torch.autograd.gradcheck(lambda *logps: team_loss(*logps, *references, **RECIPE, detach_weights=False).loss, policies)


def test_detached_gradient_by_hand():
    # One player, λ = 1, η = 6: P(y) = −1, P(y_gen) = 1, z = 6·(−1) − 1 = −7.
    # dL/dz = −1/(1+e^z) = −1/(1+e^−7) = −0.9990889; dz/dlogπ(y) = 6, dz/dlogπ(y_gen) = −1.
    policies = [f64([-11.0]).requires_grad_(), f64([-19.0]).requires_grad_()]
    loss = team_loss(*policies, f64([[-10.0]]), f64([[-20.0]]), reward_scale=1.0, eta=6.0, gamma=0.5).loss
    target, generated = torch.autograd.grad(loss, policies)
    assert target.item() == pytest.approx(-5.9945337, abs=1e-6)
    assert generated.item() == pytest.approx(0.9990889, abs=1e-6)


def test_weights_carry_no_gradient_by_default():
    policies = [f64(values).requires_grad_() for values in TEAM[:2]]
    found = team_loss(*policies, *map(f64, TEAM[2:]), **RECIPE)
    assert found.loss.requires_grad
    assert not found.target_weights_BK.requires_grad
    assert not found.player_weights_BK.requires_grad
    assert team_loss(*policies, *map(f64, TEAM[2:]), **RECIPE, detach_weights=False).player_weights_BK.requires_grad


def test_undetached_weights_stay_without_gradient_inside_no_grad():
    policies = [f64(values).requires_grad_() for values in TEAM[:2]]
    with torch.no_grad():
        assert not team_loss(*policies, *map(f64, TEAM[2:]), **RECIPE, detach_weights=False).loss.requires_grad


def test_frozen_weights_are_used_as_given():
    # z = 2·0.5 − 0.25, 1·(−1) − 0.5 = 0.75, −1.5; ℓ = 0.3868709, 1.7014133; 0.25·0.3868709 + 0.75·1.7014133 = 1.3727777
    rewards = f64([[0.5, -1.0]]), f64([[0.25, 0.5]])
    found = weighted_loss(*rewards, f64([[2.0, 1.0]]), f64([[0.25, 0.75]]))
    assert found.loss.item() == pytest.approx(1.3727777, abs=1e-6)
    assert found.target_weights_BK.tolist() == [[2.0, 1.0]]
    assert found.player_weights_BK.tolist() == [[0.25, 0.75]]


@given(logps(), SETTINGS)
@settings(max_examples=50)
def test_live_weights_equal_start_weights_while_the_policy_is_the_newest_player(arguments, values):
    targets_BK, generated_BK = f64(arguments[2]), f64(arguments[3])
    live = team_loss(targets_BK[:, 0], generated_BK[:, 0], targets_BK, generated_BK, **values)
    for b, (target_logps, generated_logps) in enumerate(zip(arguments[2], arguments[3], strict=True)):
        alpha, beta = start_weights(target_logps, generated_logps, **values)
        assert live.target_weights_BK[b].tolist() == alpha
        torch.testing.assert_close(live.player_weights_BK[b], f64(beta), rtol=1e-9, atol=1e-12)


def test_start_weights_of_far_apart_players_do_not_overflow():
    # margins 0 and 5·(−1 + 4000) − 5·(−1 + 1) = 19995; the other way round 0 and −19995
    assert start_weights([-1.0, -4000.0], [-1.0, -1.0], reward_scale=5.0, eta=6.0, gamma=5.0) == ([6.0, 1.0], [1.0, 0.0])
    assert start_weights([-4000.0, -1.0], [-1.0, -1.0], reward_scale=5.0, eta=6.0, gamma=5.0) == ([6.0, 6.0], [0.0, 1.0])


def test_target_weights_at_and_around_zero():
    # the smallest double above 0 is a positive reward, −0.0 is not
    assert target_weights(f64([[-1e-300, -0.0, 0.0, 5e-324, 3.0]]), eta=6.0).tolist() == [[6.0, 6.0, 6.0, 1.0, 1.0]]


def test_player_weights_by_hand():
    # γ = ln 2, margins 0, 1, 2: weights 1, 1/2, 1/4 over 7/4
    torch.testing.assert_close(player_weights(f64([[0.0, 1.0, 2.0]]), gamma=math.log(2)), f64([[4 / 7, 2 / 7, 1 / 7]]))


@pytest.mark.parametrize("shapes", [
    [(2,), (3,), (2, 1), (2, 1)],
    [(2,), (2,), (2, 1), (2, 2)],
    [(2,), (2,), (3, 1), (3, 1)],
    [(2,), (2,), (2,), (2,)],
    [(2, 1), (2, 1), (2, 1), (2, 1)],
    [(), (), (1, 1), (1, 1)],
])  # fmt: skip
def test_shapes_that_do_not_fit_raise_with_the_shapes_found(shapes):
    with pytest.raises(ValueError, match="expected policy logps") as raised:
        team_loss(*map(torch.zeros, shapes), reward_scale=0.1, eta=6.0, gamma=0.5)
    assert str(shapes) in str(raised.value)


@pytest.mark.parametrize(("triplets", "players"), [(0, 1), (1, 0)])
def test_no_triplet_or_no_player_raises(triplets, players):
    policy, reference = torch.zeros(triplets), torch.zeros(triplets, players)
    with pytest.raises(ValueError, match="at least one triplet and one player"):
        team_loss(policy, policy, reference, reference, reward_scale=0.1, eta=6.0, gamma=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("position", range(4))
def test_dtypes_narrower_than_float32_raise_naming_what_was_found(position, dtype):
    arguments = [torch.zeros(1), torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 1)]
    arguments[position] = arguments[position].to(dtype)
    with pytest.raises(ValueError, match=str(dtype)):
        team_loss(*arguments, reward_scale=0.1, eta=6.0, gamma=0.5)


@pytest.mark.parametrize("position", range(4))
def test_nan_is_not_hidden(position):
    arguments = [f64(values) for values in TEAM]
    arguments[position][0] = math.nan
    found = team_loss(*arguments, **RECIPE)
    assert math.isnan(found.loss.item())
    assert math.isnan(found.losses_B[0].item())
    assert math.isfinite(found.losses_B[1].item())
