"""`tpaw run` as a user types it: real Ray, vLLM and DeepSpeed on a tiny model, interrupted, continued and run again."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.faults.runs import Victim, contents
from tests.tiny import merging_tokenizer, write_tiny_model
from tpaw_ray.faults import Place
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Answer, Generation, Pair, Prompt

TPAW = Path(sys.executable).with_name("tpaw")
ROWS = 48
HELDOUT = 8
N = ROWS - HELDOUT


def write_config(folder, name, **sections):
    """A config of small steps, and its data: sums whose texts the tokenizer can spell in more than one way."""
    rows = [{"question": f"{1000 + 37 * i}+{i}=", "answer": f"{1000 + 37 * i} + {i}\n#### {1000 + 38 * i}"} for i in range(ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[HELDOUT:]))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:HELDOUT]))
    config = {
        "run": {"name": name, "root": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {
            "path": str(folder / "train.jsonl"),
            "heldout_path": str(folder / "heldout.jsonl"),
            "validation_fraction": 0.0,
            "prompt_length": 32,
            "max_length": 64,
            "shard_size": 16,
        },
        "iterations": 2,
        "team": {"size": 2},
        "sampling": {"max_new_tokens": 16},
        "evaluation": {"split": "test"},
        "learner": {
            "precision": "fp32",
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "global_batch": 16,
            "epochs": 1,
        },
    }
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment():
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}


def tpaw(*arguments, timeout=600):
    return subprocess.run([TPAW, *map(str, arguments)], capture_output=True, text=True, env=environment(), timeout=timeout)


def processes_of(group):
    """Command lines of the living processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == group and "Z" not in (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]:
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


def interrupt_when(path, stop, *arguments):
    """Start `tpaw`, stop it when a path exists, and return how it ended and which processes of its session still live."""
    process = subprocess.Popen(
        [TPAW, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        # Tests that run in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not path.exists() and process.poll() is None:
        time.sleep(0.1)
    stop(process.pid)
    out, err = process.communicate(timeout=120)
    deadline = time.monotonic() + 30
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return process.returncode, out, err, left


def press_ctrl_c(pid):
    """A terminal tells every process of it."""
    os.killpg(pid, signal.SIGINT)


def terminate(pid):
    """Process managers tell the command alone."""
    os.kill(pid, signal.SIGTERM)


def fingerprints(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2e")
    write_tiny_model(folder / "model", tokenizer=merging_tokenizer())
    return folder


@pytest.fixture(scope="module")
def first(folder):
    done = tpaw("run", write_config(folder, "replay"), "iterations=1")
    assert done.returncode == 0, done.stderr[-3000:]
    return done, fingerprints(folder / "runs/replay/iterations/000")


@pytest.fixture(scope="module")
def played(folder, first):
    done = tpaw("run", folder / "replay.yaml", "iterations=2")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def store(folder, played):
    return RunStore.open(str(folder / "runs"), "replay")


def rows_of_summary(store):
    return store.read_json(store.path("summary.json"))["iterations"]


def rows_of_metrics(store):
    return [json.loads(line) for line in store.read_bytes(store.path("metrics.jsonl")).decode().splitlines()]


def rows_in(store, directory, row_type):
    return [row for path in store.files(directory) for row in store.read_rows(path, row_type)]


def test_a_run_reports_every_stage_and_ends_with_a_table(first):
    done, _ = first
    for stage in ("[0] generate 000", "[0] score", "[0] pair", "[0] update", "answer 001"):
        assert stage in done.stdout
    assert "learner: attention varlen" in done.stdout
    assert "target reward" in done.stdout
    assert "checkpoints/001" in done.stdout


def test_a_continued_run_leaves_what_was_done_as_it_was(folder, first, played):
    assert fingerprints(folder / "runs/replay/iterations/000") == first[1]
    assert "[0] generate" not in played.stdout
    assert "[1] generate 001" in played.stdout


def test_a_finished_run_does_no_work_and_says_so(folder, played):
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/replay").rglob("*")}
    again = tpaw("run", folder / "replay.yaml")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs/replay").rglob("*")} == before


def test_another_config_on_the_same_run_is_refused_with_the_field(folder, played):
    refused = tpaw("run", folder / "replay.yaml", "objective.eta=3")
    assert refused.returncode == 5
    assert "objective.eta: started with 6.0, now 3.0" in refused.stderr


def test_summary_has_a_row_a_checkpoint_with_counts_worked_by_hand(store):
    rows = rows_of_summary(store)
    assert [row["checkpoint"] for row in rows] == [0, 1, 2]
    assert [row["sequences"]["generate"] for row in rows] == [0, N, N]
    assert [row["sequences"]["score"] for row in rows] == [0, 2 * N, 4 * N]
    # each prompt's target runs once for all its rounds: 1 + 1, then 1 + 2 sequences, unless a step's border parts them
    updates = [row["sequences"]["update"] for row in rows]
    assert updates[0] == 0 and updates[1] == 2 * N and 3 * N <= updates[2] <= 3 * N + 5
    assert [row["sequences"]["evaluate"] for row in rows] == [2 * HELDOUT] * 3
    assert rows[0]["target_reward"] is None and rows[0]["margin"] is None
    for row in rows[1:]:
        assert row.keys() == {
            "checkpoint",
            "accuracy",
            "target_logp",
            "target_reward",
            "margin",
            "warnings",
            "seconds",
            "sequences",
            "tokens",
        }
        assert all(row["seconds"][stage] > 0 for stage in ("generate", "score", "update", "evaluate"))
        assert 0 <= row["accuracy"] <= 1


def test_summary_counts_the_tokens_of_every_stage(store):
    prompts = rows_in(store, store.prompts("train"), Prompt)
    heldout = rows_in(store, store.prompts("test"), Prompt)
    asked = sum(len(row.prompt_tokens) for row in prompts)
    targets = sum(len(row.target_tokens) for row in prompts)
    said = [
        sum(len(row.generated_tokens) for row in rows_in(store, store.path(f"iterations/00{t}/rollouts"), Generation))
        for t in (0, 1)
    ]
    answered = sum(len(row.generated_tokens) for row in rows_in(store, f"{store.evaluation(2)}/answers", Answer))
    tokens = rows_of_summary(store)[2]["tokens"]
    assert tokens["generate"] == asked + said[1]
    # player 1: targets and both rounds; player 0: the new round
    assert tokens["score"] == 4 * asked + targets + said[0] + 2 * said[1]
    assert tokens["update"] == sum(row["tokens"] for row in rows_of_metrics(store) if row["iteration"] == 1)
    # prompts and targets once for all rounds, and again where a step's border parts a prompt's triplets
    assert asked + targets + sum(said) <= tokens["update"] <= asked + targets + sum(said) + 5 * 64
    assert tokens["evaluate"] == sum(2 * len(row.prompt_tokens) + len(row.target_tokens) for row in heldout) + answered


def test_learning_raises_the_targets(store):
    rows = rows_of_summary(store)
    assert rows[2]["target_logp"] > rows[0]["target_logp"]
    assert rows[2]["margin"] > 0


def test_the_newest_player_gives_no_reward_at_the_first_step(store):
    first_steps = [row for row in rows_of_metrics(store) if row["step"] == 0]
    assert [row["players"] for row in first_steps] == [[0], [1, 0]]
    assert all(row["newest_reward_max_abs"] < 1e-3 for row in first_steps)
    assert first_steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    later = [row for row in rows_of_metrics(store) if row["step"] == row["steps"] - 1]
    assert all(row["newest_reward_max_abs"] > 1e-3 for row in later)


def test_metrics_have_a_row_a_step(store):
    rows = rows_of_metrics(store)
    # 40 triplets in steps of 16, then 80
    assert [(row["iteration"], row["step"], row["triplets"]) for row in rows] == [
        (0, 0, 16), (0, 1, 16), (0, 2, 8), (1, 0, 16), (1, 1, 16), (1, 2, 16), (1, 3, 16), (1, 4, 16),
    ]  # fmt: skip
    assert rows[0].keys() >= {
        "loss", "target_reward", "generated_reward", "margin", "target_weight_share", "player_weights", "target_logp",
        "generated_logp", "target_length", "generated_length", "grad_norm", "learning_rate", "tokens_per_s",
    }  # fmt: skip


def test_responses_and_prompts_are_never_encoded_again(store, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    said = {
        (row.iteration, row.prompt_id): row.generated_tokens
        for iteration in (0, 1)
        for row in rows_in(store, store.path(f"iterations/{iteration:03d}/rollouts/opponent-{iteration:03d}"), Generation)
    }
    prompts = {row.prompt_id: row for row in rows_in(store, store.prompts("train"), Prompt)}
    pairs = rows_in(store, store.pairs(1), Pair)
    assert len(pairs) == 2 * N
    for pair in pairs:
        assert pair.generated_tokens == said[pair.iteration, pair.prompt_id]
        assert pair.prompt_tokens == prompts[pair.prompt_id].prompt_tokens
        assert pair.target_tokens == prompts[pair.prompt_id].target_tokens
    # The tokenizer would have changed ids on the way through text, so that a detour would show.
    changed = [ids for ids in said.values() if tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != list(ids)]
    assert len(changed) > N


def test_pairs_carry_the_scores_of_both_players_and_weights(store):
    for pair in rows_in(store, store.pairs(1), Pair):
        assert list(pair.players) == [1, 0]
        assert len(pair.reference_target_logps) == len(pair.reference_generated_logps) == 2
        assert set(pair.start_alpha) <= {1.0, 6.0}
        assert sum(pair.start_beta) == pytest.approx(1)


def test_answers_are_greedy_judged_and_complete(store):
    answers = rows_in(store, f"{store.evaluation(2)}/answers", Answer)
    assert len(answers) == HELDOUT
    assert all(answer.correct == (answer.answer == answer.reference_answer) for answer in answers)
    assert {answer.reference_answer for answer in answers} == {str(1000 + 38 * i) for i in range(HELDOUT)}


def test_every_committed_stage_holds_what_its_marker_says(store):
    committed = [path.rsplit("/", 1)[0] for path in all_markers(store)]
    assert len(committed) >= 12
    for directory in committed:
        store.verify(directory)


def all_markers(store):
    return [str(path) for path in Path(store.root).rglob("committed.json")]


def test_the_last_checkpoint_loads_in_transformers_and_answers(store):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store.checkpoint(2))
    model = AutoModelForCausalLM.from_pretrained(store.checkpoint(2))
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1037+1="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = inputs["input_ids"][0].tolist()
    answer = next(row for row in rows_in(store, f"{store.evaluation(2)}/answers", Answer) if row.reference_answer == "1038")
    with_prompt = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist()
    assert with_prompt[len(prompt) :] == list(answer.generated_tokens)  # vLLM said the same


def test_a_run_whose_processes_are_killed_ends_with_the_same_files(folder, first):
    """The quick part of the kill matrix: each victim once."""
    config = write_config(folder, "killed")
    run = Victim(["run", str(config), "iterations=1", "learner.save_steps=1"], folder / "faults")
    for victim, places in {
        "opponent": {"an answer": (Place.ANSWER, "checkpoints/000/*")},
        "scorer": {"a shard of scores": (Place.SCORE, "iterations/000/scores/player-000/*/00001.parquet")},
        "learner worker": {"a step": (Place.STEP, "iterations/000/steps/000001/rank-0")},
        "driver": {"the marker": (Place.MARK, "checkpoints/001")},
    }.items():
        assert list(run.killed_at(places, victim)) == [(*places, True)]
    run.finish()
    stages = ("prompts", "checkpoints/000", "checkpoints/001", "evaluations/000", "evaluations/001", "iterations/000")
    found, expected = (
        {name: digest for name, digest in contents(folder / "runs" / run_name).items() if name.startswith(stages)}
        for run_name in ("killed", "replay")
    )
    assert found == expected
    assert "the update goes on after step 1" in run.log.read_text()


def test_fresh_opponents_with_frozen_weights_and_two_workers_interrupted_in_between(folder):
    config = write_config(folder, "fresh", team={"data": "fresh"}, learner={"workers": 2, "zero_stage": 3})
    command = ("run", config, "objective.weights=frozen", "objective.reward_scale=[0.2, 0.1]")
    for begun, stop in ("prompts/committed.json", terminate), ("iterations/000/learner", press_ctrl_c):
        code, _, err, left = interrupt_when(folder / "runs/fresh" / begun, stop, *command)
        assert (code, left) == (130, []), err[-3000:]
        assert err.strip().splitlines()[-1] == "interrupted; the same command continues the run"
        assert "Traceback" not in err
    done = tpaw(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    store = RunStore.open(str(folder / "runs"), "fresh")
    rows = rows_of_summary(store)
    assert [row["sequences"]["generate"] for row in rows] == [0, N, 2 * N]
    assert [row["sequences"]["score"] for row in rows] == [0, 2 * N, 5 * N]
    spoken = {(pair.iteration, pair.opponent) for pair in rows_in(store, store.pairs(1), Pair)}
    assert spoken == {(1, 1), (1, 0)}
    # The old opponent spoke for the coming iteration while the learner trained, before the new checkpoint was evaluated.
    ahead, evaluated = (
        store.read_json(f"{directory}/committed.json")["ended"]
        for directory in (f"{store.iteration(1)}/rollouts/opponent-000", store.evaluation(1))
    )
    assert ahead < evaluated
    again, before = (
        {row.prompt_id: row.generated_tokens for row in rows_in(store, f"{store.iteration(t)}/rollouts/opponent-000", Generation)}
        for t in (1, 0)
    )
    assert again.keys() == before.keys() and again != before  # a new draw from the same opponent
