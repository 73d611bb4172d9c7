"""The live policy as a Hugging Face directory that `transformers` and vLLM load."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from torch import distributed
from transformers import PreTrainedModel

COMPANIONS = (
    "*token*",
    "*.jinja",
    "vocab*",
    "merges.txt",
    "*.model",
    "generation_config.json",
    "special_tokens_map.json",
    "*.py",
)
"""What stands beside the weights: tokenizer, chat template, generation defaults, the model's own code."""


def export_checkpoint(model: PreTrainedModel, *, start: str, destination: str) -> None:
    """Write safetensors and config, and copy the companions from the checkpoint the update started from.

    Every rank must call this: under ZeRO-3 all of them hold a part of each parameter. Rank 0 writes, beside the
    destination and renamed when whole.
    """
    state = _full_state(model)
    if distributed.get_rank() == 0:
        beside = Path(f"{destination}.writing")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(destination, ignore_errors=True)
        model.save_pretrained(beside, state_dict=state, safe_serialization=True)
        copy_companions(Path(start), beside)
        beside.rename(destination)
    distributed.barrier()


def copy_companions(start: Path, destination: Path) -> None:
    """Copy everything beside the weights that is not there yet."""
    for pattern in COMPANIONS:
        for path in start.glob(pattern):
            if path.is_file() and not (destination / path.name).exists():
                shutil.copy2(path, destination / path.name)


def _full_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers on the CPU, whole; empty on ranks other than 0. One parameter is gathered at a time."""
    keep = distributed.get_rank() == 0
    partitioned = dict(model.named_parameters())
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        parameter = partitioned.get(name, tensor)
        whole = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if whole else nullcontext():
            if keep:
                state[name] = parameter.detach().cpu().clone()
    return state
