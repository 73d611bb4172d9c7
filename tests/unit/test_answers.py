import pytest

from tpaw_ray.data.answers import final_answer

GSM8K = r"####\s*(-?[0-9.,]*[0-9])"
REST = r"####\s*(.*)"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 48/2 = 24\n#### 72", "72"),
        ("#### 1,000", "1000"),
        ("#### 72.0", "72"),
        ("#### 72.50", "72.5"),
        ("#### 100", "100"),
        ("#### 007", "7"),
        ("#### -5", "-5"),
        ("#### -0.0", "0"),
        ("#### 1\n#### 2", "2"),
        ("the answer is 72", None),
        ("", None),
    ],
)
def test_the_last_match_of_the_default_pattern_is_normalised(text, answer):
    assert final_answer(text, GSM8K) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### $1,072.50.", "1072.5"),
        ("####  72. ", "72"),
        ("#### $ 72", "72"),
        ("#### -$3", "-3"),
        ("#### .5", "0.5"),
        ("#### +5", "5"),
        ("#### Paris, France.", "Paris, France"),
        ("#### B", "B"),
        ("#### 50%", "50%"),
        ("#### 1e5", "1e5"),
        ("#### NaN", "NaN"),
        ("#### 1_000", "1_000"),
        ("#### ...", None),
        ("#### ", None),
    ],
)
def test_numbers_get_one_spelling_and_other_answers_keep_theirs(text, answer):
    assert final_answer(text, REST) == answer


def test_long_numbers_are_not_rounded():
    assert final_answer("#### 123456789012345678901234567890.10", REST) == "123456789012345678901234567890.1"


def test_a_group_that_took_no_part_in_the_match_is_no_answer():
    assert final_answer("none", r"(\d+)|none") is None
