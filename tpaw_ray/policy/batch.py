"""Rows of token ids as tensors, gathered under a token budget.

Axes: `S` sequence (a prompt with one response), `N` token of all sequences, laid end to end, `R` response token, `M` key that
attention looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences end to end, without padding. A prompt that is shared stands once, before all of its responses.

    A segment is what attention takes in one piece: a whole sequence, or of sequences that share their prompt the prompt, and
    each response, which sees the prompt and itself. Segments cover all tokens, in their order.
    """

    input_ids_N: Tensor
    positions_N: Tensor
    """Where a token stands in its own sequence."""
    response_R: Tensor
    """Indices of the response tokens, whose log-probabilities count."""
    predictor_R: Tensor
    """Indices of the tokens before them, whose hidden states predict them."""
    sequence_R: Tensor
    """The sequences they belong to."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, prompt included: `S` of them."""
    segments: tuple[int, ...]
    """Tokens of each segment."""
    contexts: tuple[int, ...]
    """Tokens that each segment sees, its own included."""
    keys_M: Tensor | None
    """Indices of the tokens that the segments see, one segment after the other; None where each sees itself only."""

    def to(self, device: torch.device | str) -> "TokenBatch":
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def token_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, share_prompts: bool = False
) -> TokenBatch:
    """Lay prompts and their responses end to end; with `share_prompts`, equal prompts that follow each other are laid once.

    Every prompt has a token at least.

    >>> batch = token_batch([[5, 6], [5]], [[7], [8, 9]])
    >>> batch.input_ids_N.tolist(), batch.lengths, batch.predictor_R.tolist()
    ([5, 6, 7, 5, 8, 9], (3, 3), [1, 3, 4])
    >>> batch = token_batch([[5, 6], [5, 6]], [[7], [8, 9]], share_prompts=True)
    >>> batch.input_ids_N.tolist(), batch.positions_N.tolist(), batch.predictor_R.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3], [1, 1, 3])
    >>> batch.segments, batch.contexts, batch.keys_M.tolist()
    ((2, 1, 2), (2, 3, 4), [0, 1, 0, 1, 2, 0, 1, 3, 4])
    """
    ids: list[int] = []
    positions: list[int] = []
    predictor: list[int] = []
    response: list[int] = []
    sequence: list[int] = []
    segments: list[tuple[int, list[int]]] = []  # tokens, and the tokens it sees
    for members in _groups(prompts, share_prompts):
        begin, prompt = len(ids), prompts[members[0]]
        prompt_keys = list(range(begin, begin + len(prompt)))
        ids += prompt
        positions += range(len(prompt))
        for member in members:
            first, said = len(ids), responses[member]
            ids += said
            positions += range(len(prompt), len(prompt) + len(said))
            response += range(first, len(ids))
            predictor += [begin + len(prompt) - 1, *range(first, len(ids) - 1)][: len(said)]
            sequence += [member] * len(said)
        if len(members) == 1:
            segments.append((len(ids) - begin, list(range(begin, len(ids)))))
        else:
            segments.append((len(prompt), prompt_keys))
            borders = accumulate((len(responses[member]) for member in members), initial=begin + len(prompt))
            segments += [(end - first, prompt_keys + list(range(first, end))) for first, end in pairwise(borders) if end > first]
    shared = len(segments) > len(prompts) or any(tokens != len(keys) for tokens, keys in segments)
    return TokenBatch(
        input_ids_N=torch.tensor(ids),
        positions_N=torch.tensor(positions),
        response_R=torch.tensor(response, dtype=torch.long),
        predictor_R=torch.tensor(predictor, dtype=torch.long),
        sequence_R=torch.tensor(sequence, dtype=torch.long),
        lengths=tuple(len(prompt) + len(said) for prompt, said in zip(prompts, responses, strict=True)),
        segments=tuple(tokens for tokens, _ in segments),
        contexts=tuple(len(keys) for _, keys in segments),
        keys_M=torch.tensor([key for _, keys in segments for key in keys]) if shared else None,
    )


def _groups(prompts: Sequence[Sequence[int]], share: bool) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        if share and groups and list(prompts[groups[-1][0]]) == list(prompt):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def cost(lengths: Sequence[int], *, packed: bool) -> int:
    """Tokens a model runs through for pieces of these lengths: their sum, or padded to the longest.

    >>> cost([3, 5], packed=True), cost([3, 5], packed=False)
    (8, 10)
    """
    return sum(lengths) if packed else max(lengths, default=0) * len(lengths)


def gather_by_tokens(items: Sequence[Sequence[int]], budget: int, *, packed: bool) -> list[list[int]]:
    """Gather items of like length into batches whose cost stays within a budget of tokens.

    Item `i` brings pieces of the lengths `items[i]`. An item that alone exceeds the budget forms a batch of its own. Longest
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
