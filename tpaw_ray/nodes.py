"""The nodes of a run's cluster: which there are, waiting for those that are to come, seeing that they stay."""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import ray

from tpaw_ray.errors import ResourceError
from tpaw_ray.placement import Demand, Node, unmet
from tpaw_ray.processes import interrupt

LOOK_S = 5.0


def cluster_nodes() -> list[Node]:
    """The nodes that are alive now."""
    return [Node(labels=node["Labels"] or {}, resources=node["Resources"]) for node in ray.nodes() if node["Alive"]]


def check_nodes(needed: Sequence[Demand]) -> None:
    """Refuse to begin what the cluster cannot hold.

    Raises:
        ResourceError: with what is missing.
    """
    if missing := unmet(needed, cluster_nodes()):
        raise ResourceError(missing)


def wait_for_nodes(needed: Sequence[Demand], minutes: float, say: Callable[[str], object]) -> None:
    """Return when the cluster has what is needed; an autoscaler is asked for it.

    Raises:
        ResourceError: with what is missing after so many minutes.
    """
    from ray.autoscaler.sdk import request_resources

    if not (missing := unmet(needed, cluster_nodes())):
        return
    deadline = time.monotonic() + 60 * minutes
    if minutes:
        say(f"waiting up to {minutes:g} minutes for nodes: {missing}")
    each = [(demand.each, dict(demand.labels)) for demand in needed for _ in range(demand.number)]
    try:
        while missing := unmet(needed, cluster_nodes()):
            if time.monotonic() >= deadline:
                raise ResourceError(missing + (f" (waited {minutes:g} minutes for them)" if minutes else ""))
            # Asked for anew each time: there is one request in a cluster, and a run beside this one may have withdrawn it.
            request_resources(bundles=[dict(bundle) for bundle, _ in each], bundle_label_selectors=[labels for _, labels in each])
            time.sleep(min(LOOK_S, 1.0))
    finally:
        if minutes:
            request_resources(bundles=[])  # what the actors take holds their nodes from here on


class NodeWatch:
    """Sees, in a `with` block, that the cluster keeps what a run needs at the time; Ray by itself waits for it in silence.

    Raises:
        ResourceError: at the end of the block, which is interrupted, when something was missing for longer than the limit.
    """

    def __init__(
        self,
        needed: Callable[[], Sequence[Demand]],
        minutes: float,
        say: Callable[[str], object],
        *,
        nodes: Callable[[], Sequence[Node]] = cluster_nodes,
        look_s: float = LOOK_S,
    ) -> None:
        self._needed, self._minutes, self._say, self._nodes, self._look_s = needed, minutes, say, nodes, look_s
        self._over = threading.Event()
        self._missing = ""
        self._looking = threading.Thread(target=self._look, name="nodes", daemon=True)

    def __enter__(self) -> "NodeWatch":
        self._watched_thread = threading.get_ident()
        self._looking.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._looking.join(timeout=self._look_s)
        if self._missing:
            raise ResourceError(f"a node is gone: {self._missing}; the same command goes on when it is back")

    def _look(self) -> None:
        since, told = None, ""
        while not self._over.wait(self._look_s):
            try:
                nodes = self._nodes()
            except Exception as error:  # Ray's and bare ones: its head does not answer, which is not yet a node that is gone
                if told != "head":
                    self._say(f"the cluster's nodes cannot be listed: {error}")
                    told = "head"
                continue
            missing = unmet(self._needed(), nodes)
            if not missing:
                since = None
                continue
            since = time.monotonic() if since is None else since
            if time.monotonic() - since >= 60 * self._minutes:
                self._missing = missing
                interrupt(self._watched_thread)
                return
            if missing != told:
                self._say(f"waiting up to {self._minutes:g} minutes for nodes: {missing}")
                told = missing
