"""The Ray Data stage that joins prompts, rollouts and scores into weighted preference pairs.

Shard `i` of every table speaks of the same prompts, so the join is made shard by shard and needs no shuffle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpaw_ray.algorithm.start import start_weights
from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.data.stage import for_each_shard
from tpaw_ray.plan import PAIRING_CPUS
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Pair, Prompt, Score


@dataclass(frozen=True, kw_only=True)
class PairRecipe:
    """What the pairs of an iteration are made of: players newest first, rollouts, and the settings of the start weights."""

    iteration: int
    players: Sequence[int]
    rollouts: Sequence[Rollout]
    reward_scale: float
    eta: float
    gamma: float


def pair(store: RunStore, recipe: PairRecipe, advance: Callable[[int], None]) -> int:
    """Write the pairs of an iteration, one file a shard; finished files are kept. Returns the number of pairs in all files."""
    names = [path.rsplit("/", 1)[1] for path in store.files(store.prompts("train"))]
    return for_each_shard(
        [{"name": name} for name in names],
        _PairShard(store, recipe),
        name="pair",
        cpus=PAIRING_CPUS,
        advance=advance,
    )


class _PairShard:
    """The join of one shard, as Ray Data carries it to a worker."""

    def __init__(self, store: RunStore, recipe: PairRecipe) -> None:
        self.store, self.recipe = store, recipe

    def __call__(self, row: dict[str, Any]) -> int:
        output = f"{self.store.pairs(self.recipe.iteration)}/{row['name']}"
        if self.store.exists(output):
            return self.store.num_rows(output)
        pairs = pairs_of_shard(self.store, self.recipe, row["name"])
        self.store.write_rows(output, pairs, Pair)
        return len(pairs)


def pairs_of_shard(store: RunStore, recipe: PairRecipe, name: str) -> list[Pair]:
    """All triplets of a shard's prompts: prompts in their order, rollouts newest first; none where a prompt has no response.
    Without rollouts, each prompt with its target alone.

    Raises:
        RunError: when a table of the shard is missing or damaged.
    """
    prompts = store.read_rows(f"{store.prompts('train')}/{name}", Prompt)
    if not recipe.rollouts:
        return [_alone(recipe, prompt) for prompt in prompts]
    target_logps = [_logps(store, f"{store.target_scores(player)}/{name}") for player in recipe.players]
    rounds = []
    for rollout in recipe.rollouts:
        said = {row.prompt_id: row for row in store.read_rows(f"{store.rollout(rollout)}/{name}", Generation)}
        rounds.append((said, [_logps(store, f"{store.rollout_scores(player, rollout)}/{name}") for player in recipe.players]))
    return [
        _weighted(
            recipe,
            prompt,
            said[prompt.prompt_id],
            [scores[prompt.prompt_id] for scores in target_logps],
            [scores[prompt.prompt_id] for scores in logps],
        )
        for prompt in prompts
        for said, logps in rounds
        if said[prompt.prompt_id].generated_tokens
    ]


def _alone(recipe: PairRecipe, prompt: Prompt) -> Pair:
    return Pair(
        prompt_id=prompt.prompt_id,
        iteration=recipe.iteration,
        opponent=recipe.iteration,
        prompt_tokens=prompt.prompt_tokens,
        target_tokens=prompt.target_tokens,
        generated_tokens=[],
        players=[],
        reference_target_logps=[],
        reference_generated_logps=[],
        start_alpha=[],
        start_beta=[],
    )


def _weighted(recipe: PairRecipe, prompt: Prompt, said: Generation, target_logps: list[float], logps: list[float]) -> Pair:
    alpha, beta = start_weights(target_logps, logps, reward_scale=recipe.reward_scale, eta=recipe.eta, gamma=recipe.gamma)
    return Pair(
        prompt_id=prompt.prompt_id,
        iteration=said.iteration,
        opponent=said.opponent,
        prompt_tokens=prompt.prompt_tokens,
        target_tokens=prompt.target_tokens,
        generated_tokens=said.generated_tokens,
        players=list(recipe.players),
        reference_target_logps=target_logps,
        reference_generated_logps=logps,
        start_alpha=alpha,
        start_beta=beta,
    )


def _logps(store: RunStore, path: str) -> dict[str, float]:
    return {row.response_id: row.logp for row in store.read_rows(path, Score)}
