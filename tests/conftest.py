"""What tests share: one local Ray and one tiny model for the whole session."""

import logging

import pytest
from hypothesis import settings

settings.register_profile("any_machine", deadline=None)  # how long an example takes says nothing about it
settings.load_profile("any_machine")


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
