"""Opponents against `vllm.LLM.generate`: the same prompts, precision and lengths, both warm, sampling at temperature 1.

Our side is the stage a run uses: Ray Data tasks that read shards, ask the opponent's actor, and write what it said. The other
side has its engine in the calling process on a CPU, as ours has: on few cores vLLM is faster so than with its default, a
process of the engine's own.
"""

import os
import tempfile
import time
from typing import Annotated, Any

import typer
from sides import TORCH_NAMES, Figures, Sides, chosen_precision, example_config, real_prompts, run

from tpaw_ray.config import Config

BATCH = 64


def config_of(settings: dict[str, Any], root: str) -> Config:
    return example_config(
        run={"name": "generation", "root": root},
        model={"path": settings["model"]},
        data={"path": settings["data"], "limit": settings["prompts"]},
        sampling={"max_new_tokens": settings["new_tokens"]},
        opponents={"batch": BATCH, "gpus": settings["gpus"]},
        learner={"precision": settings["precision"]},
    )


def ours(settings: dict[str, Any]) -> Figures:
    """The rollout stage of a run, on one opponent."""
    from tpaw_ray.data.prompts import prepare_prompts
    from tpaw_ray.data.template import end_tokens, load_tokenizer
    from tpaw_ray.launch import connect
    from tpaw_ray.opponents.messages import EngineSettings, Sampling
    from tpaw_ray.opponents.rollouts import Questions, generate
    from tpaw_ray.opponents.roster import Roster
    from tpaw_ray.placement import engines_of
    from tpaw_ray.plan import shards_asked
    from tpaw_ray.runs.store import RunStore
    from tpaw_ray.schema import Generation

    with tempfile.TemporaryDirectory() as root:
        config = config_of(settings, root)
        store = RunStore.open(root, "generation")
        tokenizer = load_tokenizer(config.model)
        prepare_prompts(config, store, tokenizer)
        connect()
        ends = end_tokens(tokenizer, settings["model"])
        roster = Roster(EngineSettings.from_config(config, ends), engines_of(config))
        model = os.path.abspath(settings["model"])
        roster.host(0, model, f"{model}/config.json")
        roster.wait_ready(0)

        def rollout(iteration: int, limit: int | None) -> str:
            """Have the opponent answer; returns the folder of what it said."""
            output = store.path(f"rollout-{iteration}")
            asked = Questions(
                split="train",
                limit=limit,
                iteration=iteration,
                opponent=0,
                sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=settings["new_tokens"]),
                run_seed=0,
                output=output,
            )
            generate(store, asked, roster.opponents(0), lambda count: None, at_once=shards_asked(config))
            return output

        rollout(0, 8)
        started = time.perf_counter()
        output = rollout(1, None)
        seconds = time.perf_counter() - started
        said = [row for path in store.files(output) for row in store.read_rows(path, Generation)]
        roster.retire_all()
    tokens = sum(len(row.generated_tokens) for row in said)
    return {"tokens_per_s": round(tokens / seconds, 1), "tokens": tokens, "seconds": round(seconds, 1)}


def theirs(settings: dict[str, Any]) -> Figures:
    """One call of `LLM.generate` with all prompts."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    on_device: dict[str, Any] = {"gpu_memory_utilization": 0.85}
    if not settings["gpus"]:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(os.cpu_count())}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        on_device = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
    from vllm import LLM, SamplingParams

    config = config_of(settings, "runs")
    prompts = [{"prompt_token_ids": list(prompt.prompt_tokens)} for prompt in real_prompts(config, settings["prompts"])]
    llm = LLM(
        settings["model"],
        dtype=TORCH_NAMES[settings["precision"]],
        max_model_len=config.data.max_length,
        max_num_seqs=BATCH,
        **on_device,
    )
    sampling = SamplingParams(temperature=1.0, max_tokens=settings["new_tokens"])
    llm.generate(prompts[:8], sampling, use_tqdm=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tokens_per_s": round(tokens / seconds, 1), "tokens": tokens, "seconds": round(seconds, 1)}


def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "models/smollm2-135m",
    data: Annotated[str, typer.Option(help="GSM8K's train.jsonl.")] = "../shared/data/gsm8k/train.jsonl",
    prompts: int = 192,
    new_tokens: int = 192,
    precision: Annotated[str, typer.Option(help="bf16, fp32, or auto: what the processor multiplies in.")] = "auto",
    gpus: Annotated[int, typer.Option(help="1 runs both engines on a GPU.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="64 prompts, 64 new tokens.")] = False,
) -> None:
    """Compare generated tokens a second."""
    settings = {
        "model": model,
        "data": data,
        "prompts": 64 if quick else prompts,
        "new_tokens": 64 if quick else new_tokens,
        "gpus": gpus,
        "precision": chosen_precision(precision),
    }
    run(Sides(name="generation", ours=ours, theirs=theirs, figure="tokens_per_s"), settings)


if __name__ == "__main__":
    typer.run(main)
