"""Evaluations as a person reads them on a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from tpaw_ray.evaluation.harness import HarnessRun
from tpaw_ray.evaluation.sampled import Figure, shown
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.wording import listed


def show_exact(results: Sequence[Mapping[str, Any]], reporter: Reporter) -> None:
    """Accuracy, pass@k and majority vote with their intervals, a row a checkpoint."""

    def cell(found: dict[str, Any] | None) -> str:
        return shown(Figure(**found) if found else None)

    several = results[0]["settings"]["samples"] > 1
    ks = list(results[0]["pass_at"])[1:] if several else []
    columns = ["checkpoint", "judged", "accuracy", *(f"pass@{k}" for k in ks), *(["majority"] if several else [])]
    rows = [
        [
            result["name"],
            str(result["judged"]),
            cell(result["accuracy"]),
            *(cell(result["pass_at"].get(k)) for k in ks),
            *([cell(result["majority"])] if several else []),
        ]
        for result in results
    ]
    reporter.table(f"exact match, {results[0]['split']}", columns, rows)
    for result in results:
        if result["set_aside"]:
            reporter.say(f"warning: {result['name']}: {result['set_aside']} prompts end every engine, and are not judged")


def show_tasks(results: Sequence[Mapping[str, Any]], wanted: HarnessRun, reporter: Reporter) -> None:
    """The metrics of every task, and the mean of the headlines."""
    rows = []
    for result in results:
        for task, metrics in result["metrics"].items():
            for metric, value in metrics.items():
                name, _, filtered = metric.partition(",")
                if isinstance(value, int | float) and not name.endswith("_stderr"):
                    error = metrics.get(f"{name}_stderr,{filtered}")
                    sure = f" ± {1.96 * error:.3f}" if isinstance(error, float) else ""
                    rows.append([result["name"], task, metric, f"{value:.3f}{sure}"])
        if result["average"] is not None:
            rows.append([result["name"], "average of headlines", "", f"{result['average']:.3f}"])
    reporter.table(f"{wanted.title} (± 1.96 standard errors)", ["checkpoint", "task", "metric", "value"], rows)


def show_versus(result: Mapping[str, Any], path: str, reporter: Reporter) -> None:
    """Win rates with their intervals, and the replies that hold no verdict."""
    rates = [shown(Figure(**found)) if (found := result[key]) else "–" for key in ("win_rate", "length_controlled")]
    columns = ["first", "second", "questions", "wins", "ties", "losses", "alike in both orders", "win rate", "length-controlled"]
    counts = [str(result[key]) for key in ("questions", "wins", "ties", "losses", "consistent")]
    reporter.table("head to head", columns, [[result["first"], result["second"], *counts, *rates]])
    if unreadable := result["unreadable"]:
        reporter.say(
            f"warning: {len(unreadable)} replies of the judge hold no verdict, and their questions are left out: "
            f"{listed(unreadable)}"
        )
    for side, number in zip(("first", "second"), result["cut_off"], strict=True):
        warn_of_cut_off(result[side], number, reporter)
    reporter.say(f"the result is in {path}, every reply in verdicts.jsonl beside it")


def warn_of_cut_off(name: str, number: int, reporter: Reporter) -> None:
    """Say how many answers ended for want of room."""
    if number:
        reporter.say(
            f"warning: {number} answers of {name} were cut off; --max-new-tokens and data.max_length say how long they may get"
        )
