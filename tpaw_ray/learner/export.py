"""The live policy as a Hugging Face directory that `transformers` and vLLM load, or as the adapter that peft and vLLM load."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError
from torch import distributed
from transformers import PreTrainedModel

from tpaw_ray.policy.directory import COMPANIONS, copy_files
from tpaw_ray.runs.store import RunStore


def export_checkpoint(model: PreTrainedModel, store: RunStore, *, start: Path, destination: str, adapter: bool) -> None:
    """Write what was trained and its config, and copy the companions from the checkpoint the update started from.

    Every rank must call this: under ZeRO-3 all of them hold a part of each parameter. Rank 0 writes; the destination is there
    when it is whole.

    Raises:
        RunError: when the disk is full or the store does not answer.
    """
    state = _full_state(model, trained_only=adapter)
    if distributed.get_rank() == 0:
        with store.making(destination) as folder:
            _save(model, state, folder, adapter=adapter)
            copy_files(start, folder, COMPANIONS)
    distributed.barrier()


def _save(model: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path, *, adapter: bool) -> None:
    try:
        if adapter:
            from tpaw_ray.policy.adapter import save_adapter

            save_adapter(model, state, folder)
        else:
            model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    except SafetensorError as error:  # its text is all that is left of the system's error
        full = os.strerror(errno.ENOSPC) in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def _full_state(model: PreTrainedModel, *, trained_only: bool) -> dict[str, torch.Tensor]:
    """Parameters and buffers on the CPU, whole; empty on ranks other than 0. One parameter is gathered at a time."""
    keep = distributed.get_rank() == 0
    partitioned = dict(model.named_parameters())
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        parameter = partitioned.get(name, tensor)
        if trained_only and not parameter.requires_grad:
            continue
        whole = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if whole else nullcontext():
            if keep:
                state[name] = parameter.detach().cpu().clone()
    return state
