"""One iteration end to end against the usual script: `transformers` generates, then TRL's `DPOTrainer` trains with its reference.

Ours is `tpaw run` with one player and one iteration, from the command to the end; the script has its imports, its generation
and its training. No side evaluates. Same prompts, lengths, epochs, precision and global batch.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from sides import TORCH_NAMES, Figures, Sides, chosen_precision, run

GLOBAL_BATCH = 8
NEW_TOKENS = 192
LEARNING_RATE = 5e-7


def ours(settings: dict[str, Any]) -> Figures:
    """`tpaw run` in a process of its own."""
    tpaw = Path(sys.executable).with_name("tpaw")
    with tempfile.TemporaryDirectory() as root:
        overrides = {
            "preset": "without-team",
            "objective.eta": 1,
            "iterations": 1,
            "run.root": root,
            "model.path": settings["model"],
            "data.path": settings["data"],
            "data.limit": settings["prompts"],
            "data.validation_fraction": 0.0,
            "sampling.max_new_tokens": NEW_TOKENS,
            "learner.epochs": 1,
            "learner.global_batch": GLOBAL_BATCH,
            "learner.learning_rate": LEARNING_RATE,
            "learner.precision": settings["precision"],
        }
        started = time.perf_counter()
        arguments = [f"{key}={value}" for key, value in overrides.items()]
        subprocess.run([tpaw, "run", "jobs/smollm2_gsm8k.yaml", *arguments], check=True)
        seconds = time.perf_counter() - started
    return {"prompts_per_s": round(settings["prompts"] / seconds, 4), "seconds": round(seconds, 1)}


def theirs(settings: dict[str, Any]) -> Figures:
    """The script, in this process; its clock starts before its imports."""
    started = time.perf_counter()
    import torch
    from datasets import Dataset
    from sides import example_config, real_prompts
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from tpaw_ray.data.template import load_tokenizer

    config = example_config(model={"path": settings["model"]}, data={"path": settings["data"]})
    tokenizer = load_tokenizer(config.model)
    tokenizer.padding_side = "left"
    prompts = real_prompts(config, settings["prompts"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, TORCH_NAMES[settings["precision"]]))
    texts = [tokenizer.decode(prompt.prompt_tokens) for prompt in prompts]
    said = []
    for begin in range(0, len(texts), 48):
        inputs = tokenizer(texts[begin : begin + 48], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=NEW_TOKENS)
        said += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    generation_s = time.perf_counter() - started
    rows = [
        {"prompt": text, "chosen": tokenizer.decode(prompt.target_tokens[:-1]), "rejected": response}
        for text, prompt, response in zip(texts, prompts, said, strict=True)
    ]
    with tempfile.TemporaryDirectory() as root:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=root,
                per_device_train_batch_size=GLOBAL_BATCH,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                optim="rmsprop",
                gradient_checkpointing=False,
                max_length=None,
                beta=0.1,
                use_cpu=True,
                bf16=settings["precision"] == "bf16",
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(f"{root}/last")
    seconds = time.perf_counter() - started
    return {
        "prompts_per_s": round(len(prompts) / seconds, 4),
        "seconds": round(seconds, 1),
        "generation_s": round(generation_s, 1),
    }


def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "models/smollm2-135m",
    data: Annotated[str, typer.Option(help="GSM8K's train.jsonl.")] = "../shared/data/gsm8k/train.jsonl",
    prompts: int = 96,
    precision: Annotated[str, typer.Option(help="bf16, fp32, or auto: what the processor multiplies in.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="8 prompts.")] = False,
) -> None:
    """Compare prompts a second from start to end."""
    settings = {"model": model, "data": data, "prompts": 8 if quick else prompts, "precision": chosen_precision(precision)}
    run(Sides(name="iteration", ours=ours, theirs=theirs, figure="prompts_per_s"), settings)


if __name__ == "__main__":
    typer.run(main)
