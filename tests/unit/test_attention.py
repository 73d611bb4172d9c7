"""Packed sequences against the same sequences padded, and what `varlen` refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tpaw_ray.errors import CheckpointError
from tpaw_ray.policy.attention import choose_attention
from tpaw_ray.policy.batch import token_batch
from tpaw_ray.policy.logprobs import Policy, check_policy

PROMPTS = [[4, 10, 11, 12, 5], [7, 8], [9, 20, 21, 22, 23, 24, 25, 26], [30]]
RESPONSES = [[40, 41, 5], [3, 6, 7, 8, 9, 10, 5], [5], [16, 17, 18, 19]]
TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 5,
}


def model_with(attention, kind=LlamaForCausalLM, config=LlamaConfig, **settings):
    torch.manual_seed(0)
    return kind._from_config(config(**TINY | settings), attn_implementation=attention).train()


def values_and_gradients(model):
    model.zero_grad()
    logps_S = Policy(model)(token_batch(PROMPTS, RESPONSES))
    (logps_S * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    return logps_S.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all activations kept", "layers recomputed"])
@pytest.mark.parametrize("padded", ["sdpa", "eager"])
def test_packed_values_and_gradients_equal_padded_ones_with_shared_heads(padded, checkpointing):
    packed_model, padded_model = model_with("varlen"), model_with(padded)
    if checkpointing:
        packed_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, found_gradients = values_and_gradients(packed_model)
    expected, expected_gradients = values_and_gradients(padded_model)
    assert (Policy(packed_model).packed, Policy(padded_model).packed) == (True, False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def shared_batch(share):
    """Three responses to one prompt, one of them empty, among others that stand alone."""
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[1], PROMPTS[2], PROMPTS[3], PROMPTS[3]]
    responses = [RESPONSES[0], RESPONSES[1], [], RESPONSES[0], RESPONSES[2], RESPONSES[3], RESPONSES[1]]
    return token_batch(prompts, responses, share_prompts=share)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all activations kept", "layers recomputed"])
def test_values_and_gradients_with_shared_prompts_equal_those_of_whole_sequences(checkpointing):
    found = []
    for share in (True, False):
        model = model_with("varlen")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logps_S = Policy(model)(shared_batch(share))
        (logps_S * torch.tensor([1.0, -2.0, 4.0, 0.5, 3.0, -1.0, 2.0])).sum().backward()
        found.append((logps_S.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (shared, shared_gradients), (whole, gradients) = found
    assert whole[2] == shared[2] == 0.0  # an empty response
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


class ScatteredSums(TorchDispatchMode):
    """The operations that add into one place from several threads, in whatever order these come."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "index_put" in str(function) and any(given is True for given in args):  # accumulate=True
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_gradient_of_shared_prompts_adds_up_in_an_order_that_threads_decide():
    """Torch's `tensor[indices]` does on a CPU: from three responses to a prompt on, a busy machine changed the last bits."""
    with ScatteredSums() as sums:
        hidden_ND = torch.zeros(4, 2, requires_grad=True)
        hidden_ND[torch.tensor([1, 1, 1])].sum().backward()
    assert len(sums.seen) == 1  # so they would be seen below
    with ScatteredSums() as sums:
        Policy(model_with("varlen"))(shared_batch(True)).sum().backward()
    assert sums.seen == []


def test_a_shared_prompt_runs_once():
    shared, whole = shared_batch(True), shared_batch(False)
    # the second prompt (2 tokens) stands in three sequences, the last (1 token) in two
    assert len(whole.input_ids_N) - len(shared.input_ids_N) == 2 * 2 + 1
    assert shared.lengths == whole.lengths
    model, seen = model_with("varlen"), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][..., 0].numel()))
    with torch.no_grad():
        Policy(model)(shared)
    assert seen == [len(shared.input_ids_N)]


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_attention_that_cannot_share_prompts_refuses_to(attention):
    policy = Policy(model_with("sdpa"))
    policy.model.config._attn_implementation = attention
    assert not policy.shares_prompts
    with pytest.raises(ValueError, match=f"{attention} attention cannot take sequences that share a prompt"):
        policy(shared_batch(True))


@pytest.mark.parametrize(("attention", "tokens"), [("varlen", 8 + 9 + 9 + 5), ("sdpa", 4 * 9)])
def test_a_packed_model_runs_through_no_padding(attention, tokens):
    model, seen = model_with(attention), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][..., 0].numel()))
    with torch.no_grad():
        Policy(model)(token_batch(PROMPTS, RESPONSES))
    assert seen == [tokens]


def test_auto_packs_on_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_attention("auto", "bf16") == "varlen"
    assert choose_attention("sdpa", "bf16") == "sdpa"


def test_auto_takes_flash_attention_2_only_in_its_precision(monkeypatch):
    import transformers.utils

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert choose_attention("auto", "bf16") == "flash_attention_2"
    assert choose_attention("auto", "fp32") == "varlen"


def test_attention_with_a_soft_cap_is_refused_and_says_what_to_set():
    model = model_with("varlen", Gemma2ForCausalLM, Gemma2Config, bos_token_id=2, query_pre_attn_scalar=8)
    with pytest.raises(CheckpointError, match=r"soft cap.*set model\.attention"):
        check_policy(Policy(model))


def test_a_window_that_is_never_reached_changes_nothing_and_a_shorter_one_is_refused():
    wide = model_with("varlen", MistralForCausalLM, MistralConfig, sliding_window=9)
    padded = model_with("sdpa", MistralForCausalLM, MistralConfig, sliding_window=9)
    batch = token_batch(PROMPTS, RESPONSES)
    torch.testing.assert_close(Policy(wide)(batch), Policy(padded)(batch), rtol=1e-5, atol=1e-5)
    narrow = model_with("varlen", MistralForCausalLM, MistralConfig, sliding_window=8)
    with pytest.raises(CheckpointError, match="a window shorter than 9 tokens"):
        Policy(narrow)(batch)


class Forgetful(LlamaForCausalLM):
    """Does not hand on where sequences begin, as an architecture with attention of its own would."""

    forgotten = ("cu_", "max_")

    def __init__(self, config):
        super().__init__(config)
        whole = self.model.forward
        self.model.forward = lambda **kwargs: whole(**{k: v for k, v in kwargs.items() if not k.startswith(self.forgotten)})


def test_an_architecture_whose_packed_sequences_see_each_other_is_refused():
    with pytest.raises(CheckpointError, match="Forgetful: packed sequences see each other"):
        check_policy(Policy(model_with("varlen", Forgetful)))


class HalfForgetful(Forgetful):
    """Hands on where sequences begin, but not what those that share a prompt see."""

    forgotten = ("keys_M",)


class Recounting(LlamaForCausalLM):
    """Counts positions itself, from where sequences begin: right for whole sequences, wrong behind a shared prompt."""

    def __init__(self, config):
        super().__init__(config)
        whole = self.model.forward

        def forward(**kwargs):
            if (begins := kwargs.get("cu_seq_lens_q")) is not None:
                kwargs["position_ids"] = torch.cat([torch.arange(length) for length in begins.diff().tolist()])[None]
            return whole(**kwargs)

        self.model.forward = forward


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (HalfForgetful, "does not hand on what sequences see that share a prompt; set model.attention to sdpa"),
        (Recounting, "Recounting: responses that share a prompt disturb each other"),
    ],
)
def test_an_architecture_whose_prompts_cannot_be_shared_is_refused(architecture, message):
    with pytest.raises(CheckpointError, match=message):
        check_policy(Policy(model_with("varlen", architecture)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's variable-length FlashAttention runs there only")
def test_on_a_gpu_packed_values_equal_padded_ones_in_bf16():
    packed, padded = (Policy(model_with(name).to("cuda", torch.bfloat16)) for name in ("varlen", "sdpa"))
    batch = token_batch(PROMPTS, RESPONSES).to("cuda")
    torch.testing.assert_close(packed(batch), padded(batch), rtol=0.05, atol=0.5)
    shared, whole = packed(shared_batch(True).to("cuda")), padded(shared_batch(False).to("cuda"))
    torch.testing.assert_close(shared, whole, rtol=0.05, atol=0.5)
