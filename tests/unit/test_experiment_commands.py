"""Runs as commands side by side: real processes, of a program that stands in for `tpaw`."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.unit.test_experiment_design import design_of
from tpaw_ray.experiment import commands
from tpaw_ray.experiment.commands import Commands, last_words
from tpaw_ray.experiment.phases import tuning_runs
from tpaw_ray.placement import Node
from tpaw_ray.runs.store import RunStore

PROGRAM = """
import os, sys, time, pathlib, yaml
config = yaml.safe_load(pathlib.Path(sys.argv[2]).read_text())
rate, folder = config["learner"]["learning_rate"], pathlib.Path(os.environ["FOLDER"])
(folder / f"began-{rate}").write_text(os.environ["RAY_ADDRESS"])
if rate == 3:
    print("a line")
    print("error: it broke\\x1b[31m")
    sys.exit(7)
while len(list(folder.glob("began-*"))) < int(os.environ["TOGETHER"]):
    time.sleep(0.01)
time.sleep(float(os.environ["NAP"]))
print("done")
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Four runs at learning rates 1 to 4; the third fails."""
    monkeypatch.setattr(commands, "PROGRAM", (sys.executable, "-c", PROGRAM))
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setenv("TOGETHER", "1")
    monkeypatch.setenv("NAP", "0")
    tuning = {"seeds": [9], "grid": {"learner.learning_rate": [1, 2, 3, 4]}}
    return tuning_runs(design_of(tmp_path, methods={"a": {}}, baselines=[], tuning=tuning))


def nodes(cpus):
    return lambda: [Node(labels={}, resources={"CPU": cpus})]


def play(folder, runs, most, cpus=64.0):
    ended = {}
    store = RunStore.open(str(folder), "experiment")
    Commands(store, "address:1", nodes(cpus), most).play(runs, lambda run, end: ended.update({rate(run): end}))
    return ended


def rate(run):
    return run.settings["learner.learning_rate"]


def test_every_run_gets_its_config_and_the_address_of_ray_and_a_failure_ends_no_other(tmp_path, runs):
    ended = play(tmp_path, runs, most=1)
    assert {number: one.exit_code for number, one in ended.items()} == {1: 0, 2: 0, 3: 7, 4: 0}
    assert (ended[1].said, ended[3].said) == ("done", "it broke\\x1b[31m")
    assert (tmp_path / "began-4.0").read_text() == "address:1"
    folder = tmp_path / "experiment/logs/tuning/a_learning_rate-3_seed-9"
    assert yaml.safe_load((folder / "config.yaml").read_text())["learner"]["learning_rate"] == 3
    assert (folder / "output.txt").read_text() == "a line\nerror: it broke\x1b[31m\n"


def test_in_an_object_store_what_a_run_said_is_there_when_it_has_ended(tmp_path, runs, bucket):
    store = RunStore.open(bucket, "experiment")
    Commands(store, "address:1", nodes(64.0), 2).play(runs[2:], lambda run, end: None)
    folder = store.path("logs", "tuning", "a_learning_rate-3_seed-9")
    assert store.read_bytes(f"{folder}/output.txt") == b"a line\nerror: it broke\x1b[31m\n"
    assert store.exists(f"{folder}/config.yaml")


def test_nodes_that_come_later_are_used(tmp_path, runs, monkeypatch):
    monkeypatch.setenv("TOGETHER", "2")  # the first waits for the second
    looks = iter([0.9, 0.9])
    store = RunStore.open(str(tmp_path), "experiment")
    ended = []
    Commands(store, "address:1", lambda: nodes(next(looks, 64.0))(), None).play(runs[:2], lambda run, end: ended.append(run))
    assert len(ended) == 2


def test_as_many_run_at_once_as_may(tmp_path, runs, monkeypatch):
    monkeypatch.setenv("TOGETHER", "2")  # each waits for the other
    assert list(play(tmp_path, runs[:2], most=2)) in ([1, 2], [2, 1])


@pytest.mark.parametrize(("most", "cpus"), [(1, 64.0), (None, 0.9), (4, 0.9)])
def test_no_more_run_at_once_than_may_by_number_and_by_resources(tmp_path, runs, monkeypatch, most, cpus):
    monkeypatch.setenv("NAP", "0.3")
    starts = []
    original = commands._Command.__init__

    def watch(self, run, store, address):
        starts.append(time.monotonic())
        original(self, run, store, address)

    monkeypatch.setattr(commands._Command, "__init__", watch)
    play(tmp_path, runs[:2], most, cpus)
    assert starts[1] - starts[0] > 0.3


def test_an_interrupt_ends_the_runs_that_are_under_way(tmp_path, runs, monkeypatch, heeds_ctrl_c):
    monkeypatch.setenv("NAP", "60")
    began = time.monotonic()

    def press_ctrl_c():
        while len(list(tmp_path.glob("began-*"))) < 2:
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press_ctrl_c).start()
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, runs[:2], most=2)
    assert time.monotonic() - began < 30
    assert not [one for one in Path("/proc").glob("[0-9]*") if is_ours(one, tmp_path)]


def is_ours(process, folder):
    try:
        state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" and str(folder) in (process / "cmdline").read_text() and process.name != str(os.getpid())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_last_error_is_told_or_else_the_last_line(tmp_path):
    output = tmp_path / "output.txt"
    output.write_bytes(b"error: first\nerror: second\nshut down\n\n")
    assert last_words(output) == "second"
    output.write_bytes(b"one\ntwo \xff\n")
    assert last_words(output) == "two �"
    output.write_bytes(b"")
    assert last_words(output) == "(no output)"
