"""The cost model: tokens, floating-point operations and bytes of an iteration's stages, as arithmetic.

A dense decoder is assumed. A weight that multiplies costs 2 operations a token, causal attention `2 L D T` a token in a sequence
of `T`; backward costs twice the forward. The head counts only where it runs: on response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tpaw_ray.config import Config
from tpaw_ray.plan import IterationPlan, ModelSize, shares_prompts

Stage = Literal["generate", "score", "update", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens of prompts, targets and generated responses."""

    prompt: float
    target: float
    generated: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage takes: `tokens` run through the model, `flops` operations, `bytes` read and written in the device's memory."""

    sequences: float
    tokens: float
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(**{name: value - getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one device achieves, not its peak."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, cost: Cost, devices: float) -> float:
        """The time of a cost spread evenly over devices, bound by operations or by memory."""
        return max(cost.flops / self.flops_per_s, cost.bytes / self.bytes_per_s) / max(devices, 1)


def iteration_cost(
    config: Config, size: ModelSize, lengths: Lengths, plan: IterationPlan, *, prompts: int, heldout: int
) -> Mapping[Stage, Cost]:
    """The cost of an iteration by stage, over `prompts` training prompts and `heldout` held-out ones."""
    width = 2 if config.learner.precision == "bf16" else 4
    target, said = lengths.prompt + lengths.target, lengths.prompt + lengths.generated
    scoring, learner = config.scoring.batch_tokens, config.learner

    def generated(sequences: float) -> Cost:
        return _generation(size, lengths, sequences, config.opponents.batch, width)

    def scored(sequences: float, length: float, response: float) -> Cost:
        return _pass(size, sequences, length, response, width=width, batch_tokens=scoring)

    def learned(sequences: float, length: float, response: float) -> Cost:
        # forward and backward are 3 forwards, without gradients of the weights 2; recomputed layers are one more
        passes = (2 if size.adapter else 3) + learner.gradient_checkpointing
        once = _pass(size, sequences, length, response, width=width, batch_tokens=learner.micro_batch_tokens)
        return replace(once, flops=passes * once.flops, bytes=passes * once.bytes)

    # Gradient, moments and master weights are read and written once a step.
    moments = 4 * (1 if learner.optimizer == "rmsprop" else 2)
    state = 2 * (4 + moments + (4 if learner.precision == "bf16" else 0)) * size.trained
    targets = learner.epochs * prompts
    targets_scored = prompts if plan.players else 0
    said_again = plan.update - targets if shares_prompts(config) else 0  # prompts that a target's run has covered
    prompts_saved = replace(learned(said_again, lengths.prompt, 0), sequences=0)
    return {
        "generate": generated(plan.generate),
        "score": scored(targets_scored, target, lengths.target) + scored(plan.score - targets_scored, said, lengths.generated),
        "update": learned(targets, target, lengths.target)
        + learned(plan.update - targets, said, lengths.generated)
        - prompts_saved
        + Cost(sequences=0, tokens=0, flops=0, bytes=state * plan.steps),
        "evaluate": generated(heldout) + scored(heldout, target, lengths.target),
    }


def stage_devices(config: Config) -> Mapping[Stage, float]:
    """How many devices work on a stage."""
    engines = config.opponents.replicas * config.opponents.tensor_parallel
    return {"generate": engines, "score": config.scoring.workers, "update": config.learner.workers, "evaluate": engines}


def iteration_seconds(config: Config, costs: Mapping[Stage, Cost], device: Device) -> float:
    """The time of an iteration in which nothing waits but for what it needs: scoring goes on beside generation."""
    devices = stage_devices(config)
    seconds = {stage: device.seconds(cost, devices[stage]) for stage, cost in costs.items()}
    return max(seconds["generate"], seconds["score"]) + seconds["update"] + seconds["evaluate"]


def forward_flops(size: ModelSize, sequences: float, length: float, head_tokens: float) -> float:
    """Operations of forward passes over sequences of a length, the head on `head_tokens` tokens of each.

    One sequence of 3 tokens, the head on 1, through 1 layer of hidden size 2 with 10 weights beside a vocabulary of 5 (2 × 5):
    3 × (2 × 10 + 2 × 1 × 2 × 3) + 1 × 2 × 2 × 5.

    >>> size = ModelSize(parameters=20, hidden=2, layers=1, vocabulary=5, context=8, tied=True, kv=2)
    >>> forward_flops(size, 1, 3, 1)
    116.0
    """
    table = size.vocabulary * size.hidden
    body = size.parameters - table * (1 if size.tied else 2)
    token = 2 * body + 2 * size.layers * size.hidden * length
    return float(sequences * (length * token + head_tokens * 2 * table))


def _pass(size: ModelSize, sequences: float, length: float, response: float, *, width: int, batch_tokens: int) -> Cost:
    tokens = sequences * length
    return Cost(
        sequences=sequences,
        tokens=tokens,
        flops=forward_flops(size, sequences, length, response),
        bytes=tokens / batch_tokens * size.parameters * width,  # the weights, once a batch
    )


def _generation(size: ModelSize, lengths: Lengths, sequences: float, batch: int, width: int) -> Cost:
    # A step of the engine reads all weights for `batch` new tokens, and each sequence's keys and values so far.
    length = lengths.prompt + lengths.generated
    steps = sequences * lengths.generated / batch
    cache = 2 * size.layers * size.kv * width * (lengths.prompt + lengths.generated / 2)
    return Cost(
        sequences=sequences,
        tokens=sequences * length,
        flops=forward_flops(size, sequences, length, lengths.generated),
        bytes=steps * size.parameters * width + sequences * lengths.generated * cache,
    )
