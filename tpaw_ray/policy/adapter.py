"""LoRA: checkpoints as adapters on the start model's weights, in the folder that peft, transformers and vLLM know.

The model keeps its own class: peft puts its layers into it. Several adapters may lie in one model, of which one works, or none.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tpaw_ray.config import LoraConfig, ModelConfig
from tpaw_ray.errors import CheckpointError, ConfigError
from tpaw_ray.policy.directory import ADAPTER, ADAPTER_WEIGHTS, check_adapter_files
from tpaw_ray.wording import listed, one_line

warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters in one model are meant

TRAINED = "trained"
"""Name of the adapter that the learner trains."""
PREFIX = "base_model.model."
"""What peft puts before the names of tensors in its files."""


def add_adapter(model: PreTrainedModel, lora: LoraConfig, base: str, seed: int) -> None:
    """Put a new adapter into a model, to be trained in place of its weights. It adds nothing yet: `B` is 0, `A` drawn by `seed`.

    `base` is what the adapter's file says it belongs to: the start model's path or hub name.

    Raises:
        ConfigError: when the model has no such layers, or they are its embedding or head.
    """
    modules = lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
    wanted = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,  # scoring and training must be the same function
        target_modules=modules,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(wanted, model, TRAINED)
        except ValueError as error:
            raise ConfigError(f"model.lora.target_modules: {one_line(error)}") from error
    if any(isinstance(module, BaseTunerLayer) for module in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise ConfigError("model.lora.target_modules: embedding and head get no adapter; where they are one, it cannot be merged")


def adapter_size(directory: Path, model: ModelConfig) -> int:
    """Parameters of an adapter on the model in a folder, without reading or making any weight.

    Raises:
        ConfigError: as `add_adapter` does.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        add_adapter(empty, model.lora, model.path, seed=0)
    return sum(parameter.numel() for parameter in empty.parameters() if parameter.requires_grad)


def load_adapter(model: PreTrainedModel, folder: Path, name: str = TRAINED, *, trained: bool = False) -> None:
    """Put a checkpoint's adapter into a model under a name, and have it work.

    Raises:
        CheckpointError: when the folder holds no adapter, or one of another model.
    """
    check_adapter_files(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trained
        weights = load_file(folder / ADAPTER_WEIGHTS)
        inject_adapter_in_model(config, model, name)
        found: Any = set_peft_model_state_dict(model, {key.removeprefix(PREFIX): value for key, value in weights.items()}, name)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be used as a LoRA adapter: {one_line(error)}") from error
    strange = [*(key for key in found.missing_keys if ".lora_" in key and f".{name}." in f"{key}."), *found.unexpected_keys]
    if strange:
        raise CheckpointError(f"{folder}: its tensors are not those of an adapter of this model: {listed(strange)}")
    use_adapter(model, name)


def use_adapter(model: PreTrainedModel, name: str) -> None:
    """Have one of a model's adapters work; with an empty name none does, and the model is the start model."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(bool(name))
            if name:
                module.set_adapter(name)


def save_adapter(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write the trained adapter, whose tensors are in `state` by the model's names. The same adapter makes the same bytes."""
    # Left to itself, peft asks a hub whether the embedding has been changed.
    tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=TRAINED, save_embedding_layers=False)
    save_file(
        {f"{PREFIX}{key}": value.contiguous() for key, value in tensors.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    config = model.peft_config[TRAINED].to_dict() | {"inference_mode": True}
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / ADAPTER).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the model that the working adapter makes of the start model, by the start model's names."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    whole = {key: value for key, value in model.state_dict().items() if ".lora_" not in key}
    return {key.replace(".base_layer.", "."): value for key, value in whole.items()}
