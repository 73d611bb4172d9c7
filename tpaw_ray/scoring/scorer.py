"""A scorer: a Ray actor that computes log-probabilities of responses under frozen players, with the learner's own model code.

Torch is imported in the actor's process only.
"""

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tpaw_ray.config import Config
from tpaw_ray.faults import Place, reached
from tpaw_ray.processes import free_memory
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt, Score
from tpaw_ray.scoring.shards import ScoreShard, score_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tpaw_ray.policy.logprobs import Policy


class Scorer:
    """Keeps one player's model loaded, or the start model with the team's adapters; work comes sorted by player.

    Ray runs several calls at once: one computes, others wait for their generations without holding it up.
    """

    def __init__(self, config: Config, store: RunStore) -> None:
        import torch

        # The policy's imports take seconds; here they are part of the warm-up.
        import tpaw_ray.policy.model  # noqa: F401

        torch.set_num_threads(config.scoring.threads or os.cpu_count() or 1)
        self.config = config
        self.store = store
        self.device = "cuda" if config.scoring.gpus else "cpu"
        self.loaded = ""
        self.adapters: set[str] = set()
        self.computing = threading.Lock()
        self.worked_s = 0.0

    def score(self, shard: ScoreShard) -> int:
        """Score a shard, once its generations are there, and write its numbers; returns how many."""
        while shard.generations and not self.store.exists(shard.generations):
            time.sleep(self.store.poll_s)
        with self.computing:
            began = time.perf_counter()
            count = self._score(shard)
            self.worked_s += time.perf_counter() - began
        return count

    def _score(self, shard: ScoreShard) -> int:
        self._load(shard.player)
        prompts = self.store.read_rows(shard.prompts, Prompt)[: shard.take]
        if shard.generations:
            said = {row.prompt_id: row.generated_tokens for row in self.store.read_rows(shard.generations, Generation)}
            responses = [said[prompt.prompt_id] for prompt in prompts]
        else:
            responses = [prompt.target_tokens for prompt in prompts]
        asked = [prompt.prompt_tokens for prompt in prompts]
        logps = response_logps(self.policy, asked, responses, self.config.scoring.batch_tokens, self.device)
        reached(Place.SCORE, self.store.inside(shard.output))
        scores = [
            Score(player=shard.player, response_id=prompt.prompt_id, logp=logp)
            for prompt, logp in zip(prompts, logps, strict=True)
        ]
        self.store.write_rows(shard.output, scores, Score, key=score_key(shard, self.store, self.config))
        return len(scores)

    def rest(self) -> float:
        """Free the model's memory, which others on the device need between stages.

        Returns the seconds worked since the last rest.
        """
        self._unload()
        worked_s, self.worked_s = self.worked_s, 0.0
        return worked_s

    def _unload(self) -> None:
        self.loaded = ""
        self.adapters.clear()
        self.__dict__.pop("policy", None)
        free_memory()

    def _load(self, player: int) -> None:
        self._load_weights(self.store.checkpoint(self.config.base_of(player)))
        if not self.config.adapters:
            return
        from tpaw_ray.policy.adapter import load_adapter, use_adapter

        name = f"checkpoint-{player}" if player else ""
        if name and name not in self.adapters:
            load_adapter(self.policy.model, Path(self.store.on_disk(self.store.checkpoint(player))), name)
            self.adapters.add(name)
        use_adapter(self.policy.model, name)

    def _load_weights(self, checkpoint: str) -> None:
        if self.loaded == checkpoint:
            return
        from tpaw_ray.policy.logprobs import Policy, check_policy
        from tpaw_ray.policy.model import load_model

        self._unload()  # two players at once may be more than the device holds
        model = load_model(
            self.store.on_disk(checkpoint),
            precision=self.config.learner.precision,
            attention=self.config.model.attention,
            trust_remote_code=self.config.model.trust_remote_code,
        )
        self.policy = Policy(model).to(self.device).eval()
        check_policy(self.policy)
        self.loaded = checkpoint


def response_logps(
    policy: "Policy",
    prompts: "Sequence[Sequence[int]]",
    responses: "Sequence[Sequence[int]]",
    batch_tokens: int,
    device: str,
) -> list[float]:
    """Summed log-probability in nats of every response, in order, computed in batches of like length; 0 of an empty one."""
    import torch

    from tpaw_ray.policy.batch import gather_by_tokens, token_batch

    said = [index for index, response in enumerate(responses) if response]
    lengths = [[len(prompts[index]) + len(responses[index])] for index in said]
    logps = [0.0] * len(responses)
    for places in gather_by_tokens(lengths, batch_tokens, packed=policy.packed):
        indices = [said[place] for place in places]
        batch = token_batch([prompts[i] for i in indices], [responses[i] for i in indices])
        with torch.inference_mode():
            found = policy(batch.to(device)).tolist()
        for index, logp in zip(indices, found, strict=True):
            logps[index] = logp
    return logps
