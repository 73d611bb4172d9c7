"""A three-player update against the plain way of writing it: references held in memory, padded batches, one epoch.

Both sides learn from the same `3N` triplets, three rounds for each of `N` prompts. The plain side runs every reference on every
batch; ours scores the `6N` sequences that are new in an iteration with a full team, then updates. The rounds' responses are other
rows' answers: real text of the right lengths. All players are the start model, which costs the same.
"""

import os
import shutil
import tempfile
import time
from typing import Annotated, Any

import typer
from sides import Figures, Sides, example_config, real_prompts, run, start_worker

from tpaw_ray.config import Config
from tpaw_ray.schema import Prompt

ROUNDS = 3
GLOBAL_BATCH = 12
LEARNING_RATE = 5e-7


def config_of(settings: dict[str, Any], root: str) -> Config:
    """The config of our side."""
    return example_config(
        run={"name": "team", "root": root},
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


def rounds_of(prompts: list[Prompt]) -> list[list[list[int]]]:
    """`[round][prompt]`: answers of other rows."""
    targets = [list(prompt.target_tokens) for prompt in prompts]
    return [targets[shift:] + targets[:shift] for shift in range(1, ROUNDS + 1)]


def ours(settings: dict[str, Any]) -> Figures:
    """Score what is new, then `tpaw_ray.learner.worker.update` with DeepSpeed on one worker."""
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
        prompts = real_prompts(config, settings["prompts"])
        rounds = rounds_of(prompts)
        store = RunStore.open(root, "team")
        shutil.copytree(settings["model"], store.checkpoint(0))
        policy = Policy(load_model(settings["model"], precision="fp32")).eval()
        asked = [prompt.prompt_tokens for prompt in prompts]

        def score(player: Policy, responses: list[Any]) -> list[float]:
            return response_logps(player, asked, responses, config.scoring.batch_tokens, "cpu")

        started = time.perf_counter()
        target_logps = score(policy, [prompt.target_tokens for prompt in prompts])  # the new checkpoint: targets and three rounds
        logps = [score(policy, said) for said in rounds]
        for _ in range(2):  # the two older players: the new round
            score(policy, rounds[0])
        scoring_s = time.perf_counter() - started
        del policy
        pairs = [
            Pair(
                prompt_id=prompt.prompt_id,
                iteration=number,
                opponent=number,
                prompt_tokens=prompt.prompt_tokens,
                target_tokens=prompt.target_tokens,
                generated_tokens=rounds[number][index],
                players=[2, 1, 0],
                reference_target_logps=[target_logps[index]] * 3,
                reference_generated_logps=[logps[number][index]] * 3,
                start_alpha=[6.0] * 3,
                start_beta=[1 / 3] * 3,
            )
            for index, prompt in enumerate(prompts)
            for number in range(ROUNDS)
        ]
        store.write_rows(store.shard(store.pairs(0), 0), pairs, Pair)
        store.commit(store.pairs(0), pairs=len(pairs))
        rows: list[StepMetrics] = []
        update(config, store, 0, rows.append)
    steps_s = sum(row.seconds for row in rows)
    return {
        "pairs_per_s": round(len(pairs) / (scoring_s + steps_s), 4),
        "scoring_s": round(scoring_s, 1),
        "steps_s": round(steps_s, 1),
        "first_loss": round(rows[0].loss, 4),
    }


def theirs(settings: dict[str, Any]) -> Figures:
    """Three references in memory; each batch pads its sequences, takes full logits and runs policy and references on them."""
    import torch
    from torch.nn.functional import pad
    from transformers import AutoModelForCausalLM

    from tpaw_ray.algorithm.objective import team_loss

    torch.set_num_threads(os.cpu_count() or 1)
    config = config_of(settings, "runs")
    prompts = real_prompts(config, settings["prompts"])
    rounds = rounds_of(prompts)
    triplets = [(prompt, rounds[number][index]) for index, prompt in enumerate(prompts) for number in range(ROUNDS)]
    order = torch.randperm(len(triplets), generator=torch.Generator().manual_seed(0)).tolist()
    model, *references = (AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32) for _ in range(1 + ROUNDS))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE)

    def logps(one: Any, sequences: list[tuple[Any, Any]]) -> torch.Tensor:
        longest = max(len(prompt) + len(said) for prompt, said in sequences)
        ids = torch.stack(
            [pad(torch.tensor([*prompt, *said]), (0, longest - len(prompt) - len(said))) for prompt, said in sequences]
        )
        position = torch.arange(longest)
        starts = torch.tensor([len(prompt) for prompt, _ in sequences])[:, None]
        ends = torch.tensor([len(prompt) + len(said) for prompt, said in sequences])[:, None]
        logits = one(input_ids=ids, attention_mask=(position < ends).long()).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (chosen * ((position >= starts) & (position < ends))[:, 1:]).sum(-1)

    started, losses, micro = time.perf_counter(), [], 4
    for begin in range(0, len(order), GLOBAL_BATCH):
        step = order[begin : begin + GLOBAL_BATCH]
        for part in (step[at : at + micro] for at in range(0, len(step), micro)):
            rows = [triplets[index] for index in part]
            sequences = [(prompt.prompt_tokens, prompt.target_tokens) for prompt, _ in rows]
            sequences += [(prompt.prompt_tokens, said) for prompt, said in rows]
            with torch.no_grad():
                found = torch.stack([logps(reference, sequences) for reference in references], dim=1)
            mine = logps(model, sequences)
            half = len(rows)
            losses_B = team_loss(
                mine[:half], mine[half:], found[:half], found[half:], reward_scale=0.1, eta=6.0, gamma=0.5
            ).losses_B
            (losses_B.sum() / len(step)).backward()
            losses.append(losses_B.mean().item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return {"pairs_per_s": round(len(triplets) / seconds, 4), "steps_s": round(seconds, 1), "first_loss": round(losses[0], 4)}


def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "models/smollm2-135m",
    data: Annotated[str, typer.Option(help="GSM8K's train.jsonl.")] = "../shared/data/gsm8k/train.jsonl",
    prompts: int = 16,
    quick: Annotated[bool, typer.Option("--quick", help="4 prompts.")] = False,
) -> None:
    """Compare triplets a second over an iteration, scoring included."""
    settings = {"model": model, "data": data, "prompts": 4 if quick else prompts}
    run(Sides(name="team", ours=ours, theirs=theirs, figure="pairs_per_s", worker=True), settings)


if __name__ == "__main__":
    typer.run(main)
