"""Warnings from hand-made curves and tables."""

import random

import pytest

from tpaw_ray.config import WarningsConfig
from tpaw_ray.runs.health import NOTHING, Said, count_said, falling_reward, warnings_of
from tpaw_ray.schema import Generation, table_of

LIMITS = WarningsConfig()
SWITCHED_OFF = WarningsConfig(**dict.fromkeys(WarningsConfig.model_fields))
FINE = Said(sequences=100, empty=5, cut_off=50, tokens=2000)  # at the limits, not above them


def steps_of(rewards, target_length=10.0):
    return [{"target_reward": reward, "target_length": target_length, "triplets": 64} for reward in rewards]


def noisy(curve, seed, deviation=0.05):
    draw = random.Random(seed)
    return [value + draw.gauss(0.0, deviation) for value in curve]


def line(begin, end, count=200):
    return [begin + (end - begin) * step / (count - 1) for step in range(count)]


RISING = line(-0.2, 0.3)
FALLING = line(0.1, -0.4)
COLLAPSING = [*line(0.0, 0.3, 150), *line(0.3, -2.0, 50)]
DIPS_AND_RECOVERS = [*line(0.0, -0.5, 100), *line(-0.5, -0.1, 100)]
STILL_POSITIVE = line(0.8, 0.2)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("curve", [FALLING, COLLAPSING], ids=["falling", "collapsing"])
def test_a_reward_that_falls_below_zero_is_told_whatever_the_noise(curve, seed):
    assert falling_reward(curve, 3.0)
    assert falling_reward(noisy(curve, seed), 3.0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "curve",
    [RISING, STILL_POSITIVE, DIPS_AND_RECOVERS, [0.0] * 200, [-0.3] * 200],
    ids=["rising", "falling but positive", "recovering", "zero", "constant below zero"],
)
def test_a_reward_that_does_not_fall_below_zero_is_not_told_whatever_the_noise(curve, seed):
    assert falling_reward(curve, 3.0) == ""
    assert falling_reward(noisy(curve, seed), 3.0) == ""


def test_the_last_two_quarters_decide_by_their_means_and_standard_error():
    # quarters of 4 steps: means −0.1 and −0.3, variances 0.02 / 3 each; their standard error is (2 · 0.02 / 3 / 4)^½ = 0.0577
    rewards = [9.0] * 8 + [0.0, -0.2, -0.1, -0.1, -0.2, -0.4, -0.3, -0.3]
    assert falling_reward(rewards, 3.46).startswith(
        "the target reward falls, from -0.1000 to -0.3000 over the last quarters of 4"
    )
    assert falling_reward(rewards, 3.47) == ""


def test_an_update_of_few_steps_is_not_judged():
    assert falling_reward(line(0.0, -5.0, 15), 3.0) == ""
    assert falling_reward(line(0.0, -5.0, 16), 3.0)


def test_nothing_is_said_where_all_is_well_or_nothing_is_known():
    assert warnings_of(steps_of(RISING), FINE, FINE, LIMITS) == []
    assert warnings_of(steps_of(RISING), NOTHING, NOTHING, LIMITS) == []


def generation(tokens, finish_reason="stop"):
    return Generation(prompt_id="p", iteration=0, opponent=0, generated_tokens=tokens, finish_reason=finish_reason)


def test_generations_are_counted_over_all_tables():
    tables = [
        table_of([generation([5]), generation([]), generation([7, 5]), generation([7], "length")], Generation),
        table_of([generation([7, 8, 9], "length")], Generation),
        table_of([], Generation),
    ]
    # nothing, or an end token alone, is empty; a single token that was cut off is not
    assert count_said(tables) == Said(sequences=5, empty=2, cut_off=2, tokens=1 + 0 + 2 + 1 + 3)
    assert count_said([]) == NOTHING


def test_empty_generations_are_told_with_their_share():
    said = count_said([table_of([generation([5])] * 3 + [generation([7, 5])], Generation)])
    (warning,) = warnings_of(steps_of(RISING), said, NOTHING, LIMITS)
    assert warning.startswith("75.0% of the responses are empty (limit 5.0%); check that model.chat_template")


def test_responses_that_blow_up_are_told_against_the_targets_the_last_iteration_and_their_ends():
    said = count_said([table_of([generation([7] * 25, "length")] * 4, Generation)])
    before = count_said([table_of([generation([7] * 9 + [5])] * 4, Generation)])
    found = warnings_of(steps_of(RISING, target_length=10.0), said, before, LIMITS)
    assert [warning.split(";")[0] for warning in found] == [
        "responses are 25.0 tokens long on average, 2.5 times the targets' 10.0 (limit 2)",
        "100.0% of the responses were cut off by their length (limit 50.0%)",
        "responses are 25.0 tokens long on average, 2.5 times the last iteration's 10.0 (limit 1.5)",
    ]


def test_null_switches_every_warning_off():
    worst = Said(sequences=100, empty=60, cut_off=100, tokens=10**6)
    before = Said(sequences=100, empty=0, cut_off=0, tokens=100)
    assert len(warnings_of(steps_of(FALLING), worst, before, LIMITS)) == 5
    assert warnings_of(steps_of(FALLING), worst, before, SWITCHED_OFF) == []


def test_a_sum_of_counts_is_their_sum_by_name():
    assert FINE + Said(sequences=1, empty=1, cut_off=0, tokens=1) == Said(sequences=101, empty=6, cut_off=50, tokens=2001)
