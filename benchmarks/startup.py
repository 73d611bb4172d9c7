"""Start-up: `tpaw run` on a few rows, with the packages compiled as `cluster/install.sh` leaves them, and without their bytecode.

The other side is what a process does that finds no bytecode and may keep none (`PYTHONDONTWRITEBYTECODE`, as in many images): it
compiles what it imports. Python's own library is compiled on both sides. Refused where the packages are not compiled.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Annotated

import typer
from sides import record

ROWS = 64


def seconds(config: str, environment: dict[str, str]) -> float:
    """Of a run of one iteration, from the command to its end."""
    tpaw = Path(sys.executable).with_name("tpaw")
    with tempfile.TemporaryDirectory() as root:
        overrides = ["iterations=1", f"data.limit={ROWS}", f"run.root={root}", "run.name=startup"]
        started = time.perf_counter()
        subprocess.run([tpaw, "run", config, *overrides], check=True, env=os.environ | environment)
        return time.perf_counter() - started


def main(config: Annotated[str, typer.Option(help="A job; its model and data must be there.")] = "jobs/demo.yaml") -> None:
    """Run the job both ways and compare."""
    for package in ("ray", "torch", "transformers", "vllm", "deepspeed"):
        source = find_spec(package).origin
        if not Path(cache_from_source(source)).exists():
            sys.exit(f"{source}: found no bytecode, expected a package that is compiled; cluster/install.sh compiles them")
    ours = seconds(config, {})  # first: the other side then finds all files in memory
    with tempfile.TemporaryDirectory() as bytecode:
        bare = {"PYTHONPYCACHEPREFIX": bytecode}
        library = [sys.executable, "-m", "compileall", "-q", "-x", r"site-packages|/tests?/", sysconfig.get_path("stdlib")]
        subprocess.run(library, check=True, env=os.environ | bare)
        theirs = seconds(config, bare | {"PYTHONDONTWRITEBYTECODE": "1"})
    row = {
        "ratio": round(theirs / ours, 3),
        "ours_s": round(ours, 1),
        "theirs_s": round(theirs, 1),
        "rows": ROWS,
        "config": config,
    }
    print(f"startup ratio={row['ratio']:.2f}  {row}")
    record("startup", row)


if __name__ == "__main__":
    typer.run(main)
