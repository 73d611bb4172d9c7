"""What the cost model says, without running anything: an iteration with a full team for 8 billion parameters on 8 and 64 GPUs.

Llama-3.1-8B's shape, the recipe's 50 000 prompts, two epochs. Lengths and what a GPU achieves are assumptions, given as options.
"""

from typing import Annotated

import typer

from tpaw_ray.config import resolve_config
from tpaw_ray.cost import Device, Lengths, iteration_cost, iteration_seconds, stage_devices
from tpaw_ray.plan import GIB, ModelSize, learner_bytes, plan_iteration

LLAMA_8B = ModelSize(parameters=8_030_261_248, hidden=4096, layers=32, vocabulary=128_256, context=131_072, kv=1024, tied=False)
POOLS = {8: {"opponents": 2, "scoring": 2, "learner": 4}, 64: {"opponents": 12, "scoring": 12, "learner": 40}}


def main(
    prompts: int = 50_000,
    prompt_tokens: float = 200,
    target_tokens: float = 250,
    generated_tokens: float = 250,
    tflops: Annotated[float, typer.Option(help="TFLOP/s a GPU achieves: 40 % of an H100's 989.")] = 396,
    bandwidth: Annotated[float, typer.Option(help="GB/s a GPU achieves: 60 % of an H100's 3350.")] = 2010,
) -> None:
    """Print a table of an iteration with a full team, computed."""
    lengths = Lengths(prompt=prompt_tokens, target=target_tokens, generated=generated_tokens)
    device = Device(flops_per_s=tflops * 1e12, bytes_per_s=bandwidth * 1e9)
    print(
        "| GPUs | stage | on | sequences | tokens | PFLOP | TB moved | hours |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for gpus, pool in POOLS.items():
        config = resolve_config(
            {
                "run": {"name": "cost"},
                "model": {"path": "-"},
                "data": {"path": "-"},
                "opponents": {"replicas": pool["opponents"], "gpus": 1},
                "scoring": {"workers": pool["scoring"], "gpus": 1},
                "learner": {"workers": pool["learner"], "gpus": 1, "zero_stage": 3},
            }
        )
        plan = plan_iteration(config, 2, prompts)
        costs = iteration_cost(config, LLAMA_8B, lengths, plan, prompts=prompts, heldout=prompts // 20)
        for stage, devices in stage_devices(config).items():
            cost = costs[stage]
            figures = f"{cost.sequences:,.0f} | {cost.tokens / 1e6:,.0f} M | {cost.flops / 1e15:,.0f} | {cost.bytes / 1e12:,.0f}"
            print(f"| {gpus} | {stage} | {devices:g} | {figures} | {device.seconds(cost, devices) / 3600:.2f} |")
        print(f"| {gpus} | iteration | | | | | | {iteration_seconds(config, costs, device) / 3600:.2f} |")
        memory = learner_bytes(LLAMA_8B, config.learner) / GIB
        print(f"\n{gpus} GPUs: {memory:.0f} GiB a learner worker, estimated\n")


if __name__ == "__main__":
    typer.run(main)
