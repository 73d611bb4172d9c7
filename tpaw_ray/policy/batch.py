"""Rows of token ids as tensors, gathered under a token budget.

Axes: `S` sequence (a prompt with one response), `N` token of all sequences, laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences end to end, without padding. `response_N` marks the response tokens, whose log-probabilities count."""

    input_ids_N: Tensor
    response_N: Tensor
    lengths: tuple[int, ...]
    """Tokens of each sequence, prompt included: `S` of them."""

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(input_ids_N=self.input_ids_N.to(device), response_N=self.response_N.to(device), lengths=self.lengths)


def token_batch(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TokenBatch:
    """Lay prompts and their responses end to end. Every prompt has a token at least.

    >>> batch = token_batch([[5, 6], [5]], [[7], [8, 9]])
    >>> batch.input_ids_N.tolist(), batch.lengths
    ([5, 6, 7, 5, 8, 9], (3, 3))
    """
    ids: list[int] = []
    response: list[bool] = []
    lengths = []
    for prompt, said in zip(prompts, responses, strict=True):
        ids += prompt
        ids += said
        response += [False] * len(prompt) + [True] * len(said)
        lengths.append(len(prompt) + len(said))
    return TokenBatch(input_ids_N=torch.tensor(ids), response_N=torch.tensor(response), lengths=tuple(lengths))


def cost(lengths: Sequence[int], *, packed: bool) -> int:
    """Tokens a model runs through for sequences of these lengths: their sum, or padded to the longest.

    >>> cost([3, 5], packed=True), cost([3, 5], packed=False)
    (8, 10)
    """
    return sum(lengths) if packed else max(lengths, default=0) * len(lengths)


def gather_by_tokens(items: Sequence[Sequence[int]], budget: int, *, packed: bool) -> list[list[int]]:
    """Gather items of like length into batches whose cost stays within a budget of tokens.

    Item `i` brings sequences of the lengths `items[i]`. An item that alone exceeds the budget forms a batch of its own. Longest
    come first, so that a lack of memory shows at once.

    >>> gather_by_tokens([[10], [3], [9], [4]], 20, packed=False)
    [[0, 2], [3, 1]]
    """
    batches: list[list[int]] = []
    held: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: (-max(items[i]), i)):
        if batches and cost([*held, *items[index]], packed=packed) <= budget:
            batches[-1].append(index)
            held += items[index]
        else:
            batches.append([index])
            held = list(items[index])
    return batches
