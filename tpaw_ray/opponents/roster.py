"""Who hosts which checkpoint: the driver starts, asks and retires opponents here."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from tpaw_ray.errors import GenerationError, RunError
from tpaw_ray.opponents.ledger import Ledger
from tpaw_ray.opponents.messages import EngineSettings, Request, Response, Sampling, Seat
from tpaw_ray.opponents.opponent import Opponent
from tpaw_ray.placement import Demand, options_of
from tpaw_ray.plan import AHEAD, PORTIONS
from tpaw_ray.processes import beside_the_driver, model_process

WITHOUT_END = -1
"""Ray replaces a process that ended unasked (an engine broke down, a node is lost) and asks it again; the ledger ends that."""
MAX_CALLS = 1000
"""Calls an opponent holds at once; they share the engine's batch."""


class Roster:
    """The opponents at work, by checkpoint. Lives in the driver.

    Example::

        roster.host(0, "runs/demo/checkpoints/000", "runs/demo/checkpoints/000/committed.json")
        roster.wait_ready(0)
        responses = ask(roster.opponents(0), 0, requests, sampling)
        roster.retire(0)
    """

    kind: type = Opponent

    def __init__(self, settings: EngineSettings, engines: Demand) -> None:
        """`engines` are those of one checkpoint: how many, and what Ray sets aside for each, all its parts together."""
        self._settings = settings
        self._replicas = engines.number
        self._options: dict[str, Any] = {
            **options_of(engines),
            "max_restarts": WITHOUT_END,
            "max_task_retries": WITHOUT_END,
            "max_concurrency": MAX_CALLS,
            "runtime_env": model_process(engines.gpus),
        }
        self._hosted: dict[int, list[ActorHandle[Opponent]]] = {}
        self._ledger: Any = None

    @property
    def hosted(self) -> tuple[int, ...]:
        """The checkpoints that have opponents, in the order in which they came."""
        return tuple(self._hosted)

    def host(self, checkpoint: int, path: str, ready_file: str) -> None:
        """Start a checkpoint's opponents and return at once; they load `path` when `ready_file` exists.

        A checkpoint that is hosted already is left alone.
        """
        if checkpoint in self._hosted:
            return
        actor: Any = ray.remote(self.kind).options(**self._options)
        self._hosted[checkpoint] = [
            actor.remote(
                self._settings, Seat(checkpoint=checkpoint, replica=replica, path=path, ready_file=ready_file), self.ledger
            )
            for replica in range(self._replicas)
        ]

    @property
    def ledger(self) -> Any:
        """The actor that knows what engines held when they died; it starts with the first opponent."""
        if self._ledger is None:
            self._ledger = ray.remote(Ledger).options(**beside_the_driver()).remote()
        return self._ledger

    def expect(self, checkpoint: int, most_set_aside: int) -> None:
        """Say how many prompts of a checkpoint may be left out because they end its engines; more end the run."""
        self.ledger.expect.remote(checkpoint, most_set_aside)

    def opponents(self, checkpoint: int) -> list[ActorHandle[Opponent]]:
        """The handles of a checkpoint's replicas.

        Raises:
            RunError: when the checkpoint is not hosted.
        """
        if checkpoint not in self._hosted:
            raise RunError(f"checkpoint {checkpoint} has no opponent; hosted: {', '.join(map(str, self._hosted)) or 'none'}")
        return list(self._hosted[checkpoint])

    def wait_ready(self, checkpoint: int) -> None:
        """Wait until all replicas of a checkpoint can answer. One that cannot start ends them all.

        Raises:
            CheckpointError: when the checkpoint's folder is missing or incomplete.
            GenerationError: when an engine could not start, with its reason.
            RunError: when the checkpoint is not hosted.
        """
        try:
            _get([opponent.ready.remote() for opponent in self.opponents(checkpoint)])
        except Exception:
            self.retire(checkpoint)
            raise

    def retire(self, checkpoint: int) -> None:
        """End a checkpoint's opponents and give back what they held; nothing happens where there are none."""
        for opponent in self._hosted.pop(checkpoint, []):
            ray.kill(opponent)

    def retire_all(self) -> None:
        """End every opponent."""
        for checkpoint in self.hosted:
            self.retire(checkpoint)
        if self._ledger is not None:
            ray.kill(self._ledger)
            self._ledger = None


def ask(
    handles: Sequence[ActorHandle[Opponent]], shard_index: int, requests: Sequence[Request], sampling: Sampling
) -> list[Response]:
    """Have a checkpoint's replicas answer a shard together; the responses come in the order of the requests.

    Each replica begins with the same part of the shard; the rest goes in portions to whoever is done first, so that a slow one
    holds nobody up. The shard's index decides who begins with the odd ones. Which replica answers does not change a response.

    Raises:
        GenerationError: when a prompt cannot be answered, or an opponent is gone for good.
    """
    replicas = len(handles)
    number = min(len(requests), PORTIONS * replicas if replicas > 1 else 1)
    portions = deque((first, list(requests[first::number])) for first in range(number))
    asked: dict[Any, tuple[int, ActorHandle[Opponent]]] = {}
    answers: dict[int, list[Response]] = {}

    def give(handle: ActorHandle[Opponent]) -> None:
        if portions:
            first, portion = portions.popleft()
            asked[handle.generate.remote(portion, sampling)] = (first, handle)

    for turn in range(AHEAD * replicas):
        give(handles[(turn + shard_index) % replicas])
    while asked:
        (done, *_), _ = ray.wait(list(asked), num_returns=1)
        first, handle = asked.pop(done)
        (answers[first],) = _get([done])
        give(handle)
    return [answers[index % number][index // number] for index in range(len(requests))]


def _get(references: list[Any]) -> list[Any]:
    """Wait for actor calls; an error comes as what was raised there, without the traceback of another process."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise GenerationError(f"an opponent is gone for good: {error}") from error
