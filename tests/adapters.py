"""LoRA adapters for tests, trained by chance instead of by an update."""

from pathlib import Path

from tpaw_ray.config import LoraConfig

LORA = LoraConfig(rank=4, alpha=8)


def write_adapter(start: Path, folder: Path, seed: int) -> Path:
    """An adapter on the model in `start`, in the files that a learner writes."""
    import torch

    from tpaw_ray.policy.adapter import add_adapter, save_adapter
    from tpaw_ray.policy.model import load_model

    model = load_model(str(start), precision="fp32")
    add_adapter(model, LORA, "the/base", seed)
    torch.manual_seed(100 + seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, dict(model.state_dict()), folder)
    return folder


def whole_model(start: Path, adapter: Path):
    """The model that an adapter makes of `start`, with weights of its own."""
    from transformers import AutoModelForCausalLM

    from tpaw_ray.policy.adapter import load_adapter, merged_state

    adapted, whole = (AutoModelForCausalLM.from_pretrained(start).eval() for _ in range(2))
    load_adapter(adapted, adapter)
    whole.load_state_dict(merged_state(adapted))
    return whole
