"""The learner's model code on one GPU: tokens a second, model FLOP utilisation and peak memory, without padding against padded.

A model of 1.5 billion parameters in Qwen2.5's shape with random weights, bf16, sequences of up to 1024 tokens: forward and
backward of the micro-batches a learner would make. Utilisation is counted operations (`tpaw_ray.cost`) a second over the rate
that this GPU shows for a large matrix product. Without a GPU it says so and ends; `--device cpu` with a small `--hidden` and
`--layers` tries the command.
"""

import random
import time
from typing import Annotated, Any

import torch
import typer
from sides import record
from transformers import Qwen2Config, Qwen2ForCausalLM

from tpaw_ray.cost import forward_flops
from tpaw_ray.plan import ModelSize
from tpaw_ray.policy.batch import gather_by_tokens, token_batch
from tpaw_ray.policy.logprobs import Policy

PROMPT = 256


def matrix_rate(device: str, side: int) -> float:
    """FLOP/s of a square matrix product in bf16."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronise(device)
    started = time.perf_counter()
    for _ in range(20):
        left @ right
    synchronise(device)
    return 20 * 2 * side**3 / (time.perf_counter() - started)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    config: Qwen2Config, attention: str, lengths: list[int], budget: int, device: str, checkpointing: bool
) -> dict[str, Any]:
    """Forward and backward over all sequences, after one micro-batch to warm up."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.bfloat16).to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model)
    size = ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        kv=config.num_key_value_heads * (config.hidden_size // config.num_attention_heads),
        tied=bool(config.tie_word_embeddings),
    )
    batches = [
        token_batch([[1] * PROMPT for _ in rows], [[2] * (lengths[index] - PROMPT) for index in rows]).to(device)
        for rows in gather_by_tokens([[length] for length in lengths], budget, packed=policy.packed)
    ]
    policy(batches[0]).sum().backward()
    synchronise(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for batch in batches:
        policy(batch).sum().backward()
    synchronise(device)
    seconds = time.perf_counter() - started
    # Model FLOPs: forward and backward; what is computed again for want of memory does not count as useful.
    flops = 3 * sum(forward_flops(size, 1, length, length - PROMPT) for length in lengths)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {"tokens_per_s": round(sum(lengths) / seconds), "flops_per_s": flops / seconds, "peak_gib": round(peak, 1)}


def main(
    hidden: int = 1536,
    layers: int = 28,
    sequences: int = 128,
    budget: Annotated[int, typer.Option(help="Tokens in a micro-batch.")] = 16384,
    checkpointing: bool = False,
    packed: Annotated[str, typer.Option(help="varlen (torch's) or flash_attention_2 (the package).")] = "varlen",
    device: str = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the sequences.")] = False,
) -> None:
    """Measure both layouts and print utilisation."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("utilisation: there is no GPU here; --device cpu with a small --hidden and --layers tries the command")
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=hidden * 35 // 6,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 768),
        tie_word_embeddings=True,
    )
    numbers = random.Random(0)
    lengths = [
        min(1024, PROMPT + max(16, int(numbers.lognormvariate(5.8, 0.6)))) for _ in range(sequences // 4 if quick else sequences)
    ]
    rate = matrix_rate(device, 8192 if device == "cuda" else 1024)
    found = {name: measure(config, name, lengths, budget, device, checkpointing) for name in (packed, "sdpa")}
    for figures in found.values():
        figures["utilisation"] = round(figures.pop("flops_per_s") / rate, 3)
    ratio = found[packed]["tokens_per_s"] / found["sdpa"]["tokens_per_s"]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"utilisation ratio={ratio:.2f}  {found}  matrix product {rate / 1e12:.1f} TFLOP/s on {name}")
    settings = {"hidden": hidden, "layers": layers, "sequences": len(lengths), "budget": budget, "checkpointing": checkpointing}
    record(
        "utilisation",
        {"ratio": round(ratio, 3), **found, "matrix_tflops": round(rate / 1e12, 1), "device": name, "settings": settings},
    )


if __name__ == "__main__":
    typer.run(main)
