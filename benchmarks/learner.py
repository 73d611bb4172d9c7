"""The learner's update against TRL's `DPOTrainer`: same model, pairs, precision, optimizer and global batch, one player.

Both sides have their reference log-probabilities beforehand; only optimizer steps are timed. The rejected response of a pair is
another row's answer: real text of the right lengths.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from sides import Figures, Sides, example_config, real_prompts, run, start_worker

GLOBAL_BATCH = 8
LEARNING_RATE = 5e-7


def config_of(settings: dict[str, Any], root: str) -> Any:
    """The config of our side."""
    return example_config(
        run={"name": "learner", "root": root},
        model={"path": settings["model"]},
        data={"path": settings["data"]},
        learner={
            "precision": "fp32",
            "gradient_checkpointing": False,
            "global_batch": GLOBAL_BATCH,
            "epochs": 1,
            "micro_batch_tokens": 2048,
            "learning_rate": LEARNING_RATE,
        },
    )


def ours(settings: dict[str, Any]) -> Figures:
    """Steps of `tpaw_ray.learner.worker.update` in this process, with DeepSpeed on one worker."""
    start_worker()
    from tpaw_ray.learner.worker import update
    from tpaw_ray.policy.logprobs import Policy
    from tpaw_ray.policy.model import load_model
    from tpaw_ray.runs.metrics import StepMetrics
    from tpaw_ray.runs.store import RunStore
    from tpaw_ray.schema import Pair
    from tpaw_ray.scoring.scorer import response_logps

    with tempfile.TemporaryDirectory() as root:
        config = config_of(settings, root)
        prompts = real_prompts(config, settings["pairs"])
        store = RunStore.open(root, "learner")
        shutil.copytree(settings["model"], store.checkpoint(0))
        policy = Policy(load_model(settings["model"], precision="fp32")).eval()
        asked = [prompt.prompt_tokens for prompt in prompts]
        targets = [prompt.target_tokens for prompt in prompts]
        others = [*targets[1:], targets[0]]
        started = time.perf_counter()
        target_logps = response_logps(policy, asked, targets, 4096, "cpu")
        other_logps = response_logps(policy, asked, others, 4096, "cpu")
        scoring_s = time.perf_counter() - started
        del policy
        pairs = [
            Pair(
                prompt_id=prompt.prompt_id,
                iteration=0,
                opponent=0,
                prompt_tokens=prompt.prompt_tokens,
                target_tokens=prompt.target_tokens,
                generated_tokens=other,
                players=[0],
                reference_target_logps=[target_logp],
                reference_generated_logps=[other_logp],
                start_alpha=[1.0],
                start_beta=[1.0],
            )
            for prompt, other, target_logp, other_logp in zip(prompts, others, target_logps, other_logps, strict=True)
        ]
        store.write_rows(store.shard(store.pairs(0), 0), pairs, Pair)
        store.commit(store.pairs(0), pairs=len(pairs))
        rows: list[StepMetrics] = []
        update(config, store, 0, rows.append)
    seconds = sum(row.seconds for row in rows)
    return {
        "pairs_per_s": round(len(prompts) / seconds, 4),
        "step_s": round(seconds / len(rows), 2),
        "scoring_s": round(scoring_s, 1),
        "first_loss": round(rows[0].loss, 4),
    }


def theirs(settings: dict[str, Any]) -> Figures:
    """Steps of TRL's trainer with precomputed references, batches of 8."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from tpaw_ray.data.template import load_tokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as root:
        config = config_of(settings, root)
        tokenizer = load_tokenizer(config.model)
        prompts = real_prompts(config, settings["pairs"])
        texts = [tokenizer.decode(prompt.target_tokens[:-1]) for prompt in prompts]
        rows = [
            {"prompt": tokenizer.decode(prompt.prompt_tokens), "chosen": chosen, "rejected": rejected}
            for prompt, chosen, rejected in zip(prompts, texts, [*texts[1:], texts[0]], strict=True)
        ]
        times: list[float] = []
        losses: list[float] = []

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                times.append(-time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                times[-1] += time.perf_counter()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                losses.extend([logs["loss"]] if "loss" in logs else [])

        started = time.perf_counter()
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
            args=DPOConfig(
                output_dir=str(Path(root) / "trl"),
                per_device_train_batch_size=GLOBAL_BATCH,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                optim="rmsprop",
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                max_length=None,
                beta=0.1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.get_train_dataloader()
        scoring_s = time.perf_counter() - started
        trainer.train()
    seconds = sum(times)
    return {
        "pairs_per_s": round(len(rows) / seconds, 4),
        "step_s": round(seconds / len(times), 2),
        "scoring_s": round(scoring_s, 1),
        "first_loss": round(losses[0], 4),
    }


def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "models/smollm2-135m",
    data: Annotated[str, typer.Option(help="GSM8K's train.jsonl.")] = "../shared/data/gsm8k/train.jsonl",
    pairs: int = 48,
    quick: Annotated[bool, typer.Option("--quick", help="16 pairs.")] = False,
) -> None:
    """Compare pairs a second and peak memory."""
    settings = {"model": model, "data": data, "pairs": 16 if quick else pairs}
    run(Sides(name="learner", ours=ours, theirs=theirs, figure="pairs_per_s", worker=True), settings)


if __name__ == "__main__":
    typer.run(main)
