"""What is measured: a row a step in `metrics.jsonl`, a row a checkpoint in `summary.json`."""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

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


class MetricsLog:
    """Step rows: the learner writes `iterations/…/learner/metrics.jsonl`, the driver copies them into the run's `metrics.jsonl`.

    The run's file grows by a line a step; rows of an update that is done again are dropped before it starts.
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

    def of_update(self, iteration: int) -> list[dict[str, Any]]:
        """The rows of a finished update."""
        return self._read(f"{self.store.learner(iteration)}/metrics.jsonl")

    def restart(self, iteration: int) -> None:
        """Drop the rows of an iteration, and of later ones, from the run's file."""
        self._waiting = b""
        self._write(self.path, [row for row in self._read(self.path) if row["iteration"] < iteration])

    def settle(self, iteration: int) -> None:
        """Put the learner's record of an iteration into the run's file, in place of what a killed driver may have missed."""
        self._waiting = b""
        earlier = [row for row in self._read(self.path) if row["iteration"] < iteration]
        self._write(self.path, earlier + self.of_update(iteration))

    def _read(self, path: str) -> list[dict[str, Any]]:
        if not self.store.exists(path):
            return []
        lines = self.store.read_bytes(path).decode().split("\n")[:-1]  # a line cut short by a kill is left out
        return [json.loads(line) for line in lines]

    def _write(self, path: str, rows: list[dict[str, Any]]) -> None:
        self.store.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
