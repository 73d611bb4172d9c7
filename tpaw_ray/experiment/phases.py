"""What comes next in an experiment: a pure function of its design and of what is known already.

    tuning runs ─► choice, by validation alone ─► final runs ─► the test split, once ─► table

Every phase waits for all of the one before: no final run starts while a setting is still open, and nothing answers the test split
while a run is still to come.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from tpaw_ray.config import Config
from tpaw_ray.errors import LearnerError, RunError
from tpaw_ray.experiment.design import Design, Settings, Tuning
from tpaw_ray.placement import Node, demands, unmet

Phase = Literal["tuning", "final"]
GIVEN_UP = 2
"""Times that a run may diverge (a loss that is not a number): then a tuning run's settings count as unusable, and of a final run
counts what it had made before."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run of the experiment. `key` is its folder inside the experiment's: `final/spin_seed-0`."""

    phase: Phase
    method: str
    seed: int
    settings: Settings
    config: Config

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.config.run.name}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run's checkpoints scored on validation; the first value is the start's, and the only one of a final run that was
    given up before its first iteration ended."""

    accuracy: Sequence[float]
    target_logp: Sequence[float]

    def best(self) -> int:
        """The checkpoint with the highest accuracy, of equal ones that with the higher target log-probability, then the earlier.

        The start is none of them, where there are others: an iteration is chosen, not whether to train.

        >>> Outcome(accuracy=[0.9, 0.5, 0.7, 0.7], target_logp=[-1.0, -1.0, -3.0, -2.0]).best()
        3
        """
        return max(range(1, len(self.accuracy)) or [0], key=lambda number: (self.accuracy[number], self.target_logp[number]))

    @property
    def last(self) -> int:
        return len(self.accuracy) - 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """Settings that were tried, and what came of them on validation; null where the learner gave them up."""

    settings: Settings
    accuracy: float | None
    """Mean over the tuning seeds."""
    target_logp: float | None
    runs: Sequence[Mapping[str, Any]]
    """By seed: `seed`, `accuracy`, `target_logp` and the `checkpoint` that counted."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method's final runs are made with."""

    settings: Settings
    points: Sequence[Point]
    at_edge: Sequence[str]
    """Axes of three or more numbers whose least or greatest was chosen: the best value may lie beyond."""


@dataclass(frozen=True, kw_only=True, order=True)
class Question:
    """A checkpoint that is to answer the test split."""

    run: str
    """Key of the run."""
    checkpoint: int


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a checkpoint scored on the test split."""

    accuracy: float
    judged: int
    """Answers that the accuracy is a share of: those to prompts with a reference."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What an experiment knows of itself."""

    outcomes: Mapping[str, Outcome]
    """By key of the run: of finished ones, and of final runs that were given up as far as they came."""
    given_up: Collection[str]
    """Keys of tuning runs that diverged too often."""
    choices: Mapping[str, Settings] | None
    """Chosen settings by method; null before the choice."""
    answers: Mapping[Question, Answered]
    """Of the checkpoints that answered the test split."""
    tested: bool
    """Whether the test is over: then it is never asked again."""


@dataclass(frozen=True)
class Play:
    """Runs to be played."""

    phase: Phase
    runs: Sequence[Planned]


@dataclass(frozen=True)
class Choose:
    """All tuning runs are done: settle every method's settings."""


@dataclass(frozen=True)
class Ask:
    """All runs are done: their chosen checkpoints answer the test split."""

    questions: Sequence[Question]


@dataclass(frozen=True)
class Conclude:
    """All answers are there: make the table."""


@dataclass(frozen=True)
class Nothing:
    """All is done."""


def next_step(design: Design, known: Known) -> Play | Choose | Ask | Conclude | Nothing:
    """What an experiment has to do next."""
    if known.tested:
        return Nothing()
    if known.choices is None:
        left = [run for run in tuning_runs(design) if run.key not in known.outcomes and run.key not in known.given_up]
        return Play("tuning", left) if left else Choose()
    finals = final_runs(design, known.choices)
    if left := [run for run in finals if run.key not in known.outcomes]:
        return Play("final", left)
    questions = [question for question in questions_of(finals, known.outcomes) if question not in known.answers]
    return Ask(questions) if questions else Conclude()


def tuning_runs(design: Design) -> list[Planned]:
    """Every method with every combination of its axes, on every tuning seed.

    Raises:
        ConfigError: naming the method whose config is at fault, and every field.
        RunError: when two runs would lie in one folder.
    """
    seeds = design.tuning.seeds if design.tuning else []
    return _apart(
        design,
        [
            _planned(design, "tuning", method, seed, settings)
            for method in design.methods
            for settings in (design.points(method) if design.axes(method) else [])
            for seed in seeds
        ],
    )


def final_runs(design: Design, choices: Mapping[str, Settings]) -> list[Planned]:
    """Every method with its chosen settings, on every seed.

    Raises:
        ConfigError, RunError: as `tuning_runs` does.
    """
    return _apart(
        design,
        [_planned(design, "final", method, seed, choices[method]) for method in design.methods for seed in design.seeds],
    )


def _apart(design: Design, runs: list[Planned]) -> list[Planned]:
    """The runs, each of which has a folder of its own."""
    keys = [run.key for run in runs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise RunError(
            f"{design.folder}/{twice}: two runs would lie there; give methods shorter names, or write values differently"
        )
    return runs


def choose(design: Design, known: Known) -> dict[str, Choice]:
    """The settings of every method, all by one rule, which sees validation only.

    The highest mean accuracy over the tuning seeds; of equal ones the higher mean target log-probability, then the grid's first.

    Raises:
        LearnerError: when none of a method's settings could be trained.
    """
    runs = tuning_runs(design)
    choices = {}
    for method in design.methods:
        if design.tuning is None or not design.axes(method):
            choices[method] = Choice(settings={}, points=(), at_edge=())
            continue
        points = [
            _point(design.tuning, settings, [run for run in runs if (run.method, run.settings) == (method, settings)], known)
            for settings in design.points(method)
        ]
        usable = [point for point in points if point.accuracy is not None]
        if not usable:
            raise LearnerError(f"{design.name}, method {method}: the learner gave up every setting of the grid; choose others")
        best = max(usable, key=lambda point: (point.accuracy, point.target_logp))
        choices[method] = Choice(settings=best.settings, points=points, at_edge=at_edge(design.axes(method), best.settings))
    return choices


def at_edge(axes: Mapping[str, Sequence[Any]], settings: Settings) -> list[str]:
    """Axes of three or more numbers whose least or greatest was chosen.

    >>> at_edge({"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2]}, {"a": 3, "b": 2, "c": 1})
    ['a']
    """
    numbers = {axis: values for axis, values in axes.items() if all(isinstance(value, int | float) for value in values)}
    return [axis for axis, values in numbers.items() if len(values) > 2 and settings[axis] in (min(values), max(values))]


def questions_of(finals: Sequence[Planned], outcomes: Mapping[str, Outcome]) -> list[Question]:
    """Who answers the test split: the start of every seed once, and of every final run the best and the last checkpoint."""
    found: dict[Question, None] = {}
    for run in finals:
        outcome = outcomes[run.key]
        found[Question(run=start_of(finals, run.seed), checkpoint=0)] = None
        found[Question(run=run.key, checkpoint=outcome.best())] = None
        found[Question(run=run.key, checkpoint=outcome.last)] = None
    return list(found)


def start_of(finals: Iterable[Planned], seed: int) -> str:
    """The key of the run whose checkpoint 0 answers as the start of a seed: that of the first method."""
    return next(run.key for run in finals if run.seed == seed)


def may_start(running: Sequence[Config], coming: Config, nodes: Sequence[Node], most: int | None) -> bool:
    """Whether a run may start beside those that are running, by what all of them demand of the nodes.

    One alone always may: `tpaw run` itself says what the cluster lacks.
    """
    if not running:
        return True
    if most is not None and len(running) >= most:
        return False
    return not unmet([demand for config in (*running, coming) for demand in demands(config)], nodes)


def _planned(design: Design, phase: Phase, method: str, seed: int, settings: Settings) -> Planned:
    name = _name(method, settings if phase == "tuning" else {}, seed)
    config = design.config(method, settings, seed=seed, phase=phase, name=name)
    return Planned(phase=phase, method=method, seed=seed, settings=settings, config=config)


def _name(method: str, settings: Settings, seed: int) -> str:
    """A run's name that tells it from the others; a digest stands for settings that would make it too long.

    >>> _name("spin", {"learner.learning_rate": 1e-05}, 7)
    'spin_learning_rate-1e-05_seed-7'
    """
    told = "".join(f"_{key.rsplit('.', 1)[-1]}-{re.sub('[^A-Za-z0-9.]+', '-', str(value))}" for key, value in settings.items())
    if len(method) + len(told) > 80:
        told = "_" + hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:12]
    return f"{method[:60]}{told}_seed-{seed}"


def _point(tuning: Tuning, settings: Settings, runs: Sequence[Planned], known: Known) -> Point:
    rows = []
    for run in runs:
        if run.key in known.given_up:
            return Point(settings=settings, accuracy=None, target_logp=None, runs=())
        outcome = known.outcomes[run.key]
        number = outcome.last if tuning.choose_by == "last" else outcome.best()
        counted = {"accuracy": outcome.accuracy[number], "target_logp": outcome.target_logp[number]}
        rows.append({"seed": run.seed, "checkpoint": number, **counted})
    return Point(
        settings=settings,
        accuracy=fmean(row["accuracy"] for row in rows),
        target_logp=fmean(row["target_logp"] for row in rows),
        runs=rows,
    )
