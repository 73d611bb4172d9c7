"""A real cluster of several nodes on this machine: jobs, placement, a lost node, a stopped job; `make test-cluster`."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ACTORS
from tests.e2e.test_run import tpaw, write_config
from tests.faults.runs import contents
from tests.holding import Holding
from tests.tiny import merging_tokenizer, write_tiny_model
from tpaw_ray.faults import Place
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt

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
    """`cluster/local.sh` with a state of its own: a head, a learner's node and two of opponents."""

    def __init__(self, state):
        self.state = state
        self.variables = os.environ | PORTS | {"TPAW_CLUSTER": str(state), "RAY": str(RAY)}
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            self.variables.pop(name, None)
        try:
            exports = self.sh("up", "2", "1", timeout=500)
        except BaseException:
            self.sh("down")
            raise
        self.exported = dict(re.findall(r"(\w+)=(\S+)", exports))

    def sh(self, *arguments, timeout=180):
        done = subprocess.run(
            [HOUSE / "cluster/local.sh", *arguments], env=self.variables, capture_output=True, text=True, timeout=timeout
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
        command = [RAY, "list", what, "--address", self.exported["RAY_API_SERVER_ADDRESS"], "--format", "json", "--detail"]
        done = subprocess.run(
            [*command, "--limit", "1000"], env=self.variables | self.exported, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        begin = done.stdout.find("[")
        return json.loads(done.stdout[begin:]) if begin >= 0 else []

    def places(self):
        """Where living actors of ours are: labels of their nodes, by class."""
        labels = {node["node_id"]: node["labels"] for node in self.listed("nodes") if node["state"] == "ALIVE"}
        found = {}
        for actor in self.listed("actors"):
            if actor["state"] == "ALIVE" and actor["class_name"] in ACTORS and actor["node_id"] in labels:
                found.setdefault(actor["class_name"], []).append(labels[actor["node_id"]])
        return found

    def when(self, holds, patience_s=300):
        """Places, as soon as they are as wanted."""
        deadline = time.monotonic() + patience_s
        while not holds(places := self.places()):
            assert time.monotonic() < deadline, places
            time.sleep(1)
        return places

    def processes(self):
        """Command lines of the living processes of all nodes, by id."""
        sessions = {int(path.read_text()) for path in self.state.glob("*.pid")}
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(entry.name)) in sessions and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("state"))
    yield cluster
    ours = cluster.processes()
    assert len(ours) > 4  # so that they would be seen below
    cluster.sh("down")
    deadline = time.monotonic() + 60
    while left := [command for pid, command in ours.items() if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)


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
    assert "secret.yaml" not in cluster.call(RAY, "job", "list")


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


def test_a_job_that_loses_a_node_and_is_stopped_and_submitted_again_ends_like_an_undisturbed_run(
    cluster, folder, undisturbed, tmp_path
):
    holding, root = Holding(tmp_path), folder / "runs/job"
    write_config(folder, "job", **PLACED)
    entry = ("python", "-m", "tpaw_ray", "run", "job.yaml", "learner.save_steps=1")
    variables = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "150", "TPAW_FAULTS": str(tmp_path)}})
    store = RunStore.open(str(folder / "runs"), "undisturbed")
    first = store.read_rows(store.files(store.prompts("train"))[0], Prompt)[0]

    # An engine holds a prompt; its node is lost.
    holding.arm(Place.ANSWER, f"checkpoints/000/{first.prompt_id}")
    cluster.call(
        RAY,
        "job",
        "submit",
        "--working-dir",
        folder,
        "--runtime-env-json",
        variables,
        "--no-wait",
        "--submission-id",
        "first",
        "--",
        *entry,
    )
    holding.wait(timeout_s=400)
    places = cluster.when(lambda places: {"Opponent", "Scorer", "RayTrainWorker"} <= places.keys())
    roles = {kind: {labels["tpaw-role"] for labels in found} for kind, found in places.items()}
    assert roles["Opponent"] == roles["Scorer"] == {"opponent"}
    assert roles["RayTrainWorker"] == {"learner"}
    assert roles["Ledger"] == roles["Mailbox"] == roles["Group"] == {"head"}
    (home,) = places["Opponent"]
    holding.arm(Place.STEP, "iterations/000/steps/000002/rank-0", "step")
    cluster.sh("kill", home["tpaw-node"])
    holding.let_go()
    moved = cluster.when(lambda places: any(labels != home for labels in places.get("Opponent", [])))
    assert {labels["tpaw-role"] for labels in moved["Opponent"]} == {"opponent"}

    # The learner has taken two steps and saved itself; the job is stopped.
    holding.wait(timeout_s=400)
    cluster.call(RAY, "job", "stop", "first", timeout=200)
    assert "was stopped" in cluster.call(RAY, "job", "status", "first")
    holding.let_go("step")
    cluster.when(lambda places: not places, patience_s=60)
    assert (root / "iterations/000/steps/000002/committed.json").exists() and not (root / "checkpoints/001").exists()

    told = cluster.call(
        TPAW, "submit", folder / "job.yaml", "learner.save_steps=1", "--working-dir", folder, "--job-id", "second"
    )
    assert "the update goes on after step 2" in told and "second: succeeded" in told and "checkpoint 002" in told
    expected, found = (
        {name: digest for name, digest in contents(path).items() if name != "config.yaml"} for path in (undisturbed, root)
    )
    assert found == expected
    assert "all 2 iterations are done" in cluster.call(TPAW, "status", root)


TEAMS = {
    "weights": ("learner.save_steps=1",),
    "adapters and two workers": ("model.lora.rank=4", "learner.workers=2", "learner.zero_stage=3", "learner.save_steps=1"),
}


@pytest.mark.parametrize("team", TEAMS)
def test_nodes_that_share_nothing_but_an_object_store_make_what_one_machine_makes(cluster, folder, s3, bucket, team, request):
    """Nodes have caches of their own, what a job uploads lies in copies, and the run in the store."""
    if team == "weights":
        here = request.getfixturevalue("undisturbed")
    else:
        here = folder / "runs/here"
        done = tpaw("run", write_config(folder, "here"), *TEAMS[team])
        assert done.returncode == 0, done.stderr
    name = f"stored-{len(team)}"
    config = write_config(folder, name, **PLACED, run={"root": f"{bucket}/runs"})
    secrets = [word for variable in s3.environment for word in ("--secret", variable)]
    told = cluster.call(
        TPAW, "submit", config, *TEAMS[team], "--working-dir", folder, "--job-id", name, *secrets, **s3.environment
    )
    assert f"{name}: succeeded" in told and s3.environment["AWS_SECRET_ACCESS_KEY"] not in told
    store, local = RunStore.open(f"{bucket}/runs", name), RunStore.open(str(here.parent), here.name)
    for checkpoint in range(3):
        assert store.checksums(store.checkpoint(checkpoint)) == local.checksums(local.checkpoint(checkpoint))
    assert not (folder / "runs" / name).exists()
    if team == "weights":
        copies = {cache.name: len([path for path in cache.iterdir() if path.is_dir()]) for cache in cluster.state.glob("*.cache")}
        # The learner's node loads both starts, an opponents' node the three checkpoints at most; the head loads none.
        assert copies.pop("0-head.cache", 0) == 0
        assert copies.pop("1-learner.cache") == 2 and max(copies.values()) == 3, copies
