"""The Ray Train group of the learner. Imports torch with it, so it is imported where the group is started, not in the driver."""

import os
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from tpaw_ray.config import Config
from tpaw_ray.processes import model_process
from tpaw_ray.runs.store import RunStore


def run_group(config: Config, store: RunStore, mailbox: Any) -> str:
    """Run the worker group until its mailbox is closed; returns why it failed, empty when it did not."""
    # Nothing here acts on a notice that a node will be taken away, so no actor need watch for one.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        make_trainer(config, store, mailbox).fit()
    except Exception as error:  # Ray Train's own errors, which carry those of the workers
        causes = getattr(error, "worker_failures", None) or {}
        return "; ".join(f"worker {rank}: {cause}" for rank, cause in causes.items()) or str(error)
    return ""


def make_trainer(config: Config, store: RunStore, mailbox: Any) -> TorchTrainer:
    """The Ray Train group of the config's size, on GPUs (NCCL) or CPUs (Gloo)."""
    learner = config.learner
    resources = {"CPU": learner.cpus} | ({"GPU": learner.gpus} if learner.gpus else {})
    return TorchTrainer(
        train_loop,
        train_loop_config={"config": config, "store": store, "mailbox": mailbox},
        torch_config=TorchConfig(backend="nccl" if learner.gpus else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # typed as that before Ray Train 2
            num_workers=learner.workers,
            use_gpu=bool(learner.gpus),
            resources_per_worker=resources,
            label_selector=learner.node_labels or None,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as the RunConfig before Ray Train 2
            name="learner",
            storage_path=store.at(store.path("ray_train")),
            storage_filesystem=store.filesystem if store.scheme else None,
            failure_config=FailureConfig(max_failures=learner.max_restarts),
            worker_runtime_env=model_process(learner.gpus),
        ),
    )


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs on a worker. Heavy imports happen here, after the process knows its accelerator and threads."""
    config: Config = settings["config"]
    os.environ.setdefault("LOCAL_SIZE", str(ray.train.get_context().get_local_world_size()))

    from tpaw_ray.learner.worker import work

    work(config, settings["store"], settings["mailbox"])
