"""Where a run is, from its folder alone: for `tpaw status` on any machine that sees the storage."""

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from tpaw_ray.config import Config
from tpaw_ray.errors import RunError
from tpaw_ray.plain_json import NUMBER
from tpaw_ray.runs.claim import LEASE_S, Holder, holder_of
from tpaw_ray.runs.continuation import started_config
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.store import MARKER, RunStore
from tpaw_ray.runs.teams import Teams

RECENT = 3
"""Iterations whose time tells of those to come: teams have grown by then."""


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """A stage of the iteration under way; `done` of `total` shards, of the update steps. `total` is 0 where it is not known."""

    name: str
    committed: bool
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run is. `iteration` is the first that is not committed, equal to `iterations` when all are."""

    run: str
    iteration: int
    iterations: int
    stages: tuple[StageStatus, ...]
    driver: Holder | None
    driver_silent_s: float | None
    """Seconds since the driver last renewed its claim; null without one, or where it is known to have died."""
    seconds_left: float | None
    """From the iterations so far; null before the first is done."""


def status_of(store: RunStore) -> Status:
    """Where a run is.

    Raises:
        RunError: when there is no run, or its files are damaged.
    """
    if not store.exists(store.path("config.yaml")):
        raise RunError(f"{store.root}: no run lies there (no config.yaml); expected the folder of a run, as in runs/demo")
    config = started_config(store)
    iteration = next((t for t in range(config.iterations) if not store.is_committed(store.iteration(t))), config.iterations)
    driver = holder_of(store)
    return Status(
        run=store.root,
        iteration=iteration,
        iterations=config.iterations,
        stages=_stages(config, store, iteration) if iteration < config.iterations else (),
        driver=driver,
        driver_silent_s=None if driver is None or driver.is_dead() else time.time() - store.changed_at(store.path("driver.json")),
        seconds_left=_seconds_left(config, store, iteration),
    )


def _stages(config: Config, store: RunStore, iteration: int) -> tuple[StageStatus, ...]:
    """In the order in which they end. Before the first iteration come prompts, the start model and its evaluation."""
    found = []
    if iteration == 0:
        found = [
            _stage(store, "prompts", store.path("prompts")),
            _stage(store, "start model", store.checkpoint(0)),
            _stage(store, "evaluate 000", store.evaluation(0)),
        ]
    if all(stage.committed for stage in found):
        shards = len(store.files(store.prompts("train")))
        teams, own = Teams(config, store), f"{store.iteration(iteration)}/"
        rollouts = [one for one in teams.rollouts(iteration) if store.rollout(one).startswith(own)]
        scores = [store.target_scores(player) for player in teams.players(iteration)]
        scores += [store.rollout_scores(player, one) for player in teams.players(iteration) for one in teams.rollouts(iteration)]
        to_score = shards * sum(folder.startswith(own) for folder in scores)
        found += [_stage(store, f"generate {one.opponent:03d}", store.rollout(one), shards) for one in rollouts]
        found += [
            _stage(store, "score", f"{own}scores", to_score),
            _stage(store, "pair", store.pairs(iteration), shards),
            _update(store, iteration),
            _stage(store, f"evaluate {iteration + 1:03d}", store.evaluation(iteration + 1)),
        ]
    return tuple(found)


def _stage(store: RunStore, name: str, folder: str, total: int = 0) -> StageStatus:
    committed = store.is_committed(folder)
    done = total if committed else len([path for path in store.files(folder) if path.endswith(".parquet")])
    return StageStatus(name=name, committed=committed, done=min(done, total or done), total=total)


def _update(store: RunStore, iteration: int) -> StageStatus:
    committed = store.is_committed(store.checkpoint(iteration + 1))
    steps = [row for row in MetricsLog(store).rows() if row["iteration"] == iteration]
    done, total = (steps[-1]["step"] + 1, steps[-1]["steps"]) if steps else (0, 0)
    return StageStatus(name="update", committed=committed, done=done, total=total)


def _seconds_left(config: Config, store: RunStore, iteration: int) -> float | None:
    if iteration == config.iterations:
        return 0.0
    if iteration == 0:
        return None
    ended = [
        store.read_json(f"{store.evaluation(number)}/{MARKER}", {"ended": NUMBER})["ended"] for number in range(iteration + 1)
    ]
    mean = fmean([after - before for before, after in pairwise(ended)][-RECENT:])
    return (config.iterations - iteration) * mean - min(time.time() - ended[-1], mean)


def lines_of(status: Status) -> list[str]:
    """A status as a person reads it."""
    if status.iteration == status.iterations:
        return [f"{status.run}: all {status.iterations} iterations are done"]
    left = "" if status.seconds_left is None else f", about {_duration(status.seconds_left)} left by the iterations so far"
    lines = [f"{status.run}: iteration {status.iteration + 1} of {status.iterations}{left}", f"  driver  {_driver(status)}"]
    width = max(len(stage.name) for stage in status.stages)
    for stage in status.stages:
        unit = "steps" if stage.name == "update" else "shards"
        of = f"{stage.done} of {stage.total} {unit}" if stage.total else f"{stage.done} {unit}"
        under_way = of if stage.done else "to come"
        lines.append(f"  {stage.name:<{width}}  {'done' if stage.committed else under_way}")
    return lines


def _driver(status: Status) -> str:
    if status.driver is None:
        return "none; `tpaw run` with the same config goes on"
    if status.driver_silent_s is None:
        return f"{status.driver} has died; `tpaw run` with the same config goes on"
    silent = f"last heard of {_duration(status.driver_silent_s)} ago"
    return f"{status.driver}, {silent}" + ("; it may have died" if status.driver_silent_s > LEASE_S else "")


def _duration(seconds: float) -> str:
    """A duration in the two largest units that fit.

    >>> _duration(7.2), _duration(150), _duration(7300), _duration(200_000)
    ('7 s', '2 min 30 s', '2 h 1 min', '2 d 7 h')
    """
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    told: list[str] = []
    for name, size in units:
        if left >= size or (name == "s" and not told):
            told.append(f"{left // size} {name}")
        elif told:
            break
        left %= size
        if len(told) == 2:
            break
    return " ".join(told)
