"""Summed response log-probabilities of a causal language model.

The head runs on response positions only, in chunks that are recomputed in the backward pass, so that the log-softmax of a
whole sequence × vocabulary never exists.

Axes: `S` sequence, `T` token, `R` response token of the batch, `C` those of a chunk, `D` hidden, `V` vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tpaw_ray.errors import CheckpointError
from tpaw_ray.policy.batch import TokenBatch

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

    def forward(self, batch: TokenBatch) -> Tensor:
        """Summed log-probabilities in nats, end token included, not divided by length. Returns float32 `[S]`."""
        hidden_STD = self.model.base_model(
            input_ids=batch.input_ids_ST, attention_mask=batch.attention_ST, use_cache=False
        ).last_hidden_state
        predicted_ST = batch.response_ST[:, 1:]  # the hidden state before a token predicts it
        hidden_RD = hidden_STD[:, :-1][predicted_ST]
        labels_R = batch.input_ids_ST[:, 1:][predicted_ST]
        logps_R = torch.cat(
            [
                checkpoint(self._chunk_logps, hidden_CD, labels_C, use_reentrant=False)
                for hidden_CD, labels_C in zip(hidden_RD.split(self.chunk), labels_R.split(self.chunk), strict=True)
            ]
        )
        sequence_R = predicted_ST.nonzero()[:, 0]
        return logps_R.new_zeros(len(predicted_ST)).index_add(0, sequence_R, logps_R)

    def _chunk_logps(self, hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        return self.logits(hidden_CD).float().log_softmax(-1).gather(-1, labels_C[:, None])[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits of last hidden states `[…, D]`. Returns `[…, V]`."""
        logits = self.model.get_output_embeddings()(hidden)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Make sure that head and decoder, run apart, give the model's own logits.

    Raises:
        CheckpointError: for an architecture that does more between its last hidden state and its logits.
    """
    device = next(policy.parameters()).device
    input_ids = torch.arange(4, device=device)[None] % policy.model.config.get_text_config().vocab_size
    expected = policy.model(input_ids=input_ids, use_cache=False).logits.float()
    found = policy.logits(policy.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        name = type(policy.model).__name__
        raise CheckpointError(
            f"{name}: its logits are not a linear head on the last hidden state; this architecture is not supported"
        )
