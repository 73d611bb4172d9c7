"""A real cluster of several nodes on this machine: jobs, placement, a lost node, a stopped job; `make test-cluster`."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_run import tpaw, write_config
from tests.faults.runs import contents
from tests.tiny import merging_tokenizer, write_tiny_model
from tpaw_ray.runs.store import RunStore

HOUSE = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
TPAW = Path(sys.executable).with_name("tpaw")
PORTS = {"TPAW_RAY_PORT": "6390", "TPAW_DASHBOARD_PORT": "8276"}
PLACED = {
    "opponents": {"node_labels": {"tpaw-role": "opponent"}},
    "scoring": {"node_labels": {"tpaw-role": "opponent"}},
    "learner": {"node_labels": {"tpaw-role": "learner"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    write_tiny_model(folder / "model", tokenizer=merging_tokenizer())
    return folder


class Cluster:
    """`cluster/local.sh` with a state of its own."""

    def __init__(self, folder, **environment):
        self.variables = os.environ | PORTS | {"TPAW_CLUSTER": str(folder / "state"), "RAY": str(RAY)} | environment
        self.variables.pop("RAY_ADDRESS", None)
        exports = self.sh("up", "2", "1")
        self.exported = dict(re.findall(r"(\w+)=(\S+)", exports))

    def sh(self, *arguments):
        done = subprocess.run(
            [HOUSE / "cluster/local.sh", *arguments], env=self.variables, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def call(self, *command, expected=0, timeout=900, **environment):
        variables = self.variables | self.exported | environment
        done = subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == expected, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def listed(self, what):
        """Rows of Ray's state API."""
        return json.loads(self.call(RAY, "list", what, "--format", "json", "--detail", "--limit", "1000").split("\n", 0)[-1])

    def nodes(self):
        """Labels of the living nodes, by id."""
        return {node["node_id"]: node["labels"] for node in self.listed("nodes") if node["state"] == "ALIVE"}

    def places(self):
        """The roles of the nodes on which living actors of each class are."""
        nodes, found = self.nodes(), {}
        for actor in self.listed("actors"):
            if actor["state"] == "ALIVE" and actor["node_id"] in nodes:
                found.setdefault(actor["class_name"], set()).add(nodes[actor["node_id"]]["tpaw-role"])
        return found


@pytest.fixture(scope="module")
def cluster(folder):
    cluster = Cluster(folder)
    yield cluster
    cluster.sh("down")
    deadline = time.monotonic() + 60
    while left := [line for line in processes() if str(folder / "state") in line or PORTS["TPAW_RAY_PORT"] in line]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)


def processes():
    """Command lines of all processes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found.append((entry / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found


def wait_for(path, running=lambda: True, timeout_s=400):
    deadline = time.monotonic() + timeout_s
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < deadline and running(), f"{path} never came"
        time.sleep(0.2)


def test_a_wrong_token_is_refused_and_so_is_none(cluster, folder, tmp_path):
    config = write_config(folder, "refused")
    command = (TPAW, "submit", config, "--working-dir", folder)
    other = tmp_path / "token"
    other.write_text("0" * 64)
    told = cluster.call(*command, expected=6, RAY_AUTH_TOKEN_PATH=str(other))
    assert "the job server at" in told and "took no job" in told and "Traceback" not in told
    told = cluster.call(*command, expected=6, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"), HOME=str(tmp_path))
    assert "took no job" in told and "Traceback" not in told
    assert not (folder / "runs/refused").exists()


def test_a_missing_secret_is_named_before_anything_is_submitted(cluster, folder):
    config = write_config(folder, "secret")
    told = cluster.call(TPAW, "submit", config, "--working-dir", folder, "--secret", "NO_SUCH_TOKEN", expected=2)
    assert "the environment has no NO_SUCH_TOKEN" in told
    assert "secret" not in cluster.call(RAY, "job", "list")


def test_a_pool_that_is_not_there_is_told_of(cluster, folder):
    config = write_config(folder, "nowhere", opponents={"node_labels": {"tpaw-role": "nobody"}})
    told = cluster.call(TPAW, "submit", config, "--working-dir", folder, expected=6)
    assert "the config needs 0.1 CPU at the same time on nodes with tpaw-role=nobody, those nodes have 0" in told


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The folder of a run on this machine alone, without a cluster."""
    done = tpaw("run", write_config(folder, "undisturbed"), "learner.save_steps=1")
    assert done.returncode == 0, done.stderr
    return folder / "runs/undisturbed"


def test_a_job_that_loses_a_node_and_is_stopped_and_submitted_again_ends_like_an_undisturbed_run(cluster, folder, undisturbed):
    write_config(folder, "job", **PLACED)
    entry = ("python", "-m", "tpaw_ray", "run", "job.yaml", "learner.save_steps=1")
    wait = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "150"}})
    submit = (RAY, "job", "submit", "--working-dir", folder, "--runtime-env-json", wait)
    cluster.call(*submit, "--no-wait", "--submission-id", "first", "--", *entry)
    root = folder / "runs/job"

    wait_for(root / "evaluations/000/committed.json")
    places = cluster.places()
    assert places["Opponent"] == places["Scorer"] == {"opponent"}
    assert places["RayTrainWorker"] == {"learner"}
    assert places["Ledger"] == places["Mailbox"] == places["Group"] == {"head"}
    homes = {actor["node_id"] for actor in cluster.listed("actors") if actor["class_name"] == "Opponent" and actor["node_id"]}
    number = cluster.nodes()[homes.pop()]["tpaw-node"]
    cluster.sh("kill", number)

    wait_for(root / "iterations/000/learner/*")  # the update is under way, or done
    cluster.call(RAY, "job", "stop", "first", timeout=200)
    assert "STOPPED" in cluster.call(RAY, "job", "status", "first")
    assert not cluster.places()
    assert not (root / "iterations/001/committed.json").exists()

    told = cluster.call(
        TPAW, "submit", folder / "job.yaml", "learner.save_steps=1", "--working-dir", folder, "--job-id", "second"
    )
    assert "second: succeeded" in told and "checkpoint 002" in told
    expected, found = (
        {name: digest for name, digest in contents(path).items() if name != "config.yaml"} for path in (undisturbed, root)
    )
    assert found == expected
    assert "all 2 iterations are done" in cluster.call(TPAW, "status", root)


def test_nodes_that_share_nothing_but_an_object_store_make_what_one_machine_makes(cluster, folder, undisturbed, s3, bucket):
    """Nodes have caches of their own, what a job uploads lies in copies, and the run in the store."""
    config = write_config(folder, "stored", **PLACED, run={"root": f"{bucket}/runs"})
    secrets = [word for name in s3.environment for word in ("--secret", name)]
    told = cluster.call(
        TPAW, "submit", config, "learner.save_steps=1", "--working-dir", folder, "--job-id", "stored", *secrets, **s3.environment
    )
    assert "stored: succeeded" in told and s3.environment["AWS_SECRET_ACCESS_KEY"] not in told
    store, local = RunStore.open(f"{bucket}/runs", "stored"), RunStore.open(str(folder / "runs"), "undisturbed")
    for checkpoint in range(3):
        assert store.checksums(store.checkpoint(checkpoint)) == local.checksums(local.checkpoint(checkpoint))
    assert not (folder / "runs/stored").exists()
    copies = {
        cache.name: len([path for path in cache.iterdir() if path.is_dir()]) for cache in (folder / "state").glob("*.cache")
    }
    # The learner's node loads both starts, an opponents' node the three checkpoints at most; the head loads none.
    assert copies.pop("0-head.cache", 0) == 0
    assert copies.pop("1-learner.cache") == 2 and max(copies.values()) == 3, copies
