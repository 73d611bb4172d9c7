"""What is told while a run goes on, to people and to collectors of logs."""

import io
import json
from datetime import datetime

import pytest
from rich.console import Console

from tpaw_ray.runs.progress import JsonReporter, Reporter


def told(reporter):
    with reporter, reporter.stage("generate 000", 8, iteration=2) as advance:
        advance(3)
        advance(5)
    with reporter.stage("answer 003", 4) as advance:
        advance(4)
    reporter.say("prompts: 8\x1b[7m")
    reporter.table("demo", ["checkpoint", "target logp"], [["000", "–"], ["001", "-0.3"]])


def test_a_person_reads_a_line_a_stage():
    out = io.StringIO()
    told(Reporter(Console(file=out, width=100)))
    first, second, *_ = out.getvalue().splitlines()
    assert first.split()[:4] == ["[2]", "generate", "000", "8"] and second.split()[:3] == ["answer", "003", "4"]


def test_a_collector_reads_one_object_a_line_with_run_stage_and_iteration():
    out = io.StringIO()
    told(JsonReporter("demo", out))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert all((line["run"], line["actor"]) == ("demo", "driver") for line in lines)
    assert all(datetime.fromisoformat(line.pop("time")).utcoffset().total_seconds() == 0 for line in lines)
    said = [{key: value for key, value in line.items() if key not in ("run", "actor", "seconds")} for line in lines]
    assert said == [
        {"stage": "generate 000", "iteration": 2, "done": 8},
        {"stage": "answer 003", "iteration": None, "done": 4},
        {"message": "prompts: 8\x1b[7m"},
        {"checkpoint": "000", "target_logp": "–"},
        {"checkpoint": "001", "target_logp": "-0.3"},
    ]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("make", [lambda: Reporter(Console(file=io.StringIO())), lambda: JsonReporter("demo", io.StringIO())])
def test_observers_hear_of_every_advance(make):
    heard = []
    reporter = make()
    reporter.observers.append(lambda *progress: heard.append(progress))
    told(reporter)
    assert heard == [("generate 000", 3, 8), ("generate 000", 8, 8), ("answer 003", 4, 4)]
