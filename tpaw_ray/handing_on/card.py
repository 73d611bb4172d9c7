"""The model card, written from what a run committed."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tpaw_ray.config import Config
from tpaw_ray.evaluation.statistics import proportion_interval
from tpaw_ray.handing_on.choice import Choice
from tpaw_ray.methods import method_of
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import Summary
from tpaw_ray.wording import visible


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A line of the evaluation table. Null is what the data does not give."""

    checkpoint: int
    judged: int
    accuracy: float | None
    low: float | None
    """Ends of Wilson's 95 % interval."""
    high: float | None
    target_logp: float | None
    target_reward: float | None
    margin: float | None


def write_card(store: RunStore, config: Config, choice: Choice, *, called: str, path: Path) -> None:
    """Write the card of a checkpoint as a file of Markdown with the YAML header that the Hub reads.

    `called` is the name or folder that a reader loads the model by.
    """
    from huggingface_hub import ModelCard

    lines = evaluated(store, config)
    header = _header(config, next((line for line in lines if line.checkpoint == choice.checkpoint), None)).to_yaml()
    ModelCard(f"---\n{header}\n---\n\n{_body(store, config, choice, lines, called)}").save(path)


def evaluated(store: RunStore, config: Config) -> list[Evaluated]:
    """The evaluation of every checkpoint that was evaluated."""
    lines = []
    for row in Summary(config, store).rows():
        judged = int(store.counts(store.evaluation(row.checkpoint)).get("judged") or 0) if row.accuracy is not None else 0
        interval = proportion_interval(round((row.accuracy or 0) * judged), judged)
        lines.append(
            Evaluated(
                checkpoint=row.checkpoint,
                judged=judged,
                accuracy=row.accuracy,
                low=interval.low if interval else None,
                high=interval.high if interval else None,
                target_logp=row.target_logp,
                target_reward=row.target_reward,
                margin=row.margin,
            )
        )
    return lines


def code(text: object) -> str:
    """Foreign text as a code span: neither Markdown, HTML nor a terminal obeys what is in it.

    >>> print(code("a`<b>\\nc"))
    `` a`<b> c ``
    """
    line = one_liner(str(text)) or " "
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def cell(text: object) -> str:
    """Foreign text as a code span in a table.

    >>> print(cell("a|b"))
    `a\\|b`
    """
    return code(text).replace("|", "\\|")


def one_liner(text: str) -> str:
    """Text on one line, control characters visible.

    >>> one_liner("a\\n b")
    'a b'
    """
    return " ".join(visible(text).split())


def last_part(path: str) -> str:
    """A path without the folders above it, which are nobody else's business; a hub name whole."""
    return path if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else path.rstrip("/").rsplit("/", 1)[-1]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _header(config: Config, line: Evaluated | None) -> Any:
    """What the Hub reads. Base model, data set and licence are left out: only who publishes knows their names there."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    if line and line.accuracy is not None:
        name = one_liner(last_part(config.data.path))
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name=f"{name}, {config.evaluation.split} rows held out by the run",
                dataset_split=config.evaluation.split,
                metric_type="exact_match",
                metric_name="Exact match of the final answer, greedy",
                metric_value=round(line.accuracy, 6),
            )
        )
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tpaw", "self-play", "tpaw-ray"],
        model_name=config.run.name,
        eval_results=results or None,
        metrics=["exact_match"] if results else None,
    )


def _body(store: RunStore, config: Config, choice: Choice, lines: list[Evaluated], called: str) -> str:
    environment = Environment(
        loader=PackageLoader("tpaw_ray.handing_on", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: `code` is what makes foreign text plain
    )
    environment.filters |= {"code": code, "cell": cell, "number": _number, "last_part": last_part}
    return environment.get_template("card.md.j2").render(
        config=config,
        choice=choice,
        lines=lines,
        method=method_of(config),
        counts=_counts(store, store.path("prompts")),
        made=_counts(store, store.checkpoint(choice.checkpoint)),
        sheet=_sheet(store),
        python_name=json.dumps(one_liner(called)),
        shell_name=shlex.quote(one_liner(called)),
    )


def _counts(store: RunStore, directory: str) -> Mapping[str, Any]:
    return store.counts(directory) if store.is_committed(directory) else {}


def _sheet(store: RunStore) -> Mapping[str, Any]:
    path = store.path("environment.json")
    return store.read_json(path, {"packages": dict, "cluster": dict}) if store.exists(path) else {}
