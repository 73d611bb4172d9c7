"""Hand-over between stages: the wall clock of `tpaw run` against the sum of the stages' own work, on the demo's task.

The ratio is work over wall clock, 1 where nothing waits. Start-up (Ray, imports, engines, worker group) counts as hand-over.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from side_by_side import record

from tpaw_ray.runs.store import RunStore


def main(
    config: Annotated[str, typer.Option(help="A job; its model and data must be there.")] = "jobs/demo.yaml",
    override: Annotated[list[str] | None, typer.Option(help="key=value, as for tpaw run.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One iteration.")] = False,
) -> None:
    """Run the job and compare."""
    overrides = [*(override or []), *(["iterations=1"] if quick else [])]
    tpaw = Path(sys.executable).with_name("tpaw")
    with tempfile.TemporaryDirectory() as root:
        started = time.perf_counter()
        subprocess.run([tpaw, "run", config, *overrides, f"run.root={root}", "run.name=overhead"], check=True)
        wall = time.perf_counter() - started
        store = RunStore.open(root, "overhead")
        rows = store.read_json(store.path("summary.json"))["iterations"]
    stages: dict[str, float] = {}
    for row in rows:
        for stage, seconds in row["seconds"].items():
            stages[stage] = round(stages.get(stage, 0.0) + seconds, 1)
    work = sum(stages.values())
    print(f"overhead ratio={work / wall:.2f}  work {work:.0f} s {stages}  wall clock {wall:.0f} s")
    record(
        "overhead",
        {
            "ratio": round(work / wall, 3),
            "work_s": round(work, 1),
            "wall_s": round(wall, 1),
            "stages_s": stages,
            "config": config,
        },
    )


if __name__ == "__main__":
    typer.run(main)
