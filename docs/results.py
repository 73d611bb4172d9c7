"""Write `docs/results.md` and its pictures from the small study and what follows it, when they are done.

python docs/results.py runs/experiments/small-study   # takes its figures to benchmarks/results/small_study.json, then draws;
                                                      # the same of small-study-finer and small-study-finer-tpaw
python docs/results.py                                # writes tables and pictures from these files

What is written by hand between the tables stays.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tpaw_ray.experiment.design import START
from tpaw_ray.experiment.table import (
    COMPARISON_COLUMNS,
    ON,
    SCORE_COLUMNS,
    Scores,
    as_json,
    comparison_cells,
    make_table,
    markdown,
    remarks,
    score_cells,
)
from tpaw_ray.experiment.words import CHOICE_COLUMNS, choice_cells
from tpaw_ray.report.experiment import MethodCurves, gather_experiment
from tpaw_ray.runs.store import RunStore

PAGE = Path(__file__).with_name("results.md")
RESULTS = Path(__file__).parents[1] / "benchmarks/results"
COMMANDS = {
    "small-study": "make small-study",
    "small-study-finer": "tpaw experiment jobs/small_study_finer.yaml",
    "small-study-finer-tpaw": "tpaw experiment jobs/small_study_finer_tpaw.yaml",
}
"""By the experiment's name, which is its file's as well."""
EARLIER = "small_study_three_iterations.json"
"""Of `small_study.yaml` before it was made to fit one sitting; it is not made again."""
INK = "#7d8590"
"""Of axes and text: the pictures have no ground of their own, and this is legible on white and on black."""
COLOURS = ("#d9480f", "#1c7ed6", "#ae3ec9", "#0ca678", "#e0a100", "#e64980")
PANELS = {
    "target_reward": "target reward",
    "generated_reward": "generated reward",
    "target_weight_share": "share of α = η",
    "target_logp": "log-probability of targets, nats",
}
"""Columns of `metrics.jsonl` that are drawn by optimizer step, as in the paper's figures 2 and 3."""


def take(folder: str) -> None:
    """Write the committed JSON from a finished experiment's folder."""
    store = RunStore.named(folder)
    experiment = store.read_json(store.path("experiment.json"))
    name = experiment["name"]
    if name not in COMMANDS or not experiment["table"]:
        sys.exit(
            f"{store.root}: expected {' or '.join(COMMANDS)} with its table; found {name}, {len(experiment['protocol'])} events"
        )
    figures = gather_experiment(store)
    result = {
        "command": COMMANDS[name],
        "environment": {topic: dict(facts) for topic, facts in figures.environment.items()},
        **{part: experiment[part] for part in ("protocol", "choices", "table", "failures")},
        "curves": [_drawn(one) for one in figures.curves],
    }
    path = RESULTS / _file_of(name)
    path.write_text(json.dumps(_rounded(result), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """A committed result by its file's name. What its table makes of accuracies is made anew: an earlier version of this project
    let intervals end beyond 1."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    compared = dict.fromkeys(one["to"] for row in found["table"] for one in row["comparisons"])
    return found | {"table": _made_from(found["table"], list(compared))}


def blocks(
    result: Mapping[str, Any], spin: Mapping[str, Any], tpaw: Mapping[str, Any], earlier: Mapping[str, Any]
) -> dict[str, str]:
    """The tables by the name of their place in the page: of the study, the finer grids of SPIN and TPAW, the earlier study."""
    finer = _side_by_side(spin["table"], tpaw["table"])
    happened = ", ".join(f"{event['event']} {event['at']}" for event in result["protocol"])
    return {
        "scores": "\n\n".join([markdown(SCORE_COLUMNS, score_cells(result["table"])), *remarks(result["table"])]),
        "comparisons": markdown(COMPARISON_COLUMNS, comparison_cells(result["table"])),
        "choices": markdown(CHOICE_COLUMNS, choice_cells(result["choices"])),
        "grid": _grid(result["choices"]),
        "seeds": _by_seed(result["table"]),
        "protocol": f"{happened}.",
        "finer-seeds": _by_seed(finer),
        "finer-comparisons": markdown(COMPARISON_COLUMNS, comparison_cells(finer)),
        "finer-grid": _grid({"spin": spin["choices"]["spin"], "tpaw": tpaw["choices"]["tpaw"]}),
        "earlier": markdown(SCORE_COLUMNS, score_cells(earlier["table"])),
    }


def render(page: str, tables: Mapping[str, str]) -> str:
    """The page with its tables put in: each between `<!-- NAME -->` and `<!-- end -->`."""
    for name, text in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, found = place.subn(partial(_between, text), page)
        if found != 1:
            raise ValueError(f"{PAGE}: found {found} places <!-- {name} -->, expected 1")
    return page


def _between(text: str, place: re.Match[str]) -> str:
    return f"{place[1]}\n{text}\n\n{place[2]}"


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Write the two pictures, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK
        ),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9.5,
        "axes.titlesize": 10,
        "svg.hashsalt": "tpaw_ray",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    figure, (tested, learned) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.15, 1), layout="constrained")
    _draw_test(tested, result["table"])
    _draw_bands(learned, result["curves"], "accuracy", "Validation accuracy by iteration, ± deviation", opacity=0.06)
    learned.set_xticks(range(len(result["curves"][0]["bands"]["accuracy"]["x"])))
    _save(figure, folder / "small-study.svg")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for axis, (column, title) in zip(axes.flat, PANELS.items(), strict=True):
        _draw_bands(axis, result["curves"], column, title)
    axes.flat[0].legend(frameon=False, fontsize=8)
    _save(figure, folder / "small-study-learning.svg")


def _draw_test(axis: Any, table: list[dict[str, Any]]) -> None:
    colours = dict(zip((row["method"] for row in table[1:]), COLOURS, strict=True))
    for place, row in enumerate(reversed(table)):
        scores, colour = row["last"], colours.get(row["method"], INK)
        axis.plot(
            scores["values"], [place] * len(scores["values"]), "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0
        )
        axis.plot([scores["low"], scores["high"]], [place, place], color=colour, linewidth=2)
        axis.plot(scores["mean"], place, "D", color=colour, markersize=6)
        axis.annotate(
            f"{scores['mean']:.3f}", (scores["mean"], place), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set_yticks(range(len(table)), [row["method"] for row in reversed(table)])
    axis.set_ylim(-0.5, len(table) - 0.2)
    axis.set_title("Test accuracy of the last iteration, 95 % interval", loc="left")


def _draw_bands(axis: Any, curves: list[dict[str, Any]], column: str, title: str, opacity: float = 0.12) -> None:
    for one, colour in zip(curves, COLOURS, strict=True):
        band = one["bands"].get(column)
        if band is None:  # fine-tuning has no players
            continue
        low, high = (
            [mean + sign * (spread or 0.0) for mean, spread in zip(band["mean"], band["deviation"], strict=True)]
            for sign in (-1, 1)
        )
        axis.plot(band["x"], band["mean"], color=colour, linewidth=1.6, label=one["method"])
        axis.fill_between(band["x"], low, high, color=colour, alpha=opacity, linewidth=0)
    axis.set_title(title, loc="left")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, transparent=True, metadata={"Date": None})  # the same numbers make the same bytes


def _side_by_side(spin: list[dict[str, Any]], tpaw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A table of both on the same starts: the start, and each method as it was chosen on its grid."""
    rows = {row["method"]: row for row in spin}
    own = next(row for row in tpaw if row["method"] == "tpaw")
    return _made_from([rows[START], own, rows["spin"]], [START, "spin"])


def _made_from(rows: list[dict[str, Any]], baselines: list[str]) -> list[dict[str, Any]]:
    """The table as this version makes it from the accuracies by seed."""
    scores = {
        row["method"]: {on: Scores.of(row[on]["values"], row[on]["checkpoints"], row[on].get("judged", ())) for on in ON}
        for row in rows
    }
    return as_json(make_table(rows[0]["seeds"], scores, baselines, {row["method"]: row.get("given_up", ()) for row in rows}))


def _by_seed(table: list[dict[str, Any]]) -> str:
    return markdown(
        ["method", *(f"seed {seed}" for seed in table[0]["seeds"])],
        [[row["method"], *(f"{value:.3f}" for value in row["last"]["values"])] for row in table],
    )


def _grid(choices: Mapping[str, Any]) -> str:
    rows = [
        [
            method,
            ", ".join(f"{key.rsplit('.', 1)[-1]} {value:g}" for key, value in point["settings"].items()),
            "given up" if point["accuracy"] is None else f"{point['accuracy']:.3f}",
        ]
        for method, choice in choices.items()
        for point in choice["points"]
    ]
    return markdown(["method", "settings", "last accuracy on validation"], rows)


def _file_of(name: str) -> str:
    return f"{name.replace('-', '_')}.json"


def _drawn(curves: MethodCurves) -> dict[str, Any]:
    return {
        "method": curves.method,
        "bands": {name: asdict(curves.bands[name]) for name in ("accuracy", *PANELS) if name in curves.bands},
    }


def _rounded(value: Any) -> Any:
    """Six digits are more than any of these numbers is known to."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take(sys.argv[1])
    study = read(_file_of("small-study"))
    finer = [read(_file_of(name)) for name in ("small-study-finer", "small-study-finer-tpaw")]
    tables = blocks(study, *finer, read(EARLIER))
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    draw(study, PAGE.parent)
    print(PAGE)
