"""The work of scoring as a list of shards: which player scores which responses, and where the numbers go."""

from dataclasses import dataclass

from tpaw_ray.runs.store import RunStore


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


def _name(path: str) -> str:
    return path.rsplit("/", 1)[1]
