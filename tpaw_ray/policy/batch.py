"""Rows of token ids as padded tensors, gathered under a token budget.

Axes: `S` sequence (a prompt with one response), `T` token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences padded on the right. `response_ST` marks the response tokens, whose log-probabilities count."""

    input_ids_ST: Tensor
    attention_ST: Tensor
    response_ST: Tensor

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(
            input_ids_ST=self.input_ids_ST.to(device),
            attention_ST=self.attention_ST.to(device),
            response_ST=self.response_ST.to(device),
        )


def token_batch(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TokenBatch:
    """Pad prompt + response ids to the longest of the batch.

    Padding ids are 0: causal attention keeps them from every real position, whatever token 0 means.

    >>> token_batch([[5, 6], [5]], [[7], [8, 9, 2]]).input_ids_ST.tolist()
    [[5, 6, 7, 0], [5, 8, 9, 2]]
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    input_ids_ST = torch.zeros((len(lengths), max(lengths)), dtype=torch.long)
    attention_ST = torch.zeros_like(input_ids_ST)
    response_ST = torch.zeros_like(input_ids_ST, dtype=torch.bool)
    for index, (prompt, response, length) in enumerate(zip(prompts, responses, lengths, strict=True)):
        input_ids_ST[index, :length] = torch.as_tensor([*prompt, *response])
        attention_ST[index, :length] = 1
        response_ST[index, len(prompt) : length] = True
    return TokenBatch(input_ids_ST=input_ids_ST, attention_ST=attention_ST, response_ST=response_ST)


def gather_by_tokens(lengths: Sequence[int], budget: int, sizes: Sequence[int] | None = None) -> list[list[int]]:
    """Gather items into batches of like length whose padded size stays within a budget of tokens.

    Item `i` brings `sizes[i]` sequences (1 by default), the longest of `lengths[i]` tokens. An item that alone exceeds the
    budget forms a batch of its own. Longest batches come first, so that a lack of memory shows at once.

    >>> gather_by_tokens([10, 3, 9, 4], budget=20)
    [[0, 2], [3, 1]]
    """
    sizes = sizes or [1] * len(lengths)
    batches: list[list[int]] = []
    longest = count = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and longest * (count + sizes[index]) <= budget:
            batches[-1].append(index)
            count += sizes[index]
        else:
            batches.append([index])
            longest, count = lengths[index], sizes[index]
    return batches
