"""A Ray actor between the driver and the workers of the learner."""

import asyncio

from tpaw_ray.errors import TpawError
from tpaw_ray.runs.metrics import StepMetrics


class Mailbox:
    """Orders one way, step metrics the other."""

    def __init__(self) -> None:
        self._order = -1
        self._open = True
        self._changed = asyncio.Condition()
        self._rows: list[StepMetrics] = []
        self._failure: TpawError | None = None

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

    async def give_up(self, reason: TpawError) -> None:
        """Say that the update cannot succeed, however often it is tried."""
        self._failure = reason

    async def collect(self) -> tuple[list[StepMetrics], TpawError | None]:
        """The rows reported since the last call, and why the workers gave up, if they did."""
        rows, self._rows = self._rows, []
        return rows, self._failure
