"""Opponents side by side: 1, 2, 4 and 8 of them with an engine paced by a clock, so that only our own dispatch is measured.

`PacedOpponent` is a fake: it stands where an opponent's actor does and sleeps in place of generating, like an engine that takes a
fixed time a sequence and answers so many at once. The stage that asks is the real one. The ratio is the efficiency at the
largest number: its responses a second over the number times those of one opponent.
"""

import asyncio
import tempfile
import time
from typing import Annotated

import ray
import typer
from sides import example_config, record

from tpaw_ray.launch import connect
from tpaw_ray.opponents.messages import Request, Response, Sampling
from tpaw_ray.opponents.rollouts import Questions, generate
from tpaw_ray.plan import shards_asked
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt

BATCH = 64
SHARD = 128
SEQUENCE_S = 2.0


class PacedOpponent:
    """Takes `SEQUENCE_S` for a response, `BATCH` at once."""

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(BATCH)

    async def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        return list(await asyncio.gather(*map(self.answer, requests)))

    async def answer(self, request: Request) -> Response:
        async with self.places:
            await asyncio.sleep(SEQUENCE_S)
        return Response(prompt_id=request.prompt_id, generated_tokens=[1] * 100, finish_reason="stop")


def rate(store: RunStore, replicas: int, shards: int) -> float:
    """Responses a second of so many opponents, each with the same amount of work, warm."""
    config = example_config(opponents={"replicas": replicas, "batch": BATCH}, data={"shard_size": SHARD})
    opponents = [ray.remote(PacedOpponent).options(num_cpus=0, max_concurrency=1000).remote() for _ in range(replicas)]

    def ask(limit: int, name: str) -> None:
        asked = Questions(
            split="train",
            limit=limit,
            iteration=0,
            opponent=0,
            sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=100),
            run_seed=0,
            output=store.path(f"{name}-{replicas}"),
        )
        generate(store, asked, opponents, lambda count: None, at_once=shards_asked(config))

    ask(1, "warm")
    sequences = replicas * shards * SHARD
    started = time.perf_counter()
    ask(sequences, "rollout")
    seconds = time.perf_counter() - started
    for opponent in opponents:
        ray.kill(opponent)
    return sequences / seconds


def main(
    most: int = 8,
    shards: Annotated[int, typer.Option(help="Shards of prompts for each opponent.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the shards.")] = False,
) -> None:
    """Measure how responses a second grow with opponents."""
    shards = max(1, shards // 4) if quick else shards
    connect()
    with tempfile.TemporaryDirectory() as root:
        store = RunStore.open(root, "scaling")
        for index in range(most * shards):
            prompts = [
                Prompt(prompt_id=f"{index}-{row}", row=row, prompt_tokens=[1] * 100, target_tokens=[1], reference_answer=None)
                for row in range(SHARD)
            ]
            store.write_rows(store.shard(store.prompts("train"), index), prompts, Prompt)
        numbers = [2**power for power in range(most.bit_length()) if 2**power <= most]
        rates = {number: round(rate(store, number, shards), 1) for number in numbers}
    efficiency = {number: round(found / number / rates[1], 3) for number, found in rates.items()}
    row = {"ratio": efficiency[numbers[-1]], "responses_per_s": rates, "efficiency": efficiency, "shards": shards}
    print(f"scaling ratio={row['ratio']:.2f}  {row}  one engine alone {BATCH / SEQUENCE_S}/s")
    record("scaling", row)


if __name__ == "__main__":
    typer.run(main)
