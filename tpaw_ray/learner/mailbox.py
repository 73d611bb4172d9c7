"""A Ray actor between the driver and the workers of the learner."""

import asyncio
from dataclasses import dataclass, field

from tpaw_ray.errors import TpawError
from tpaw_ray.runs.metrics import StepMetrics


@dataclass(kw_only=True)
class News:
    """What workers said since the driver last asked."""

    rows: list[StepMetrics] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """For the user to read."""
    failure: TpawError | None = None
    """Why the update cannot succeed, however often it is tried."""


class Mailbox:
    """Orders one way, step metrics the other."""

    def __init__(self) -> None:
        self._order = -1
        self._open = True
        self._changed = asyncio.Condition()
        self._news = News()

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
        self._news.rows.append(row)

    async def remark(self, text: str) -> None:
        """Say something to the user."""
        self._news.remarks.append(text)

    async def give_up(self, reason: TpawError) -> None:
        """Say that the update cannot succeed, however often it is tried."""
        self._news.failure = reason

    async def collect(self) -> News:
        """What came in since the last call; a failure stays."""
        news, self._news = self._news, News(failure=self._news.failure)
        return news
