"""Which triplets make a step, and which worker runs them in which micro-batch. Pure, and the same on every rank.

Triplets of one prompt stay together, so that their common target runs once. The order is shuffled by prompt, seeded.
"""

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tpaw_ray.policy.batch import cost, gather_by_tokens


@dataclass(frozen=True, kw_only=True)
class TripletLengths:
    """What planning needs to know of a triplet; lengths in tokens, prompt included."""

    prompt_id: str
    prompt_length: int
    target_length: int
    generated_length: int


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Triplets of one prompt that run together: one target and their generations, or the target alone."""

    triplets: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of its sequences, the target's first; where they share their prompt, of the prompt and then of each response."""


def epoch_steps(prompts: Sequence[str] | npt.NDArray[np.int32], global_batch: int, seed: str) -> list[list[int]]:
    """Triplet indices of every step of an epoch: prompts shuffled, their triplets adjacent, cut every `global_batch`.

    `prompts` names the prompt of each triplet. The last step may be smaller. The same seed gives the same order whatever the
    number of workers. A triplet takes 40 bytes in the result, and as much again while it is made.

    >>> steps = epoch_steps(["a", "b", "a", "b"], 2, seed="42")
    >>> sorted(sorted(step) for step in steps)
    [[0, 2], [1, 3]]
    """
    _, firsts, prompt_of = np.unique(np.asarray(prompts), return_index=True, return_inverse=True)
    order = array("q", np.argsort(firsts).tobytes())  # prompts as they first appear
    random.Random(seed).shuffle(order)
    places = np.empty(len(order), np.int32)
    places[np.asarray(order)] = np.arange(len(order))
    flat = np.argsort(places[prompt_of], kind="stable")
    return [flat[start : start + global_batch].tolist() for start in range(0, len(flat), global_batch)]


def num_steps(num_triplets: int, global_batch: int, epochs: int) -> int:
    """Optimizer steps of an update."""
    return epochs * -(-num_triplets // global_batch)


def micro_batches(
    triplets: Sequence[TripletLengths],
    step: Sequence[int],
    *,
    workers: int,
    budget: int,
    packed: bool,
    share_prompts: bool = False,
) -> list[list[list[Unit]]]:
    """Lay a step's triplets out as `[worker][micro-batch][unit]`.

    Every worker gets equally many micro-batches, because workers wait for each other in each; the spare ones are empty.
    Triplets of a prompt that exceed the budget together make several units. The heaviest micro-batches are dealt out first,
    each to the worker with the least work. `packed` says what a micro-batch costs: its tokens, or its tokens padded to the
    longest sequence; `share_prompts`, that a unit's prompt runs once.
    """

    def tokens(units: Sequence[Unit]) -> int:
        return cost(lengths_in(units), packed=packed)

    units = _units(triplets, step, budget, tokens, share_prompts)
    # A step that fits into fewer micro-batches than there are workers would leave some of them idle.
    fair = -(-sum(tokens([unit]) for unit in units) // workers)
    gathered = gather_by_tokens([unit.lengths for unit in units], max(1, min(budget, fair)), packed=packed)
    rows = [[units[index] for index in batch] for batch in gathered]
    shares: list[list[list[Unit]]] = [[] for _ in range(workers)]
    for row in sorted(rows, key=tokens, reverse=True):
        min(shares, key=lambda share: (sum(map(tokens, share)), len(share))).append(row)
    longest = max(map(len, shares))
    return [share + [[] for _ in range(longest - len(share))] for share in shares]


def lengths_in(units: Sequence[Unit]) -> list[int]:
    """Lengths of all that a micro-batch lays end to end."""
    return [length for unit in units for length in unit.lengths]


def _units(
    triplets: Sequence[TripletLengths],
    step: Sequence[int],
    budget: int,
    tokens: Callable[[Sequence[Unit]], int],
    share_prompts: bool,
) -> list[Unit]:
    groups: dict[str, list[int]] = {}
    for index in step:
        groups.setdefault(triplets[index].prompt_id, []).append(index)
    units = []
    for group in groups.values():
        held: list[int] = []
        for index in group:
            if held and tokens([unit_of(triplets, [*held, index], share_prompts=share_prompts)]) > budget:
                units.append(unit_of(triplets, held, share_prompts=share_prompts))
                held = []
            held.append(index)
        units.append(unit_of(triplets, held, share_prompts=share_prompts))
    return units


def unit_of(triplets: Sequence[TripletLengths], indices: Sequence[int], *, share_prompts: bool = False) -> Unit:
    """The unit of some triplets of one prompt. One without a generation, which is a target alone, adds no sequence.

    >>> triplet = TripletLengths(prompt_id="a", prompt_length=4, target_length=10, generated_length=7)
    >>> unit_of([triplet], [0]).lengths, unit_of([triplet], [0], share_prompts=True).lengths
    ((10, 7), (4, 6, 3))
    """
    first = triplets[indices[0]]
    generated = (triplets[index].generated_length for index in indices)
    sequences = (first.target_length, *(length for length in generated if length > first.prompt_length))
    if share_prompts:
        sequences = (first.prompt_length, *(length - first.prompt_length for length in sequences))
    return Unit(triplets=tuple(indices), lengths=sequences)
