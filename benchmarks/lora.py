"""Memory of a team of three on CPUs: adapters on one model against three whole checkpoints.

Each side's parts run one after the other in processes of their own: the engines that speak for the team (one with three adapters,
or three), and the learner's update. Their peaks are added up; the figure is the inverse of the sum. All engines answer the same
prompts; whole checkpoints are copies of the start model, adapters random, which costs the same as trained ones.
"""

import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from sides import Figures, Sides, example_config, real_prompts, run, start_worker

from tpaw_ray.config import Config
from tpaw_ray.processes import model_process

TEAM = 3
RANK = 16


def config_of(settings: dict[str, Any], root: str, rank: int) -> Config:
    """The config of a side: rank 0 trains all weights."""
    return example_config(
        run={"name": "lora", "root": root},
        model={"path": settings["model"], "lora": {"rank": rank}},
        data={"path": settings["data"]},
        learner={
            "precision": "fp32",
            "gradient_checkpointing": False,
            "global_batch": 4,
            "epochs": 1,
            "micro_batch_tokens": 1024,
            "learning_rate": 5e-7,
        },
    )


def engine_gib(settings: dict[str, Any], adapters: list[str]) -> float:
    """Peak memory of an engine that answers all prompts as every adapter, or with its own weights where there is none."""
    from tpaw_ray.data.template import end_tokens, load_tokenizer
    from tpaw_ray.opponents.messages import EngineSettings, Request, Sampling
    from tpaw_ray.opponents.opponent import prepare_process

    config = config_of(settings, "runs", RANK if adapters else 0)
    asked = EngineSettings.from_config(config, end_tokens(load_tokenizer(config.model), settings["model"]))
    prepare_process(asked)
    from tpaw_ray.opponents.engine import Engine

    engine = Engine(asked, settings["model"])
    sampling, waiting = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=32), set()
    for index, prompt in enumerate(real_prompts(config, settings["prompts"])):
        for adapter in adapters or [""]:
            key = f"{index}-{adapter}"
            request = Request(prompt_id=key, prompt_tokens=list(prompt.prompt_tokens), seed=index, adapter=adapter)
            engine.add(key, request, sampling, adapter)
            waiting.add(key)
    while waiting:
        waiting -= {finished.key for finished in engine.step()}
    return peak_gib()


def learner_gib(settings: dict[str, Any], rank: int) -> tuple[float, float]:
    """Peak memory of an update, and the size of the checkpoint it makes, in GiB."""
    start_worker()
    from tpaw_ray.learner.worker import Reports, update
    from tpaw_ray.runs.store import RunStore
    from tpaw_ray.schema import Pair

    with tempfile.TemporaryDirectory() as root:
        config, store = config_of(settings, root, rank), RunStore.open(root, "lora")
        prompts = real_prompts(config, settings["prompts"])
        shutil.copytree(settings["model"], store.checkpoint(0))
        pairs = [
            Pair(
                prompt_id=prompt.prompt_id,
                iteration=0,
                opponent=0,
                prompt_tokens=prompt.prompt_tokens,
                target_tokens=prompt.target_tokens,
                generated_tokens=other.target_tokens,
                players=[0],
                reference_target_logps=[-40.0],
                reference_generated_logps=[-40.0],
                start_alpha=[6.0],
                start_beta=[1.0],
            )
            for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True)
        ]
        store.write_rows(store.shard(store.pairs(0), 0), pairs, Pair)
        store.commit(store.pairs(0), pairs=len(pairs))
        update(config, store, 0, Reports(None))
        size = sum(path.stat().st_size for path in Path(store.checkpoint(1)).glob("*.safetensors"))
    return peak_gib(), size / 2**30


def make_adapters(settings: dict[str, Any], root: str) -> list[str]:
    """A team of random adapters."""
    from tpaw_ray.policy.adapter import add_adapter, save_adapter
    from tpaw_ray.policy.model import load_model

    folders = []
    for number in range(TEAM):
        model = load_model(settings["model"], precision="fp32")
        add_adapter(model, config_of(settings, root, RANK).model.lora, settings["model"], seed=number)
        folders.append(f"{root}/{number}")
        Path(folders[-1]).mkdir()
        save_adapter(model, dict(model.state_dict()), Path(folders[-1]))
    return folders


def peak_gib() -> float:
    """This process's `VmHWM`, which knows nothing of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 2**20


def apart(function: Any, *arguments: Any) -> Any:
    """A function's result, from a process of its own with the environment that the project gives to those that run a model."""
    os.environ |= model_process(0)["env_vars"]
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(function, arguments)


def figures_of(engines: list[float], learner: tuple[float, float]) -> Figures:
    total = sum(engines) + learner[0]
    return {
        "teams_per_gib": round(1 / total, 4),
        "engines": len(engines),
        "engines_gib": round(sum(engines), 2),
        "learner_gib": round(learner[0], 2),
        "checkpoint_mib": round(learner[1] * 1024, 1),
    }


def ours(settings: dict[str, Any]) -> Figures:
    """One engine with three adapters, and an update of an adapter."""
    with tempfile.TemporaryDirectory() as root:
        adapters = apart(make_adapters, settings, root)
        engines = [apart(engine_gib, settings, adapters)]
    return figures_of(engines, apart(learner_gib, settings, RANK))


def theirs(settings: dict[str, Any]) -> Figures:
    """Three engines, and an update of all weights."""
    return figures_of([apart(engine_gib, settings, []) for _ in range(TEAM)], apart(learner_gib, settings, 0))


def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "models/smollm2-135m",
    data: Annotated[str, typer.Option(help="GSM8K's train.jsonl.")] = "../shared/data/gsm8k/train.jsonl",
    prompts: int = 16,
    quick: Annotated[bool, typer.Option("--quick", help="4 prompts.")] = False,
) -> None:
    """Compare the memory of engines and learner."""
    settings = {"model": model, "data": data, "prompts": 4 if quick else prompts}
    run(Sides(name="lora", ours=ours, theirs=theirs, figure="teams_per_gib"), settings)


if __name__ == "__main__":
    typer.run(main)
