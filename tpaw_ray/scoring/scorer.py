"""The Ray Data stage that scores responses under frozen players.

The work is a list of shards; each says which player scores which responses and where the numbers go. A shard whose file
exists was finished earlier and is not done again. Torch is imported in the scorers' processes only.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import ray

from tpaw_ray.config import Config
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt, Score


@dataclass(frozen=True, kw_only=True)
class ScoreShard:
    """One player's work on one shard: targets where `generations` is empty, otherwise the generations in that file."""

    player: int
    checkpoint: str
    prompts: str
    generations: str
    output: str


def target_shards(store: RunStore, player: int, split: str, output: str) -> list[ScoreShard]:
    """The work of scoring a split's targets into the folder `output`."""
    return [
        ScoreShard(
            player=player, checkpoint=store.checkpoint(player), prompts=path, generations="", output=f"{output}/{_name(path)}"
        )
        for path in store.files(store.prompts(split))
    ]


def generation_shards(store: RunStore, player: int, generations: str, output: str) -> list[ScoreShard]:
    """The work of scoring the generations of training prompts in a folder."""
    return [
        ScoreShard(
            player=player,
            checkpoint=store.checkpoint(player),
            prompts=f"{store.prompts('train')}/{_name(path)}",
            generations=path,
            output=f"{output}/{_name(path)}",
        )
        for path in store.files(generations)
    ]


def score(config: Config, store: RunStore, shards: Iterable[ScoreShard], advance: Callable[[int], None]) -> int:
    """Score what is not scored yet, on `scoring.workers` actors. Calls `advance(sequences)` as shards finish.

    Returns the number of sequences scored now.
    """
    missing = [asdict(shard) for shard in shards if not store.exists(shard.output)]
    if not missing:
        return 0
    done = 0
    scored = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
        Scorer,  # type: ignore[arg-type]  # Ray Data makes an actor of a class and calls the instance
        fn_constructor_args=(config, store),
        concurrency=min(config.scoring.workers, len(missing)),
        num_cpus=config.scoring.cpus,
        num_gpus=config.scoring.gpus or None,
    )
    for row in scored.iter_rows():
        done += row["sequences"]
        advance(row["sequences"])
    return done


class Scorer:
    """A Ray Data actor that keeps one player's model loaded; work comes sorted by player, so it seldom changes."""

    def __init__(self, config: Config, store: RunStore) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if not config.scoring.gpus else "cuda")
        # Threads that spin while they wait starve the other processes of a machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        torch.set_num_threads(config.scoring.threads or os.cpu_count() or 1)
        self.config = config
        self.store = store
        self.device = "cuda" if config.scoring.gpus else "cpu"
        self.loaded = ""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = ScoreShard(**row)
        self._load(shard.checkpoint)
        prompts = self.store.read_rows(shard.prompts, Prompt)
        if shard.generations:
            said = {row.prompt_id: row.generated_tokens for row in self.store.read_rows(shard.generations, Generation)}
            responses = [said[prompt.prompt_id] for prompt in prompts]
        else:
            responses = [prompt.target_tokens for prompt in prompts]
        logps = response_logps(
            self.policy, [prompt.prompt_tokens for prompt in prompts], responses, self.config.scoring.batch_tokens, self.device
        )
        scores = [
            Score(player=shard.player, response_id=prompt.prompt_id, logp=logp)
            for prompt, logp in zip(prompts, logps, strict=True)
        ]
        self.store.write_rows(shard.output, scores, Score)
        return {"sequences": len(scores)}

    def _load(self, checkpoint: str) -> None:
        if self.loaded == checkpoint:
            return
        from tpaw_ray.policy.logprobs import Policy, check_head
        from tpaw_ray.policy.model import load_model

        model = load_model(
            checkpoint,
            precision=self.config.learner.precision,
            attention=self.config.model.attention,
            trust_remote_code=self.config.model.trust_remote_code,
        )
        self.policy = Policy(model).to(self.device).eval()
        check_head(self.policy)
        self.loaded = checkpoint


def response_logps(policy, prompts, responses, batch_tokens: int, device: str) -> list[float]:  # type: ignore[no-untyped-def]
    """Summed log-probability in nats of every response, in order, computed in batches of like length."""
    import torch

    from tpaw_ray.policy.batch import gather_by_tokens, token_batch

    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    logps = [0.0] * len(lengths)
    for indices in gather_by_tokens(lengths, batch_tokens):
        batch = token_batch([prompts[i] for i in indices], [responses[i] for i in indices])
        with torch.inference_mode():
            found = policy(batch.to(device)).tolist()
        for index, logp in zip(indices, found, strict=True):
            logps[index] = logp
    return logps


def _name(path: str) -> str:
    return path.rsplit("/", 1)[1]
