"""A tiny Llama with a character tokenizer and a chat template, written as a normal Hugging Face directory."""

from pathlib import Path

CHARACTERS = "0123456789+-=*#. abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?,\n$"
SPECIAL = ("<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def engines(replicas):
    """So many engines of a checkpoint, on the CPU."""
    from tpaw_ray.placement import Demand

    return Demand(role="engine", number=replicas, cpus=0.1, labels={})


def tiny_tokenizer():
    """One token a character; `<|end|>` ends every turn."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:]),
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def merging_tokenizer():
    """Characters, and every pair of digits as a token of its own: `1`, `2` decodes to a text that encodes as `12`."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    digits = "0123456789"
    pairs = [(one, other) for one in digits for other in digits]
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS, *map("".join, pairs)))}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:]),
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_tiny_model(path: Path, seed: int = 0, hidden: int = 64, layers: int = 2, tokenizer=None, context: int = 256) -> Path:
    """Random weights in float32, head size 32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=context,
            tie_word_embeddings=False,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
