"""Attention over sequences laid end to end, without padding.

`varlen` is registered with transformers beside `flash_attention_2`, `sdpa` and `eager`: torch's variable-length FlashAttention
on a GPU, and elsewhere torch's scaled dot product, a sequence at a time.

Axes: `N` token of all sequences, `M` key that attention looks at, `H` head, `D` head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tpaw_ray.errors import CheckpointError

PACKED = ("varlen", "flash_attention_2")
"""Kinds of attention that take sequences end to end; the others get padded rows."""


def choose_attention(attention: str, precision: str) -> str:
    """`auto` becomes FlashAttention-2 where a GPU and the package are there and the precision fits it, `varlen` elsewhere."""
    if attention != "auto":
        return attention
    from transformers.utils import is_flash_attn_2_available

    flash = torch.cuda.is_available() and is_flash_attn_2_available() and precision == "bf16"
    return "flash_attention_2" if flash else "varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    keys_M: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, and of it to what stands before it; transformers' attention interface.

    Args:
        query: `[1, H, N, D]`; `key` and `value` may have fewer heads.
        cu_seq_lens_q: where segments begin, and `N` at the end; without it each row is one sequence.
        cu_seq_lens_k: where what they see begins, and `M` at the end; a segment is the end of what it sees.
        max_length_q: the longest segment; `max_length_k` the most that one sees.
        keys_M: indices of what the segments see; without them each sees itself only, and `M` is `N`.

    Returns `[1, N, H, D]`.

    Raises:
        CheckpointError: for a model whose attention does more than this one, or that keeps `keys_M` to itself.
    """
    longest = max_length_k or query.shape[2]
    if softcap is not None or s_aux is not None or (sliding_window is not None and sliding_window < longest):
        raise CheckpointError(
            f"{type(module).__name__}: this model's attention has a soft cap, sinks or a window shorter than {longest} tokens, "
            "which varlen lacks; set model.attention to flash_attention_2, sdpa or eager, as the model allows"
        )
    if keys_M is None and max_length_k != max_length_q:
        raise CheckpointError(
            f"{type(module).__name__}: this model does not hand on what sequences see that share a prompt; "
            "set model.attention to sdpa"
        )
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        return _causal(query, key, value, scaling).transpose(1, 2), None
    if keys_M is not None:
        key, value = (tensor.index_select(2, keys_M) for tensor in (key, value))  # its gradient adds up in one order
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        query_NHD, key_MHD, value_MHD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        attended: Any = varlen_attn(
            query_NHD,
            key_MHD,
            value_MHD,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q or longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),  # causal, counted from the end of what a segment sees
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return attended[None], None
    segments, contexts = cu_seq_lens_q.diff().tolist(), cu_seq_lens_k.diff().tolist()
    parts = zip(query.split(segments, 2), key.split(contexts, 2), value.split(contexts, 2), strict=True)
    return torch.cat([_causal(*part, scaling).transpose(1, 2) for part in parts], dim=1), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    grouped, tokens, context = key.shape[1] != query.shape[1], query.shape[2], key.shape[2]
    if tokens == context:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    # The queries are the last of what they see; `is_causal` would take them for the first.
    seen = torch.ones(tokens, context, dtype=torch.bool, device=query.device).tril(context - tokens)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=grouped)


AttentionInterface.register("varlen", varlen_attention)
