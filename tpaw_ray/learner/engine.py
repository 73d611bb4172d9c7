"""The live policy under DeepSpeed: model, optimizer and schedule of one update."""

import errno
import math
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from torch.optim import AdamW, Optimizer, RMSprop
from transformers import PreTrainedModel, get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from tpaw_ray.config import Config, LearnerConfig, at_iteration
from tpaw_ray.learner.fragments import read_fragments, write_fragments
from tpaw_ray.policy.logprobs import Policy
from tpaw_ray.policy.model import load_model
from tpaw_ray.processes import free_memory

# On CPUs DeepSpeed would compile its all-reduce for inference, which training never calls: half a minute's work, 66 MiB in
# /dev/shm that stay when the process is gone, and a lock that one killed meanwhile leaves behind, for which the next waits for
# good. (As an attribute, `deepspeed.comm.torch` is torch itself.)
import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def deepspeed_settings(learner: LearnerConfig) -> dict[str, Any]:
    """The DeepSpeed config of a worker.

    Gradient accumulation is ours (`managed_gradient_accumulation: false`): a step runs as many micro-batches as its tokens
    need, and `engine.step()` is the boundary.
    """
    to_cpu = {"device": "cpu", "pin_memory": learner.gpus > 0}
    offload = {"optimizer": ["offload_optimizer"], "parameters": ["offload_optimizer", "offload_param"]}.get(learner.offload, [])
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {
            "stage": learner.zero_stage,
            "overlap_comm": False,
            # Keeps a GPU's memory from fragmenting; on CPUs it is one more copy.
            "contiguous_gradients": learner.gpus > 0,
            **dict.fromkeys(offload, to_cpu),
        },
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is the config's, wherever its states lie
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": learner.precision == "bf16"},
        "gradient_clipping": learner.max_grad_norm,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


class PolicyEngine:
    """A DeepSpeed engine around the policy that starts an update. `close` frees its memory."""

    def __init__(self, config: Config, *, base: str, checkpoint: str, iteration: int, num_steps: int) -> None:
        """`base` holds the weights of `checkpoint`: it is the same folder, unless that is an adapter on them."""
        settings = deepspeed_settings(config.learner)
        # ZeRO-3 partitions parameters while they load, which transformers does only while this object lives.
        self._zero3 = HfDeepSpeedConfig(settings) if config.learner.zero_stage == 3 else None
        model = load_model(
            base,
            precision=config.learner.precision,
            attention=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
        )
        self._adapters = config.adapters
        if config.adapters:
            from tpaw_ray.policy.adapter import add_adapter, load_adapter

            if checkpoint == base:
                add_adapter(model, config.model.lora, config.model.path, config.run.seed)
            else:
                load_adapter(model, Path(checkpoint), trained=True)
        if config.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = Policy(model).train()
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=make_optimizer(policy, config.learner, iteration),
            lr_scheduler=lambda optimizer: make_schedule(optimizer, config.learner, num_steps),
            config=settings,
        )

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def packed(self) -> bool:
        return bool(self.engine.module.packed)

    @property
    def shares_prompts(self) -> bool:
        return bool(self.engine.module.shares_prompts)

    @property
    def attention(self) -> str:
        """The kind of attention that was chosen for this machine."""
        return str(self.model.config._attn_implementation)

    @property
    def model(self) -> PreTrainedModel:
        return self.engine.module.model

    def step(self) -> tuple[float | None, float]:
        """Take the optimizer step of the gradients so far.

        Returns their norm before clipping (where DeepSpeed computes none, None, or NaN if the step spoiled the weights), and the
        learning rate.
        """
        learning_rate = self.engine.get_lr()[0]
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if norm is None and not all(weights.isfinite().all() for weights in self.model.parameters()):
            norm = math.nan
        return (None if norm is None else float(norm)), float(learning_rate)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer, each worker what it holds; all workers must call it, after at least one step."""
        try:
            write_fragments(self.engine, folder)
        except SafetensorError as error:  # its text is all that is left of the system's error
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error

    def load(self, files: Iterable[Path], steps: int) -> None:
        """Take up what `save` wrote after so many steps, on any number of workers; all of them must call it.

        Raises:
            ValueError: when the files do not hold the policy.
            SafetensorError: when one cannot be read.
        """
        read_fragments(self.engine, files, steps)
        skip_steps(self.engine.lr_scheduler, steps)

    def close(self) -> None:
        self.engine.destroy()
        self.engine = self._zero3 = None
        free_memory()


def make_optimizer(policy: Policy, learner: LearnerConfig, iteration: int) -> Optimizer:
    """A new optimizer for every iteration; RMSprop with torch's defaults is what SPIN trained with."""
    rate = at_iteration(learner.learning_rate, iteration)
    kind = {"rmsprop": RMSprop, "adamw": AdamW}[learner.optimizer]
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return kind(trained, lr=rate, weight_decay=learner.weight_decay)


def make_schedule(optimizer: Optimizer, learner: LearnerConfig, num_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up over a share of the steps, then the schedule of the config."""
    warmup = math.ceil(learner.warmup_fraction * num_steps)
    return get_scheduler(_SCHEDULES[learner.schedule], optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)


def skip_steps(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> None:
    """Put a schedule that has taken no step where `steps` steps would have brought it."""
    rates = [base * scale(steps) for base, scale in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
