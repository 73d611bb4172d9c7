"""What a run takes of a cluster, and what the cluster lacks, by hand; the watch over nodes with stand-ins for them."""

import time

import pytest

from tpaw_ray import nodes as nodes_module
from tpaw_ray.config import resolve_config
from tpaw_ray.errors import ConfigError, ResourceError
from tpaw_ray.nodes import NodeWatch, wait_for_nodes
from tpaw_ray.placement import Demand, Node, by_labels, demands, unmet

OPPONENT, LEARNER = {"tpaw-role": "opponent"}, {"tpaw-role": "learner"}


def config_of(**sections):
    return resolve_config({"run": {"name": "t"}, "model": {"path": "m"}, "data": {"path": "d"}, **sections})


def node(labels=None, **resources):
    return Node(labels=labels or {}, resources=resources)


def test_demands_count_opponents_a_learner_group_and_scorers():
    config = config_of(
        opponents={"replicas": 2, "gpus": 1, "tensor_parallel": 4, "cpus": 1, "node_labels": OPPONENT},
        learner={"workers": 8, "gpus": 1, "cpus": 2, "node_labels": LEARNER},
        scoring={"gpus": 0.5, "cpus": 1},
    )
    nodes = [node(OPPONENT, CPU=4, GPU=8), node(LEARNER, CPU=16, GPU=8)]
    assert by_labels(demands(config), nodes) == [
        ({}, {"CPU": (2 * 1 + 8 * 2 + 1 + 0.5, 20), "GPU": (2 * 4 + 8 + 0.5, 16)}),
        (OPPONENT, {"CPU": (2, 4), "GPU": (8, 8)}),
        (LEARNER, {"CPU": (16, 16), "GPU": (8, 8)}),
    ]


def test_fresh_opponents_stand_side_by_side():
    fresh = config_of(
        team={"data": "fresh", "size": 3}, opponents={"gpus": 1, "cpus": 0}, learner={"cpus": 0}, scoring={"cpus": 0}
    )
    assert by_labels(demands(fresh), []) == [({}, {"CPU": (0.5, 0), "GPU": (3, 0)})]
    assert by_labels(demands(fresh, hosted=1), []) == [({}, {"CPU": (0.5, 0), "GPU": (1, 0)})]


@pytest.mark.parametrize(
    ("needed", "nodes", "told"),
    [
        ([("engine", 1, 2, 1, {})], [node(CPU=2)], "the config needs 1 GPU at the same time, the cluster has 0"),
        ([("engine", 1, 0.3, 0, {})], [node(CPU=0.1 + 0.2)], ""),
        (
            [("engine", 2, 1, 1, OPPONENT), ("learner worker", 1, 1, 1, LEARNER)],
            [node(OPPONENT, CPU=8, GPU=1), node(LEARNER, CPU=8, GPU=2)],
            "the config needs 2 GPU at the same time on nodes with tpaw-role=opponent, those nodes have 1",
        ),
        ([("engine", 1, 1, 4, {})], [node(CPU=8, GPU=2)] * 2, "one engine takes 1 CPU and 4 GPU of one node, which no node has"),
        (
            [("engine", 1, 1, 0, OPPONENT)],
            [node(LEARNER, CPU=8)],
            "the config needs 1 CPU at the same time on nodes with tpaw-role=opponent, those nodes have 0",
        ),
        ([("engine", 1, 1, 0, OPPONENT)], [node(OPPONENT | {"zone": "a"}, CPU=1)], ""),
    ],
)
def test_what_the_nodes_lack_is_told_with_both_numbers(needed, nodes, told):
    wanted = [
        Demand(role=role, number=number, cpus=cpus, gpus=gpus, labels=labels) for role, number, cpus, gpus, labels in needed
    ]
    assert unmet(wanted, nodes) == told


@pytest.mark.parametrize("labels", [{"": "x"}, {"role": ""}, {"role": "!in(a)"}, {"a b": "c"}, {"role": 1}, "role=x"])
def test_labels_that_ray_would_not_take_are_refused(labels):
    with pytest.raises(ConfigError, match="node_labels"):
        config_of(opponents={"node_labels": labels})


def test_a_run_does_not_begin_without_its_nodes(monkeypatch):
    monkeypatch.setattr(nodes_module, "cluster_nodes", lambda: [node(CPU=1)])
    with pytest.raises(ResourceError, match=r"needs 2 CPU at the same time, the cluster has 1$"):
        wait_for_nodes([Demand(role="engine", number=2, cpus=1, labels={})], 0, print)


def test_nodes_that_come_in_time_are_waited_for_and_asked_for(monkeypatch):
    asked, said, looks = [], [], iter([1, 1, 1, 2])
    monkeypatch.setattr(nodes_module, "cluster_nodes", lambda: [node(OPPONENT, CPU=1)] * next(looks))
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda **request: asked.append(request))
    monkeypatch.setattr(nodes_module, "LOOK_S", 0.01)
    wait_for_nodes([Demand(role="engine", number=2, cpus=1, labels=OPPONENT)], 1, said.append)
    request = {"bundles": [{"CPU": 1, "GPU": 0.0}] * 2, "bundle_label_selectors": [OPPONENT] * 2}
    assert asked == [request, request, {"bundles": []}]  # a run beside this one may have withdrawn the first
    assert said == [
        "waiting up to 1 minutes for nodes: the config needs 2 CPU at the same time, the cluster has 1; "
        "the config needs 2 CPU at the same time on nodes with tpaw-role=opponent, those nodes have 1"
    ]


def watch(nodes, minutes, said):
    needed = [Demand(role="engine", number=1, cpus=1, labels={})]
    return NodeWatch(lambda: needed, minutes, said.append, nodes=nodes, look_s=0.01)


def test_a_node_that_is_gone_for_good_ends_the_run_with_what_is_missing():
    began = time.monotonic()
    with pytest.raises(ResourceError, match="a node is gone: the config needs 1 CPU at the same time, the cluster has 0"):  # noqa: SIM117
        with watch(lambda: [], 0, []):
            time.sleep(60)
    assert time.monotonic() - began < 60


def test_a_node_that_comes_back_is_told_of_once_and_waited_for():
    said, looks = [], []

    def nodes():
        looks.append(1)
        return [node(CPU=1)] if len(looks) > 5 else []

    with watch(nodes, 1, said):
        while len(looks) < 8:
            time.sleep(0.01)
    assert said == ["waiting up to 1 minutes for nodes: the config needs 1 CPU at the same time, the cluster has 0"]


def test_a_head_that_does_not_answer_is_told_of_and_looked_for_again():
    said, looks = [], []

    def nodes():
        looks.append(1)
        if len(looks) < 5:
            raise RuntimeError("no answer")
        return [node(CPU=1)]

    with watch(nodes, 0, said):
        while len(looks) < 8:
            time.sleep(0.01)
    assert said == ["the cluster's nodes cannot be listed: no answer"]
