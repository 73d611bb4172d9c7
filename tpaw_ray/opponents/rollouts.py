"""The Ray Data stage that has opponents answer prompts, shard by shard."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from tpaw_ray.config import Config
from tpaw_ray.data.stage import ask_for_each_shard
from tpaw_ray.errors import RunError
from tpaw_ray.opponents.messages import Request, Sampling
from tpaw_ray.opponents.roster import ask
from tpaw_ray.opponents.seeds import request_seed
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Who answers what: the prompts of a split (its first `limit`), and the folder the answers go to."""

    split: str
    limit: int | None
    iteration: int
    opponent: int
    sampling: Sampling
    run_seed: int
    output: str
    adapter: str = ""
    """Folder of the adapter that answers, where the opponent is one."""


def adapter_of(store: RunStore, config: Config, checkpoint: int) -> str:
    """The folder of a checkpoint that is an adapter; empty for one that holds all weights."""
    return "" if config.base_of(checkpoint) == checkpoint else store.checkpoint(checkpoint)


def generate(
    store: RunStore,
    questions: Questions,
    opponents: Sequence[ActorHandle],
    advance: Callable[[int], None],
    *,
    at_once: int,
) -> None:
    """Have the opponents answer; finished shards are kept. Calls `advance(sequences)` as shards finish.

    `at_once` shards are under way at once (`plan.shards_asked`), each dealt to all opponents.

    Raises:
        GenerationError: when a prompt cannot be answered, or an opponent is gone for good.
        RunError: when a table cannot be read, or what tasks wrote does not appear in the run's folder.
    """
    asked: list[dict[str, Any]] = []
    while missing := _missing(store, questions):
        if missing == asked:
            raise RunError(
                f"{missing[0]['output']}: was written where this node does not see it; run.root must be a shared folder"
            )
        ask_for_each_shard(
            missing, _GenerateShard(store, questions, list(opponents)), name="generate", at_once=at_once, advance=advance
        )
        asked = missing


class _GenerateShard:
    """One shard's questions, as Ray Data carries them to a process that waits while the engines work."""

    def __init__(self, store: RunStore, questions: Questions, opponents: list[ActorHandle]) -> None:
        self.store, self.questions, self.opponents = store, questions, opponents

    def __call__(self, row: dict[str, Any]) -> int:
        asked = self.questions
        if self.store.exists(row["output"]):  # done by a task that died later
            return int(row["take"])
        prompts = self.store.read_rows(row["prompts"], Prompt)[: row["take"]]
        requests = [
            Request(
                prompt_id=prompt.prompt_id,
                prompt_tokens=list(prompt.prompt_tokens),
                seed=request_seed(asked.run_seed, asked.iteration, asked.opponent, prompt.prompt_id),
                adapter=asked.adapter,
            )
            for prompt in prompts
        ]
        responses = ask(self.opponents, row["index"], requests, asked.sampling)
        generations = [
            Generation(
                prompt_id=response.prompt_id,
                iteration=asked.iteration,
                opponent=asked.opponent,
                generated_tokens=response.generated_tokens,
                finish_reason=response.finish_reason,
            )
            for response in responses
        ]
        self.store.write_rows(row["output"], generations, Generation)
        return len(generations)


def _missing(store: RunStore, questions: Questions) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    left = questions.limit
    for index, path in enumerate(store.files(store.prompts(questions.split))):
        size = store.num_rows(path)
        take = size if left is None else min(size, left)
        left = None if left is None else left - take
        output = store.shard(questions.output, index)
        if take and not store.exists(output):
            rows.append({"index": index, "prompts": path, "take": take, "output": output})
    return rows
