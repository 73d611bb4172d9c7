"""What is measured: a row a step in `metrics.jsonl`, a row a checkpoint in `summary.json`."""

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from tpaw_ray.errors import RunError
from tpaw_ray.plain_json import NUMBER, misfit, parse_plain_json
from tpaw_ray.runs.store import RunStore

STORE_PAUSE_S = 30.0
"""Seconds between two writes of the run's rows to an object store."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step, averaged over its triplets.

    Rewards in nats × `reward_scale`, log-probabilities in nats, lengths in tokens. An update on targets alone has a loss in nats
    a target token, and null for all that speaks of generated responses and players.
    """

    iteration: int
    epoch: int
    step: int
    steps: int
    """Steps of the whole update."""
    triplets: int
    loss: float
    target_reward: float | None
    """Mean over players of `P_j(x, y)`."""
    generated_reward: float | None
    margin: float | None
    target_weight_share: float | None
    """Share of (triplet, player) with `α = η`."""
    players: list[int]
    player_weights: list[float]
    """Mean `β` of each of `players`."""
    target_logp: float
    generated_logp: float | None
    target_length: float
    generated_length: float | None
    newest_reward_max_abs: float | None
    """Largest `|P_t|` of the newest player, which is 0 at the first step."""
    grad_norm: float | None
    """Before clipping; null where DeepSpeed computes none."""
    learning_rate: float
    sequences: int
    """Sequences run forward and backward; a target that stands in several triplets runs once."""
    tokens: int
    """Their tokens, padding not included; a prompt that several sequences share counts once."""
    tokens_per_s: float
    seconds: float


_KINDS: dict[Any, Any] = {int: int, float: NUMBER, float | None: NUMBER | None, list[int]: [int], list[float]: [NUMBER]}
ROW = {field.name: _KINDS[field.type] for field in fields(StepMetrics)}
"""The shape of a line (`plain_json.misfit`)."""


class MetricsLog:
    """Step rows: the learner writes `iterations/…/learner/metrics.jsonl`, the driver copies them into the run's `metrics.jsonl`.

    The run's file grows by a line a step, and is made anew from the learner's before an update and after it. So the learner's
    must be whole; of the run's, in which a power cut may leave anything, lines that cannot be read are left out.
    """

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.path = store.path("metrics.jsonl")
        self._waiting = b""
        self._written_s = 0.0

    def append(self, rows: list[StepMetrics]) -> None:
        """Add rows to the run's file as they come; in an object store, which writes it anew, every half minute.

        Rows that a killed driver has not written are those of an unfinished update, or `settle` brings them.
        """
        self._waiting += "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()
        pause = STORE_PAUSE_S if self.store.scheme else 0.0
        if self._waiting and time.monotonic() - self._written_s >= pause:
            self.store.append_bytes(self.path, self._waiting)
            self._waiting, self._written_s = b"", time.monotonic()

    def write_update(self, iteration: int, rows: list[StepMetrics]) -> None:
        """The learner's own record of an update, written whole at its end."""
        self._write(f"{self.store.learner(iteration)}/metrics.jsonl", [asdict(row) for row in rows])

    def rows(self) -> list[dict[str, Any]]:
        """The run's rows so far, those of an update under way included."""
        found = []
        for line in self._lines(self.path):
            with suppress(ValueError):
                found.append(_row(line))
        return found

    def of_update(self, iteration: int) -> list[dict[str, Any]]:
        """The rows of a finished update.

        Raises:
            RunError: naming the line that is damaged.
        """
        path, found = f"{self.store.learner(iteration)}/metrics.jsonl", []
        for number, line in enumerate(self._lines(path), 1):
            try:
                found.append(_row(line))
            except ValueError as error:
                raise RunError(
                    f"{path}, line {number}: not a step's row ({error}); copy those of iteration {iteration} from {self.path}"
                ) from error
        return found

    def restart(self, iteration: int) -> None:
        """Drop the rows of an iteration, and of later ones, from the run's file."""
        self._waiting = b""
        self._write(self.path, [row for earlier in range(iteration) for row in self.of_update(earlier)])

    def settle(self, iteration: int) -> None:
        """Put the learner's record of an iteration into the run's file, in place of what a killed driver may have missed."""
        self.restart(iteration + 1)

    def _lines(self, path: str) -> list[bytes]:
        return self.store.read_bytes(path).splitlines() if self.store.exists(path) else []

    def _write(self, path: str, rows: list[dict[str, Any]]) -> None:
        self.store.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _row(line: bytes) -> dict[str, Any]:
    row: dict[str, Any] = parse_plain_json(line)
    if wrong := misfit(row, ROW):
        raise ValueError(wrong)
    return row
