"""An experiment as a person reads it: the plan, and the outcome on a terminal and in `table.md`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tpaw_ray.experiment.design import Design
from tpaw_ray.experiment.phases import Planned
from tpaw_ray.experiment.record import Record
from tpaw_ray.experiment.table import COMPARISON_COLUMNS, SCORE_COLUMNS, comparison_cells, markdown, remarks, score_cells
from tpaw_ray.runs.progress import Reporter

CHOICE_COLUMNS = ("method", "settings", "validation accuracy", "of", "at the grid's edge")
NOTES = (
    "Accuracy on the test split. `best` is the iteration that was best on validation, `last` the last one; ± is the standard "
    "deviation over the seeds. Differences are paired by seed, with Student's 95 % interval and the paired t-test; Cohen's d is "
    "the mean difference over the standard deviation of the differences; Holm's correction is for all comparisons of the table "
    "on the same checkpoint. With few seeds intervals are wide and d is large easily."
)


def show(record: Record, reporter: Reporter) -> None:
    """The outcome on a terminal."""
    reporter.table("chosen on validation", list(CHOICE_COLUMNS), choice_cells(record.points))
    reporter.table(f"{record.design.name}: accuracy on test", list(SCORE_COLUMNS), score_cells(record.table))
    for remark in remarks(record.table):
        reporter.say(remark)
    cells = comparison_cells(record.table)
    if cells:
        reporter.table("paired by seed", list(COMPARISON_COLUMNS), cells)


def write_table(record: Record) -> None:
    """The outcome as `table.md` in the experiment's folder."""
    parts = [
        f"# {record.design.name}",
        markdown(SCORE_COLUMNS, score_cells(record.table)),
        *remarks(record.table),
        NOTES,
        markdown(COMPARISON_COLUMNS, comparison_cells(record.table)),
        "Settings, chosen on validation before the first final run:",
        markdown(CHOICE_COLUMNS, choice_cells(record.points)),
        "Order: " + ", ".join(f"{event['event']} {event['at']}" for event in record.protocol) + ".",
    ]
    record.store.write_bytes(record.store.path("table.md"), ("\n\n".join(parts) + "\n").encode())


def show_plan(design: Design, runs: Sequence[Planned], finished: Mapping[str, bool], reporter: Reporter) -> None:
    """How many runs there are, and which."""
    columns = ["phase", "method", "settings", "seeds", "runs", "finished"]
    rows = []
    for phase in ("tuning", "final"):
        for method in design.methods:
            own = [run for run in runs if (run.phase, run.method) == (phase, method)]
            if not own:
                continue
            settings = str(len(design.points(method))) if phase == "tuning" else "the chosen"
            seeds = ", ".join(map(str, dict.fromkeys(run.seed for run in own)))
            done = sum(finished[run.key] for run in own)
            rows.append([phase, method, settings, seeds, str(len(own)), str(done)])
    reporter.table(design.name, columns, rows)
    for axis, values in (design.tuning.grid if design.tuning else {}).items():
        reporter.say(f"tuned: {axis}: {', '.join(map(str, values))}")
    tuning = sum(run.phase == "tuning" for run in runs)
    together = "as many at once as the cluster holds" if design.parallel == "resources" else f"{design.parallel} at once"
    reporter.say(
        f"{len(runs)} runs: {tuning} tuning, {len(runs) - tuning} final, {together}; {sum(finished.values())} are finished"
    )


def choice_cells(points: Mapping[str, Any]) -> list[list[str]]:
    """The choices, in the order of `CHOICE_COLUMNS`."""
    rows = []
    for method, choice in points.items():
        chosen = next((point for point in choice["points"] if point["settings"] == choice["settings"]), None)
        given_up = sum(point["accuracy"] is None for point in choice["points"])
        of = f"{len(choice['points'])} settings" + (f", {given_up} given up" if given_up else "")
        accuracy = f"{chosen['accuracy']:.4f}" if chosen else "–"
        rows.append([method, _told(choice["settings"]) or "–", accuracy, of, ", ".join(choice["at_edge"]) or "–"])
    return rows


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
