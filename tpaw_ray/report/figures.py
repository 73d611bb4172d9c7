"""A run's figures, gathered from what its stages committed: accuracy, steps, seconds, settings, where it was made."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from typing import Any

from tpaw_ray.config import Config, dump_config
from tpaw_ray.errors import RunError
from tpaw_ray.evaluation.statistics import Interval, Paired, compare, proportion_interval
from tpaw_ray.methods import method_of
from tpaw_ray.plain_json import NUMBER
from tpaw_ray.runs.continuation import started_config
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.store import MARKER, RunStore
from tpaw_ray.runs.summary import STAGES, Row, Summary
from tpaw_ray.schema import Answer

POINTS = 1200
"""Points of a curve; of a run with more steps, each is the mean of several in a row."""
CURVES = (
    "loss",
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
)
"""The columns of `metrics.jsonl` that are drawn."""
Facts = tuple[tuple[str, str], ...]
"""Names and what they stand for, in the order in which a person reads them."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A row of the summary, and how sure its accuracy is."""

    row: Row
    judged: int
    """Held-out answers that have a reference answer."""
    interval: Interval | None
    """Wilson's 95 % interval of the accuracy; null where nothing was judged."""
    gain: Paired | None
    """Accuracy less the start's, paired by prompt; null for the start, and where nothing was judged."""
    gain_interval: Interval | None
    """Of the gain, 95 %, and no wider than two shares can differ."""
    waited: dict[str, float]
    """Seconds of each stage in which it waited for another one or for an engine to start."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Step metrics along the whole run. All sequences are as long as `steps`; null is what a step did not measure."""

    steps: tuple[int, ...]
    """Optimizer steps since the start of the run; of several steps in one point, the first."""
    per_point: int
    """Steps in a point."""
    iterations: tuple[tuple[int, int], ...]
    """Each iteration and its first step."""
    last: int
    """Steps of the run so far."""
    values: dict[str, tuple[float | None, ...]]
    """By column of `metrics.jsonl`."""
    player_weights: dict[int, tuple[float | None, ...]]
    """Mean `β` by player."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """What a report shows of a run, but for its samples."""

    name: str
    root: str
    method: Facts
    """Its name, and the settings of the equations."""
    planned: int
    """Iterations that the config asks for."""
    ended: float | None
    """When the last stage was committed, Unix time."""
    data: Facts
    """Rows that were read and what became of them."""
    checkpoints: tuple[Checkpoint, ...]
    curves: Curves
    config: str
    """The resolved config as YAML."""
    environment: dict[str, Facts]
    """`environment.json` by topic; empty where it is not written yet."""

    @property
    def done(self) -> int:
        """Iterations whose checkpoint is evaluated."""
        return max((checkpoint.row.checkpoint for checkpoint in self.checkpoints), default=0)

    @property
    def finished(self) -> bool:
        return bool(self.checkpoints) and self.done >= self.planned


def gather_run(store: RunStore) -> RunFigures:
    """Read a run's committed files.

    Raises:
        RunError: when there is no run, or a file of it is damaged.
        ConfigError: when this version does not take its config.
    """
    if not store.exists(store.path("config.yaml")):
        raise RunError(f"{store.root}: found neither config.yaml nor experiment.json; expected a run's or an experiment's folder")
    config = started_config(store)
    found = {row.checkpoint: row for row in Summary(config, store).rows()}
    starts = _verdicts(store, 0) if 0 in found else {}
    return RunFigures(
        name=config.run.name,
        root=store.root,
        method=_method(config),
        planned=config.iterations,
        ended=_ended(store, found),
        data=_data(store),
        checkpoints=tuple(_checkpoint(store, row, starts) for row in found.values()),
        curves=curves_of(MetricsLog(store).rows()),
        config=dump_config(config),
        environment=_environment(store),
    )


LEARNS_FROM = {
    "replay": "own answers, replayed",
    "fresh": "own answers, fresh",
    "given": "given preferences",
    "none": "targets alone",
}
"""`team.data` as a person reads it."""


def _method(config: Config) -> Facts:
    facts = [("method", method_of(config)), ("learns from", LEARNS_FROM[config.team.data])]
    if config.team.data != "none":
        facts += [
            ("team size K", str(config.team.size)),
            ("team", config.team.select),
            ("rounds", str(config.window)),
            ("η", _number(config.objective.eta)),
            ("γ", _number(config.objective.gamma)),
            ("λ", _number(config.objective.reward_scale)),
        ]
    return (
        *facts,
        ("learning rate", _number(config.learner.learning_rate)),
        ("global batch", str(config.learner.global_batch)),
        ("epochs", str(config.learner.epochs)),
    )


def _number(value: float | Sequence[float]) -> str:
    return f"{value:g}" if isinstance(value, int | float) else ", ".join(f"{one:g}" for one in value)


def _checkpoint(store: RunStore, row: Row, starts: dict[str, bool]) -> Checkpoint:
    verdicts = _verdicts(store, row.checkpoint)
    both = sorted(verdicts.keys() & starts.keys()) if row.checkpoint else []
    waited = {"evaluate": _waited(store, store.evaluation(row.checkpoint))}
    if row.checkpoint:
        waited["score"] = _waited(store, f"{store.iteration(row.checkpoint - 1)}/scores")
    gain = compare([float(verdicts[one]) for one in both], [float(starts[one]) for one in both]) if both else None
    return Checkpoint(
        row=row,
        judged=len(verdicts),
        interval=proportion_interval(sum(verdicts.values()), len(verdicts)),
        gain=gain,
        gain_interval=gain.interval.within(-1.0, 1.0) if gain and gain.interval else None,
        waited={stage: round(waited.get(stage, 0.0), 3) for stage in STAGES},
    )


def _verdicts(store: RunStore, checkpoint: int) -> dict[str, bool]:
    """Whether each judged answer of a checkpoint is correct, by prompt."""
    found: dict[str, bool | None] = {}
    for path in store.files(f"{store.evaluation(checkpoint)}/answers"):
        table = store.read_columns(path, Answer, "prompt_id", "correct")
        found.update(zip(table["prompt_id"].to_pylist(), table["correct"].to_pylist(), strict=True))
    return {prompt: correct for prompt, correct in found.items() if correct is not None}


def _waited(store: RunStore, stage: str) -> float:
    counts = store.counts(stage)
    return min(float(counts.get("waited", 0.0)), float(counts["seconds"]))


def _ended(store: RunStore, checkpoints: Iterable[int]) -> float | None:
    markers = [store.read_json(f"{store.evaluation(number)}/{MARKER}", {"ended": NUMBER}) for number in checkpoints]
    return max((float(marker["ended"]) for marker in markers), default=None)


def _data(store: RunStore) -> Facts:
    prompts = store.path("prompts")
    if not store.is_committed(prompts):
        return ()
    return tuple(
        (name.replace("_", " "), f"{count:,}") for name, count in store.counts(prompts).items() if isinstance(count, int)
    )


def _environment(store: RunStore) -> dict[str, Facts]:
    path = store.path("environment.json")
    if not store.exists(path):
        return {}
    content = store.read_json(path, dict)
    topics: dict[str, list[tuple[str, str]]] = {"source": [], "machine": []}
    for name, value in content.items():
        if isinstance(value, dict):
            topics[name] = [_fact(str(key), inner) for key, inner in value.items()]
        else:
            topics["source" if name in ("commit", "seed", "python") else "machine"].append(_fact(str(name), value))
    return {name: tuple(facts) for name, facts in topics.items() if facts}


def _fact(name: str, value: object) -> tuple[str, str]:
    told = name.replace("_", " ").replace(" gib", ", GiB")
    if value is None:
        return told, "unknown"
    if isinstance(value, float) and name.endswith("memory"):  # Ray counts bytes
        return f"{told}, GiB", f"{value / 2**30:,.1f}"
    return told, f"{value:,g}" if isinstance(value, float) else str(value)


# Curves.


def curves_of(rows: Sequence[dict[str, Any]], points: int = POINTS) -> Curves:
    """Rows of `metrics.jsonl` as curves of at most some `points` points; a point never mixes two iterations.

    Means are over the triplets of a point's steps.
    """
    per_point = max(1, -(-len(rows) // points))
    groups: list[tuple[int, list[dict[str, Any]]]] = []
    iterations, step = [], 0
    for iteration, of_iteration in groupby(rows, key=lambda row: row["iteration"]):
        its_rows = list(of_iteration)
        iterations.append((int(iteration), step))
        groups += [(step + first, its_rows[first : first + per_point]) for first in range(0, len(its_rows), per_point)]
        step += len(its_rows)
    players = sorted({int(player) for row in rows for player in row["players"]})
    return Curves(
        steps=tuple(first for first, _ in groups),
        per_point=per_point,
        iterations=tuple(iterations),
        last=step,
        values={name: tuple(_mean([(row.get(name), row) for row in group]) for _, group in groups) for name in CURVES},
        player_weights={
            player: tuple(_mean([(_weight(row, player), row) for row in group]) for _, group in groups) for player in players
        },
    )


def _weight(row: dict[str, Any], player: int) -> float | None:
    return dict(zip(row["players"], row["player_weights"], strict=True)).get(player)


def _mean(measured: Sequence[tuple[float | None, dict[str, Any]]]) -> float | None:
    found = [(value, row["triplets"]) for value, row in measured if value is not None and isfinite(value)]
    return sum(value * weight for value, weight in found) / sum(weight for _, weight in found) if found else None
