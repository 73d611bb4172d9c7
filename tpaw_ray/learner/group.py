"""The driver's side of the learner: one Ray Train worker group for the whole run, which takes an order an iteration.

Starting a group, importing torch and DeepSpeed takes longer than a small update, so the group starts once, while the
first checkpoint is evaluated, and waits for orders in between; it holds no model while it waits.
"""

import asyncio
from collections.abc import Callable
from threading import Event
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from tpaw_ray.config import Config
from tpaw_ray.errors import LearnerError
from tpaw_ray.runs.metrics import StepMetrics
from tpaw_ray.runs.store import RunStore


class Mailbox:
    """A Ray actor between driver and workers: orders one way, step metrics the other."""

    def __init__(self) -> None:
        self._order = -1
        self._open = True
        self._changed = asyncio.Condition()
        self._rows: list[StepMetrics] = []
        self._failure = ""

    async def post(self, iteration: int) -> None:
        """Order the update of an iteration."""
        async with self._changed:
            self._order = iteration
            self._changed.notify_all()

    async def close(self) -> None:
        """Send the workers home once they are done."""
        async with self._changed:
            self._open = False
            self._changed.notify_all()

    async def next_order(self, done: int) -> int | None:
        """Wait for an iteration later than `done`; None when there will be no more. A restarted worker passes -1."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._order > done or not self._open)
        return self._order if self._order > done else None

    async def report(self, row: StepMetrics) -> None:
        self._rows.append(row)

    async def give_up(self, reason: str) -> None:
        """Say that the update cannot succeed, however often it is tried."""
        self._failure = reason

    async def collect(self) -> tuple[list[StepMetrics], str]:
        """The rows reported since the last call, and why the workers gave up, if they did."""
        rows, self._rows = self._rows, []
        return rows, self._failure


class Group:
    """A Ray actor in which Ray Train's `fit` runs: the driver keeps no thread inside Ray, and ending the actor ends the group."""

    def fit(self, config: Config, store: RunStore, mailbox: Any) -> str:
        """Run the worker group until its mailbox is closed; returns why it failed, empty when it did not."""
        try:
            make_trainer(config, store, mailbox).fit()
        except Exception as error:  # Ray Train's own errors, which carry those of the workers
            causes = getattr(error, "worker_failures", None) or {}
            return "; ".join(f"worker {rank}: {cause}" for rank, cause in causes.items()) or str(error)
        return ""


class Learner:
    """Starts the worker group at once; `update` orders an iteration and waits for its checkpoint."""

    def __init__(self, config: Config, store: RunStore) -> None:
        self.store = store
        self.mailbox: Any = ray.remote(Mailbox).options(num_cpus=0).remote()
        group: Any = ray.remote(Group).options(num_cpus=0)
        self.group = group.remote()
        self._failure = self.group.fit.remote(config, store, self.mailbox)
        self._broken_off = Event()

    def update(self, iteration: int, on_rows: Callable[[list[StepMetrics]], None]) -> None:
        """Have `θ_{t+1}` made from the committed pairs of an iteration; `on_rows` gets the metrics of steps as they end.

        Raises:
            LearnerError: when the workers gave up, the group has ended, with the reason, or the update was broken off.
        """
        ray.get(self.mailbox.post.remote(iteration))
        checkpoint = self.store.checkpoint(iteration + 1)
        while not self.store.is_committed(checkpoint):
            ended, _ = ray.wait([self._failure], timeout=0)
            self._collect(on_rows)
            if ended and not self.store.is_committed(checkpoint):
                raise LearnerError(f"iteration {iteration}: the learner ended without its checkpoint: {self._reason()}")
            if self._broken_off.wait(0.1):
                raise LearnerError(f"iteration {iteration}: the update was broken off")
        self._collect(on_rows)

    def break_off(self) -> None:
        """End the group, whatever it does, and an `update` in another thread with it."""
        self._broken_off.set()
        ray.kill(self.group)

    def close(self) -> None:
        """Send the workers home and wait until the group has ended. Call it only when no order is under way."""
        ray.get(self.mailbox.close.remote())
        self._reason()
        ray.kill(self.group)
        ray.kill(self.mailbox)

    def _collect(self, on_rows: Callable[[list[StepMetrics]], None]) -> None:
        rows, failure = ray.get(self.mailbox.collect.remote())
        on_rows(rows)
        if failure:
            raise LearnerError(failure)

    def _reason(self) -> str:
        try:
            return str(ray.get(self._failure))
        except ray.exceptions.RayActorError as error:
            return f"its process ended: {error}"


def make_trainer(config: Config, store: RunStore, mailbox: Any) -> TorchTrainer:
    """The Ray Train group of the config's size, on GPUs (NCCL) or CPUs (Gloo)."""
    learner = config.learner
    resources = {"CPU": learner.cpus} | ({"GPU": learner.gpus} if learner.gpus else {})
    return TorchTrainer(
        train_loop,
        train_loop_config={"config": config, "store": store, "mailbox": mailbox},
        torch_config=TorchConfig(backend="nccl" if learner.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=learner.workers, use_gpu=bool(learner.gpus), resources_per_worker=resources),
        run_config=RunConfig(
            name="learner",
            storage_path=store.path("ray_train"),
            failure_config=FailureConfig(max_failures=learner.max_restarts),
        ),
    )


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs on a worker. Heavy imports happen here, after the process knows its accelerator and threads."""
    import os

    config: Config = settings["config"]
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if config.learner.gpus else "cpu")
    # Threads that spin while they wait starve the other processes of a machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("LOCAL_SIZE", str(ray.train.get_context().get_local_world_size()))

    from tpaw_ray.learner.worker import work

    work(config, settings["store"], settings["mailbox"])
