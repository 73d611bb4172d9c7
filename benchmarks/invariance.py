"""Whether a response depends on what else is in its engine's batch: the same prompts with the same seeds, in other company.

    alone      one request in the engine at a time
    together   all at once, as a shard that has the engine for itself
    again      the same in the same order
    trickled   joining the running batch a few at a time, as shards of other tasks do

Prints and records the share of responses that differ from those of `together`.
"""

from typing import Annotated

import typer
from sides import chosen_precision, example_config, real_prompts, record

from tpaw_ray.opponents.messages import EngineSettings, Request, Sampling
from tpaw_ray.opponents.opponent import prepare_process
from tpaw_ray.opponents.seeds import request_seed


def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "models/smollm2-135m",
    data: Annotated[str, typer.Option(help="GSM8K's train.jsonl.")] = "../shared/data/gsm8k/train.jsonl",
    prompts: int = 64,
    new_tokens: int = 64,
    precision: Annotated[str, typer.Option(help="bf16, fp32, or auto: what the processor multiplies in.")] = "auto",
) -> None:
    """Count the responses that differ."""
    precision = chosen_precision(precision)
    config = example_config(
        model={"path": model}, data={"path": data}, learner={"precision": precision}, opponents={"batch": 256}
    )
    settings = EngineSettings.from_config(config, end_tokens=(2,))
    prepare_process(settings)
    from tpaw_ray.opponents.engine import Engine

    engine = Engine(settings, model)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=new_tokens)
    requests = [
        Request(prompt_id=row.prompt_id, prompt_tokens=list(row.prompt_tokens), seed=request_seed(0, 0, 0, row.prompt_id))
        for row in real_prompts(config, prompts)
    ]

    def answers(at_once: int, every: int) -> dict[str, list[int]]:
        """Have the requests answered, `at_once` more of them joining every so many steps; 0 waits until the engine is empty."""
        said: dict[str, list[int]] = {}
        waiting, held, steps = list(requests), 0, 0
        while waiting or held:
            if waiting and (held == 0 or (every and steps % every == 0)):
                for request in waiting[:at_once]:
                    engine.add(request.prompt_id, request, sampling)
                held += len(waiting[:at_once])
                del waiting[:at_once]
            for finished in engine.step():
                said[finished.key] = finished.tokens
                held -= 1
            steps += 1
        return said

    together = answers(len(requests), 0)
    found = {
        "again": answers(len(requests), 0),
        "trickled": answers(5, 3),
        "alone": answers(1, 0),
    }
    differing = {name: sum(other[key] != together[key] for key in together) / len(together) for name, other in found.items()}
    tokens = sum(map(len, together.values()))
    print(f"invariance {precision}: share of {len(together)} responses ({tokens} tokens) that differ from one batch: {differing}")
    settings_told = {
        "prompts": prompts,
        "new_tokens": new_tokens,
        "precision": precision,
        "model": "/".join(model.split("/")[-2:]),
    }
    record("invariance", {"differing": differing, "tokens": tokens, "settings": settings_told})


if __name__ == "__main__":
    typer.run(main)
