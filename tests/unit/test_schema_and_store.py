"""Rows survive the disk, files appear whole, and damage is named."""

import json
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from tpaw_ray import errors
from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.errors import RunError, TpawError
from tpaw_ray.runs.metrics import MetricsLog, StepMetrics
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Answer, Generation, Pair, Prompt, Score, arrow_schema, rows_of, table_of

PROMPT = Prompt(prompt_id="p0", row=7, prompt_tokens=[1, 5, 151_935], target_tokens=[7, 2], reference_answer="72")
GENERATION = Generation(prompt_id="p0", iteration=2, opponent=1, generated_tokens=[9, 8], finish_reason="length")
SCORE = Score(player=3, response_id="p0", logp=-123.456789012345)
ANSWER = Answer(prompt_id="p0", generated_tokens=[1], text="é 72\n", answer="72", reference_answer="72", correct=True)
PAIR = Pair(
    prompt_id="p0",
    iteration=2,
    opponent=1,
    prompt_tokens=[1, 5],
    target_tokens=[7, 2],
    generated_tokens=[],
    players=[2, 1, 0],
    reference_target_logps=[-1.5, -2.25, -1 / 3],
    reference_generated_logps=[-4.0, -5.0, -6.0],
    start_alpha=[6.0, 1.0, 1.0],
    start_beta=[0.5, 0.25, 0.25],
)
STEP = StepMetrics(
    iteration=0,
    epoch=0,
    step=0,
    steps=4,
    triplets=2,
    loss=0.5,
    target_reward=0.1,
    generated_reward=-0.1,
    margin=0.2,
    target_weight_share=0.5,
    players=[1, 0],
    player_weights=[0.5, 0.5],
    target_logp=-10.0,
    generated_logp=-20.0,
    target_length=3.0,
    generated_length=4.0,
    newest_reward_max_abs=0.0,
    grad_norm=None,
    learning_rate=5e-7,
    sequences=3,
    tokens=30,
    tokens_per_s=10.0,
    seconds=3.0,
)


@pytest.fixture
def on_disk(tmp_path):
    return RunStore.open(str(tmp_path), "demo")


@pytest.fixture(params=["disk", "S3"])
def store(request):
    """A run's store of either kind."""
    if request.param == "disk":
        return request.getfixturevalue("on_disk")
    return RunStore.open(f"{request.getfixturevalue('bucket')}/runs of mine/", "demo")


@pytest.mark.parametrize(
    "rows",
    [
        [PROMPT, replace(PROMPT, prompt_id="p1", reference_answer=None, prompt_tokens=[])],
        [GENERATION, replace(GENERATION, generated_tokens=[], finish_reason="stop")],
        [SCORE, replace(SCORE, logp=float("-inf"))],
        [ANSWER, replace(ANSWER, answer=None, reference_answer=None, correct=None), replace(ANSWER, correct=False)],
        [PAIR, replace(PAIR, prompt_id="p1")],
    ],
    ids=["Prompt", "Generation", "Score", "Answer", "Pair"],
)
def test_rows_come_back_from_disk_as_they_were_in_their_order(store, rows):
    path = store.path("rows.parquet")
    store.write_rows(path, rows, type(rows[0]))
    assert store.read_rows(path, type(rows[0])) == rows
    assert store.num_rows(path) == len(rows)


@pytest.mark.parametrize("row_type", [Prompt, Generation, Score, Answer, Pair])
def test_no_rows_come_back_as_no_rows(store, row_type):
    store.write_rows(store.path("none.parquet"), [], row_type)
    assert store.read_rows(store.path("none.parquet"), row_type) == []


def test_column_types_and_nulls_follow_the_annotations():
    assert arrow_schema(Answer) == pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("generated_tokens", pa.list_(pa.int32()), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("answer", pa.string()),
            pa.field("reference_answer", pa.string()),
            pa.field("correct", pa.bool_()),
        ]
    )
    assert arrow_schema(Pair).field("start_beta").type == pa.list_(pa.float64())


def test_extra_columns_are_ignored_and_a_missing_one_is_named():
    table = table_of([SCORE], Score)
    assert rows_of(table.append_column("more", pa.array([1])), Score) == [SCORE]
    with pytest.raises(KeyError, match="logp"):
        rows_of(table.drop_columns(["logp"]), Score)


def test_a_null_in_a_required_column_is_refused_on_writing(store):
    with pytest.raises(pa.ArrowInvalid, match="response_id"):
        store.write_rows(store.path("scores.parquet"), [replace(SCORE, response_id=None)], Score)
    assert store.files(store.root) == []


def test_a_run_lies_where_the_layout_says(store):
    found = [
        store.prompts("train"),
        store.checkpoint(4),
        store.evaluation(0),
        store.rollout(Rollout(2, 1)),
        store.target_scores(2),
        store.rollout_scores(1, Rollout(2, 2)),
        store.rollout_scores(3, Rollout(2, 2)),
        store.pairs(2),
        store.learner(12),
        store.shard(store.pairs(2), 3),
    ]
    assert [path.removeprefix(f"{store.root}/") for path in found] == [
        "prompts/train",
        "checkpoints/004",
        "evaluations/000",
        "iterations/002/rollouts/opponent-001",
        "iterations/002/scores/player-002/targets",
        "iterations/002/scores/player-001/rollout-002-002",
        "iterations/003/scores/player-003/rollout-002-002",
        "iterations/002/pairs",
        "iterations/012/learner",
        "iterations/002/pairs/00003.parquet",
    ]


def test_an_address_of_an_unknown_kind_is_refused():
    with pytest.raises(RunError, match=r"run\.root: found an address of 'hdfs'; expected a folder, s3://"):
        RunStore.open("hdfs://host/runs", "demo")


@pytest.mark.parametrize(
    "root",
    [
        "s3://AKID:wJalr/Xut@bucket/runs",
        "s3://AKID:wJalr@bucket",
        "s3://AKID:wJalr",
        "s3://bucket/runs?access_key=AKID&secret_key=wJalr",
        "gs://bucket#wJalr",
    ],
)
def test_an_address_with_keys_in_it_is_refused_and_not_repeated(root):
    with pytest.raises(RunError, match=r"run\.root: found more than bucket and prefix") as raised:
        RunStore.open(root, "demo")
    assert "wJalr" not in str(raised.value) and "AKID" not in str(raised.value).replace("AWS_ACCESS_KEY_ID", "")


@pytest.mark.parametrize("root", ["s3://bucket/a//b", "gs://bucket//a"])
def test_an_address_with_an_empty_name_is_refused_before_the_store_is_asked(root):
    with pytest.raises(RunError, match=r"run\.root: found an empty name in the prefix, as in a//b"):
        RunStore.open(root, "demo")


def test_an_address_of_a_file_system_is_a_folder(tmp_path):
    assert RunStore.open(f"file://{tmp_path}", "demo") == RunStore.open(str(tmp_path), "demo")


def test_a_store_carries_no_keys_across_processes(s3, bucket):
    carried = pickle.dumps(RunStore.open(bucket, "demo"))
    assert b"demo" in carried
    for secret in (s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"]):
        assert secret.encode() not in carried


def test_opening_a_run_creates_nothing(tmp_path):
    RunStore.open(str(tmp_path), "demo")
    assert list(tmp_path.iterdir()) == []


def test_a_store_crosses_processes(store):
    store.write_bytes(store.path("a"), b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes(store.path("a")) == b"1"


def test_a_written_file_leaves_nothing_beside_it(store):
    store.write_bytes(store.path("d", "a.parquet"), b"old")
    store.write_bytes(store.path("d", "a.parquet"), b"new")
    assert store.read_bytes(store.path("d", "a.parquet")) == b"new"
    found = [info.base_name for info in store.filesystem.get_file_info(pa.fs.FileSelector(store.at(store.path("d"))))]
    assert found == ["a.parquet"]


def test_a_write_that_was_cut_short_is_not_listed_and_leaves_the_earlier_file(on_disk, monkeypatch):
    store = on_disk
    store.write_bytes(store.path("d", "a.parquet"), b"whole")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        for name in ("a.parquet", "b.parquet"):
            with pytest.raises(KeyboardInterrupt):
                store.write_bytes(store.path("d", name), b"half")
    left = list(Path(store.path("d")).glob("*.writing"))
    assert len(left) == 2
    assert store.files(store.path("d")) == [store.path("d", "a.parquet")]
    assert store.read_bytes(store.path("d", "a.parquet")) == b"whole"
    store.commit(store.path("d"))
    assert not any(path.exists() for path in left)


def test_files_are_sorted_found_in_subfolders_and_without_markers(store):
    for name in ("z", "a", "sub/m", "sub/committed.json", "committed.json"):
        store.write_bytes(store.path("stage", *name.split("/")), b"1")
    assert [path.removeprefix(store.path("stage/")) for path in store.files(store.path("stage"))] == ["a", "sub/m", "z"]
    assert store.files(store.path("absent")) == []


@pytest.fixture
def stage(store):
    """A committed stage of two files."""
    directory = store.path("stage")
    store.write_bytes(f"{directory}/a.bin", b"abc")
    store.write_bytes(f"{directory}/sub/b.bin", bytes(range(256)))
    store.commit(directory, sequences=2, seconds=1.5)
    return directory


def test_a_commit_carries_counts_sizes_and_checksums(store, stage):
    assert store.is_committed(stage)
    assert store.counts(stage) == {"sequences": 2, "seconds": 1.5}
    files = store.read_json(f"{stage}/committed.json")["files"]
    # SHA-256 of "abc" is the first test vector of FIPS 180-2
    assert files["a.bin"] == {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    assert files["sub/b.bin"]["bytes"] == 256
    store.verify(stage)


def test_a_stage_without_a_marker_is_not_committed(store):
    store.write_bytes(store.path("stage", "a.bin"), b"abc")
    assert not store.is_committed(store.path("stage"))
    assert not store.is_committed(store.path("absent"))


def test_verify_names_a_file_with_one_flipped_byte(store, stage):
    content = bytearray(store.read_bytes(f"{stage}/sub/b.bin"))
    content[100] ^= 1
    store.write_bytes(f"{stage}/sub/b.bin", bytes(content))
    with pytest.raises(RunError, match=r"sub/b\.bin: differs from what was committed"):
        store.verify(stage)


def test_verify_names_a_missing_file(store, stage):
    store.filesystem.delete_file(store.at(f"{stage}/a.bin"))
    with pytest.raises(RunError, match=r"a\.bin: differs from what was committed"):
        store.verify(stage)


def test_a_damaged_marker_is_named(store, stage):
    store.write_bytes(f"{stage}/committed.json", b'{"counts": {')
    with pytest.raises(RunError, match=r"committed\.json: not valid JSON"):
        store.counts(stage)


DAMAGED_MARKERS = {
    "no object": (b"[1]", "found [1], expected dict"),
    "neither counts nor files": (b"{}", "counts: missing"),
    "no files": (b'{"counts": {}}', "files: missing"),
    "counts that are none": (b'{"counts": {"rows": [1]}, "files": {}}', "counts.rows: found [1], expected"),
    "files in a list": (b'{"counts": {}, "files": ["a.bin"]}', "files: found ['a.bin'], expected dict"),
    "a file without a checksum": (b'{"counts": {}, "files": {"a.bin": {"bytes": 3}}}', "files.a.bin.sha256: missing"),
    "deep": (b"[" * 100_000, "not valid JSON (maximum recursion depth"),
    "deeper than ours": (b"[" * 51 + b"]" * 51, "not valid JSON (lists and objects stand more than 50 deep in one another)"),
    "a number without end": (b'{"counts": {"rows": %s}}' % (b"1" * 400), "not valid JSON (an integer of 400 digits)"),
    "NULs": (bytes(100), "not valid JSON"),
}


@pytest.mark.parametrize(("content", "told"), DAMAGED_MARKERS.values(), ids=DAMAGED_MARKERS)
def test_a_marker_of_another_shape_is_named_whatever_is_asked_of_it(on_disk, tmp_path, content, told):
    stage = on_disk.path("stage")
    on_disk.write_bytes(f"{stage}/a.bin", b"abc")
    on_disk.write_bytes(f"{stage}/committed.json", content)
    for ask in (RunStore.counts, RunStore.checksums, RunStore.verify, RunStore.is_reopened, RunStore.reopen):
        with pytest.raises(RunError) as raised:
            ask(on_disk, stage)
        assert str(raised.value).startswith(f"{stage}/committed.json: ") and told in str(raised.value)
    with pytest.raises(RunError, match=f"^{stage}/committed.json: "):
        on_disk.fetch(stage, tmp_path / "copy")


def test_a_count_that_a_marker_lacks_is_named_when_it_is_asked_for(store, stage):
    counts = store.counts(stage)
    assert "rows" not in counts and counts.get("rows") is None
    with pytest.raises(RunError, match=r"stage/committed\.json: the run is damaged there \(counts\.rows: missing\)"):
        counts["rows"]


def test_a_file_tells_when_it_changed_and_one_that_is_not_there_is_named(store):
    store.write_bytes(store.path("a"), b"1")
    assert abs(store.changed_at(store.path("a")) - time.time()) < 60
    with pytest.raises(RunError, match="none: cannot be looked at: there is no such file"):
        store.changed_at(store.path("none"))


def test_json_refuses_nan_so_that_every_reader_can_read_it(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(store.path("a.json"), {"loss": float("nan")})
    assert not store.exists(store.path("a.json"))


DAMAGES = {
    "cut short": lambda content: content[:-20],
    "empty": lambda content: b"",
    "not Parquet": lambda content: b"hello" * 100,
    "data overwritten": lambda content: content[:4] + b"\xff" * 60 + content[64:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_parquet_is_named(store, damage):
    path = store.path("scores", "00000.parquet")
    store.write_rows(path, [replace(SCORE, response_id=f"p{index}") for index in range(200)], Score)
    store.write_bytes(path, damage(store.read_bytes(path)))
    with pytest.raises(RunError, match="cannot be read as Parquet") as raised:
        store.read_rows(path, Score)
    assert path in str(raised.value)


def test_every_flipped_bit_in_the_numbers_of_a_table_is_found(on_disk):
    path = on_disk.path("scores.parquet")
    on_disk.write_rows(path, [Score(player=0, response_id=str(row), logp=-row / 7) for row in range(200)], Score)
    content, spoiled = Path(path).read_bytes(), 0
    for place in range(4, len(content) - 8, 37):
        Path(path).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            found = on_disk.read_rows(path, Score)
        except RunError as error:
            assert path in str(error)
        else:  # a bit of what says how the table was written, such as a name
            spoiled += [row.logp for row in found] != [-row / 7 for row in range(200)]
    assert spoiled == 0


@dataclass(frozen=True, kw_only=True)
class Said:
    """A row with little to say of itself in a footer."""

    key: str
    tokens: Sequence[int]


def test_a_flipped_bit_of_a_footer_is_told_or_changes_nothing(on_disk):
    path, rows = on_disk.path("said.parquet"), [Said(key="é", tokens=[9, 8, 7])]
    on_disk.write_rows(path, rows, Said)
    content = Path(path).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    reads = (
        (lambda: on_disk.read_rows(path, Said), rows),
        (lambda: on_disk.num_tokens(path, Said, "tokens"), 3),
        (lambda: on_disk.num_rows(path), 1),
    )
    for bit in range(8 * footer, 8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        Path(path).write_bytes(damaged)
        for read, written in reads:
            try:
                assert read() == written, bit
            except RunError as error:
                assert str(error).startswith(f"{path}: cannot be read as Parquet")
        on_disk.key_of(path)  # another key makes the file stale, and so it is made again


def test_a_folder_at_the_root_is_not_one_of_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in ("/demo", "/demo/", "file:///demo"):
        assert RunStore.named(path).root == RunStore.open("/", "demo").root == "/demo"
    assert RunStore.around("demo").root == f"{os.path.realpath(tmp_path)}/demo"


def test_missing_parquet_is_named(store):
    with pytest.raises(RunError, match=r"none\.parquet: cannot be read as Parquet"):
        store.read_rows(store.path("none.parquet"), Score)


def test_parquet_of_another_shape_is_named(store):
    path = store.path("scores.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"player": [1]}), sink)
    store.write_bytes(path, sink.getvalue().to_pybytes())
    with pytest.raises(RunError, match=r"scores\.parquet"):
        store.read_rows(path, Score)


def rows_in(store):
    lines = store.read_bytes(store.path("metrics.jsonl")).decode().splitlines()
    return [(row["iteration"], row["step"]) for row in map(json.loads, lines)]


def steps(iteration, *numbers):
    return [replace(STEP, iteration=iteration, step=number) for number in numbers]


@pytest.fixture
def log(store):
    log = MetricsLog(store)
    log.restart(0)
    return log


def test_metrics_in_a_store_wait_half_a_minute_for_more_and_are_whole_when_the_update_ends(bucket, monkeypatch):
    store = RunStore.open(bucket, "demo")
    log = MetricsLog(store)
    log.append(steps(0, 0))
    log.append(steps(0, 1))
    assert rows_in(store) == [(0, 0)]
    monkeypatch.setattr("tpaw_ray.runs.metrics.STORE_PAUSE_S", 0.0)
    log.append([])
    assert rows_in(store) == [(0, 0), (0, 1)]


def test_metrics_grow_by_a_line_a_step(store, log, monkeypatch):
    monkeypatch.setattr("tpaw_ray.runs.metrics.STORE_PAUSE_S", 0.0)
    log.append(steps(0, 0, 1))
    log.append(steps(0, 2))
    assert rows_in(store) == [(0, 0), (0, 1), (0, 2)]


def test_restart_drops_the_iteration_and_later_ones(store, log):
    log.write_update(0, steps(0, 0))
    log.append(steps(0, 0) + steps(1, 0, 1) + steps(2, 0))
    log.restart(1)
    assert rows_in(store) == [(0, 0)]


def test_restart_drops_a_line_that_was_cut_short_so_that_later_rows_stay_readable(store, log, monkeypatch):
    monkeypatch.setattr("tpaw_ray.runs.metrics.STORE_PAUSE_S", 0.0)
    log.write_update(0, steps(0, 0))
    log.append(steps(0, 0))
    path = store.path("metrics.jsonl")
    store.write_bytes(path, store.read_bytes(path) + b'{"iteration": 1, "st')
    log.restart(1)
    log.append(steps(1, 0))
    assert rows_in(store) == [(0, 0), (1, 0)]


def test_settle_puts_the_learners_record_in_place_of_what_the_driver_saw(store, log):
    log.write_update(0, steps(0, 0, 1))
    log.append(steps(0, 0, 1) + steps(1, 0))
    log.write_update(1, steps(1, 0, 1, 2))
    log.settle(1)
    assert rows_in(store) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    log.settle(1)
    assert rows_in(store) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def test_the_learners_record_reads_back_as_it_was_written(store, log):
    log.write_update(1, steps(1, 0, 1))
    assert log.of_update(1) == [vars(row) for row in steps(1, 0, 1)]
    assert log.of_update(0) == []


DAMAGED_LINES = {
    "no JSON": b'{"a',
    "no UTF-8": b"\xff\xfe\xff",
    "NULs": bytes(20),
    "no object": b"[]",
    "an empty object": b"{}",
    "deep": b"[" * 100_000,
    "another type": json.dumps(vars(STEP) | {"players": "x"}).encode(),
}


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_a_damaged_line_of_the_runs_metrics_is_left_out_and_comes_back_from_the_learners_record(on_disk, line):
    log, path = MetricsLog(on_disk), Path(on_disk.path("metrics.jsonl"))
    for iteration in (0, 1):
        log.write_update(iteration, steps(iteration, 0, 1))
    log.settle(1)
    whole = path.read_bytes()
    for again, expected in ((lambda: log.settle(1), whole), (lambda: log.restart(1), whole[: len(whole) // 2])):
        path.write_bytes(line + whole[whole.index(b"\n") :])  # in place of the first
        assert [(row["iteration"], row["step"]) for row in log.rows()] == [(0, 1), (1, 0), (1, 1)]
        again()
        assert path.read_bytes() == expected


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_a_damaged_line_of_the_learners_record_is_named_with_where_it_stands_whole(on_disk, line):
    log, path = MetricsLog(on_disk), Path(f"{on_disk.learner(3)}/metrics.jsonl")
    log.write_update(3, steps(3, 0, 1))
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(RunError, match=rf"^{path}, line 3: not a step's row .*copy those of iteration 3 from {log.path}$"):
        log.of_update(3)


def test_every_error_crosses_processes_and_has_an_exit_code_of_its_own():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TpawError)]
    for kind in kinds:
        found = pickle.loads(pickle.dumps(kind("data.jsonl, row 3: no answer")))
        assert (type(found), str(found)) == (kind, "data.jsonl, row 3: no answer")
    own = [kind.exit_code for kind in kinds if "exit_code" in vars(kind)]
    assert sorted(own) == list(range(1, len(own) + 1))
    assert [kind for kind in kinds if "exit_code" not in vars(kind)] == [errors.DamageError]


def test_a_damaged_table_names_the_stage_to_remove_whose_marker_may_lie_above_its_folder(on_disk):
    path = on_disk.shard(on_disk.prompts("train"), 0)
    on_disk.write_bytes(path, b"no Parquet")
    with pytest.raises(RunError, match=f"remove {on_disk.prompts('train')} to have it made again"):
        on_disk.num_rows(path)
    on_disk.commit(on_disk.path("prompts"))
    with pytest.raises(RunError, match=f"remove {on_disk.path('prompts')} to have it made again"):
        on_disk.num_rows(path)
