"""The driver's side: trackers follow what a run has committed, and its steps as they are taken.

Each tracker is asked what it has of the run and sent the rest, in order, in a thread of its own: a slow or absent tracker holds
nothing up. One that fails is warned of once and left alone; the next driver of the run asks it again and sends what is missing.
"""

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from tpaw_ray.config import Config
from tpaw_ray.errors import ConfigError
from tpaw_ray.runs.metrics import MetricsLog, StepMetrics
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import Summary
from tpaw_ray.tracking.entries import Entry, Reached, Subject, Tracker, of_checkpoint, of_step
from tpaw_ray.wording import one_line


def check_installed(config: Config) -> None:
    """Refuse a tracker whose package is not there, before anything starts.

    Raises:
        ConfigError: naming the tracker and what to install.
    """
    for name in config.tracking.to:
        if find_spec(name) is None:
            raise ConfigError(
                f"tracking.to: {name} is asked for, but its package is not installed; pip install 'tpaw-ray[trackers]' brings it"
            )


class Trackers:
    """All trackers of a run. Without any in the config, and outside of Ray, nothing happens and nothing is imported.

    Example::

        with Trackers(config, store, reporter.say) as trackers:
            trackers.take(rows)     # steps as they come
            trackers.follow()       # whatever stages have committed since
    """

    def __init__(self, config: Config, store: RunStore, say: Callable[[str], None]) -> None:
        self.config = config
        self.store = store
        self.say = say
        self.summary = Summary(config, store)
        self._lines: list[Line] = []
        self._before = [0]
        """By iteration: the steps taken before it. One more than iterations whose update is done."""
        self._checkpoint = 0

    def __enter__(self) -> "Trackers":
        if self.config.tracking.to:
            subject = subject_of(self.config, self.store)
            self._lines = [Line(name, OPENERS[name], subject, self.say) for name in self.config.tracking.to]
        if in_ray():
            self._lines.append(Line("Ray's metrics", _ray, subject_named(self.config), self.say))
        self.follow()
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines:
            line.close()
        self._lines = []

    def take(self, rows: Sequence[StepMetrics]) -> None:
        """Steps of an update under way, in order. The iterations before it have been followed."""
        if self._lines:
            self._send([of_step(asdict(row), self._before[row.iteration]) for row in rows])

    def follow(self) -> None:
        """Send what has been committed since the last call, by the axis: a checkpoint, then the steps that start from it."""
        if not self._lines:
            return
        self._follow_evaluations()
        while self._is_updated(iteration := len(self._before) - 1):
            rows = MetricsLog(self.store).of_update(iteration)
            self._send([of_step(row, self._before[iteration]) for row in rows])
            self._before.append(self._before[iteration] + len(rows))
            self._follow_evaluations()

    def _follow_evaluations(self) -> None:
        while self._checkpoint < len(self._before) and self.store.is_committed(self.store.evaluation(self._checkpoint)):
            self._send([of_checkpoint(self.summary.row(self._checkpoint), self._before[self._checkpoint])])
            self._checkpoint += 1

    def _is_updated(self, iteration: int) -> bool:
        return iteration < self.config.iterations and self.store.is_committed(self.store.checkpoint(iteration + 1))

    def _send(self, entries: Sequence[Entry]) -> None:
        for line in self._lines:
            line.send(entries)


class Line:
    """One tracker behind a thread: whatever it does or fails to do, the run goes on."""

    def __init__(self, name: str, opener: Callable[[Subject], Tracker], subject: Subject, say: Callable[[str], None]) -> None:
        self.name = name
        self.say = say
        self._tracker: Tracker | None = None
        self._reached = Reached()
        self._failed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"tracking-{name}")
        self._do(lambda: self._open(opener, subject))

    def send(self, entries: Sequence[Entry]) -> None:
        """Pass entries on, without waiting; those that the tracker has are left out."""
        self._do(lambda: self._pass_on(entries))

    def close(self) -> None:
        """Wait until everything has arrived, or failed to."""
        self._do(self._close)
        self._thread.shutdown()

    def _do(self, work: Callable[[], None]) -> None:
        self._thread.submit(self._guarded, work)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # of any kind, from any tool: the rows are in the run's folder, and nothing waits for this
            self._failed = True
            self.say(
                f"warning: tracking.to: {self.name} failed: {one_line(error)}; the run goes on without it, and the same command, "
                "once this run has ended, sends what is missing"
            )

    def _open(self, opener: Callable[[Subject], Tracker], subject: Subject) -> None:
        self._tracker = opener(subject)
        self._reached = self._tracker.reached

    def _pass_on(self, entries: Sequence[Entry]) -> None:
        new = [entry for entry in entries if not self._reached.holds(entry)]
        if new and self._tracker:
            self._tracker.log(new)
            self._reached = self._reached.after(new)

    def _close(self) -> None:
        if self._tracker:
            self._tracker.close()


def subject_of(config: Config, store: RunStore) -> Subject:
    """The run as trackers know it. Its id is drawn once and kept in its folder, so that a run made anew is another run."""
    path = store.path("tracking.json")
    if not store.exists(path):
        store.write_json(path, {"id": f"{config.run.name}-{uuid.uuid4().hex[:8]}"})
    known: str = store.read_json(path, {"id": str})["id"]
    sheet = store.path("environment.json")
    environment = store.read_json(sheet, dict) if store.exists(sheet) else {}
    return Subject(
        id=known,
        name=config.run.name,
        project=config.tracking.project,
        folder=Path("tracking", known).absolute() if store.scheme else Path(store.path("tracking")),
        config={**config.model_dump(mode="json"), "environment": environment},
    )


def subject_named(config: Config) -> Subject:
    """The run by its name alone."""
    return Subject(id=config.run.name, name=config.run.name, project=config.tracking.project, folder=Path(), config={})


def in_ray() -> bool:
    """Whether this process is a driver of Ray."""
    import ray

    return bool(ray.is_initialized())


def _tensorboard(subject: Subject) -> Tracker:
    from tpaw_ray.tracking.to_tensorboard import TensorBoard

    return TensorBoard(subject)


def _wandb(subject: Subject) -> Tracker:
    from tpaw_ray.tracking.to_wandb import WeightsAndBiases

    return WeightsAndBiases(subject)


def _mlflow(subject: Subject) -> Tracker:
    from tpaw_ray.tracking.to_mlflow import MLflow

    return MLflow(subject)


def _trackio(subject: Subject) -> Tracker:
    from tpaw_ray.tracking.to_trackio import Trackio

    return Trackio(subject)


def _ray(subject: Subject) -> Tracker:
    from tpaw_ray.tracking.to_ray import RayMetrics

    return RayMetrics(subject)


OPENERS: dict[str, Callable[[Subject], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
