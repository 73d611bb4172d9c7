"""The user's SFT model as checkpoint 0 of a run."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tpaw_ray.config import ModelConfig
from tpaw_ray.errors import CheckpointError
from tpaw_ray.policy.directory import COMPANIONS, INDEX, check_directory, copy_files
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import one_line

_NEEDED = ("*.safetensors", "config.json", INDEX, *COMPANIONS)


def import_start(model: ModelConfig, store: RunStore, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy `model.path` into the run as checkpoint 0, with the tokenizer as it renders here, and commit it.

    Raises:
        CheckpointError: when there is no such model, or `check_directory` refuses it.
    """
    checkpoint = store.checkpoint(0)
    if store.is_committed(checkpoint):
        return
    source = locate(model.path)
    check_directory(source, trust_remote_code=model.trust_remote_code)
    with store.making(checkpoint) as folder:
        copy_files(source, folder, _NEEDED)
        tokenizer.save_pretrained(folder)
    store.commit(checkpoint)


def locate(path: str) -> Path:
    """The local directory of a model; a hub name is fetched first.

    Raises:
        CheckpointError: when there is none.
    """
    directory = os.path.expanduser(path)
    return Path(directory) if os.path.isdir(directory) else _fetch(path)


def _fetch(name: str) -> Path:
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise CheckpointError(f"model.path: no directory {name}; expected a Hugging Face model directory or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_NEEDED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model.path: no directory {name}, and no model of that name from the hub: {one_line(error)}"
        ) from error
