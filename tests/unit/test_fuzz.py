"""Whatever a row, a file or a config holds: it is taken, or refused with an error meant for the user."""

import contextlib
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_sources import SHAPED_ROWS
from tpaw_ray.cli import told
from tpaw_ray.config import DataConfig, config_fields, dump_config, load_config, resolve_config
from tpaw_ray.data.answers import final_answer
from tpaw_ray.data.prompts import prompt_id
from tpaw_ray.data.sources import read_conversations
from tpaw_ray.errors import ConfigError, DataError, TpawError
from tpaw_ray.policy.directory import check_directory, weight_shapes
from tpaw_ray.wording import visible

texts = st.text(max_size=20) | st.text(st.characters(categories=["Cc", "Cs", "Cf"]), max_size=4)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
VALID = {
    "run": {"name": "demo", "root": "runs"},
    "model": {"path": "m"},
    "data": {"path": "d.jsonl", "columns": {"prompt": "q", "target": "a"}},
    "learner": {"learning_rate": [5e-7, 1e-7]},
    "opponents": {"engine_args": {"block_size": 16}},
}
KEYS = [key for key, *_ in config_fields()]
fast = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def places(tree, path=()):
    """Every place in a tree, as the keys that lead there."""
    yield path
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


def changed(tree, path, value):
    """A copy of the tree with another value in one place."""
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = changed(tree[path[0]], path[1:], value)
    return copy


@st.composite
def mutated(draw, valid):
    """A valid tree with one to three places replaced, or given a key more."""
    tree = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree))))
        tree = changed(tree, path, draw(trees))
    return tree


def check_words(error):
    message = visible(str(error))
    assert message.strip() and "\x1b" not in message
    message.encode("utf-8")
    assert told(error) is error


def read(path, content, **settings):
    """The conversations of a file, or None where it is refused."""
    path.write_bytes(content)
    try:
        return list(read_conversations(DataConfig(path=str(path), **settings)))
    except TpawError as error:
        assert isinstance(error, DataError) and str(path) in str(error)
        check_words(error)
        return None


def check_taken(conversations):
    for conversation in conversations or ():
        assert conversation.prompt and conversation.target.strip()
        assert len(prompt_id(conversation)) == 16
        final_answer(conversation.target, r"####\s*(.*)")


def as_line(row):
    return json.dumps(row).encode()


@fast
@given(row=trees | mutated(list(SHAPED_ROWS.values())), ascii=st.booleans())
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_any_row_is_taken_or_refused(tmp_path, name, row, ascii):
    content = json.dumps([row] if name == "d.json" else row, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    check_taken(read(tmp_path / name, content))


@fast
@given(rows=st.lists(mutated(list(SHAPED_ROWS.values())), max_size=3), first=st.sampled_from(list(SHAPED_ROWS.values())))
def test_any_rows_behind_a_good_one_are_taken_or_refused(tmp_path, rows, first):
    check_taken(read(tmp_path / "d.jsonl", b"\n".join(map(as_line, [first, *rows]))))


@fast
@given(content=st.binary(max_size=200), row=st.sampled_from(list(SHAPED_ROWS.values())), at=st.integers(0, 300))
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
def test_any_bytes_are_taken_or_refused(tmp_path, name, content, row, at):
    line = as_line(row)
    check_taken(read(tmp_path / name, line[:at] + content + line[at:]))


@fast
@given(at=st.integers(0, 2000), damage=st.binary(min_size=1, max_size=8))
def test_any_damage_to_a_parquet_file_is_taken_or_refused(tmp_path, at, damage):
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"question": "1+1?", "answer": "2"}]), sink)
    content = sink.getvalue().to_pybytes()
    at %= len(content)
    check_taken(read(tmp_path / "d.parquet", content[:at] + damage + content[at + len(damage) :]))


def check_config(load):
    """It is refused with words, or survives being written and read."""
    try:
        config = load()
    except TpawError as error:
        assert isinstance(error, ConfigError)
        check_words(error)
        return
    assert resolve_config(yaml.safe_load(dump_config(config))) == config


@fast
@given(tree=trees | mutated([VALID]))
def test_any_yaml_tree_is_taken_or_refused(tmp_path, tree):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=False))
    check_config(lambda: load_config(path))


@fast
@given(content=st.binary(max_size=100) | st.text(st.sampled_from(list("&*!:{}[]-?|>'\"%@#,\n\t ax1~<=.")), max_size=60))
def test_any_text_for_a_config_is_taken_or_refused(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_config(lambda: load_config(path))


@fast
@given(
    overrides=st.lists(st.tuples(st.sampled_from(KEYS) | texts, trees.map(json.dumps) | texts).map("=".join) | texts, max_size=3)
)
def test_any_overrides_are_taken_or_refused(tmp_path, overrides):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(VALID))
    check_config(lambda: load_config(path, overrides))


@fast
@given(overrides=st.fixed_dictionaries({}, optional={key: st.integers(-1, 3) | st.floats(-1, 2) | st.booleans() for key in KEYS}))
def test_any_numbers_for_any_keys_are_taken_or_refused(tmp_path, overrides):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(VALID))
    check_config(lambda: load_config(path, [f"{key}={json.dumps(value)}" for key, value in overrides.items()]))


@fast
@given(config=trees | st.binary(max_size=40), index=trees, weights=st.binary(max_size=100))
def test_any_model_folder_is_taken_or_refused(tmp_path, config, index, weights):
    (tmp_path / "config.json").write_bytes(config if isinstance(config, bytes) else as_line(config))
    (tmp_path / "model.safetensors.index.json").write_bytes(as_line({"weight_map": index}))
    (tmp_path / "model.safetensors").write_bytes(weights)
    for check in (lambda: check_directory(tmp_path, trust_remote_code=False), lambda: weight_shapes(tmp_path)):
        with contextlib.suppress(TpawError):
            check()


@given(text=texts)
def test_visible_text_holds_nothing_that_a_terminal_obeys(text):
    shown = visible(text)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert visible(shown) == shown
