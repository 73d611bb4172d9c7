"""Memory as data grows: prompts, rollouts, pairs and what the learner reads of them, at two sizes, a process a stage.

The stages are real. `PacedOpponent` is a fake, as in `scaling.py`: it stands where an opponent's actor does and sleeps in place
of generating. Scores are made up, and written where scorers would write them; older rounds are copies of the one generated. The
ratio is the peak memory of all stages at the smaller size over that at the larger: 1 where memory is flat.

Peaks are high-water marks of resident memory: of the stage's own process, and of the largest process that Ray started for it.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.config import Config, resolve_config
from tpaw_ray.opponents.messages import Request, Response, Sampling
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt, Score

Figures = dict[str, float]
TEAM = (2, 1, 0)
ROLLOUTS = tuple(Rollout(iteration=number, opponent=number) for number in TEAM)
BATCH = 256
SEQUENCE_S = 0.1
RESPONSE = 64
STEPS = 200
"""Steps that the learner's stage lays out and turns into tensors, of its epoch's many."""


class PacedOpponent:
    """Takes `SEQUENCE_S` for a response, `BATCH` at once."""

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(BATCH)

    async def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        return list(await asyncio.gather(*map(self.answer, requests)))

    async def answer(self, request: Request) -> Response:
        async with self.places:
            await asyncio.sleep(SEQUENCE_S)
        tokens = [6 + (request.seed + place) % 60 for place in range(RESPONSE)]
        return Response(prompt_id=request.prompt_id, generated_tokens=tokens, finish_reason="length")


# The stages. Each runs in a process of its own and returns figures beside its seconds and peaks.


def prompts(config: Config, store: RunStore) -> Figures:
    """Read, render, tokenise and sort the data."""
    from tpaw_ray.data.prompts import prepare_prompts
    from tpaw_ray.data.template import load_tokenizer

    return {"prompts": prepare_prompts(config, store, load_tokenizer(config.model)).train}


def generate(config: Config, store: RunStore) -> Figures:
    """Two paced opponents answer every prompt."""
    import ray

    from tpaw_ray.launch import connect
    from tpaw_ray.opponents.rollouts import Questions
    from tpaw_ray.opponents.rollouts import generate as ask_all
    from tpaw_ray.plan import shards_asked

    connect()
    opponents = [ray.remote(PacedOpponent).options(num_cpus=0, max_concurrency=1000).remote() for _ in range(2)]
    done: list[int] = []
    questions = Questions(
        split="train",
        limit=None,
        iteration=TEAM[0],
        opponent=TEAM[0],
        sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=RESPONSE),
        run_seed=0,
        output=store.rollout(ROLLOUTS[0]),
    )
    ask_all(store, questions, opponents, done.append, at_once=shards_asked(config))
    store.commit(questions.output, sequences=sum(done))
    ray.shutdown()
    return {"responses": sum(done)}


def scores(config: Config, store: RunStore) -> Figures:
    """Make up the scores of every player, and the older rounds."""
    for rollout in ROLLOUTS[1:]:
        shutil.copytree(store.rollout(ROLLOUTS[0]), store.rollout(rollout))
    for path in store.files(store.prompts("train")):
        name = path.rsplit("/", 1)[1]
        ids = store.read_columns(path, Prompt, "prompt_id")["prompt_id"].to_pylist()
        for player in TEAM:
            rows = [Score(player=player, response_id=key, logp=-50.0 - player) for key in ids]
            for folder in (store.target_scores(player), *(store.rollout_scores(player, rollout) for rollout in ROLLOUTS)):
                store.write_rows(f"{folder}/{name}", rows, Score)
    return {}


def pair(config: Config, store: RunStore) -> Figures:
    """Join three rounds under three players."""
    import ray

    from tpaw_ray.data.pairs import PairRecipe
    from tpaw_ray.data.pairs import pair as join
    from tpaw_ray.launch import connect

    connect()
    recipe = PairRecipe(iteration=TEAM[0], players=TEAM, rollouts=ROLLOUTS, reward_scale=0.1, eta=6.0, gamma=0.5)
    made = join(store, recipe, lambda count: None)
    store.commit(store.pairs(TEAM[0]), pairs=made)
    ray.shutdown()
    return {"pairs": made}


def learner(config: Config, store: RunStore) -> Figures:
    """What a worker reads: lengths of all triplets, an epoch's order, and the tensors of `STEPS` steps."""
    import torch

    from tpaw_ray.learner.batches import epoch_steps, micro_batches
    from tpaw_ray.learner.triplets import lengths_of, read_pairs, triplet_batch

    torch.set_num_threads(1)
    began = time.perf_counter()
    pairs = read_pairs(store, TEAM[0])
    lengths = lengths_of(pairs)
    steps = epoch_steps(lengths.prompts, config.learner.global_batch, "0")
    ready = time.perf_counter()
    for step in steps[:STEPS]:
        (share,) = micro_batches(lengths, step, workers=1, budget=8192, packed=True, share_prompts=True)
        for units in share:
            triplet_batch(pairs, units, share_prompts=True)
    return {
        "triplets": len(pairs),
        "ready_s": round(ready - began, 1),
        "step_ms": round(1000 * (time.perf_counter() - ready) / min(STEPS, len(steps)), 2),
    }


STAGES: dict[str, Callable[[Config, RunStore], Figures]] = {
    "prompts": prompts,
    "generate": generate,
    "scores": scores,
    "pair": pair,
    "learner": learner,
}


# Measuring.


def measure(folder: Path, model: str, count: int) -> dict[str, Figures]:
    """Run every stage over so many prompts in a process of its own: seconds, peaks in MiB, and what the stage counts."""
    write_data(folder / "data.jsonl", count)
    found = {}
    for stage in STAGES:
        figures = folder / f"{stage}.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--model", model, "--stage", stage, "--folder", str(folder)]
        subprocess.run(command, check=True)
        found[stage] = json.loads(figures.read_text())
    return found


def run_stage(stage: str, folder: Path, model: str) -> None:
    """One stage, in this process; its figures go into a file."""
    config = config_of(folder, model)
    with peaks() as found:
        began = time.perf_counter()
        counted = STAGES[stage](config, RunStore.open(config.run.root, config.run.name))
        seconds = round(time.perf_counter() - began, 1)
    (folder / f"{stage}.json").write_text(json.dumps({"seconds": seconds, **found, **counted}))


def config_of(folder: Path, model: str) -> Config:
    """The config of the run whose stages are measured."""
    return resolve_config(
        {
            "run": {"name": "load", "root": str(folder)},
            "model": {"path": model},
            "data": {
                "path": str(folder / "data.jsonl"),
                "prompt_length": 256,
                "max_length": 512,
                "validation_fraction": 0.0,
                "test_fraction": 0.0,
            },
        }
    )


def write_data(path: Path, count: int) -> None:
    """Sums in words, every prompt once."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"What is {number} + {7 * number % 1013}, worked out step by step, please?"
            target = (
                f"Adding {7 * number % 1013} to {number} gives {number + 7 * number % 1013}. #### {number + 7 * number % 1013}"
            )
            file.write(json.dumps({"prompt": prompt, "completion": target}) + "\n")


@contextmanager
def peaks() -> Iterator[Figures]:
    """High-water marks while the block runs, in MiB: `own_mib`, and `worker_mib` of the largest of Ray's workers below it."""
    found: Figures = {"own_mib": 0.0, "worker_mib": 0.0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for pid in descendants():
                if command_of(pid).startswith("ray::"):
                    found["worker_mib"] = max(found["worker_mib"], peak_mib(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found["own_mib"] = peak_mib(os.getpid())


def descendants() -> list[int]:
    """Processes below this one."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it ended meanwhile
            continue
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(below - {os.getpid()})


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def peak_mib(pid: int) -> float:
    """A process's `VmHWM`; unlike `ru_maxrss` it knows nothing of the process that started this one."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0.0)


def main(
    model: Annotated[str, typer.Option(help="A model's folder; only its tokenizer is used.")] = "models/demo",
    small: int = 20_000,
    large: int = 200_000,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of both sizes.")] = False,
    stage: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Measure both sizes and compare."""
    if stage:
        run_stage(stage, folder, model)
        return
    from sides import record

    found = {}
    for count in (small // 10, large // 10) if quick else (small, large):
        with tempfile.TemporaryDirectory() as place:
            found[count] = measure(Path(place), model, count)
        for name, figures in found[count].items():
            print(f"  {count:>7} {name:<9} {figures}", flush=True)
    smaller, larger = (max(max(each["own_mib"], each["worker_mib"]) for each in found[count].values()) for count in found)
    print(f"load ratio={smaller / larger:.2f}  peak {smaller:.0f} MiB at {min(found)} prompts, {larger:.0f} MiB at {max(found)}")
    record("load", {"ratio": round(smaller / larger, 3), "peak_mib": [round(smaller), round(larger)], "sizes": found})


if __name__ == "__main__":
    typer.run(main)
