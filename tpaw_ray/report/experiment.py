"""An experiment's figures: its table as it stands in `experiment.json`, and the curves of its runs by method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from tpaw_ray.errors import TpawError
from tpaw_ray.report.figures import Facts, RunFigures, gather_run
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import one_line, shorten

POINTS = 120
"""Points of a method's curve by step."""
FINAL = "final"
"""The phase of the runs that the table is made of; those of tuning are listed and not drawn."""
STEP_CURVES = ("target_reward", "generated_reward", "margin", "target_weight_share", "target_logp", "generated_length")


@dataclass(frozen=True, kw_only=True)
class Band:
    """A curve of a method: its mean over seeds and the standard deviation, null where fewer than two seeds have the point."""

    x: tuple[int, ...]
    mean: tuple[float, ...]
    deviation: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method's difference to a baseline, as text; a dash where the experiment did not say."""

    baseline: str
    on: str
    """The checkpoint, best or last."""
    difference: str
    interval: str
    cohens_d: str
    p: str
    holm: str


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """A method of the table."""

    method: str
    seeds: str
    best: str
    last: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True)
class MethodCurves:
    """The curves of a method's runs, by column of `metrics.jsonl`, and `accuracy` and `held_out_logp` by checkpoint."""

    method: str
    runs: int
    bands: dict[str, Band]


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """A run of the experiment; `state` says how far it is, or why it cannot be read."""

    method: str
    phase: str
    seed: str
    root: str
    state: str
    ended: bool
    """Whether nothing more is to come of it: it is finished, or was given up."""


@dataclass(frozen=True, kw_only=True)
class ExperimentFigures:
    """What a report shows of an experiment. What its file does not have is empty."""

    name: str
    root: str
    protocol: tuple[str, ...]
    table: tuple[MethodRow, ...]
    remarks: tuple[str, ...]
    """What has to be known of the table: how many answers it rests on, and runs that diverged."""
    curves: tuple[MethodCurves, ...]
    runs: tuple[RunLine, ...]
    design: str
    """`experiment.yaml`: methods, seeds and the ranges of hyper-parameters; empty where there is none."""
    more: dict[str, Facts]
    """What else stands in the file, such as what was chosen."""
    environment: dict[str, Facts]
    """Of the first run that has one."""


def is_experiment(store: RunStore) -> bool:
    return store.exists(store.path("experiment.json"))


def gather_experiment(store: RunStore) -> ExperimentFigures:
    """Read an experiment's file and the runs that it names; a run that cannot be read is listed with the reason.

    Raises:
        RunError: when `experiment.json` is damaged.
    """
    content = store.read_json(store.path("experiment.json"))
    content = content if isinstance(content, dict) else {}
    listed = [run for run in _list(content, "runs") if isinstance(run, dict)]
    found = [(run, _read(store, run)) for run in listed]
    diverged = tuple(f"/{key}" for key in _list(content, "given_up"))
    by_method: dict[str, list[RunFigures]] = {}
    for run, figures in found:
        if isinstance(figures, RunFigures) and run.get("phase", FINAL) == FINAL:
            by_method.setdefault(str(run.get("method", "–")), []).append(figures)
    return ExperimentFigures(
        name=str(content.get("name") or store.root.rsplit("/", 1)[-1]),
        root=store.root,
        protocol=tuple(_event(line) for line in _list(content, "protocol")),
        table=tuple(_row(row) for row in _list(content, "table") if isinstance(row, dict)),
        remarks=tuple(map(str, _list(content, "remarks"))),
        curves=tuple(MethodCurves(method=name, runs=len(runs), bands=_bands(runs)) for name, runs in by_method.items()),
        runs=tuple(_line(run, figures, diverged) for run, figures in found),
        design=_design(store),
        more=_more(content),
        environment=next((one.environment for _, one in found if isinstance(one, RunFigures) and one.environment), {}),
    )


def _design(store: RunStore) -> str:
    path = store.path("experiment.yaml")
    return store.read_bytes(path).decode(errors="replace") if store.exists(path) else ""


def _event(line: object) -> str:
    """A line of the protocol: text, or an event with its time."""
    if isinstance(line, dict) and "event" in line:
        return f"{line['event']}, {line['at']}" if "at" in line else str(line["event"])
    return _said(line)


def _read(store: RunStore, run: Mapping[str, Any]) -> RunFigures | str:
    root = str(run.get("root", ""))
    if not root:
        return "no root is given"
    inside = root if "://" in root or root.startswith("/") else store.path(root)
    try:
        here = RunStore.named(inside)
        return gather_run(here if here.exists(here.path("config.yaml")) else RunStore.named(root))
    except TpawError as error:  # the others are shown all the same
        return one_line(error)


def _line(run: Mapping[str, Any], figures: RunFigures | str, diverged: tuple[str, ...]) -> RunLine:
    method, phase, seed, root = (str(run.get(key, "–")) for key in ("method", "phase", "seed", "root"))
    over = root.endswith(diverged)
    if isinstance(figures, str):
        state = figures
    elif figures.finished:
        state = "finished"
    else:
        state = f"{'diverged, ' if over else ''}{figures.done} of {figures.planned} iterations evaluated"
    ended = not isinstance(figures, str) and (figures.finished or over)
    return RunLine(method=method, phase=phase, seed=seed, root=root, state=state, ended=ended)


# The table.


def _row(row: Mapping[str, Any]) -> MethodRow:
    return MethodRow(
        method=str(row.get("method", "–")),
        seeds=", ".join(map(str, _list(row, "seeds"))),
        best=_spread(row.get("best")),
        last=_spread(row.get("last")),
        comparisons=tuple(_comparison(one) for one in _list(row, "comparisons") if isinstance(one, dict)),
    )


def _spread(found: object) -> str:
    """Mean and standard deviation of an accuracy, in percent."""
    if not isinstance(found, dict) or not _is_number(found.get("mean")):
        return "–"
    mean = f"{100 * found['mean']:.1f}"
    return f"{mean} ± {100 * found['std']:.1f} %" if _is_number(found.get("std")) else f"{mean} %"


def _comparison(found: Mapping[str, Any]) -> Comparison:
    def number(value: Any, form: str, times: float = 1.0) -> str:
        return format(value * times, form).replace("-", "−") if _is_number(value) else "–"

    low, high = found.get("low"), found.get("high")
    return Comparison(
        baseline=str(found.get("to", "–")),
        on=str(found.get("on", "–")),
        difference=number(found.get("difference"), "+.1f", 100),
        interval=f"{number(low, '+.1f', 100)} to {number(high, '+.1f', 100)}" if _is_number(low) and _is_number(high) else "–",
        cohens_d=number(found.get("cohens_d"), "+.2f"),
        p=number(found.get("p"), ".3g"),
        holm=number(found.get("p_holm"), ".3g"),
    )


def _more(content: Mapping[str, Any]) -> dict[str, Facts]:
    elsewhere = ("name", "protocol", "table", "runs", "given_up", "remarks")
    shown = {key: value for key, value in content.items() if key not in elsewhere}
    topics: dict[str, Facts] = {}
    for key, value in shown.items():
        if key == "choices" and isinstance(value, dict):  # beside the settings it has the scores of all that were tried
            value = {method: one.get("settings", one) if isinstance(one, dict) else one for method, one in value.items()}
        if key == "failures" and isinstance(value, list):
            value = {str(one.get("run", "–")): one.get("said") for one in value if isinstance(one, dict)}
        flat = _flat(value) if isinstance(value, dict | list) else [("", _said(value))]
        topics[key.replace("_", " ")] = tuple((name or key, said) for name, said in flat)
    return {topic: facts for topic, facts in topics.items() if facts}


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, list) and not any(isinstance(one, dict | list) for one in value):
        return [(name, ", ".join(map(_said, value)))]
    if not isinstance(value, dict | list):
        return [(name, _said(value))]
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return [one for key, inner in parts for one in _flat(inner, f"{name} · {key}" if name else str(key))]


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else shorten(value, 300)


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    found = content.get(key)
    return found if isinstance(found, list) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Curves.


def _bands(runs: Sequence[RunFigures]) -> dict[str, Band]:
    bands = {
        "accuracy": band([{one.row.checkpoint: one.row.accuracy for one in run.checkpoints} for run in runs]),
        "held_out_logp": band([{one.row.checkpoint: one.row.target_logp for one in run.checkpoints} for run in runs]),
    }
    for name in STEP_CURVES:
        bands[name] = band([dict(zip(run.curves.steps, run.curves.values[name], strict=True)) for run in runs], POINTS)
    return {name: found for name, found in bands.items() if found.x}


def band(curves: Sequence[Mapping[int, float | None]], points: int | None = None) -> Band:
    """Mean and standard deviation over curves, as far as all of them go; of many x, means of neighbours.

    Beyond the end of one, the mean of the others would say that a method got better where its worst run is gone.

    >>> band([{0: 1.0, 1: 2.0}, {0: 3.0, 1: None}])
    Band(x=(0,), mean=(2.0,), deviation=(1.4142135623730951,))
    """
    known_at = [[x for x, value in curve.items() if value is not None] for curve in curves]
    end = min((max(known) for known in known_at if known), default=0)
    every = sorted({x for known in known_at for x in known if x <= end})
    size = max(1, -(-len(every) // points)) if points else 1
    groups = [every[first : first + size] for first in range(0, len(every), size)]
    means = [[_mean(curve.get, group) for curve in curves] for group in groups]
    known = [[value for value in values if value is not None] for values in means]
    return Band(
        x=tuple(group[0] for group in groups),
        mean=tuple(fmean(values) for values in known),
        deviation=tuple(stdev(values) if len(values) > 1 else None for values in known),
    )


def _mean(value_at: Callable[[int], float | None], group: Sequence[int]) -> float | None:
    found = [value for x in group if (value := value_at(x)) is not None]
    return fmean(found) if found else None
