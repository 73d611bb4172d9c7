"""The experiment's file: methods × settings × seeds over one base config. Imports nothing heavy.

Layers of a run's config, later ones win: the base, the method, the settings that tuning chose (or tries), and the run's own name,
root and seed. `{seed}` in a text of base or method stands for the seed, as in `model.path: models/study-{seed}`.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_serializer, model_validator

from tpaw_ray.config import (
    LARGEST,
    Config,
    Filled,
    Name,
    Number,
    Section,
    merge,
    problems,
    read_mapping,
    resolve_config,
    with_preset,
)
from tpaw_ray.errors import ConfigError
from tpaw_ray.plain_yaml import DEPTH
from tpaw_ray.wording import listed, shorten

START = "start"
"""What `baselines` call the model that every method starts from."""
_POWER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}")
QUICK_ROWS, QUICK_HELDOUT, QUICK_SEEDS, QUICK_VALUES = 256, 64, 2, 2
Seeds = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST), Number]], Field(min_length=1)]
Settings = Mapping[str, Any]
"""Values by dotted key of the config, as in `{"learner.learning_rate": 1e-4}`."""


def distinct(seeds: list[int]) -> list[int]:
    """The seeds; raises `ValueError` when one stands twice."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a seed stands twice in {seeds}")
    return seeds


class Tuning(Section):
    seeds: Seeds
    """Seeds of the tuning runs; none of the final ones, so that no seed is chosen for."""
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    """Values to try by dotted key of the config; every method tries every combination of its axes."""
    choose_by: Literal["last", "best"] = "last"
    """The checkpoint whose validation accuracy counts: the last iteration's, or the best one's."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        return distinct(seeds)

    @field_validator("grid")
    @classmethod
    def _values_differ(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # YAML 1.1 takes 1e-4, without a dot, for a text.
        grid = {
            axis: [float(one) if isinstance(one, str) and _POWER.fullmatch(one) else one for one in grid[axis]] for axis in grid
        }
        for axis, values in grid.items():
            if not all(parts := axis.split(".")) or len(parts) > DEPTH:
                raise ValueError(f"{shorten(axis)}: expected a dotted key of the config, as in learner.learning_rate")
            if any(value in values[:index] for index, value in enumerate(values)):
                raise ValueError(f"{axis}: a value stands twice in {shorten(values)}")
            if axis == "preset" or axis.split(".")[0] in _FIXED:
                raise ValueError(f"{axis} cannot be an axis; it has to be the same for all settings of a method")
        return grid


class Method(Section):
    """A layer over the base: a preset, sections of a config, and `untuned`."""

    config: dict[str, Any] = Field({})
    untuned: list[Filled] = Field([])
    """Axes of the grid that the method does not have, or sets itself."""

    @model_validator(mode="before")
    @classmethod
    def _is_a_layer(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("expected a layer over the base, as in {preset: spin}")
        for section in _FIXED:
            if section in value:
                raise ValueError(f"{section} belongs in base: methods are compared on the same {_FIXED[section]}")
        return {
            "config": {key: inner for key, inner in value.items() if key != "untuned"},
            "untuned": value.get("untuned", []),
        }

    @model_serializer
    def _as_a_layer(self) -> dict[str, Any]:
        return self.config | ({"untuned": self.untuned} if self.untuned else {})


_FIXED = {"run": "names, roots and seeds", "model": "start", "evaluation": "held-out prompts"}


class Design(Section):
    """Everything an experiment is made from."""

    name: Name
    """Name of the experiment; its folder is `root/name`."""
    root: Filled = "runs/experiments"
    """Where experiments lie: a folder, or an object store as in `run.root`."""
    base: dict[str, Any]
    """A run's config without `run`, or the path of a file with one, counted from the experiment's file."""
    seeds: Seeds
    """Seeds of the final runs; the same for every method, since differences are taken seed by seed."""
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    tuning: Tuning | None = None
    """How settings are chosen, for every method alike; without it nothing is."""
    baselines: list[Filled] = Field([START])
    """What every method is compared to: methods, or `start`."""
    parallel: int | Literal["resources"] = 1
    """Runs side by side, at most; `resources`: as many as the cluster holds."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        return distinct(seeds)

    @field_validator("parallel", mode="before")
    @classmethod
    def _some_run_at_least(cls, value: Any) -> Any:
        if value != "resources" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST):
            raise ValueError("expected a number of runs, at least 1, or resources")
        return value

    @field_validator("base")
    @classmethod
    def _base_names_no_run(cls, base: dict[str, Any]) -> dict[str, Any]:
        if "run" in base:
            raise ValueError("run has no place in base: the experiment names its runs, and seeds give run.seed")
        return base

    @model_validator(mode="after")
    def _parts_fit(self) -> "Design":
        if START in self.methods:
            raise ValueError(f"methods: {START!r} is the name of what all methods start from; choose another")
        strange = [name for name in self.baselines if name not in (START, *self.methods)]
        if strange:
            raise ValueError(f"baselines: found {listed(strange)}, expected {START} or methods: {listed(self.methods)}")
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError(f"baselines: a name stands twice in {shorten(self.baselines)}")
        if self.tuning and (both := sorted(set(self.tuning.seeds) & set(self.seeds))):
            raise ValueError(f"tuning.seeds: {listed(both)} are among seeds too; settings would be chosen for them")
        axes = self.tuning.grid if self.tuning else {}
        for name, method in self.methods.items():
            if strange := [axis for axis in method.untuned if axis not in axes]:
                raise ValueError(f"methods.{name}.untuned: {listed(strange)}: no such axis in tuning.grid ({listed(axes)})")
        return self

    @property
    def folder(self) -> str:
        """The experiment's folder as the user wrote it; that of its runs lies below."""
        return f"{self.root.rstrip('/')}/{self.name}"

    def axes(self, method: str) -> dict[str, list[Any]]:
        """The axes of the grid that a method is tuned on."""
        grid = self.tuning.grid if self.tuning else {}
        return {axis: values for axis, values in grid.items() if axis not in self.methods[method].untuned}

    def points(self, method: str) -> list[dict[str, Any]]:
        """Every combination of a method's axes; the last axis turns fastest."""
        axes = self.axes(method)
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def config(self, method: str, settings: Settings, *, seed: int, phase: str, name: str) -> Config:
        """The config of one run.

        Raises:
            ConfigError: naming the method and every field at fault.
        """
        source = f"{self.name}, method {method}"
        layers = [with_preset(layer, source) for layer in (self.base, self.methods[method].config)]
        if both := [axis for axis in settings if _holds(layers[1], axis)]:
            raise ConfigError(f"{source}: sets {listed(both)}, which tuning.grid chooses; name it under untuned, or take it out")
        own = {"run": {"root": f"{self.folder}/{phase}", "name": name, "seed": seed}}
        return resolve_config(*(_seeded(layer, seed) for layer in layers), _nested(settings), own, source=source)


def load_design(path: Path, *, quick: bool = False) -> Design:
    """Read an experiment's file.

    Raises:
        ConfigError: naming the file, every field at fault, what was found and what is expected.
    """
    content = read_mapping(path)
    if isinstance(content.get("base"), str):
        # Its own `run` is that of a run alone.
        content["base"] = {key: value for key, value in read_mapping(path.parent / content["base"]).items() if key != "run"}
    try:
        design = Design.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in problems(error, Design))) from error
    return quickly(design) if quick else design


def quickly(design: Design) -> Design:
    """The same experiment, cut down until it only shows that everything works: its numbers say nothing.

    Two seeds, two values of the grid's first axis and one of the others, an iteration, few rows; under a name of its own.
    """
    base: dict[str, Any] = {"iterations": 1, "data": {"limit": None}, "evaluation": {"limit": None}}
    merge(base, design.base)
    methods = {name: method.model_copy(update={"config": _cut(method.config)}) for name, method in design.methods.items()}
    grid = dict(design.tuning.grid) if design.tuning else {}
    for index, axis in enumerate(grid):
        grid[axis] = grid[axis][: 1 if index else QUICK_VALUES]
    tuning = design.tuning and design.tuning.model_copy(update={"grid": grid, "seeds": design.tuning.seeds[:1]})
    return design.model_copy(
        update={
            "name": f"{design.name}-quick",
            "seeds": design.seeds[:QUICK_SEEDS],
            "base": _cut(base),
            "methods": methods,
            "tuning": tuning,
        }
    )


def dump_design(design: Design) -> str:
    """The design as YAML; reading it back gives the same design."""
    return yaml.safe_dump(design.model_dump(mode="json"), sort_keys=False)


def _cut(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of which only a little is played: one iteration and few rows, where it says how many.

    >>> _cut({"iterations": 5, "data": {"limit": 5000}, "learner": {"epochs": 2}})
    {'iterations': 1, 'data': {'limit': 256}, 'learner': {'epochs': 2}}
    """
    cut = {**layer, "iterations": 1} if "iterations" in layer else dict(layer)
    for section, most in (("data", QUICK_ROWS), ("evaluation", QUICK_HELDOUT)):
        inner = cut.get(section)
        if isinstance(inner, Mapping) and "limit" in inner:
            limit = inner["limit"]
            if limit is None or (isinstance(limit, int | float) and limit > most):  # what is no limit is told as without --quick
                cut[section] = {**inner, "limit": most}
    return cut


def _nested(settings: Settings) -> dict[str, Any]:
    """Dotted keys as a layer.

    >>> _nested({"learner.epochs": 1, "iterations": 2})
    {'learner': {'epochs': 1}, 'iterations': 2}
    """
    layer: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        merge(layer, value)
    return layer


def _holds(layer: Mapping[str, Any], key: str) -> bool:
    first, _, rest = key.partition(".")
    inner = layer.get(first)
    return _holds(inner, rest) if rest and isinstance(inner, Mapping) else first in layer


def _seeded(value: Any, seed: int) -> Any:
    """A layer in which `{seed}` stands for the seed.

    >>> _seeded({"model": {"path": "models/study-{seed}"}}, 3)
    {'model': {'path': 'models/study-3'}}
    """
    if isinstance(value, Mapping):
        return {key: _seeded(inner, seed) for key, inner in value.items()}
    if isinstance(value, list):
        return [_seeded(inner, seed) for inner in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value
