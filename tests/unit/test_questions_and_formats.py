"""Questions from files, and answers in the formats of AlpacaEval and MT-Bench."""

import json

import pytest

from tpaw_ray.data.rows import Message
from tpaw_ray.errors import DataError
from tpaw_ray.evaluation.formats import temperature_of, written
from tpaw_ray.evaluation.questions import Question, read_questions


def file_of(tmp_path, *rows, name="questions.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_alpaca_evals_instructions_are_read_from_a_json_list(tmp_path):
    rows = [{"instruction": "Say hi.", "output": "x", "generator": "y", "dataset": "koala"}, {"instruction": "Go", "input": "on"}]
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows))
    assert read_questions(str(path)) == [
        Question(question_id="0", turns=("Say hi.",), dataset="koala"),
        Question(question_id="1", turns=("Go\non",)),
    ]


def test_mt_benchs_questions_are_read_with_their_turns(tmp_path):
    path = file_of(tmp_path, {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]})
    assert read_questions(path) == [Question(question_id="81", turns=("Write.", "Again."), category="writing")]


def test_other_rows_and_a_limit(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = file_of(tmp_path, {"prompt": "a"}, {"question": "b", "answer": "c"}, {"messages": messages}, {"prompt": "d"})
    assert [question.turns for question in read_questions(path, 3)] == [("a",), ("b",), ("Hi",)]
    assert read_questions(path)[2].context == (Message(role="system", content="Be brief."),)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "a"}, "row 0: found the columns text; expected instruction, turns, messages, prompt or question"),
        ({"turns": []}, "row 0: turns: found [], expected a list of texts"),
        ({"turns": ["a", 7]}, "row 0: turns[1]: found 7, expected a text"),
        ({"prompt": " "}, "row 0: prompt: found ' ', expected a text"),
        ({"prompt": "\ud800"}, "row 0: prompt: found a lone surrogate"),
        ({"question_id": [1], "prompt": "a"}, "row 0: question_id: found [1], expected a number or a text"),
        ({"question_id": "\ud800", "prompt": "a"}, "row 0: question_id: found a lone surrogate"),
        ({"question_id": "9" * 5000, "prompt": "a"}, "expected a number or a text of at most 1000 characters"),
        ({"messages": [{"role": ["x"], "content": "a"}]}, "messages[0]: found {'role': ['x'], 'content': 'a'}"),
        ({"messages": [{"role": {}, "content": "a"}]}, "messages[0]: found {'role': {}, 'content': 'a'}"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last is the assistant's, expected the user's"),
        ({"messages": [{"role": "x", "content": "a"}]}, "messages[0]: found {'role': 'x', 'content': 'a'}"),
        ("{", "row 0: not valid JSON"),
        ("7", "row 0: found a number 7, expected an object with named columns"),
    ],
)
def test_a_malformed_row_is_told_by_file_row_and_field(tmp_path, row, told):
    with pytest.raises(DataError) as error:
        read_questions(file_of(tmp_path, row))
    assert told in str(error.value)
    assert "questions.jsonl" in str(error.value)


def test_a_missing_an_empty_and_a_damaged_file_are_told(tmp_path):
    for path, told in (
        (str(tmp_path / "none.jsonl"), "cannot be read: No such file"),
        ("~nobody-here/q.jsonl", "cannot be read: No such file"),
        (file_of(tmp_path, name="empty.jsonl"), "holds no rows"),
        (file_of(tmp_path, "[1,", name="cut.json"), "not valid JSON"),
    ):
        with pytest.raises(DataError, match=told):
            read_questions(path)


def test_two_questions_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="question_id '5' stands in two rows"):
        read_questions(file_of(tmp_path, {"question_id": 5, "prompt": "a"}, {"question_id": "5", "prompt": "b"}))


def test_alpaca_evals_file_holds_what_its_loader_reads():
    questions = [Question(question_id="0", turns=("Say <b>hi</b>.",), dataset="koala")]
    content = written("alpaca-eval", questions, [["hi \u2028 \x1b[31m"]], "demo-003", 0.0)
    assert json.loads(content) == [
        {"instruction": "Say <b>hi</b>.", "output": "hi \u2028 \x1b[31m", "generator": "demo-003", "dataset": "koala"}
    ]


def test_mt_benchs_file_is_fastchats_sorted_by_question():
    questions = [Question(question_id=name, turns=("a", "b"), category="math") for name in ("101", "81")]
    lines = written("mt-bench", questions, [["one", "two"], ["three", "four"]], "demo-003", 12.5).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["question_id"] for row in rows] == [81, 101]
    assert list(rows[0]) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["three", "four"]}]
    assert (rows[0]["model_id"], rows[0]["tstamp"]) == ("demo-003", 12.5)
    assert rows[0]["answer_id"] != rows[1]["answer_id"]


def test_temperatures_are_fastchats_by_category_and_greedy_for_alpaca_eval():
    question = Question(question_id="1", turns=("a",), category="roleplay")
    assert (temperature_of("mt-bench", question), temperature_of("alpaca-eval", question)) == (0.7, 0.0)
    assert temperature_of("mt-bench", Question(question_id="1", turns=("a",), category="math")) == 0.0


def test_what_a_format_cannot_hold_is_refused():
    two = Question(question_id="1", turns=("a", "b"))
    with pytest.raises(DataError, match="question '1': has 2 turns; AlpacaEval's format holds one"):
        written("alpaca-eval", [two], [["c", "d"]], "m", 0.0)
    led = Question(question_id="2", turns=("a",), context=(Message(role="system", content="s"),))
    with pytest.raises(DataError, match="question '2': has messages before the user's"):
        written("mt-bench", [led], [["c"]], "m", 0.0)
