"""`tpaw evaluate` with real engines: exact match, the local GSM8K task, answers, and a real vLLM server on loopback as the judge.

All models are tiny and random, so what they say is nonsense; what is asserted is that every part talks to the next. Takes some
5 minutes on two idle cores.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.tiny import write_tiny_model

HOUSE = Path(__file__).parents[2]
CHOICE = json.dumps({"structured_outputs": {"choice": ["[[A]]", "[[B]]", "[[C]]"]}})
PATIENCE_S = 900


def evaluate(folder, *arguments):
    """The command, in a process of its own."""
    command = [sys.executable, "-c", "from tpaw_ray.cli import main; main()", "evaluate", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(HOUSE), "OPENAI_API_KEY": "none-that-is-secret"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Two tiny models, data in GSM8K's shape, and the config of a run that was never begun."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("one", 0), ("other", 1)):
        write_tiny_model(folder / name, seed=seed)
    rows = [{"question": f"{number}+1=", "answer": f"#### {number + 1}"} for number in range(40)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"name": "t"},
        "model": {"path": "set by the command"},
        "data": {"path": "test.jsonl", "prompt_length": 40, "max_length": 80, "validation_fraction": 0.5, "shard_size": 8},
        "sampling": {"max_new_tokens": 8},
        "learner": {"precision": "fp32"},
        "opponents": {"threads": 2, "cpu_cache_gib": 0.25},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_exact_match_with_samples_of_a_model(house):
    said = evaluate(house, "exact", "one", "--config", "config.yaml", "--samples", "4", "--limit", "10")
    (result,) = (house / "evaluations/one/evaluations/000").glob("exact-validation-4-samples-*/result.json")
    found = json.loads(result.read_text())
    assert (found["judged"], found["samples"], sorted(found["pass_at"])) == (10, 4, ["1", "2", "4"])
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
    assert "pass@4" in said
    before = result.stat().st_mtime_ns
    assert "answer one" not in evaluate(house, "exact", "one", "--config", "config.yaml", "--samples", "4", "--limit", "10")
    assert result.stat().st_mtime_ns == before


def test_the_local_gsm8k_task_through_the_harnesss_vllm_model(house):
    evaluate(house, "tasks", "one", "--config", "config.yaml", "--suite", "gsm8k-local", "--data", ".", "--limit", "6")
    (result,) = (house / "evaluations/one/evaluations/000").glob("tasks-gsm8k-local-*/result.json")
    found = json.loads(result.read_text())
    assert found["headlines"] == {"gsm8k_local": found["metrics"]["gsm8k_local"]["exact_match,final-answer"]}
    samples = [json.loads(line) for line in (result.parent / "samples/gsm8k_local.jsonl").read_text().splitlines()]
    assert [sample["target"] for sample in samples] == [str(number + 1) for number in range(6)]
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples)


def test_answers_to_questions_of_several_turns(house):
    rows = [{"question_id": 80 + number, "category": "math", "turns": ["1+1=", "And 2+2?"]} for number in range(3)]
    (house / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["answers", "one", "--config", "config.yaml", "--questions", "question.jsonl", "--format", "mt-bench"]
    evaluate(house, *asked, "--output", "answers/one.jsonl")
    found = [json.loads(line) for line in (house / "answers/one.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in found] == [80, 81, 82]
    assert all(len(row["choices"][0]["turns"]) == 2 for row in found)


@contextmanager
def vllm_server(model):
    """A real server of vLLM on a free port of loopback; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself cannot start in the build for CPUs, for it asks for the version of `vllm`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "8192", "--enforce-eager"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = model.parent / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not answers(port):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_two_models_before_a_judge_that_a_vllm_server_is(house, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "CHARACTERS", tiny.CHARACTERS + "[]<>/:;()'\"_!")
    model = write_tiny_model(tmp_path / "judge", seed=5, context=8192)
    rows = [{"instruction": f"{number}+1="} for number in range(6)]
    (house / "instructions.json").write_text(json.dumps(rows))
    asked = ["versus", "one", "other", "--config", "config.yaml", "--questions", "instructions.json", "--judge-model", "judge"]
    with vllm_server(model) as url:
        evaluate(house, *asked, "--judge-url", url, "--judge-extra", CHOICE, "--judge-tokens", "16", "--to", "compared")
        free = evaluate(house, *asked, "--judge-url", url, "--judge-tokens", "16", "--to", "compared")
    (folder,) = (house / "compared/evaluations/000").glob("versus-other-*")
    results = [json.loads(path.read_text()) for path in folder.glob("result-*.json")]
    (guided,) = [found for found in results if found["judge"]["extra"]]
    assert guided["unreadable"] == []
    assert guided["questions"] == guided["wins"] + guided["ties"] + guided["losses"] == 6
    rate = guided["win_rate"]  # without an interval where a judge of one mind ties everything
    assert 0 <= (rate["low"] or 0) <= rate["value"] <= (rate["high"] or 1) <= 1
    (unguided,) = [found for found in results if not found["judge"]["extra"]]
    assert len(unguided["unreadable"]) == 12  # sixteen characters of a random model hold no verdict
    assert "12 replies of the judge hold no verdict" in free
    assert "answer one" not in free  # what both said is there from the first time
    verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 24
    assert {verdict["verdict"] for verdict in verdicts[:12]} <= {"A", "B", "C"}
