"""Log-probabilities against a naive full-softmax forward pass, and what they must not depend on."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.tiny import write_tiny_model
from tpaw_ray.errors import CheckpointError
from tpaw_ray.policy.batch import gather_by_tokens, token_batch
from tpaw_ray.policy.logprobs import CHUNK, Policy, check_policy
from tpaw_ray.policy.model import load_model

PROMPTS = [[4, 10, 11, 12, 5], [7, 8], [9, 20, 21, 22, 23, 24, 25, 26], [30]]
RESPONSES = [[40, 41, 5], [50, 51, 52, 53, 54, 55, 5], [5], [60, 61, 62, 63]]
TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 5,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["varlen", "sdpa"], ids=["packed", "padded"])
def model(request, directory):
    return load_model(str(directory), precision="fp32", attention=request.param)


def naive_logps(model, prompts, responses):
    """One sequence at a time, the whole softmax, token by token."""
    totals = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
        logps = logits.log_softmax(-1)
        totals.append(sum((logps[len(prompt) + t - 1, token] for t, token in enumerate(response)), torch.zeros(())))
    return torch.stack(totals)


def test_values_equal_a_naive_softmax_over_the_whole_vocabulary(model):
    expected = naive_logps(model, PROMPTS, RESPONSES)
    assert expected.max() < -1
    torch.testing.assert_close(Policy(model)(token_batch(PROMPTS, RESPONSES)), expected, rtol=1e-5, atol=1e-4)


def test_gradients_of_all_parameters_equal_the_naive_ones(model):
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (naive_logps(model, PROMPTS, RESPONSES) * factors).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (Policy(model, chunk=4)(token_batch(PROMPTS, RESPONSES)) * factors).sum().backward()
    for name, parameter in model.named_parameters():
        assert expected[name].abs().max() > 0, name
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 15, 16, CHUNK])
def test_values_do_not_depend_on_the_chunk(model, chunk):
    batch = token_batch(PROMPTS, RESPONSES)
    torch.testing.assert_close(Policy(model, chunk=chunk)(batch), Policy(model, chunk=1000)(batch), rtol=1e-6, atol=1e-5)


def test_values_do_not_depend_on_batch_composition_or_padding(model):
    policy = Policy(model)
    alone = torch.cat([policy(token_batch([prompt], [response])) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
    together = policy(token_batch(PROMPTS, RESPONSES))
    backwards = policy(token_batch(PROMPTS[::-1], RESPONSES[::-1])).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(backwards, alone, rtol=1e-6, atol=1e-5)


def test_the_end_token_counts(model):
    policy = Policy(model)
    whole, body = policy(token_batch([[4, 9]] * 2, [[20, 21, 5], [20, 21]])).tolist()
    logits = model(input_ids=torch.tensor([[4, 9, 20, 21]])).logits[0, -1]
    assert whole - body == pytest.approx(logits.log_softmax(-1)[5].item(), abs=1e-4)
    assert whole < body - 0.01


def test_the_sum_is_not_divided_by_length(model):
    # log π(abc|x) = log π(a|x) + log π(b|xa) + log π(c|xab)
    policy = Policy(model)
    whole = policy(token_batch([[4, 9]], [[20, 21, 5]])).item()
    parts = policy(token_batch([[4, 9], [4, 9, 20], [4, 9, 20, 21]], [[20], [21], [5]])).sum().item()
    assert whole == pytest.approx(parts, abs=1e-4)


def test_an_empty_response_has_log_probability_0_and_leaves_the_others_alone(model):
    found = Policy(model)(token_batch([[4, 9], [4, 9]], [[], [20, 5]]))
    expected = Policy(model)(token_batch([[4, 9]], [[20, 5]]))
    assert found[0].item() == 0.0
    assert found[1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_bf16_weights_give_float32_log_probabilities(directory):
    policy = Policy(load_model(str(directory), precision="bf16", attention="sdpa"))
    found = policy(token_batch(PROMPTS, RESPONSES))
    expected = naive_logps(load_model(str(directory), precision="fp32"), PROMPTS, RESPONSES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.5)
    assert not torch.equal(found, expected)


def test_the_head_runs_on_response_tokens_only(model):
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    with torch.no_grad():
        Policy(model, chunk=8)(token_batch(PROMPTS, RESPONSES))
    assert rows == [8, 7]  # 3 + 7 + 1 + 4 response tokens


def test_responses_follow_their_prompts_end_to_end():
    batch = token_batch([[5, 6], [5]], [[7], [8, 9, 2]])
    assert batch.input_ids_N.tolist() == [5, 6, 7, 5, 8, 9, 2]
    assert (batch.response_R.tolist(), batch.predictor_R.tolist()) == ([2, 4, 5, 6], [1, 3, 4, 5])
    assert batch.sequence_R.tolist() == [0, 1, 1, 1]
    assert batch.lengths == (3, 4)


class Allocations(TorchDispatchMode):
    """Follows every tensor that an operation makes, forward and backward: the largest, and the most bytes alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return made


def allocations_of(loss):
    with Allocations() as seen:
        loss().backward()
    return seen


def test_the_logits_of_a_whole_batch_never_exist():
    vocabulary, tokens, chunk = 152_000, 512, 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY | {"vocab_size": vocabulary, "hidden_size": 8, "head_dim": 4}))
    batch = token_batch([[1] * 4] * 4, [list(range(6, 6 + tokens // 4))] * 4)
    seen = allocations_of(lambda: Policy(model, chunk=chunk)(batch).sum())
    assert seen.largest == chunk * vocabulary
    assert seen.peak < tokens * vocabulary * 4 / 2


def test_allocations_are_seen_where_the_logits_of_a_whole_batch_do_exist():
    # What the test above would look like without chunks: logits, their log-softmax, and gradients of both.
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    batch = token_batch([[1] * 4] * 4, [[6] * 64] * 4)
    seen = allocations_of(lambda: model(input_ids=batch.input_ids_N.view(4, 68)).logits.log_softmax(-1)[..., 6].sum())
    assert seen.largest == 4 * 68 * 48
    assert seen.peak > 3 * 4 * 68 * 48 * 4


def test_check_policy_accepts_a_linear_head(model):
    check_policy(Policy(model))


def test_a_soft_capped_head_is_followed():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**TINY | {"final_logit_softcapping": 2.0, "bos_token_id": 2})).eval()
    policy = Policy(model)
    check_policy(policy)
    expected = naive_logps(model, PROMPTS[:2], [[40, 41, 5], [42, 5]])
    torch.testing.assert_close(policy(token_batch(PROMPTS[:2], [[40, 41, 5], [42, 5]])), expected, rtol=1e-5, atol=1e-4)


class ScaledLogits(LlamaForCausalLM):
    """Does more between its last hidden state and its logits than a linear head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def test_check_policy_refuses_a_model_that_scales_its_logits_and_names_its_class():
    torch.manual_seed(0)
    with pytest.raises(CheckpointError, match="ScaledLogits: its logits are not a linear head"):
        check_policy(Policy(ScaledLogits(LlamaConfig(**TINY))))


def test_check_policy_refuses_a_real_architecture_that_scales_its_logits():
    torch.manual_seed(0)
    config = {key: value for key, value in TINY.items() if key != "head_dim"}
    with pytest.raises(CheckpointError, match="GraniteForCausalLM"):
        check_policy(Policy(GraniteForCausalLM(GraniteConfig(**config, logits_scaling=8.0))))


def test_a_checkpoint_is_loaded_with_dropout_off(directory, tmp_path):
    model = load_model(str(directory), precision="fp32")
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), precision="fp32").train()
    batch = token_batch(PROMPTS, RESPONSES)
    assert loaded.config.attention_dropout == 0.0
    torch.testing.assert_close(Policy(loaded)(batch), Policy(model.eval())(batch), rtol=1e-6, atol=1e-5)


def test_loading_a_folder_without_a_config_names_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json") as raised:
        load_model(str(tmp_path), precision="fp32")
    assert str(tmp_path) in str(raised.value)


def test_loading_a_folder_without_weights_names_the_folder(directory, tmp_path):
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(CheckpointError, match="cannot be loaded as a causal language model") as raised:
        load_model(str(tmp_path), precision="fp32")
    assert str(tmp_path) in str(raised.value)


def copied(directory, destination):
    for path in directory.iterdir():
        (destination / path.name).write_bytes(path.read_bytes())
    return destination / "model.safetensors"


def test_loading_weights_that_are_cut_short_names_the_folder(directory, tmp_path):
    weights = copied(directory, tmp_path)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as raised:
        load_model(str(tmp_path), precision="fp32")
    assert str(tmp_path) in str(raised.value)


def test_loading_weights_with_a_tensor_missing_raises(directory, tmp_path):
    weights = copied(directory, tmp_path)
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="down_proj"):
        load_model(str(tmp_path), precision="fp32")


ITEMS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=5), max_size=40)


@given(ITEMS, st.integers(1, 1000), st.booleans())
def test_gathering_puts_every_item_into_exactly_one_batch(items, budget, packed):
    batches = gather_by_tokens(items, budget, packed=packed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(items)))
    assert all(batches)


def cost_by_hand(items, packed):
    lengths = [length for item in items for length in item]
    return sum(lengths) if packed else max(lengths) * len(lengths)


@given(ITEMS, st.integers(1, 1000), st.booleans())
def test_gathering_keeps_the_budget_unless_an_item_alone_exceeds_it(items, budget, packed):
    for batch in gather_by_tokens(items, budget, packed=packed):
        assert cost_by_hand([items[index] for index in batch], packed) <= budget or len(batch) == 1


@given(ITEMS, st.integers(1, 1000), st.booleans())
def test_gathering_puts_longest_items_first_and_equal_ones_in_their_order(items, budget, packed):
    flat = [index for batch in gather_by_tokens(items, budget, packed=packed) for index in batch]
    assert flat == sorted(range(len(items)), key=lambda index: (-max(items[index]), index))


@given(ITEMS, st.integers(1, 1000), st.booleans())
def test_gathering_never_opens_a_batch_while_the_item_fits_the_last_one(items, budget, packed):
    for batch, following in pairwise(gather_by_tokens(items, budget, packed=packed)):
        assert cost_by_hand([items[index] for index in (*batch, following[0])], packed) > budget


def test_gathering_by_hand():
    items = [[3], [9], [4], [9], [4], [2, 1]]
    # padded: 9 × 2 = 18 ≤ 20, 9 × 3 = 27 > 20; 4 × 2 = 8, 4 × 3 = 12 and 4 × 5 = 20 ≤ 20
    assert gather_by_tokens(items, 20, packed=False) == [[1, 3], [2, 4, 0, 5]]
    # packed: 9 + 9 = 18, + 4 > 20; 4 + 4 + 3 + 2 + 1 = 14
    assert gather_by_tokens(items, 20, packed=True) == [[1, 3], [2, 4, 0, 5]]
    assert gather_by_tokens(items, 22, packed=True) == [[1, 3, 2], [4, 0, 5]]
    assert gather_by_tokens([], 20, packed=True) == []
    assert gather_by_tokens([[50], [1]], 20, packed=True) == [[0], [1]]
