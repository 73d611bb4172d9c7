"""`tpaw run` in an object store whose port is closed in the middle: for a few seconds, and for longer than anybody waits."""

import signal
import subprocess
import time

import pytest

from tests.e2e.test_run import TPAW, environment, tpaw, write_config
from tests.tiny import merging_tokenizer, write_tiny_model
from tpaw_ray.runs.store import RunStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    write_tiny_model(folder / "model", tokenizer=merging_tokenizer())
    write_config(folder, "run")
    return folder


@pytest.fixture(scope="module")
def checksums_on_disk(folder):
    """The files of the checkpoint that the same config makes on a disk."""
    done = tpaw("run", folder / "run.yaml", "iterations=1")
    assert done.returncode == 0, done.stderr[-3000:]
    store = RunStore.open(str(folder / "runs"), "run")
    return store.checksums(store.checkpoint(1))


def shut_when(server, store, path, command):
    """Start a run and shut the store's door when a path is there; returns the process."""
    process = subprocess.Popen(
        [TPAW, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    while not store.exists(path) and process.poll() is None:
        time.sleep(0.2)
    server.shut_door()
    return process


def test_a_run_survives_a_short_outage_ends_in_a_long_one_goes_on_and_makes_what_it_makes_on_a_disk(
    folder, s3, bucket, checksums_on_disk
):
    command = ("run", folder / "run.yaml", "iterations=1", f"run.root={bucket}/runs")
    store = RunStore.open(f"{bucket}/runs", "run")

    gone = shut_when(s3, store, store.checkpoint(0) + "/committed.json", command)
    try:
        out, err = gone.communicate(timeout=300)
    finally:
        gone.send_signal(signal.SIGTERM)
        s3.open_door()
    assert gone.returncode == 5, (out[-2000:], err[-3000:])
    assert bucket in err and "the same command continues the run" in err and "Traceback" not in err

    back = shut_when(s3, store, f"{store.iteration(0)}/rollouts", command)
    time.sleep(5)
    s3.open_door()
    out, err = back.communicate(timeout=300)
    assert back.returncode == 0, (out[-2000:], err[-3000:])
    assert f"the last checkpoint is {store.checkpoint(1)}" in out.replace("\n", "")

    assert store.checksums(store.checkpoint(1)) == checksums_on_disk
    for directory in (store.checkpoint(0), store.checkpoint(1), store.evaluation(1), store.pairs(0), store.learner(0)):
        store.verify(directory)
    assert len(store.read_bytes(store.path("metrics.jsonl")).splitlines()) == 3
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert not any(secret in store.read_bytes(path) for path in store.files(store.root))

    again = tpaw(*command)
    assert again.returncode == 0 and "nothing to do" in again.stdout
