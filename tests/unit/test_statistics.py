"""Intervals, effect sizes and tests: worked examples, scipy, and what an interval promises, by simulation."""

import random

import pytest
from scipy import stats

from tpaw_ray.evaluation.statistics import compare, holm, mean_interval, pass_at_k, proportion_interval

# Student's sleep data (1908): hours gained with two drugs, the same ten people.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_students_own_example_of_paired_values():
    found = compare(SECOND, FIRST)
    assert found.difference == pytest.approx(1.58)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert (found.interval.low, found.interval.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.cohens_d == pytest.approx(1.58 / 1.2299955, abs=1e-6)
    expected = stats.ttest_rel(SECOND, FIRST)
    assert found.p == expected.pvalue
    assert found.interval.low == pytest.approx(expected.confidence_interval().low)


def test_what_cannot_be_told_of_few_or_equal_values_is_null():
    alone = compare([1.0], [0.5])
    assert (alone.difference, alone.interval, alone.cohens_d, alone.p) == (0.5, None, None, None)
    equal = compare([1.0, 2.0], [0.5, 1.5])
    assert (equal.difference, equal.interval, equal.cohens_d, equal.p) == (0.5, None, None, None)
    assert mean_interval([0.5, 0.5]) is None
    with pytest.raises(ValueError, match="found 2 and 1"):
        compare([1.0, 2.0], [1.0])


@pytest.mark.parametrize("others", [[0.2, 0.1], [0.3, 0.2], [0.2, 0.10000000000000003]])
def test_differences_that_rounding_alone_tells_apart_are_equal(others):
    found = compare([0.3, 0.2], others)  # 0.09999999999999998 and 0.1
    assert (found.interval, found.cohens_d, found.p) == (None, None, None)


def test_wilsons_interval_of_a_worked_example():
    # 8 of 10 with z = 1.96: centre (0.8 + 1.92/10) / (1 + 3.84/10), half width 1.96/1.384 * sqrt(0.016 + 0.0096).
    found = proportion_interval(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert proportion_interval(0, 20).low == 0.0
    assert proportion_interval(20, 20).high == 1.0


def test_holms_correction_of_a_worked_example():
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_pass_at_k_is_the_mean_over_all_subsets():
    from itertools import combinations

    samples = [True] * 3 + [False] * 4
    for k in range(1, 8):
        subsets = list(combinations(samples, k))
        assert pass_at_k(7, 3, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_interval_of_a_share_holds_it_as_often_as_it_says(share):
    draws, trials, seeds = 2000, 100, random.Random(f"share {share}")
    inside = 0
    for _ in range(draws):
        found = proportion_interval(sum(seeds.random() < share for _ in range(trials)), trials)
        inside += found.low <= share <= found.high
    assert 0.92 <= inside / draws <= 0.96  # exactly 0.936 to 0.943 at these shares, ± 3 standard errors


def test_an_interval_of_a_mean_holds_it_as_often_as_it_says():
    seeds = random.Random("mean")
    inside = 0
    for _ in range(2000):
        found = mean_interval([seeds.gauss(0.6, 0.02) for _ in range(5)])
        inside += found.low <= 0.6 <= found.high
    assert 0.935 <= inside / 2000 <= 0.965
