"""What tests share: one local Ray and one tiny model for the whole session."""

import logging
import signal
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any_machine", deadline=None)  # how long an example takes says nothing about it
settings.load_profile("any_machine")


ACTORS = ("Opponent", "Scorer", "Ledger", "Mailbox", "Group", "RayTrainWorker", "TrainController")


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing():
    """After every module, when all that its tests shared has ended: no actor of ours, no temporary file."""
    before = temporary_files()
    yield
    deadline = time.monotonic() + 60  # what was killed ends in its own time
    while left := [*actors(), *sorted(temporary_files() - before)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)


def actors():
    """Titles of the living processes of our actors that this process's Ray has started."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline()).strip()  # Ray pads its titles with spaces
        except psutil.Error:
            continue  # it ended while we looked
        if title.startswith(tuple(f"ray::{actor}" for actor in ACTORS)):
            found.append(title)
    return found


def temporary_files():
    """What our processes, and DeepSpeed in them, put into folders that tests share."""
    folder = Path(tempfile.gettempdir())
    return {*folder.glob("tpaw-pairs-*"), *folder.glob("tpaw-*/*.writing"), *Path("/dev/shm").glob("deepspeed*")}


@pytest.fixture(scope="session")
def holding(tmp_path_factory):
    """Holds processes of the session's Ray at named places (`tpaw_ray.faults`); nothing is armed unless a test does so."""
    from tests.holding import Holding

    return Holding(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def ray_session(holding):
    """A local Ray of four scheduling CPUs, whatever the machine has."""
    import os

    import ray

    os.environ["TPAW_FAULTS"] = str(holding.folder)  # Ray's processes have the environment of this one
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny Llama's folder, marked as finished the way the run's store marks a checkpoint."""
    from tests.tiny import write_tiny_model

    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    (path / "committed.json").write_text("{}")
    return path


@pytest.fixture(scope="session")
def s3_session():
    """A moto server for the whole session."""
    from tests.s3 import MOTO, s3_server

    if not MOTO.exists():
        pytest.skip(f"no S3 server: {MOTO} is not there; cluster/install.sh installs it, or set MOTO_SERVER")
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_session, monkeypatch, tmp_path):
    """The server as this process's own store, and a folder of its own for copies."""
    for name, value in s3_session.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TPAW_CACHE", str(tmp_path / "cache"))
    return s3_session


@pytest.fixture
def bucket(s3):
    """The address of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3.make_bucket(name)
    return f"s3://{name}"


@pytest.fixture
def heeds_ctrl_c():
    """Tests that run in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
