"""Ray's own metrics carry the run's rows: read where Prometheus reads them."""

import time
import urllib.request

import ray

from tests.unit.test_trackers import config_of, evaluate, rows_at
from tpaw_ray.runs.store import RunStore
from tpaw_ray.tracking.follow import Trackers

PATIENCE_S = 60


def exported(name):
    """The lines of a metric on this node's port."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        return [line for line in page.read().decode().splitlines() if line.startswith(f"{name}{{")]


def test_the_last_step_and_checkpoint_are_gauges_of_the_cluster(ray_session, tmp_path):
    config, store = config_of(tmp_path), RunStore.open(str(tmp_path), "t")
    evaluate(store, 0, 0.25)
    said = []
    with Trackers(config, store, said.append) as trackers:
        trackers.take(rows_at(0, 0, 1, 2))
    assert said == []
    end = time.monotonic() + PATIENCE_S
    while not (losses := exported("ray_tpaw_train_loss")) and time.monotonic() < end:
        time.sleep(1)
    assert [(float(line.split()[-1]), 'run="t"' in line) for line in losses] == [(0.25, True)]
    assert [float(line.split()[-1]) for line in exported("ray_tpaw_checkpoint_accuracy")] == [0.25]
