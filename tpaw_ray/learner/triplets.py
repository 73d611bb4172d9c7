"""The pairs of an iteration as the learner reads them, and a micro-batch of them as tensors.

Axes: `S` sequence, `B` triplet, `K` player.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpaw_ray.learner.batches import TripletLengths, Unit
from tpaw_ray.policy.batch import TokenBatch, token_batch
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Pair


@dataclass(frozen=True, kw_only=True)
class TripletBatch:
    """Triplets of one micro-batch: each target once in `tokens`, and where to find a triplet's two sequences."""

    tokens: TokenBatch
    response_lengths_S: Tensor
    target_B: Tensor
    generated_B: Tensor
    reference_target_logps_BK: Tensor
    reference_generated_logps_BK: Tensor
    start_alpha_BK: Tensor
    start_beta_BK: Tensor

    def to(self, device: torch.device) -> "TripletBatch":
        return TripletBatch(**{name: value.to(device) for name, value in vars(self).items()})


def read_pairs(store: RunStore, iteration: int) -> list[Pair]:
    """All triplets of an iteration, in the order of their files."""
    return [pair for path in store.files(store.pairs(iteration)) for pair in store.read_rows(path, Pair)]


def lengths_of(pairs: Sequence[Pair]) -> list[TripletLengths]:
    """Lengths in tokens, prompt included."""
    return [
        TripletLengths(
            prompt_id=pair.prompt_id,
            prompt_length=len(pair.prompt_tokens),
            target_length=len(pair.prompt_tokens) + len(pair.target_tokens),
            generated_length=len(pair.prompt_tokens) + len(pair.generated_tokens),
        )
        for pair in pairs
    ]


def triplet_batch(pairs: Sequence[Pair], units: Sequence[Unit], *, share_prompts: bool = False) -> TripletBatch:
    """The tensors of a micro-batch. A unit's target stands once, before its generations; so does its prompt where shared."""
    prompts: list[Sequence[int]] = []
    responses: list[Sequence[int]] = []
    targets, generated, rows = [], [], []
    for unit in units:
        target = len(responses)
        first = pairs[unit.triplets[0]]
        prompts.append(first.prompt_tokens)
        responses.append(first.target_tokens)
        for index in unit.triplets:
            pair = pairs[index]
            targets.append(target)
            generated.append(len(responses))
            prompts.append(pair.prompt_tokens)
            responses.append(pair.generated_tokens)
            rows.append(pair)

    def per_player(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return TripletBatch(
        tokens=token_batch(prompts, responses, share_prompts=share_prompts),
        response_lengths_S=torch.tensor([len(response) for response in responses]),
        target_B=torch.tensor(targets),
        generated_B=torch.tensor(generated),
        reference_target_logps_BK=per_player([pair.reference_target_logps for pair in rows]),
        reference_generated_logps_BK=per_player([pair.reference_generated_logps for pair in rows]),
        start_alpha_BK=per_player([pair.start_alpha for pair in rows]),
        start_beta_BK=per_player([pair.start_beta for pair in rows]),
    )
