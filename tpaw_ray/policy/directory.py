"""A model directory before anything is loaded from it: its own code, and whether its weights are those of its config.

Weights travel as safetensors, which hold numbers only; nothing here or later unpickles.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tpaw_ray.errors import CheckpointError
from tpaw_ray.wording import listed, one_line, shorten

INDEX = "model.safetensors.index.json"
COMPANIONS = (
    *("tokenizer*.json", "*.model", "tokenizer.model*", "*.tiktoken", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt", "dict.txt", "bpe.codes", "emoji.json"),
    *("*.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("*.py", "LICENSE*"),
)
"""What belongs to a model beside its weights and `config.json`: tokenizer, chat template, generation defaults, own code, licence.
By name: whatever else lies in its folder, a token perhaps, is not handed on."""


ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a LoRA adapter, by the names that peft and vLLM know."""


def check_adapter_files(directory: Path) -> None:
    """Make sure that an adapter's files are there.

    Raises:
        CheckpointError: naming the first that is missing or not readable.
    """
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: no {name}; expected the folder of a LoRA adapter")
    _read_object(directory / ADAPTER)


def check_directory(directory: Path, *, trust_remote_code: bool) -> None:
    """What takes no import of torch: files that are there, and code that may not run.

    Raises:
        CheckpointError: saying what is missing or damaged, or that the directory's own code would have to run.
    """
    if not (directory / "config.json").is_file():
        adapter = (
            "; it holds a LoRA adapter, of which `tpaw export` makes a whole model" if (directory / ADAPTER).is_file() else ""
        )
        raise CheckpointError(f"model.path: {directory} holds no config.json; expected a Hugging Face model directory{adapter}")
    if not any(directory.glob("*.safetensors")):
        pickled = "; pickled weights (*.bin, *.pt) are never read" if any(directory.glob("*.bin")) else ""
        raise CheckpointError(
            f"model.path: {directory} holds no *.safetensors{pickled}; convert the weights with save_pretrained(…)"
        )
    for name in ("config.json", "tokenizer_config.json"):
        code = _read_object(directory / name).get("auto_map") if (directory / name).exists() else None
        if code and not trust_remote_code:
            raise CheckpointError(
                f"model.path: {directory}/{name} names Python code of its own (auto_map: {shorten(code)}), which does not run "
                "here; read it and set model.trust_remote_code=true, or remove auto_map where transformers knows the model itself"
            )
    if (directory / INDEX).exists():
        shards = _read_object(directory / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise CheckpointError(f"{directory / INDEX}: weight_map: found {shorten(shards)}, expected the file of every tensor")
        missing = sorted(str(name) for name in set(map(str, shards.values())) if not (directory / name).is_file())
        if missing:
            raise CheckpointError(f"{directory / INDEX} names {listed(missing)}, which the folder lacks; copy the model again")


def copy_files(source: Path, destination: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a folder that have such names and are not there yet."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file() and not (destination / path.name).exists():
                shutil.copy2(path, destination / path.name)


def own_code(place: object) -> str:
    """What is said at the opening wherever `model.trust_remote_code` is true; `place` holds the code."""
    return f"model.trust_remote_code is true: the Python code in {place} runs wherever the model is loaded"


def weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the headers of the safetensors.

    Raises:
        CheckpointError: naming the file that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not readable as safetensors: {one_line(error)}; copy the model again") from error
    return shapes


def check_weights(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Compare the headers of the weights with the model that `config.json` describes, without reading or making any weight.

    Where the files hold a name that the model does not know, transformers renames as it loads, and nothing is compared here.

    Raises:
        CheckpointError: when there is no such causal language model, or its tensors are missing or of another shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # what the model's own class raises on sizes that it cannot have: each its own type
        raise CheckpointError(f"{directory}/config.json describes no causal language model: {one_line(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = weight_shapes(directory)
    if found.keys() - expected.keys():
        return
    if absent := sorted(expected.keys() - found.keys() - model.all_tied_weights_keys.keys()):
        raise CheckpointError(f"{directory}: the weights lack {listed(absent)}; expected every tensor of the model")
    for name, shape in found.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"{directory}: {name} has the shape {list(shape)}, but by config.json it would be {list(expected[name])}; "
                "expected config.json and weights of one model"
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: found {shorten(content)}, expected a JSON object")
    return content
