"""The driver's side of the learner: one Ray Train worker group for the whole run, which takes an order an iteration.

Starting a group, importing torch and DeepSpeed takes longer than a small update, so the group starts once, while the
first checkpoint is evaluated, and waits for orders in between; it holds no model while it waits.
"""

from collections.abc import Callable
from threading import Event
from typing import Any

import ray

from tpaw_ray.config import Config
from tpaw_ray.errors import LearnerError
from tpaw_ray.learner.mailbox import Mailbox, News
from tpaw_ray.processes import beside_the_driver
from tpaw_ray.runs.store import RunStore


class Group:
    """A Ray actor in which Ray Train's `fit` runs: the driver keeps no thread inside Ray, and ending the actor ends the group."""

    def fit(self, config: Config, store: RunStore, mailbox: Any) -> str:
        """Run the worker group until its mailbox is closed; returns why it failed, empty when it did not."""
        from tpaw_ray.learner.trainer import run_group

        return run_group(config, store, mailbox)


class Learner:
    """Starts the worker group at once; `update` orders an iteration and waits for its checkpoint."""

    def __init__(self, config: Config, store: RunStore) -> None:
        self.store = store
        self.mailbox: Any = ray.remote(Mailbox).options(**beside_the_driver()).remote()
        group: Any = ray.remote(Group).options(**beside_the_driver())
        self.group = group.remote()
        self._failure = self.group.fit.remote(config, store, self.mailbox)
        self._broken_off = Event()

    def update(self, iteration: int, on_news: Callable[[News], None]) -> None:
        """Have `θ_{t+1}` made from the committed pairs of an iteration; `on_news` gets the metrics of steps as they end.

        After a worker's death steps are taken again, and their metrics come again.

        Raises:
            LearnerError: when the workers gave up, the group has ended, with the reason, or the update was broken off.
            RunError: when the checkpoint cannot be written.
        """
        ray.get(self.mailbox.post.remote(iteration))
        checkpoint = self.store.checkpoint(iteration + 1)
        while not self.store.is_committed(checkpoint):
            ended, _ = ray.wait([self._failure], timeout=0)
            self._collect(on_news)
            if ended and not self.store.is_committed(checkpoint):
                raise LearnerError(f"iteration {iteration}: the learner ended without its checkpoint: {self._reason()}")
            if self._broken_off.wait(self.store.poll_s):
                raise LearnerError(f"iteration {iteration}: the update was broken off")
        self._collect(on_news)

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

    def _collect(self, on_news: Callable[[News], None]) -> None:
        try:
            news = ray.get(self.mailbox.collect.remote())
        except ray.exceptions.RayActorError as error:
            raise LearnerError(f"the process between driver and learner has ended: {error}") from error
        on_news(news)
        if news.failure:
            raise news.failure

    def _reason(self) -> str:
        try:
            return str(ray.get(self._failure))
        except ray.exceptions.RayActorError as error:
            return f"its process ended: {error}"
