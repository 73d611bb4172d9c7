"""Loading a checkpoint for scoring or training."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from tpaw_ray.errors import CheckpointError
from tpaw_ray.policy.attention import choose_attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(path: str, *, precision: str, attention: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model on the CPU, dropout off.

    Raises:
        CheckpointError: when the directory holds no loadable model in safetensors, or not all of its weights.
    """
    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; expected a Hugging Face model directory")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            dtype=DTYPES[precision],
            attn_implementation=choose_attention(attention, precision),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **_without_dropout(path),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be loaded as a causal language model: {error}") from error
    model, found = loaded
    absent = sorted(found["missing_keys"])
    if absent:  # transformers would go on with random numbers in their place
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise CheckpointError(f"{path}: the weights lack {', '.join(absent[:3])}{more}; expected every tensor of the model")
    return cast(PreTrainedModel, model)


def _without_dropout(path: str) -> dict[str, float]:
    # Scoring in eval mode and training in train mode must be the same function, else P_t is not 0 at the first step.
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return {key: 0.0 for key in config if key.endswith(("dropout", "pdrop", "dropout_rate")) and config[key]}
