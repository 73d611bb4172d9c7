"""The experiment's table, by hand-worked numbers."""

import pytest
from scipy import stats

from tpaw_ray.evaluation.statistics import holm
from tpaw_ray.experiment.table import (
    Scores,
    as_json,
    comparison_cells,
    make_table,
    remarks,
    score_cells,
)

START = [0.5, 0.5, 0.5]
SPIN = [0.5, 0.6, 0.7]
TPAW = [0.6, 0.7, 0.9]
LAST = [0.4, 0.4, 0.4]


def scores(values, last=None):
    return {"best": Scores.of(values, [1] * 3, [200] * 3), "last": Scores.of(last or values, [2] * 3, [200, 198, 200])}


@pytest.fixture
def rows():
    table = make_table([0, 1, 2], {"start": scores(START), "spin": scores(SPIN), "tpaw": scores(TPAW, LAST)}, ["start", "spin"])
    return {row["method"]: row for row in as_json(table)}


def comparison(rows, method, to, on):
    (found,) = [one for one in rows[method]["comparisons"] if (one["to"], one["on"]) == (to, on)]
    return found


def test_a_row_has_its_values_by_seed_their_mean_and_their_deviation(rows):
    spin = rows["spin"]
    assert (spin["seeds"], spin["best"]["values"], spin["best"]["checkpoints"]) == ([0, 1, 2], SPIN, [1, 1, 1])
    assert spin["best"]["mean"] == pytest.approx(0.6)
    assert spin["best"]["std"] == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    half = 4.302652729911275 * 0.1 / 3**0.5  # Student's t with 2 degrees of freedom
    assert (spin["best"]["low"], spin["best"]["high"]) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))
    assert rows["tpaw"]["last"]["mean"] == pytest.approx(0.4)


def test_differences_are_paired_by_seed(rows):
    found = comparison(rows, "tpaw", "spin", "best")  # 0.1, 0.1, 0.2: mean 0.4/3, deviation sqrt(0.02/3/2)
    assert found["difference"] == pytest.approx(0.4 / 3)
    assert found["cohens_d"] == pytest.approx((0.4 / 3) / (0.02 / 6) ** 0.5)
    assert found["p"] == pytest.approx(stats.ttest_rel(TPAW, SPIN).pvalue)
    expected = stats.ttest_rel(TPAW, SPIN).confidence_interval()
    assert (found["low"], found["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_every_method_is_compared_to_every_baseline_but_itself_and_the_start_to_none(rows):
    compared = {method: [(one["to"], one["on"]) for one in row["comparisons"]] for method, row in rows.items()}
    assert compared == {
        "start": [],
        "spin": [("start", "best"), ("start", "last")],
        "tpaw": [("start", "best"), ("spin", "best"), ("start", "last"), ("spin", "last")],
    }


def test_holms_correction_counts_the_tests_on_the_same_checkpoint(rows):
    # Three tests on best: p of spin-start, tpaw-start, tpaw-spin; sorted they are taken 3, 2 and 1 times, never falling.
    pairs = [("spin", "start"), ("tpaw", "start"), ("tpaw", "spin")]
    p = {pair: comparison(rows, *pair, "best")["p"] for pair in pairs}
    first, second, third = sorted(pairs, key=p.get)
    expected = {first: 3 * p[first]}
    expected[second] = max(expected[first], 2 * p[second])
    expected[third] = max(expected[second], p[third])
    for pair in pairs:
        assert comparison(rows, *pair, "best")["p_holm"] == pytest.approx(expected[pair])


def test_two_baselines_are_one_comparison_to_holm():
    table = {"start": scores(START), "spin": scores(SPIN), "sft": scores([0.5, 0.5, 0.8]), "tpaw": scores(TPAW)}
    rows = {row["method"]: row for row in as_json(make_table([0, 1, 2], table, ["start", "spin", "sft"]))}
    pairs = [("spin", "start"), ("sft", "start"), ("tpaw", "start"), ("sft", "spin"), ("tpaw", "spin"), ("tpaw", "sft")]
    p = [comparison(rows, *pair, "best")["p"] for pair in pairs]
    assert [comparison(rows, *pair, "best")["p_holm"] for pair in pairs] == pytest.approx(holm(p))
    assert comparison(rows, "spin", "sft", "best")["p_holm"] == comparison(rows, "sft", "spin", "best")["p_holm"]


def test_what_equal_differences_cannot_tell_is_null_and_not_counted_by_holm(rows):
    found = comparison(rows, "tpaw", "start", "last")  # -0.1 for every seed
    assert (found["difference"], found["p"], found["p_holm"]) == (pytest.approx(-0.1), None, None)
    two = [comparison(rows, "tpaw", "spin", "last"), comparison(rows, "spin", "start", "last")]
    smaller = min(one["p"] for one in two)
    assert min(one["p_holm"] for one in two) == pytest.approx(2 * smaller)


def test_the_interval_of_an_accuracy_ends_where_accuracies_do():
    found = Scores.of([0.7, 0.99, 0.99], [1] * 3, [100] * 3)  # Student's would end at 1.31
    assert (found.mean, found.high) == (pytest.approx(0.8933, abs=1e-4), 1.0)
    assert found.low == pytest.approx(0.4774, abs=1e-3)  # 0.8933 - 4.3027 * 0.1674 / sqrt(3)


def test_one_seed_has_a_difference_and_nothing_more():
    one = {"best": Scores.of([0.5], [1], [10]), "last": Scores.of([0.5], [1], [10])}
    other = {"best": Scores.of([0.25], [0], [10]), "last": Scores.of([0.25], [0], [10])}
    row = as_json(make_table([0], {"start": other, "tpaw": one}, ["start"]))[1]
    assert (row["best"]["std"], row["best"]["low"]) == (None, None)
    assert comparison({"tpaw": row}, "tpaw", "start", "best") == {
        "to": "start",
        "on": "best",
        "difference": 0.25,
        "low": None,
        "high": None,
        "cohens_d": None,
        "p": None,
        "p_holm": None,
    }
    assert score_cells([row]) == [["tpaw", "1", "0.5000", "–", "0.5000", "–"]]


def test_a_person_reads_four_digits_and_signs(rows):
    (start, spin, tpaw) = score_cells(list(rows.values()))
    assert start[:3] == ["start", "3", "0.5000 ± 0.0000"]
    assert spin == ["spin", "3", "0.6000 ± 0.1000", "0.3516 … 0.8484", "0.6000 ± 0.1000", "0.3516 … 0.8484"]
    assert tpaw[4] == "0.4000 ± 0.0000"
    cells = comparison_cells(list(rows.values()))
    assert [cell[:4] for cell in cells][:3] == [
        ["spin", "start", "best", "+0.1000"],
        ["tpaw", "start", "best", "+0.2333"],
        ["tpaw", "spin", "best", "+0.1333"],
    ]
    (equal,) = [cell for cell in cells if cell[:3] == ["tpaw", "start", "last"]]
    assert equal[3] == "-0.1000" and equal[6:] == ["–", "–"]


def test_a_reader_learns_how_many_answers_accuracies_rest_on(rows):
    assert remarks(list(rows.values())) == ["Accuracies are of 198 to 200 judged answers each."]
    (start,) = as_json(make_table([0], {"start": {on: Scores.of([0.5], [0], [10]) for on in ("best", "last")}}, []))
    assert remarks([start]) == ["Accuracies are of 10 judged answers each."]
    for on in ("best", "last"):
        del start[on]["judged"]  # as earlier versions wrote it
    assert remarks([start]) == []


def test_no_name_is_cut_however_narrow_the_terminal_is(capsys):
    from rich.console import Console

    from tpaw_ray.runs.progress import Reporter

    Reporter(Console(width=30)).table("t", ["a", "b"], [["without-target-weights", "0.123456789012345678901234567890"]])
    said = "".join(line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│"))
    assert said == "without-target-weights"
