"""What is measured: a row a step in `metrics.jsonl`, a row a checkpoint in `summary.json`."""

import json
from dataclasses import asdict, dataclass

from tpaw_ray.runs.store import RunStore


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step, averaged over its triplets. Rewards in nats × `reward_scale`, log-probabilities in nats, lengths in tokens."""

    iteration: int
    epoch: int
    step: int
    steps: int
    """Steps of the whole update."""
    triplets: int
    loss: float
    target_reward: float
    """Mean over players of `P_j(x, y)`."""
    generated_reward: float
    margin: float
    target_weight_share: float
    """Share of (triplet, player) with `α = η`."""
    players: list[int]
    player_weights: list[float]
    """Mean `β` of each of `players`."""
    target_logp: float
    generated_logp: float
    target_length: float
    generated_length: float
    newest_reward_max_abs: float
    """Largest `|P_t|` of the newest player, which is 0 at the first step."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens_per_s: float
    seconds: float


class MetricsLog:
    """`metrics.jsonl`: grows by one line a step; rows of an update that is done again are dropped before it starts."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.path = store.path("metrics.jsonl")

    def append(self, rows: list[StepMetrics]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)

    def rows(self) -> list[dict]:  # type: ignore[type-arg]
        """Every whole line; one cut short by a kill is left out."""
        if not self.store.exists(self.path):
            return []
        lines = self.store.read_bytes(self.path).decode().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def restart(self, iteration: int) -> None:
        """Drop the rows of an iteration, and of later ones, that never committed."""
        kept = [row for row in self.rows() if row["iteration"] < iteration]
        self.store.write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
