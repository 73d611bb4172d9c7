"""The work of scoring as a list of shards: which player scores which responses, and where the numbers go."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.config import Config
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt


@dataclass(frozen=True, kw_only=True)
class ScoreShard:
    """One player's work on one shard: targets where `generations` is empty, otherwise the generations in that file.

    The file of generations may be yet to come: a scorer waits for it.
    """

    player: int
    prompts: str
    generations: str
    take: int
    """Prompts of the shard whose responses are scored, from the first one on."""
    output: str


def target_shards(store: RunStore, player: int, split: str, output: str, limit: int | None = None) -> list[ScoreShard]:
    """The work of scoring a split's targets, the first `limit` of them, into the folder `output`."""
    shards, left = [], limit
    for path in store.files(store.prompts(split)):
        size = store.num_rows(path)
        take = size if left is None else min(size, left)
        left = None if left is None else left - take
        if take:
            shards.append(ScoreShard(player=player, prompts=path, generations="", take=take, output=f"{output}/{_name(path)}"))
    return shards


def generation_shards(store: RunStore, player: int, generations: str, output: str) -> list[ScoreShard]:
    """The work of scoring the generations of training prompts in a folder, which are there or in the making."""
    return [
        ScoreShard(
            player=player,
            prompts=path,
            generations=f"{generations}/{_name(path)}",
            take=store.num_rows(path),
            output=f"{output}/{_name(path)}",
        )
        for path in store.files(store.prompts("train"))
    ]


def scores_of(shard: ScoreShard) -> str:
    """The folder of the scoring stage that a shard belongs to.

    >>> output = "r/iterations/000/scores/player-000/targets/00000.parquet"
    >>> scores_of(ScoreShard(player=0, prompts="", generations="", take=1, output=output))
    'r/iterations/000/scores'
    """
    return shard.output.rsplit("/player-", 1)[0]


def num_tokens(shards: Sequence[ScoreShard], store: RunStore) -> int:
    """Tokens that scoring runs through a model, prompts included."""
    return sum(
        store.num_tokens(shard.prompts, Prompt, "prompt_tokens", shard.take)
        + (
            store.num_tokens(shard.generations, Generation, "generated_tokens")
            if shard.generations
            else store.num_tokens(shard.prompts, Prompt, "target_tokens", shard.take)
        )
        for shard in shards
    )


def shards_to_score(
    store: RunStore, config: Config, iteration: int, players: Sequence[int], rollouts: Sequence[Rollout]
) -> list[ScoreShard]:
    """What the pairs of an iteration need and no earlier iteration scored.

    Players newest first; of a player's work first what is there, then the new rollouts, which are in the making meanwhile.
    """
    shards = []
    for player in players:
        shards += target_shards(store, player, "train", store.target_scores(player))
        for rollout in sorted(rollouts):
            shards += generation_shards(store, player, store.rollout(rollout), store.rollout_scores(player, rollout))
    own = f"{store.iteration(iteration)}/"
    return [shard for shard in shards if shard.output.startswith(own) or not is_scored(shard, store, config)]


def score_key(shard: ScoreShard, store: RunStore, config: Config) -> str:
    """What a shard's numbers depend on, as a hash: weights, token ids, precision, attention, kind of device.

    Template, tokenizer and lengths act through the token ids. Kept with the numbers, so that old ones are never taken for those
    of another model or other responses.
    """
    responses = store.checksum(shard.generations) if shard.generations else ""
    return hashlib.sha256(
        json.dumps(
            [
                *(store.checksums(store.checkpoint(number)) for number in sorted({shard.player, config.base_of(shard.player)})),
                store.checksum(shard.prompts),
                shard.take,
                responses,
                config.learner.precision,
                config.model.attention,
                "cuda" if config.scoring.gpus else "cpu",
            ]
        ).encode()
    ).hexdigest()


def is_scored(shard: ScoreShard, store: RunStore, config: Config) -> bool:
    """Whether a shard's numbers are there, and made from what is there now."""
    if not store.exists(shard.output) or (shard.generations and not store.exists(shard.generations)):
        return False
    return store.key_of(shard.output) == score_key(shard, store, config)


def _name(path: str) -> str:
    return path.rsplit("/", 1)[1]
