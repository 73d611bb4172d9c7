"""Figures of judged answers, on cases worked by hand."""

import pytest

from tpaw_ray.evaluation.sampled import figure, figures_of, majority
from tpaw_ray.schema import Answer


def answer(prompt, found, reference="7", set_aside=False):
    unanswered = reference is None or set_aside
    return Answer(
        prompt_id=prompt,
        generated_tokens=[],
        text="",
        answer=found,
        reference_answer=reference,
        correct=None if unanswered else found == reference,
    )


def test_greedy_answers_have_an_accuracy_with_wilsons_interval_and_no_vote():
    found = figures_of([answer("a", "7"), answer("b", "8"), answer("c", None), answer("d", "7", reference=None)], samples=1)
    assert (found.prompts, found.judged, found.set_aside, found.majority) == (4, 3, 0, None)
    assert found.accuracy.value == pytest.approx(1 / 3)
    assert found.accuracy.method == "wilson"
    assert (round(found.accuracy.low, 3), round(found.accuracy.high, 3)) == (0.061, 0.792)  # Wilson for 1 of 3
    assert found.pass_at == {1: found.accuracy}


def test_pass_at_k_and_majority_of_four_samples():
    said = {"a": ["7", "7", "8", "9"], "b": ["7", "8", "8", "8"], "c": ["1", "2", "3", None]}
    found = figures_of([answer(prompt, one) for prompt, all_ in said.items() for one in all_], samples=4)
    assert found.accuracy.value == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    # Of the 6 pairs of samples, 5 hold a right one for `a`, 3 for `b`, none for `c`.
    assert {k: round(one.value, 6) for k, one in found.pass_at.items()} == {
        1: round(0.25, 6),
        2: round((5 / 6 + 3 / 6) / 3, 6),
        4: round(2 / 3, 6),
    }
    assert found.majority.value == pytest.approx(1 / 3)  # of `a` only
    assert (found.accuracy.method, found.pass_at[4].method, found.majority.method) == ("student", "wilson", "wilson")


def test_the_interval_of_several_samples_takes_the_prompt_as_its_unit():
    few = figures_of([answer(prompt, found) for prompt in "abcd" for found in ("7", "8")], samples=2)
    many = figures_of([answer(prompt, found) for prompt in "abcd" for found in ("7", "8") * 50], samples=100)
    assert (few.accuracy.low, few.accuracy.high) == (many.accuracy.low, many.accuracy.high)


@pytest.mark.parametrize(
    ("votes", "value"),
    [
        (["7", "7", "8"], 1.0),
        (["8", "8", "7"], 0.0),
        (["7", "8"], 0.5),
        (["7", "8", "9"], 1 / 3),
        ([None, None, "7"], 1.0),
        ([None, None], 0.0),
    ],
)
def test_a_tie_counts_the_share_of_tied_answers_that_are_right_and_silence_has_no_vote(votes, value):
    assert majority([answer("a", vote) for vote in votes]) == pytest.approx(value)


def test_samples_that_were_set_aside_are_left_out_and_a_prompt_without_any_is_counted():
    said = [answer("a", "7"), *(answer(prompt, None, set_aside=True) for prompt in "abb")]
    found = figures_of(said, samples=2)
    assert (found.judged, found.set_aside, found.accuracy.value) == (1, 1, 1.0)
    assert list(found.pass_at) == [1]  # with one sample of `a` nobody knows two


def test_nothing_judged_has_no_figures():
    found = figures_of([answer("a", "7", reference=None)], samples=4)
    assert (found.judged, found.accuracy, found.pass_at, found.majority) == (0, None, {}, None)


def test_intervals_stay_within_0_and_1_and_have_a_width_where_all_are_right():
    assert figure([1.0] * 10).low < 1.0
    assert (figure([1.0, 1.0, 0.5]).high, figure([0.0, 0.0, 0.5]).low) == (1.0, 0.0)
