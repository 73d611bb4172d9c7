"""A report as one HTML file that makes no request: figures, texts, styles, programs and the drawing library are all inside.

Foreign text never becomes markup: the template escapes, JSON in the page has no `<`, the programs set text only, and the page's
own content security policy runs nothing but the scripts whose hashes it names.
"""

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tpaw_ray.errors import RunError
from tpaw_ray.report.experiment import ExperimentFigures, gather_experiment, is_experiment
from tpaw_ray.report.figures import Checkpoint, Curves, RunFigures, gather_run
from tpaw_ray.report.samples import Sample, Samples, SampleSet, gather_samples
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import visible

STAGE_ORDER = ("generate", "score", "update", "evaluate")


def write_report(path: str, to: Path | None, limit: int) -> str:
    """Write the report of the run or experiment at `path`, by default as `report.html` in it; returns where it was written.

    Raises:
        RunError: when there is neither, a file of it is damaged, or the report cannot be written.
    """
    store = RunStore.named(path)
    if is_experiment(store):
        page = experiment_page(gather_experiment(store))
    else:
        page = run_page(gather_run(store), gather_samples(store, limit))
    if to is None:
        store.write_bytes(store.path("report.html"), page.encode())
        return store.path("report.html")
    place = os.path.realpath(to)  # a link stays one
    if os.path.lexists(place) and not os.path.isfile(place):
        raise RunError(f"--to: {to} is there already and not a file; choose another")
    RunStore.around(place).write_bytes(place, page.encode())
    return str(to)


def run_page(figures: RunFigures, samples: Samples) -> str:
    """The report of a run as HTML."""
    drawn = {
        "checkpoints": [_drawn_checkpoint(checkpoint) for checkpoint in figures.checkpoints],
        "curves": _drawn_curves(figures.curves),
        "stages": STAGE_ORDER,
    }
    browsed = {"special": samples.special, "sets": [_browsed(one) for one in samples.sets]}
    return _render(
        "run.html.j2",
        drawn,
        browsed if samples.sets else None,
        figures=figures,
        headline=headline(figures),
        warned=[(one.row.checkpoint, sentence) for one in figures.checkpoints for sentence in one.row.warnings],
        sets=samples.sets,
        stages=STAGE_ORDER,
        total_s=sum(sum(one.row.seconds.values()) for one in figures.checkpoints),
    )


def experiment_page(figures: ExperimentFigures) -> str:
    """The report of an experiment as HTML."""
    return _render("experiment.html.j2", {"methods": [asdict(one) for one in figures.curves]}, None, figures=figures)


def headline(figures: RunFigures) -> str:
    """The run's outcome as a sentence."""
    judged = [one for one in figures.checkpoints if one.row.accuracy is not None]
    if len(judged) > 1 and judged[0].row.checkpoint == 0:
        last = judged[-1]
        count = "one iteration" if last.row.checkpoint == 1 else f"{last.row.checkpoint} iterations"
        text = f"Held-out accuracy went from {percent(judged[0].row.accuracy)} to {percent(last.row.accuracy)} in {count}"
        if last.gain is None or last.gain_interval is None:
            return f"{text}."
        low, gain, high = (
            signed(100 * share, 1) for share in (last.gain_interval.low, last.gain.difference, last.gain_interval.high)
        )
        return f"{text}: {gain} points, with 95 % confidence between {low} and {high}."
    if judged:
        return f"Held-out accuracy of checkpoint {judged[-1].row.checkpoint:03d} is {percent(judged[-1].row.accuracy)}."
    logps = [one.row.target_logp for one in figures.checkpoints if one.row.target_logp is not None]
    if len(logps) > 1:
        return (
            f"The mean log-probability of held-out targets went from {minus(logps[0])} to {minus(logps[-1])} nats. "
            "The data has no final answers to judge by, so there is no accuracy."
        )
    return "Nothing has been evaluated to compare yet."


# Numbers as a person reads them.


def percent(share: float | None, digits: int = 1) -> str:
    """A share as percent; a dash where there is none."""
    return "–" if share is None else f"{share * 100:.{digits}f} %"


def signed(value: float | None, digits: int = 4) -> str:
    """A number with its sign; a dash where there is none."""
    return "–" if value is None else minus(value, digits) if value < 0 else f"+{value:.{digits}f}"


def minus(value: float, digits: int = 2) -> str:
    """A number with a minus that is as wide as a plus."""
    return f"{value:.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> duration(42.4), duration(372), duration(9000)
    ('42 s', '6 min 12 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(unix: float | None) -> str:
    """A point in time, UTC."""
    return "–" if unix is None else datetime.fromtimestamp(unix, UTC).strftime("%-d %B %Y, %H:%M UTC")


# What the page's programs read.


def _drawn_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    row = checkpoint.row
    return {
        "number": row.checkpoint,
        "accuracy": row.accuracy,
        "interval": [checkpoint.interval.low, checkpoint.interval.high] if checkpoint.interval else None,
        "target_logp": row.target_logp,
        "seconds": row.seconds,
        "waited": checkpoint.waited,
    }


def _drawn_curves(curves: Curves) -> dict[str, Any]:
    def rounded(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else float(f"{value:.5g}") for value in values]

    return asdict(curves) | {
        "values": {name: rounded(values) for name, values in curves.values.items()},
        "player_weights": {str(player): rounded(values) for player, values in curves.player_weights.items()},
    }


def _browsed(found: SampleSet) -> dict[str, Any]:
    return {"voices": found.voices, "players": found.players, "samples": [_browsed_sample(one) for one in found.samples]}


def _browsed_sample(sample: Sample) -> list[Any]:
    """Lists and not objects: names would be half of the file."""
    said = [one and [one.text, one.answer, one.correct, one.finish, one.logps] for one in sample.said]
    return [sample.prompt_id, sample.row, sample.prompt, sample.target, sample.reference, sample.logps, said]


# The file.


def _render(template: str, drawn: Mapping[str, Any], browsed: Mapping[str, Any] | None, **values: Any) -> str:
    plotly, packed = _plotly()
    scripts = [_part(name) for name in ("theme.js", "charts.js", *(["samples.js"] if browsed else []))]
    return (
        _environment()
        .get_template(template)
        .render(
            policy=_policy([*(script.encode() for script in scripts), plotly]),
            style=Markup(_part("page.css")),
            scripts=[Markup(script) for script in scripts],
            plotly=Markup(packed),
            drawn=Markup(_json(drawn).replace("<", "\\u003c")),
            browsed=Markup(_packed(_json(browsed).encode())) if browsed else "",
            **values,
        )
    )


@cache
def _plotly() -> tuple[bytes, str]:
    """The drawing library, and the same compressed."""
    found = files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return found, _packed(found)


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("tpaw_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    made.filters.update(percent=percent, minus=minus, signed=signed, duration=duration, moment=moment)
    return made


def _part(name: str) -> str:
    return files("tpaw_ray.report").joinpath("templates", name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[bytes]) -> str:
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _packed(content: bytes) -> str:
    """Compressed, as text; the same content makes the same text."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
