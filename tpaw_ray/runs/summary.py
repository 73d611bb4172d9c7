"""`summary.json`: one row a checkpoint, made only of what stages committed, so that a continued run has the same rows."""

from dataclasses import asdict, dataclass
from typing import Any

from tpaw_ray.config import Config
from tpaw_ray.errors import RunError
from tpaw_ray.runs.health import NOTHING, Said, warnings_of
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.teams import Teams

STAGES = ("generate", "score", "update", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A checkpoint, and the iteration that made it. Row 0 is the start: it has no update, so no rewards."""

    checkpoint: int
    accuracy: float | None
    """Share of held-out answers that match; null where the data has no final answer."""
    target_logp: float | None
    """Mean summed log-probability of held-out targets, in nats."""
    target_reward: float | None
    """Mean over players and over the last epoch's triplets of the update; null where it learnt from targets alone."""
    margin: float | None
    warnings: list[str]
    """What looks wrong in the iteration (`health.py`); empty when all is well."""
    seconds: dict[str, float]
    sequences: dict[str, int]
    tokens: dict[str, int]
    """Run through a model by each stage, prompts included (in the update, a prompt that sequences share once), padding not."""


class Summary:
    """Reads committed stages into rows."""

    def __init__(self, config: Config, store: RunStore) -> None:
        self.config = config
        self.store = store
        self.teams = Teams(config, store)

    def row(self, checkpoint: int) -> Row:
        """The row of an evaluated checkpoint."""
        stages = {"evaluate": [self.store.evaluation(checkpoint)]}
        if checkpoint:
            made = checkpoint - 1
            stages["generate"] = self._new_rollouts(made)
            stages["score"] = [f"{self.store.iteration(made)}/scores"]
            stages["update"] = [self.store.learner(made)]
        counts = {stage: [self.store.counts(path) for path in stages.get(stage, [])] for stage in STAGES}
        rewards = self._rewards(checkpoint - 1) if checkpoint else {"target_reward": None, "margin": None}
        return Row(
            checkpoint=checkpoint,
            accuracy=counts["evaluate"][0]["accuracy"],
            target_logp=counts["evaluate"][0]["target_logp"],
            warnings=self.warnings(checkpoint - 1) if checkpoint else [],
            seconds={stage: round(sum(count["seconds"] for count in counts[stage]), 3) for stage in STAGES},
            sequences={stage: sum(count["sequences"] for count in counts[stage]) for stage in STAGES},
            tokens={stage: sum(count["tokens"] for count in counts[stage]) for stage in STAGES},
            **rewards,
        )

    def warnings(self, iteration: int) -> list[str]:
        """What looks wrong in an iteration whose update is done."""
        return warnings_of(self._steps(iteration), self._said(iteration), self._said(iteration - 1), self.config.warnings)

    def rows(self) -> list[Row]:
        """The rows of all evaluated checkpoints of the configured iterations."""
        return [self.row(number) for number in range(self.config.iterations + 1) if self._evaluated(number)]

    def write(self) -> None:
        self.store.write_json(self.store.path("summary.json"), {"iterations": [asdict(row) for row in self.rows()]})

    def line(self, checkpoint: int) -> str:
        """One line for a person."""
        row = self.row(checkpoint)
        cells = zip(COLUMNS, cells_of(row), strict=True)
        return "  ".join(f"{name} {cell}" for name, cell in cells)

    def _evaluated(self, checkpoint: int) -> bool:
        return self.store.is_committed(self.store.evaluation(checkpoint))

    def _new_rollouts(self, iteration: int) -> list[str]:
        rollouts = self.teams.rollouts(iteration)
        return [self.store.rollout(rollout) for rollout in rollouts if rollout.iteration == iteration]

    def _said(self, iteration: int) -> Said:
        said = NOTHING
        for counts in map(self.store.counts, self._new_rollouts(iteration) if iteration >= 0 else []):
            if "empty" in counts:  # a run that an earlier version began did not count them
                without = tuple(counts.get("set_aside", "").split())
                said += Said(
                    sequences=counts["sequences"] - len(without),
                    empty=counts["empty"],
                    cut_off=counts["cut_off"],
                    tokens=counts["generated"],
                    set_aside=without,
                )
        return said

    def _steps(self, iteration: int) -> list[dict[str, Any]]:
        rows = MetricsLog(self.store).of_update(iteration)
        if not rows:
            raise RunError(f"{self.store.learner(iteration)}/metrics.jsonl: the run is damaged there (no rows)")
        return rows

    def _rewards(self, iteration: int) -> dict[str, Any]:
        rows = self._steps(iteration)
        last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
        triplets = sum(row["triplets"] for row in last)
        if last[0]["target_reward"] is None:  # an update on targets alone
            return {"target_reward": None, "margin": None}
        return {key: sum(row[key] * row["triplets"] for row in last) / triplets for key in ("target_reward", "margin")}


COLUMNS = ("checkpoint", "accuracy", "target logp", "target reward", "margin", "seconds")


def cells_of(row: Row) -> list[str]:
    """A row as a person reads it, in the order of `COLUMNS`."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        f"{row.checkpoint:03d}",
        number(row.accuracy, ".3f"),
        number(row.target_logp, ".3f"),
        number(row.target_reward, "+.4f"),
        number(row.margin, "+.4f"),
        f"{sum(row.seconds.values()):.0f}",
    ]
