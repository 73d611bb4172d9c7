"""What a run takes of a cluster, and on which nodes: roles with node labels, and what the nodes lack for them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpaw_ray.config import Config
from tpaw_ray.plan import ASKING_CPUS, PAIRING_CPUS, SCORER_SHARDS, num_askers, shards_asked

Labels = Mapping[str, str]
ANYWHERE: Labels = {}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as Ray knows it: its labels (`ray start --labels`) and all its resources, by name."""

    labels: Labels
    resources: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Demand:
    """So many actors of a role at the same time, with what each takes of one node that has these labels."""

    role: str
    number: int
    cpus: float
    gpus: float = 0.0
    labels: Labels

    @property
    def each(self) -> dict[str, float]:
        """The resources of one of them, by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus}


def demands(config: Config, hosted: int | None = None) -> tuple[Demand, ...]:
    """What must exist at the same time, with the engines of so many checkpoints; by default of as many as ever at once.

    Engines, scorers and the learner group keep theirs from iteration to iteration. Beside them stand the processes that ask
    a checkpoint's engines and the scorers, and at another time one pairing task at least; those run anywhere.
    """
    learner = config.learner
    most = config.window if config.team.data == "fresh" and not config.adapters else 1
    asking = ASKING_CPUS * (num_askers(shards_asked(config)) + num_askers(SCORER_SHARDS * config.scoring.workers))
    return (
        engines_of(config, most if hosted is None else hosted),
        scorers_of(config),
        Demand(role="learner worker", number=learner.workers, cpus=learner.cpus, gpus=learner.gpus, labels=learner.node_labels),
        Demand(role="Ray Data task", number=1, cpus=max(asking, PAIRING_CPUS), labels=ANYWHERE),
    )


def engines_of(config: Config, checkpoints: int = 1) -> Demand:
    """The engines of so many checkpoints."""
    opponents = config.opponents
    return Demand(
        role="engine",
        number=opponents.replicas * checkpoints,
        cpus=opponents.cpus,
        gpus=opponents.engine_gpus,
        labels=opponents.node_labels,
    )


def scorers_of(config: Config) -> Demand:
    """The scorers of a run."""
    scoring = config.scoring
    return Demand(role="scorer", number=scoring.workers, cpus=scoring.cpus, gpus=scoring.gpus, labels=scoring.node_labels)


def unmet(needed: Iterable[Demand], nodes: Sequence[Node]) -> str:
    """What the nodes lack, as one message; empty when they suffice.

    Looked at are the sums on the nodes of every set of labels, and whether one actor of each role fits on a node.
    """
    wanted = list(needed)
    told = [sentence for labels in _kinds(wanted) for sentence in _lacking(wanted, nodes, labels)]
    return "; ".join(told or [sentence for demand in wanted for sentence in _too_large(demand, nodes)])


def by_labels(needed: Iterable[Demand], nodes: Sequence[Node]) -> list[tuple[Labels, dict[str, tuple[float, float]]]]:
    """For every set of labels that is asked for, what is needed and what there is, by resource."""
    wanted = list(needed)
    return [(labels, _sums(wanted, nodes, labels)) for labels in _kinds(wanted)]


def options_of(demand: Demand) -> dict[str, Any]:
    """The options with which Ray places one of these actors."""
    found: dict[str, Any] = {"num_cpus": demand.cpus, "num_gpus": demand.gpus}
    return found | ({"label_selector": dict(demand.labels)} if demand.labels else {})


def label_text(labels: Labels) -> str:
    """Labels as `ray start` takes them.

    >>> label_text({"tpaw-role": "opponent", "zone": "a"})
    'tpaw-role=opponent,zone=a'
    """
    return ",".join(f"{key}={value}" for key, value in labels.items())


def this_machine() -> Node:
    """The node that Ray would start here, without starting it."""
    import torch

    return Node(labels={}, resources={"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())})


def _kinds(wanted: Sequence[Demand]) -> list[Labels]:
    found: list[Labels] = [ANYWHERE]
    found += (demand.labels for demand in wanted if demand.labels)
    return [labels for index, labels in enumerate(found) if labels not in found[:index]]


def _sums(wanted: Sequence[Demand], nodes: Sequence[Node], labels: Labels) -> dict[str, tuple[float, float]]:
    there = [node for node in nodes if _has(node.labels, labels)]
    return {
        name: (
            sum(demand.number * demand.each[name] for demand in wanted if _has(demand.labels, labels)),
            sum(node.resources.get(name, 0.0) for node in there),
        )
        for name in ("CPU", "GPU")
    }


def _lacking(wanted: Sequence[Demand], nodes: Sequence[Node], labels: Labels) -> list[str]:
    place, owner = (f" on nodes with {label_text(labels)}", "those nodes have") if labels else ("", "the cluster has")
    return [
        f"the config needs {amount:g} {name} at the same time{place}, {owner} {there:g}"
        for name, (amount, there) in _sums(wanted, nodes, labels).items()
        if amount > there + 1e-6
    ]


def _too_large(demand: Demand, nodes: Sequence[Node]) -> list[str]:
    there = [node.resources for node in nodes if _has(node.labels, demand.labels)]
    if any(all(resources.get(name, 0.0) + 1e-6 >= amount for name, amount in demand.each.items()) for resources in there):
        return []
    kind = f"no node with {label_text(demand.labels)}" if demand.labels else "no node"
    return [f"one {demand.role} takes {demand.cpus:g} CPU and {demand.gpus:g} GPU of one node, which {kind} has"]


def _has(labels: Labels, wanted: Labels) -> bool:
    return labels.items() >= wanted.items()
