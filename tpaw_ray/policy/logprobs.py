"""Summed response log-probabilities of a causal language model.

The head runs on response positions only, in chunks that are recomputed in the backward pass, so that the log-softmax of a
whole sequence × vocabulary never exists.

Axes: `S` sequence, `T` token of a padded row, `N` token of all sequences end to end, `R` response token, `C` those of a chunk,
`D` hidden, `V` vocabulary.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tpaw_ray.errors import CheckpointError
from tpaw_ray.policy.attention import PACKED
from tpaw_ray.policy.batch import TokenBatch, token_batch

CHUNK = 512
"""Response tokens whose logits exist at once: 512 × 152 k × 4 bytes = 0.3 GB."""


class Policy(nn.Module):
    """A causal language model whose forward pass yields `log π(y|x)` per sequence."""

    def __init__(self, model: PreTrainedModel, chunk: int = CHUNK) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        config = model.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def packed(self) -> bool:
        """Whether the model takes sequences end to end; otherwise they are padded to the longest."""
        return self.model.config._attn_implementation in PACKED

    @property
    def shares_prompts(self) -> bool:
        """Whether sequences may share their prompt, which then runs once for all of them."""
        return self.model.config._attn_implementation == "varlen"

    def forward(self, batch: TokenBatch) -> Tensor:
        """Summed log-probabilities in nats, end token included, not divided by length. Returns float32 `[S]`."""
        hidden_RD = self.hidden(batch).index_select(0, batch.predictor_R)  # its gradient adds up in one order, `[…]` does not
        labels_R = batch.input_ids_N[batch.response_R]
        logps_R = torch.cat(
            [
                checkpoint(self._chunk_logps, hidden_CD, labels_C, use_reentrant=False)
                for hidden_CD, labels_C in zip(hidden_RD.split(self.chunk), labels_R.split(self.chunk), strict=True)
            ]
        )
        return logps_R.new_zeros(len(batch.lengths)).index_add(0, batch.sequence_R, logps_R)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """The model's last hidden states. Returns `[N, D]`."""
        if batch.keys_M is not None and not self.shares_prompts:
            raise ValueError(f"{self.model.config._attn_implementation} attention cannot take sequences that share a prompt")
        if not self.packed:
            return self._hidden_padded(batch)
        device = batch.input_ids_N.device
        shared = {} if batch.keys_M is None else {"keys_M": batch.keys_M}  # what only `varlen` knows
        return self.model.base_model(
            input_ids=batch.input_ids_N[None],
            position_ids=batch.positions_N[None],
            use_cache=False,
            cu_seq_lens_q=_borders(batch.segments, device),
            cu_seq_lens_k=_borders(batch.contexts, device),
            max_length_q=max(batch.segments),
            max_length_k=max(batch.contexts),
            **shared,
        ).last_hidden_state[0]

    def _hidden_padded(self, batch: TokenBatch) -> Tensor:
        # Padded on the right with 0: causal attention keeps it from every real position, whatever token 0 means.
        device = batch.input_ids_N.device
        lengths_S = torch.tensor(batch.lengths, device=device)
        real_ST = torch.arange(max(batch.lengths), device=device) < lengths_S[:, None]
        input_ids_ST = torch.zeros_like(real_ST, dtype=torch.long)
        input_ids_ST[real_ST] = batch.input_ids_N
        output = self.model.base_model(input_ids=input_ids_ST, attention_mask=real_ST.long(), use_cache=False)
        return output.last_hidden_state[real_ST]

    def _chunk_logps(self, hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        return self.logits(hidden_CD).float().log_softmax(-1).gather(-1, labels_C[:, None])[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits of last hidden states `[…, D]`. Returns `[…, V]`."""
        logits = self.model.get_output_embeddings()(hidden)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def _borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    # Where pieces of these lengths begin, and the end of the last one.
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@torch.no_grad()
def check_policy(policy: Policy) -> None:
    """Make sure that head and decoder, run apart, give the model's own logits, and that packed sequences do not see each other.

    Raises:
        CheckpointError: for an architecture that does more between its last hidden state and its logits, or that does not
            hand on where sequences begin, or what those that share a prompt see.
    """
    name = type(policy.model).__name__
    device = next(policy.parameters()).device
    vocabulary = policy.model.config.get_text_config().vocab_size
    input_ids = torch.arange(4, device=device)[None] % vocabulary
    expected = policy.model(input_ids=input_ids, use_cache=False).logits.float()
    found = policy.logits(policy.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise CheckpointError(
            f"{name}: its logits are not a linear head on the last hidden state; this architecture is not supported"
        )
    one, other = (policy.hidden(token_batch([first, [1, 2]], [[3], [4]]).to(device))[3:].float() for first in ([1, 2], [5, 6]))
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3):
        raise CheckpointError(f"{name}: packed sequences see each other in this architecture; set model.attention to sdpa")
    if policy.shares_prompts:
        together, apart = (
            policy(token_batch([[1, 2, 3]] * 2, [[4, 5], [6, 7, 8]], share_prompts=share).to(device)) for share in (True, False)
        )
        if not torch.allclose(together, apart, rtol=0.05, atol=0.25):
            raise CheckpointError(
                f"{name}: responses that share a prompt disturb each other in this architecture; set model.attention to sdpa"
            )
