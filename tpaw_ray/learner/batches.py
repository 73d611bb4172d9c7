"""Which triplets make a step, and which worker runs them in which micro-batch. Pure, and the same on every rank.

Triplets of one prompt stay together, so that their common target runs once. The order is shuffled by prompt, seeded.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tpaw_ray.policy.batch import gather_by_tokens


@dataclass(frozen=True, kw_only=True)
class TripletLengths:
    """What planning needs to know of a triplet; lengths in tokens, prompt included."""

    prompt_id: str
    target_length: int
    generated_length: int


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Triplets of one prompt that run together: one target and `len(triplets)` generations."""

    triplets: tuple[int, ...]
    longest: int

    @property
    def num_sequences(self) -> int:
        return 1 + len(self.triplets)


def epoch_steps(prompt_ids: Sequence[str], global_batch: int, seed: str) -> list[list[int]]:
    """Triplet indices of every step of an epoch: prompts shuffled, their triplets adjacent, cut every `global_batch`.

    The last step may be smaller. The same seed gives the same order whatever the number of workers.

    >>> steps = epoch_steps(["a", "b", "a", "b"], 2, seed="42")
    >>> sorted(sorted(step) for step in steps)
    [[0, 2], [1, 3]]
    """
    groups: dict[str, list[int]] = {}
    for index, prompt_id in enumerate(prompt_ids):
        groups.setdefault(prompt_id, []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    flat = [index for group in order for index in group]
    return [flat[start : start + global_batch] for start in range(0, len(flat), global_batch)]


def num_steps(num_triplets: int, global_batch: int, epochs: int) -> int:
    """Optimizer steps of an update."""
    return epochs * -(-num_triplets // global_batch)


def micro_batches(
    triplets: Sequence[TripletLengths], step: Sequence[int], *, workers: int, budget: int
) -> list[list[list[Unit]]]:
    """Lay a step's triplets out as `[worker][micro-batch][unit]`.

    Every worker gets equally many micro-batches, because workers wait for each other in each; the spare ones are empty.
    A unit over the budget is split into single triplets. The heaviest micro-batches are dealt out first, each to the worker
    with the least work.
    """
    units = _units(triplets, step, budget)
    batches = gather_by_tokens(
        [unit.longest for unit in units], _fair_budget(units, budget, workers), [unit.num_sequences for unit in units]
    )
    rows = [[units[index] for index in batch] for batch in batches]
    shares: list[list[list[Unit]]] = [[] for _ in range(workers)]
    for row in sorted(rows, key=padded_tokens, reverse=True):
        min(shares, key=lambda share: (sum(map(padded_tokens, share)), len(share))).append(row)
    longest = max(map(len, shares))
    return [share + [[] for _ in range(longest - len(share))] for share in shares]


def padded_tokens(units: Sequence[Unit]) -> int:
    """Tokens a micro-batch costs, padding included."""
    return max((unit.longest for unit in units), default=0) * sum(unit.num_sequences for unit in units)


def _units(triplets: Sequence[TripletLengths], step: Sequence[int], budget: int) -> list[Unit]:
    groups: dict[str, list[int]] = {}
    for index in step:
        groups.setdefault(triplets[index].prompt_id, []).append(index)
    units = []
    for group in groups.values():
        unit = _unit(triplets, group)
        units += [unit] if padded_tokens([unit]) <= budget else [_unit(triplets, [index]) for index in group]
    return units


def _unit(triplets: Sequence[TripletLengths], indices: Sequence[int]) -> Unit:
    longest = max(max(triplets[index].target_length, triplets[index].generated_length) for index in indices)
    return Unit(triplets=tuple(indices), longest=longest)


def _fair_budget(units: Sequence[Unit], budget: int, workers: int) -> int:
    # A step that fits into fewer micro-batches than there are workers would leave some of them idle.
    total = sum(padded_tokens([unit]) for unit in units)
    return max(1, min(budget, -(-total // workers)))
