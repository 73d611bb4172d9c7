"""Hand-over between stages: the wall clock of `tpaw run` against the time in which a stage worked.

The ratio is work over wall clock, 1 where nothing waits. A moment in which two stages work counts once; waiting for an engine or
for generations counts as hand-over, and so does starting Ray, imports and the worker group. Two ratios are given: of the whole
command, and of its iterations, which begin when the start is evaluated.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from sides import record

from tpaw_ray.runs.store import RunStore

Interval = tuple[float, float]


def intervals(store: RunStore) -> dict[str, list[Interval]]:
    """When each stage worked, in Unix time."""
    found: dict[str, list[Interval]] = {}
    for marker in Path(store.root).rglob("committed.json"):
        content = store.read_json(str(marker))
        counts = content["counts"]
        if "seconds" in counts:
            parts = marker.relative_to(store.root).parts
            stage = "evaluate" if parts[0] == "evaluations" else parts[2]
            began = content["ended"] - counts["seconds"] + counts.get("waited", 0.0)
            found.setdefault(stage, []).append((began, content["ended"]))
    return found


def picture(stages: dict[str, list[Interval]], begin: float, end: float, width: int = 100) -> str:
    """A line a stage, with a mark where it worked."""
    lines = []
    for stage, spans in sorted(stages.items(), key=lambda item: min(item[1])):
        cells = [begin + (end - begin) * (cell + 0.5) / width for cell in range(width)]
        marks = "".join("█" if any(first <= at <= last for first, last in spans) else "·" for at in cells)
        lines.append(f"{stage:<9} {marks}")
    return "\n".join(lines)


def covered(spans: list[Interval], begin: float, end: float) -> float:
    """Seconds between `begin` and `end` in which at least one span goes on.

    >>> covered([(0.0, 2.0), (1.0, 3.0), (5.0, 9.0)], 0.0, 6.0)
    4.0
    """
    total, reached = 0.0, begin
    for first, last in sorted(spans):
        total += max(0.0, min(last, end) - max(first, reached))
        reached = max(reached, min(last, end))
    return total


def main(
    config: Annotated[str, typer.Option(help="A job; its model and data must be there.")] = "jobs/demo.yaml",
    override: Annotated[list[str] | None, typer.Option(help="key=value, as for tpaw run.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One iteration.")] = False,
) -> None:
    """Run the job and compare."""
    overrides = [*(override or []), *(["iterations=1"] if quick else [])]
    tpaw = Path(sys.executable).with_name("tpaw")
    with tempfile.TemporaryDirectory() as root:
        started = time.time()
        subprocess.run([tpaw, "run", config, *overrides, f"run.root={root}", "run.name=overhead"], check=True)
        ended = time.time()
        stages = intervals(RunStore.open(root, "overhead"))
    spans = [span for spans in stages.values() for span in spans]
    first = min(last for _, last in stages["evaluate"])
    last = max(last for _, last in spans)
    work, playing = covered(spans, started, ended), covered(spans, first, last)
    row = {
        "ratio": round(work / (ended - started), 3),
        "wall_s": round(ended - started, 1),
        "iterations_ratio": round(playing / (last - first), 3),
        "iterations_s": round(last - first, 1),
        "stages_s": {stage: round(sum(end - begin for begin, end in spans), 1) for stage, spans in stages.items()},
        "config": config,
        "overrides": overrides,
    }
    print(picture(stages, started, ended))
    print(f"overhead ratio={row['ratio']:.2f}  {row}")
    record("overhead", row)


if __name__ == "__main__":
    typer.run(main)
