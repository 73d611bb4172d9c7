"""LoRA adapters against peft's own loading, whole merged weights and counts by hand."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.adapters import LORA, whole_model, write_adapter
from tests.tiny import write_tiny_model
from tpaw_ray.algorithm.objective import team_loss
from tpaw_ray.config import LoraConfig, ModelConfig
from tpaw_ray.errors import CheckpointError, ConfigError
from tpaw_ray.policy.adapter import TRAINED, adapter_size, add_adapter, load_adapter, use_adapter
from tpaw_ray.policy.batch import token_batch
from tpaw_ray.policy.logprobs import Policy
from tpaw_ray.policy.model import load_model

PROMPTS, RESPONSES = [[7, 8, 9], [10, 11], [12]], [[20, 21], [22, 23, 24], [25]]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def team(start, tmp_path_factory):
    """Three adapters that differ from the start model and from each other."""
    return [write_adapter(start, tmp_path_factory.mktemp("adapter"), seed) for seed in range(3)]


def base_of(start):
    return load_model(str(start), precision="fp32")


def logps_of(model, share_prompts=False):
    with torch.no_grad():
        return Policy(model)(token_batch(PROMPTS, RESPONSES, share_prompts=share_prompts))


def test_a_new_adapter_adds_nothing_and_is_all_that_is_trained(start):
    model = base_of(start)
    before = logps_of(model)
    names = set(dict(model.named_parameters()))
    add_adapter(model, LORA, "the/base", seed=0)
    torch.testing.assert_close(logps_of(model), before, rtol=0, atol=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert len(names) == sum(not parameter.requires_grad for parameter in model.parameters())
    Policy(model)(token_batch(PROMPTS, RESPONSES)).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_the_same_seed_draws_the_same_adapter_and_leaves_other_draws_alone(start):
    drawn = []
    for seed in (5, 5, 6):
        model = base_of(start)
        torch.manual_seed(9)
        add_adapter(model, LORA, "the/base", seed)
        drawn.append([parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad])
        assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(9)).item()
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not all(map(torch.equal, drawn[0], drawn[2]))


def test_an_adapters_size_is_rank_times_the_sides_of_its_layers(start):
    model = AutoModelForCausalLM.from_pretrained(start)
    expected = sum(
        LORA.rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert adapter_size(start, ModelConfig(path=str(start), lora=LORA)) == expected


def test_what_is_saved_is_loaded_again_by_us_and_by_peft(start, team):
    for folder in team:
        ours, fresh = base_of(start), base_of(start)
        load_adapter(ours, folder)
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), folder)
        input_ids = torch.tensor([[7, 8, 9, 20]])
        with torch.no_grad():
            found, expected = (model(input_ids=input_ids).logits for model in (ours, theirs))
            torch.testing.assert_close(found, expected)
            assert not torch.allclose(found, fresh(input_ids=input_ids).logits, atol=1e-2)


def test_the_same_adapter_makes_the_same_bytes(start, tmp_path):
    written = []
    for name in "ab":
        write_adapter(start, tmp_path / name, 0)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    config = json.loads(written[0]["adapter_config.json"])
    assert config["target_modules"] == sorted(config["target_modules"]) and config["base_model_name_or_path"] == "the/base"


def test_a_team_of_adapters_has_the_losses_of_whole_models_with_merged_weights(start, team):
    live = base_of(start)
    load_adapter(live, team[0], trained=True)
    one = base_of(start)
    for index, folder in reversed(list(enumerate(team))):
        load_adapter(one, folder, f"player-{(1, 10, 11)[index]}")  # names that begin alike
    losses = []
    for merged in (False, True):
        players = []
        for index, folder in enumerate(team):
            if merged:
                model = whole_model(start, folder)
            else:
                use_adapter(one, f"player-{(1, 10, 11)[index]}")
                model = one
            players.append(logps_of(model))
        reference = torch.stack(players, dim=1)  # by sequence and player
        found = team_loss(
            logps_of(live)[:1] + 0.5,
            logps_of(live)[1:2],
            reference[:1],
            reference[1:2],
            reward_scale=0.1,
            eta=6.0,
            gamma=0.5,
            detach_weights=True,
        )
        losses.append(found.losses_B)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_without_an_adapter_at_work_the_model_is_the_start_model(start, team):
    model = base_of(start)
    before = logps_of(model)
    load_adapter(model, team[0], "0")
    changed = logps_of(model)
    use_adapter(model, "")
    torch.testing.assert_close(logps_of(model), before, rtol=0, atol=0)
    use_adapter(model, "0")
    torch.testing.assert_close(logps_of(model), changed, rtol=0, atol=0)


def test_training_goes_on_from_a_loaded_adapter(start, team):
    model = base_of(start)
    load_adapter(model, team[0], trained=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(f".{TRAINED}." in name for name in trained)


def test_layers_that_the_model_has_not_are_named(start):
    wrong = LoraConfig(rank=4, target_modules=["nowhere_proj"])
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules: .*nowhere_proj"):
        adapter_size(start, ModelConfig(path=str(start), lora=wrong))


def test_a_folder_without_an_adapter_or_with_one_of_another_model_is_named(start, team, tmp_path):
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load_adapter(base_of(start), tmp_path)
    for path in team[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="its tensors are not those of an adapter of this model"):
        load_adapter(base_of(start), tmp_path)
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be used as a LoRA adapter: .*size mismatch"):
        load_adapter(base_of(start), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be used as a LoRA adapter"):
        load_adapter(base_of(start), tmp_path)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_embedding_and_head_get_no_adapter(start, module):
    with pytest.raises(ConfigError, match="embedding and head get no adapter"):
        adapter_size(start, ModelConfig(path=str(start), lora=LoraConfig(rank=4, target_modules=["q_proj", module])))
