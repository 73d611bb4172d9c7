"""What the benchmarks share: real text, one process a side, one line with the ratio, one row with machine and versions."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tpaw_ray.config import Config, resolve_config
from tpaw_ray.data.prompts import iter_prompts
from tpaw_ray.data.template import load_tokenizer
from tpaw_ray.plan import multiplies_bf16
from tpaw_ray.processes import model_process
from tpaw_ray.runs.environment import environment
from tpaw_ray.schema import Prompt

RESULTS = Path(__file__).with_name("results")
MODEL = "models/smollm2-135m"
DATA = "../shared/data/gsm8k/train.jsonl"

Figures = dict[str, float]
TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Sides:
    """A comparison: each side is a function that returns its figures, and runs in a process of its own."""

    name: str
    ours: Callable[[Any], Figures]
    theirs: Callable[[Any], Figures]
    figure: str
    """The figure whose ratio, ours over theirs, is the result; larger is better."""
    worker: bool = False
    """Whether our side is what a worker of the project does, and so needs the environment that the project gives to it."""


def run(sides: Sides, settings: dict[str, Any]) -> None:
    """Run both sides, one after the other, in fresh processes; print the line, write `results/NAME.jsonl`.

    A process that was started with `SIDE=ours` or `SIDE=theirs` runs that side only.
    """
    side = os.environ.get("SIDE")
    if side:
        figures = (sides.ours if side == "ours" else sides.theirs)(settings)
        figures["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        Path(os.environ["FIGURES"]).write_text(json.dumps(figures))
        return
    found = {which: _in_process(sides, which) for which in ("theirs", "ours")}
    ratio = found["ours"][sides.figure] / found["theirs"][sides.figure]
    print(f"{sides.name} ratio={ratio:.2f}  ours {found['ours']}  theirs {found['theirs']}")
    record(sides.name, {"ratio": round(ratio, 3), "figure": sides.figure, **found, "settings": _without_places(settings)})


def record(name: str, row: dict[str, Any]) -> None:
    """Append a row with date, machine and versions to `results/NAME.jsonl`."""
    sheet = environment(example_config(), {})
    machine = {key: sheet[key] for key in ("packages", "python", "cpu", "cores", "memory_gib", "commit")}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"benchmark": name, "date": date.today().isoformat(), **row, "machine": machine}) + "\n")


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    # Where files lie on a machine says nothing: folder and name are enough.
    return {key: "/".join(Path(value).parts[-2:]) if isinstance(value, str) else value for key, value in settings.items()}


def _in_process(sides: Sides, side: str) -> Figures:
    file = RESULTS / f".{sides.name}-{side}.json"
    settings = {"SIDE": side, "FIGURES": str(file)}
    if side == "ours" and sides.worker:
        settings |= model_process(0)["env_vars"]
    RESULTS.mkdir(exist_ok=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, *sys.argv], env=os.environ | settings, check=True)
    figures: Figures = json.loads(file.read_text())
    file.unlink()
    print(f"  {side}: {figures} ({time.perf_counter() - started:.0f} s)", flush=True)
    return figures


def chosen_precision(asked: str) -> str:
    """`auto` becomes bf16 where the processor (or a GPU) multiplies in it, fp32 elsewhere; both sides then run in it.

    Found without torch, whose import is part of what is measured.
    """
    if asked != "auto":
        return asked
    return "bf16" if Path("/dev/nvidiactl").exists() or multiplies_bf16() else "fp32"


def start_worker() -> None:
    """Make this process the only worker of a group on the CPU, as Ray Train would, with all cores."""
    os.environ |= {
        "LOCAL_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533",
    }
    import torch
    from torch import distributed

    torch.set_num_threads(os.cpu_count() or 1)
    distributed.init_process_group("gloo", rank=0, world_size=1)


def example_config(**sections: Any) -> Config:
    """A config for SmolLM2 on GSM8K; `sections` are merged over it."""
    base = {
        "run": {"name": "benchmark"},
        "model": {"path": MODEL},
        "data": {
            "path": DATA,
            "prompt_length": 320,
            "max_length": 640,
            "validation_fraction": 0.0,
            "test_fraction": 0.0,
            "shard_size": 32,
        },
    }
    return resolve_config(base, sections)


def real_prompts(config: Config, count: int) -> list[Prompt]:
    """The first training prompts with their targets."""
    tokenizer = load_tokenizer(config.model)
    limited = resolve_config(config.model_dump(), {"data": {"limit": count}})
    return [prompt for fate, prompt, _ in iter_prompts(limited, tokenizer) if prompt is not None]
