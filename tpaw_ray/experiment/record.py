"""What an experiment knows of itself, in its folder, so that the same command goes on.

ROOT/NAME/
  experiment.yaml          the design; fixed once settings are chosen
  choices.json             the whole grid's validation numbers and the choice, written before any final run starts
  experiment.json          protocol, choices, runs, failures, table
  table.md                 the table to read
  tuning/… final/…         ordinary runs
  logs/tuning/… final/…    what each run's command was given and said
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from tpaw_ray.errors import DivergedError, RunError
from tpaw_ray.experiment.commands import Ended
from tpaw_ray.experiment.design import Design, Settings, dump_design
from tpaw_ray.experiment.phases import GIVEN_UP, Choice, Planned
from tpaw_ray.experiment.table import remarks
from tpaw_ray.plain_json import NUMBER, misfit
from tpaw_ray.plain_yaml import parse_plain_yaml
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import listed, one_line

MAY_CHANGE = ("parallel",)
"""What an experiment whose settings are chosen may be given anew."""
_ENDS = {"low": NUMBER | None, "high": NUMBER | None}
_SCORES = _ENDS | {"mean": NUMBER, "std": NUMBER | None}
_COMPARISON = _ENDS | {"to": str, "on": str, "difference": NUMBER, "cohens_d": NUMBER | None}
_COMPARISON |= {"p": NUMBER | None, "p_holm": NUMBER | None}
EXPERIMENT = {
    "protocol": [{"event": str, "at": str}],
    "failures": [{"run": str, "exit_code": int}],
    "table": [{"method": str, "seeds": list, "best": _SCORES, "last": _SCORES, "comparisons": [_COMPARISON]}],
    "runs": [dict],
}
"""The shape of `experiment.json` (`plain_json.misfit`), and below that of `choices.json`."""
_POINT = {"settings": dict, "accuracy": NUMBER | None}
CHOICES = {"at": str, "methods": {str: {"settings": dict, "points": [_POINT], "at_edge": [str]}}}


class Record:
    """Reads and writes `experiment.json`, `choices.json` and `experiment.yaml`."""

    def __init__(self, design: Design, store: RunStore) -> None:
        """
        Raises:
            RunError: when settings were chosen for another design, or a file is damaged.
        """
        self.design = design
        self.store = store
        content = self._read("experiment.json", EXPERIMENT)
        self.protocol: list[dict[str, str]] = content.get("protocol", [])
        self.failures: list[dict[str, Any]] = content.get("failures", [])
        self.table: list[dict[str, Any]] = content.get("table", [])
        self.runs: list[dict[str, Any]] = content.get("runs", [])
        self._chosen = self._read("choices.json", CHOICES)
        if self._chosen:
            check_same_design(design, store)
            self._note("chosen", self._chosen["at"])  # should its writer have died in between

    @property
    def choices(self) -> dict[str, Settings] | None:
        """Chosen settings by method; null before the choice."""
        return {method: one["settings"] for method, one in self._chosen["methods"].items()} if self._chosen else None

    @property
    def points(self) -> dict[str, Any]:
        """The choices with all numbers, by method, as `choices.json` holds them."""
        return dict(self._chosen.get("methods", {}))

    @property
    def tested(self) -> bool:
        return any(event["event"] == "tested" for event in self.protocol)

    def given_up(self) -> set[str]:
        """Keys of runs that diverged as often as they may."""
        times = Counter(one["run"] for one in self.failures if one["exit_code"] == DivergedError.exit_code)
        return {key for key, number in times.items() if number >= GIVEN_UP}

    def note(self, event: str) -> None:
        """Write an event down with its time, the first time it happens."""
        self._note(event, now())
        self.write()

    def fail(self, run: Planned, ended: Ended) -> None:
        """Write down that a run failed."""
        self.failures.append({"run": run.key, "exit_code": ended.exit_code, "said": ended.said, "at": now()})
        self.write()

    def begin(self, runs: Sequence[Planned]) -> None:
        """Write down the design, while it may change, and all runs that it has so far."""
        if not self._chosen:
            self.store.write_bytes(self.store.path("experiment.yaml"), dump_design(self.design).encode())
        self.runs = [
            {
                "method": run.method,
                "seed": run.seed,
                "root": store_of(run).root,
                "settings": dict(run.settings),
                "phase": run.phase,
            }
            for run in runs
        ]
        self.write()

    def choose(self, choices: Mapping[str, Choice]) -> None:
        """Settle the choice: from here on the design is fixed."""
        rule = {
            "split": "validation",
            "checkpoint": self.design.tuning.choose_by if self.design.tuning else None,
            "by": "mean accuracy over the tuning seeds, then mean target_logp, then the order of the grid",
        }
        self.store.write_bytes(self.store.path("experiment.yaml"), dump_design(self.design).encode())
        self._chosen = {"at": now(), "rule": rule, "methods": {method: asdict(choice) for method, choice in choices.items()}}
        self.store.write_json(self.store.path("choices.json"), self._chosen)
        self._note("chosen", self._chosen["at"])
        self.write()

    def write(self) -> None:
        """Write `experiment.json`."""
        self.store.write_json(
            self.store.path("experiment.json"),
            {
                "name": self.design.name,
                "protocol": self.protocol,
                "choices": self.points,
                "table": self.table,
                "runs": self.runs,
                "failures": self.failures,
                "given_up": sorted(self.given_up()),
                "remarks": remarks(self.table),
            },
        )

    def _note(self, event: str, at: str) -> None:
        if not any(one["event"] == event for one in self.protocol):
            self.protocol.append({"event": event, "at": at})

    def _read(self, name: str, shape: object) -> dict[str, Any]:
        path = self.store.path(name)
        return self.store.read_json(path, shape) if self.store.exists(path) else {}


def check_same_design(design: Design, store: RunStore) -> None:
    """Refuse a design that differs from the one for which settings were chosen.

    Raises:
        RunError: with the parts that differ.
    """
    path = store.path("experiment.yaml")
    try:
        before = parse_plain_yaml(store.read_bytes(path))
    except ValueError as error:
        raise RunError(f"{path}: not valid YAML ({error}); the experiment is damaged there") from error
    if wrong := misfit(before, dict):
        raise RunError(f"{path}: the experiment is damaged there ({wrong})")
    try:
        chosen_for = Design.model_validate(before)
    except ValidationError as error:
        raise RunError(f"{path}: the experiment is damaged there ({one_line(error)})") from error
    fixed = [part for part in Design.model_fields if part not in MAY_CHANGE]
    differing = [part for part in fixed if getattr(chosen_for, part) != getattr(design, part)]
    if differing:
        raise RunError(
            f"{store.root}: settings were chosen for another design, and {listed(differing)} changed since; choose another name "
            f"or undo ({path} is the design)"
        )


def store_of(run: Planned) -> RunStore:
    """The folder of a run."""
    return RunStore.open(run.config.run.root, run.config.run.name)


def now() -> str:
    """The time as the protocol has it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
