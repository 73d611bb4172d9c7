"""Win rates, on cases worked by hand and on simulated judges whose taste is known."""

import numpy as np
import pytest

from tpaw_ray.evaluation.preference import Judged, length_controlled, preference


def judged(*scores, length=10, other_length=10, name="q"):
    return Judged(question_id=name, scores=scores, length=length, other_length=other_length)


def test_both_orders_count_half_each_and_a_tie_is_half_a_win():
    found = preference([judged(1.0, 1.0), judged(1.0, 0.0), judged(0.5, 0.5), judged(0.0, 0.0), judged(1.0, 0.5)])
    assert (found.questions, found.wins, found.ties, found.losses, found.consistent) == (5, 2, 2, 1, 3)
    assert found.win_rate.value == pytest.approx((1 + 0.5 + 0.5 + 0 + 0.75) / 5)
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high


def test_nothing_judged_has_no_win_rate():
    found = preference([])
    assert (found.questions, found.win_rate, found.length_controlled) == (0, None, None)


def simulated(strength, taste_for_length, count=4000, longer=60.0, seed=0):
    """A judge that prefers the first model with chance σ(strength + taste · tanh(difference / its deviation))."""
    random = np.random.default_rng(seed)
    differences = np.round(random.normal(longer, 100.0, count))
    chance = 1 / (1 + np.exp(-(strength + taste_for_length * np.tanh(differences / np.std(differences)))))
    scores = (random.random(count) < chance).astype(float)
    return [judged(score, length=1000 + int(more), other_length=1000) for score, more in zip(scores, differences, strict=True)]


@pytest.mark.parametrize("strength", [-0.7, 0.0, 0.7])
def test_the_length_controlled_win_rate_finds_the_strength_behind_a_taste_for_length(strength):
    found = preference(simulated(strength, taste_for_length=2.0))
    truth = 1 / (1 + np.exp(-strength))
    assert found.win_rate.value > truth + 0.05  # the longer model gains by its length
    assert found.length_controlled.value == pytest.approx(truth, abs=0.03)
    assert found.length_controlled.low < truth < found.length_controlled.high


def test_swapping_the_models_gives_the_rest_to_one():
    one = simulated(0.4, 1.0, count=300)
    other = [judged(1 - item.score, length=item.other_length, other_length=item.length) for item in one]
    assert length_controlled(one).value + length_controlled(other).value == pytest.approx(1.0, abs=1e-5)


def test_equal_lengths_leave_the_win_rate_as_it_is():
    found = preference([judged(1.0)] * 30 + [judged(0.0)] * 10)
    assert found.length_controlled.value == pytest.approx(0.75, abs=0.005)  # but for the weak penalty


def test_a_model_that_wins_everything_stays_below_one():
    assert 0.95 < length_controlled([judged(1.0, length=10 + more, other_length=10) for more in range(40)]).value < 1.0


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_equal_scores_have_no_interval_at_equal_length(score):
    found = length_controlled([judged(score, length=10 + more, other_length=10) for more in range(20)])
    assert (found.low, found.high) == (None, None)


def test_a_difference_in_length_that_is_always_the_same_cannot_be_controlled():
    assert length_controlled([judged(1.0, length=20, other_length=10)] * 5) is None
