"""A run's rows as trackers take them: a name and a number each, over the optimizer steps since the start of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tpaw_ray.runs.summary import Row

STEP_MARK = "train/loss"
"""In every entry of a step, and the last of its values: a tracker has a step when it has this."""
CHECKPOINT_MARK = "checkpoint/number"
"""In every entry of a checkpoint, and the last of its values."""
_PLAIN = (
    "iteration",
    "epoch",
    "target_reward",
    "generated_reward",
    "margin",
    "target_weight_share",
    "target_logp",
    "generated_logp",
    "target_length",
    "generated_length",
    "grad_norm",
    "learning_rate",
    "tokens_per_s",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What trackers are told at once, of an optimizer step or of an evaluated checkpoint."""

    step: int
    """Steps since the start of the run, all iterations together: the first step's entry is 1, checkpoint 0's is 0."""
    checkpoint: int | None
    """Null for a step."""
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Reached:
    """How much of a run a tracker has: the steps up to `steps` and the checkpoints up to `checkpoint`."""

    steps: int = 0
    checkpoint: int = -1

    def holds(self, entry: Entry) -> bool:
        """Whether an entry is there already.

        >>> [Reached(steps=3).holds(Entry(step=step, checkpoint=None, values={})) for step in (3, 4)]
        [True, False]
        """
        return entry.step <= self.steps if entry.checkpoint is None else entry.checkpoint <= self.checkpoint

    def after(self, entries: Sequence[Entry]) -> "Reached":
        """How much is there when these have come as well."""
        return Reached(
            steps=max([self.steps, *(entry.step for entry in entries if entry.checkpoint is None)]),
            checkpoint=max([self.checkpoint, *(entry.checkpoint for entry in entries if entry.checkpoint is not None)]),
        )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a tracker is told of a run when it opens."""

    id: str
    """Never that of another run, also where that has the same name. Example: `demo-3f2a9c1d`."""
    name: str
    project: str
    folder: Path
    """On this machine; for what a tracker writes to a disk."""
    config: dict[str, Any]
    """The resolved config, which holds no secrets, and under `environment` what the run is made on."""


class Tracker(Protocol):
    """A tool that keeps a run's rows. May raise whatever its tool raises: the run goes on (`follow.py`)."""

    @property
    def reached(self) -> Reached:
        """What an earlier driver has brought here. Asked once, when the tracker opens."""

    def log(self, entries: Sequence[Entry]) -> None:
        """Take entries, in order; none that it has."""

    def close(self) -> None:
        """Bring everything where it belongs."""


def of_step(row: Mapping[str, Any], before: int) -> Entry:
    """A row of `metrics.jsonl`; `before` steps were taken in earlier iterations. Player 0 is the newest of the team."""
    values = {f"train/{name}": float(row[name]) for name in _PLAIN if row[name] is not None}
    values |= {f"train/player_weight/{place}": float(beta) for place, beta in enumerate(row["player_weights"])}
    return Entry(step=before + row["step"] + 1, checkpoint=None, values=values | {STEP_MARK: float(row["loss"])})


def of_checkpoint(row: Row, before: int) -> Entry:
    """A row of `summary.json`; `before` steps made the checkpoint."""
    judged = {name: getattr(row, name) for name in ("accuracy", "target_logp", "target_reward", "margin")}
    values = {f"checkpoint/{name}": float(value) for name, value in judged.items() if value is not None}
    for name in ("seconds", "sequences", "tokens"):
        values |= {f"checkpoint/{name}/{stage}": float(count) for stage, count in getattr(row, name).items()}
    values |= {"checkpoint/warnings": float(len(row.warnings)), CHECKPOINT_MARK: float(row.checkpoint)}
    return Entry(step=before, checkpoint=row.checkpoint, values=values)
