import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpaw_ray.config import DataConfig
from tpaw_ray.data.rows import Conversation, Message
from tpaw_ray.data.sources import looks_like_path, read_conversations
from tpaw_ray.errors import ConfigError, DataError

QUESTION = {"question": "1+1?", "answer": "2"}


def user(text):
    return Message(role="user", content=text)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path, **settings):
    return list(read_conversations(DataConfig(path=str(path), **settings)))


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def spoken(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


SHAPED_ROWS = {
    "messages": {"messages": turns(("user", "1+1?"), ("assistant", "2")), "prompt": "unused", "prompt_id": "x"},
    "prompt and completion as strings": {"prompt": "1+1?", "completion": "2"},
    "prompt and completion as messages": {"prompt": turns(("user", "1+1?")), "completion": turns(("assistant", "2"))},
    "question and answer": QUESTION,
    "ShareGPT": {"id": 1, "conversations": spoken(("human", "1+1?"), ("gpt", "2"))},
    "ShareGPT with role names": {"conversations": spoken(("user", "1+1?"), ("assistant", "2"))},
    "SPIN": {"real": turns(("user", "1+1?"), ("assistant", "2")), "generated": turns(("user", "1+1?"), ("assistant", "3"))},
    "Alpaca": {"instruction": "1+1?", "input": "", "output": "2"},
    "Alpaca without input": {"instruction": "1+1?", "output": "2"},
}


@pytest.mark.parametrize("row", SHAPED_ROWS.values(), ids=SHAPED_ROWS)
def test_every_shape_is_read_as_the_same_conversation(tmp_path, row):
    path = write_lines(tmp_path / "data.jsonl", row)
    assert read(path) == [Conversation(row=0, prompt=(user("1+1?"),), target="2")]


def test_the_last_assistant_turn_is_the_target_and_what_follows_it_is_dropped(tmp_path):
    said = turns(
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "thanks")
    )
    [conversation] = read(write_lines(tmp_path / "data.jsonl", {"messages": said}))
    assert [(turn.role, turn.content) for turn in conversation.prompt] == [(t["role"], t["content"]) for t in said[:4]]
    assert conversation.target == "d"


def test_alpaca_input_continues_the_prompt(tmp_path):
    [conversation] = read(write_lines(tmp_path / "data.jsonl", {"instruction": "Add.", "input": "1, 1", "output": "2"}))
    assert conversation.prompt == (user("Add.\n1, 1"),)


def test_the_first_row_decides_the_shape(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", QUESTION, {"prompt": "1+1?", "completion": "2"})
    with pytest.raises(DataError, match=r"data.jsonl, row 1 \(line 2\): question: missing"):
        read(path)


# Column mapping.


def test_mapped_columns_win_over_a_known_shape(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {**QUESTION, "q": "2+2?", "a": "4", "s": "Be brief."})
    [conversation] = read(path, columns={"prompt": "q", "target": "a", "system": "s"})
    expected = (Message(role="system", content="Be brief."), user("2+2?"))
    assert conversation == Conversation(row=0, prompt=expected, target="4")


def test_a_system_column_joins_a_recognised_shape_and_null_means_none(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {**QUESTION, "s": "Be brief."}, {**QUESTION, "s": None})
    first, second = read(path, columns={"system": "s"})
    assert first.prompt == (Message(role="system", content="Be brief."), user("1+1?"))
    assert second.prompt == (user("1+1?"),)


def test_a_mapped_messages_column_may_be_sharegpt(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {"dialogue": spoken(("system", "s"), ("human", "a"), ("gpt", "b"))})
    [conversation] = read(path, columns={"messages": "dialogue"})
    assert conversation == Conversation(row=0, prompt=(Message(role="system", content="s"), user("a")), target="b")


@pytest.mark.parametrize("columns", [{"prompt": "q"}, {"target": "a"}, {"messages": "m", "prompt": "q", "target": "a"}])
def test_half_a_mapping_is_refused(tmp_path, columns):
    with pytest.raises(ConfigError, match=r"data.columns: found .*; expected either messages, or prompt and target"):
        read(write_lines(tmp_path / "data.jsonl", QUESTION), columns=columns)


# Files and folders.


def test_json_may_hold_a_list_or_lines(tmp_path):
    (tmp_path / "list.json").write_text("\ufeff \n" + json.dumps([QUESTION, QUESTION], indent=2), encoding="utf-8")
    write_lines(tmp_path / "lines.json", QUESTION, QUESTION)
    assert read(tmp_path / "list.json") == read(tmp_path / "lines.json")
    assert [conversation.row for conversation in read(tmp_path / "list.json")] == [0, 1]


def test_blank_lines_are_skipped_and_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\ufeff" + json.dumps(QUESTION) + "\n\n  \n" + json.dumps({**QUESTION, "answer": ""}) + "\n", encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"row 1 \(line 4\): answer: found the target response ''"):
        read(path)


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "a\u2028b", "answer": "c\u0085d"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read(path) == [Conversation(row=0, prompt=(user("a\u2028b"),), target="c\u0085d")]


def test_parquet_is_read_like_lines(tmp_path):
    row = SHAPED_ROWS["messages"]
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet") == read(write_lines(tmp_path / "data.jsonl", row, row))


def test_a_folder_is_read_sorted_and_deep_and_its_rows_are_counted_through(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    pq.write_table(pa.Table.from_pylist([{"question": "third", "answer": "3"}]), tmp_path / "b" / "c.parquet")
    write_lines(tmp_path / "a.jsonl", {"question": "first", "answer": "1"}, {"question": "second", "answer": "2"})
    write_lines(tmp_path / ".cache" / "x.jsonl", {"not": "data"})
    (tmp_path / "README.md").write_text("not data")
    assert [(c.row, c.prompt[0].content) for c in read(tmp_path)] == [(0, "first"), (1, "second"), (2, "third")]


def test_a_parquet_row_in_a_folder_is_named_by_both_its_numbers(tmp_path):
    write_lines(tmp_path / "a.jsonl", QUESTION)
    pq.write_table(pa.Table.from_pylist([{"question": "q", "answer": " "}]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet, row 1 \(row 0 of this file\): answer: found the target response ' '"):
        read(tmp_path)


def test_a_folder_saved_by_datasets_gives_its_split(tmp_path):
    import datasets

    saved = {name: datasets.Dataset.from_list([{"question": name, "answer": "2"}]) for name in ("train", "test")}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "both"))
    saved["train"].save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "both", split="test")[0].prompt == (user("test"),)
    assert read(tmp_path / "one")[0].prompt == (user("train"),)
    with pytest.raises(DataError, match=r"has no split 'validation'; expected one of train, test"):
        read(tmp_path / "both", split="validation")


def test_a_hub_name_is_loaded_by_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [QUESTION]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read("openai/gsm8k", subset="main", split="test") == [Conversation(row=0, prompt=(user("1+1?"),), target="2")]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_a_failing_hub_is_reported_with_its_reason(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"openai/gsm8k: neither a local .* nor .* the hub .*split train\): no route to the hub"):
        read("openai/gsm8k")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/folder", "~/missing", "a/b/c", "data/missing.parquet"])
def test_a_missing_path_is_not_asked_of_the_hub(name):
    assert looks_like_path(name)
    with pytest.raises(DataError, match="no such file or folder"):
        read(name)


def test_limit_is_for_the_data_and_not_for_heldout_data(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", QUESTION, QUESTION, QUESTION)
    data = DataConfig(path=path, heldout_path=path, limit=2)
    assert len(list(read_conversations(data))) == 2
    assert len(list(read_conversations(data, heldout=True))) == 3


def test_heldout_data_comes_from_its_own_split_of_a_saved_folder(tmp_path):
    import datasets

    saved = {name: datasets.Dataset.from_list([{"question": name, "answer": "2"}]) for name in ("train", "test")}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "both"))
    data = DataConfig(path=str(tmp_path / "both"), heldout_path=str(tmp_path / "both"))
    assert [row.prompt[0].content for row in read_conversations(data)] == ["train"]
    assert [row.prompt[0].content for row in read_conversations(data, heldout=True)] == ["test"]


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train-00000-of-00001.jsonl", "validation/dev.jsonl")])
def test_a_folder_with_several_splits_is_not_read_as_one(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, QUESTION)
    with pytest.raises(DataError, match=r"files of several splits .*heldout_path"):
        read(tmp_path)


def test_files_of_one_split_are_read_together(tmp_path):
    for name in ("train-1.jsonl", "train-2.jsonl", "testimony.jsonl"):
        write_lines(tmp_path / name, QUESTION)
    assert len(read(tmp_path)) == 3


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(QUESTION) + "\nnot json\n")
    assert next(read_conversations(DataConfig(path=str(path)))).target == "2"


# Malformed sources.


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_source_without_rows_is_refused(tmp_path, name):
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path / name)


def test_an_empty_list_and_an_empty_folder_are_refused(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path / "data.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no data"):
        read(tmp_path / "empty")


def test_an_unknown_file_type_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer\n")
    with pytest.raises(DataError, match=r"unknown file type '.csv'; expected .jsonl, .json, .parquet"):
        read(tmp_path / "data.csv")


def test_a_damaged_parquet_file_and_a_damaged_saved_folder_are_refused(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"data.parquet: cannot be read as Parquet"):
        read(tmp_path / "data.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a folder saved by `datasets`"):
        read(tmp_path / "saved")


def test_a_json_list_that_breaks_off_is_refused(tmp_path):
    (tmp_path / "data.json").write_text('[{"question": ')
    with pytest.raises(DataError, match=r"data.json: not valid JSON .*expected a list of objects"):
        read(tmp_path / "data.json")


def test_an_unknown_shape_lists_columns_shapes_and_the_option(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {"text": "a", "label": 1})
    with pytest.raises(DataError) as caught:
        read(path)
    for part in ("row 0 (line 1)", "text, label", "question + answer", "messages", "data.columns.prompt"):
        assert part in str(caught.value)


MALFORMED = {
    "not JSON": (b"{'question': 1}", "not valid JSON", "expected one object a line"),
    "cut off": (b'{"question": "a', "not valid JSON", '{"question": "a'),
    "not an object": (b'["a", "b"]', "found a list ['a', 'b']", "expected an object"),
    "null": (b"null", "found null", "expected an object"),
    "missing field": (b'{"question": "a"}', "answer: missing", "question"),
    "number for text": (b'{"question": "a", "answer": 2}', "answer: found a number 2", "a string or a list of messages"),
    "null for text": (b'{"question": null, "answer": "2"}', "question: found null", "a string"),
    "empty list": (b'{"question": [], "answer": "2"}', "question: found an empty list", "expected messages"),
    "empty target": (b'{"question": "a", "answer": ""}', "answer: found the target response ''", "expected text"),
    "blank target": (b'{"question": "a", "answer": " \\n"}', "answer: found the target response ' \\n'", "expected text"),
    "blank prompt": (b'{"question": " ", "answer": "2"}', "question: found an empty prompt", "expected text"),
    "lone surrogate": (
        b'{"question": "a\\ud800", "answer": "2"}',
        "question: found the lone surrogate '\\ud800' at character 1",
        "UTF-8",
    ),
    "broken UTF-8": (b'{"question": "a\xff", "answer": "2"}', "not valid UTF-8: found byte 0xff", "expected a UTF-8 file"),
    "completion without answer": (
        b'{"question": "a", "answer": [{"role": "user", "content": "b"}]}',
        "answer: found no assistant",
        "",
    ),
    "messages as text": (b'{"messages": "a"}', "messages: found a string 'a'", "expected a list of messages"),
    "message as text": (b'{"messages": ["a"]}', "messages[0]: found a string 'a'", "{role, content}"),
    "message without role": (b'{"messages": [{"content": "a"}]}', "messages[0].role: missing", "found content"),
    "message without content": (b'{"messages": [{"role": "user"}]}', "messages[0].content: missing", "found role"),
    "unknown role": (
        b'{"messages": [{"role": "tool", "content": "a"}]}',
        "messages[0].role: found 'tool'",
        "expected one of system, user",
    ),
    "role as number": (b'{"messages": [{"role": 1, "content": "a"}]}', "messages[0].role: found 1", "expected one of"),
    "content in parts": (
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        "messages[0].content: found a list",
        "expected a string",
    ),
    "ShareGPT value": (
        b'{"conversations": [{"from": "human", "value": null}]}',
        "conversations[0].value: found null",
        "a string",
    ),
    "no assistant turn": (
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "messages: found no assistant turn",
        "expected one",
    ),
    "no turn before": (
        b'{"messages": [{"role": "assistant", "content": "a"}]}',
        "messages: found no turn before the target",
        "a prompt",
    ),
}


def good_row_like(line):
    """A good row of the same shape to stand first, so that the malformed one does not decide the shape."""
    return next(
        (SHAPED_ROWS[shape] for key, shape in ((b"messages", "messages"), (b"conversations", "ShareGPT")) if key in line),
        QUESTION,
    )


@pytest.mark.parametrize(("line", "found", "expected"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_names_file_row_line_field_and_what_is_expected(tmp_path, line, found, expected):
    good = json.dumps(good_row_like(line)).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(good + b"\n\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, row 1 (line 3): ")
    assert found in message
    assert expected in message
    assert "\n" not in message and len(message) < 500
    message.encode("utf-8")


def test_a_huge_value_is_cut_in_the_message(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {"question": ["x" * 10_000], "answer": "2"})
    with pytest.raises(DataError) as caught:
        read(path)
    assert len(str(caught.value)) < 300


# Given preferences.

CHOSEN, REJECTED = turns(("assistant", "2")), turns(("assistant", "3"))
PREFERRED_ROWS = {
    "strings": {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    "messages": {"prompt": turns(("user", "1+1?")), "chosen": CHOSEN, "rejected": REJECTED},
    "without a prompt of their own": {
        "chosen": turns(("user", "1+1?")) + CHOSEN,
        "rejected": turns(("user", "1+1?")) + REJECTED,
    },
    "UltraFeedback": {
        "prompt": "1+1?",
        "messages": turns(("user", "1+1?")) + CHOSEN,
        "chosen": turns(("user", "1+1?")) + CHOSEN,
        "rejected": turns(("user", "1+1?")) + REJECTED,
        "score_chosen": 8.0,
    },
}


def preferred(path, **settings):
    return list(read_conversations(DataConfig(path=str(path), **settings), preferences=True))


@pytest.mark.parametrize("row", PREFERRED_ROWS.values(), ids=PREFERRED_ROWS)
def test_every_shape_of_preferences_is_read_as_target_and_rejected_response(tmp_path, row):
    path = write_lines(tmp_path / "data.jsonl", row)
    assert preferred(path) == [Conversation(row=0, prompt=(user("1+1?"),), target="2", rejected="3")]
    assert read(path) == [Conversation(row=0, prompt=(user("1+1?"),), target="2")]  # as fine-tuning data: the chosen alone


def test_columns_may_name_the_rejected_response(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {"q": "1+1?", "good": "2", "bad": "3"})
    columns = {"prompt": "q", "target": "good", "rejected": "bad"}
    assert [row.rejected for row in preferred(path, columns=columns)] == ["3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "found the columns prompt, chosen; known shapes of preferences are prompt + chosen",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected: found the rejected response ' ', expected text"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected: found null, expected a string or a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": turns(("user", "c"))}, "rejected: found a last turn of the user"),
        (
            {"prompt": "a", "chosen": "b", "rejected": turns(("user", "z"), ("assistant", "c"))},
            "rejected: its prompt differs from that of the chosen response",
        ),
    ],
)
def test_a_rejected_response_that_cannot_be_used_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=r"data\.jsonl, row 0 \(line 1\)") as raised:
        preferred(write_lines(tmp_path / "data.jsonl", row))
    assert message in str(raised.value)
