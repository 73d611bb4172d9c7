"""The work ahead, computed without starting it: sequences, steps, memory.

Memory figures are estimates from parameter counts and token budgets; they leave out fragmentation.
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tpaw_ray.algorithm.team import rollouts_of, team_at
from tpaw_ray.config import Config, LearnerConfig
from tpaw_ray.policy.directory import weight_shapes

GIB = 2**30
_HEAD_CHUNK = 512
RUNTIME_BYTES = 2 * GIB
"""What torch, vLLM or DeepSpeed take by themselves in a process (2.7 GB were measured for vLLM with a 135 M model)."""
ASKING_CPUS = 0.05
"""CPUs Ray sets aside for a process that asks opponents or scorers: asking is waiting."""
ASKING_THREADS = 32
"""Shards such a process asks for at once."""
SCORER_SHARDS = 2
"""Shards under way at once for each scorer: one is computed, another waits for its generations."""
PORTIONS = 4
"""Into how many parts a replica's share of a shard is divided."""
AHEAD = 2
"""How many of them a replica has at once; the others go to whoever is done first."""
PAIRING_CPUS = 0.5
"""CPUs Ray sets aside for a task that joins a shard: short work, so fewer processes that start mean sooner done."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory estimates need of a model."""

    parameters: int
    hidden: int
    layers: int
    vocabulary: int
    context: int
    kv: int
    """Width of a layer's keys: heads that are kept × head size."""
    tied: bool
    """Whether head and embedding are one matrix."""
    adapter: int = 0
    """Parameters of an adapter, where those are trained in place of the weights."""

    @property
    def trained(self) -> int:
        """Parameters that an update changes."""
        return self.adapter or self.parameters


@dataclass(frozen=True, kw_only=True)
class IterationPlan:
    """Sequences of one iteration by stage; `steps` are optimizer steps."""

    iteration: int
    players: int
    generate: int
    score: int
    triplets: int
    update: int
    """Sequences the live policy runs forward and backward, over all epochs: each prompt's target once for all its rounds."""
    steps: int


def plan_iteration(config: Config, iteration: int, num_prompts: int) -> IterationPlan:
    """Count the work of an iteration over `num_prompts` training prompts.

    With a full team of three and replayed rounds, `6N` sequences are scored: the new checkpoint scores targets and three
    rounds, each older one the new round.
    """
    team, earlier = config.team, range(iteration - 1, -1, -1)  # which of them are best is not known yet
    rollouts = rollouts_of(team.data, iteration, team_at(iteration, config.window, team.select, earlier)[: config.window])
    players = () if team.data == "none" else team_at(iteration, team.size, team.select, earlier)
    scored = 0
    for player in players:
        scored += player == iteration
        scored += sum(max(player, rollout.iteration) == iteration for rollout in rollouts)
    triplets = num_prompts * max(1, len(rollouts))
    return IterationPlan(
        iteration=iteration,
        players=len(players),
        generate=0 if team.data == "given" else num_prompts * sum(rollout.iteration == iteration for rollout in rollouts),
        score=num_prompts * scored,
        triplets=triplets,
        update=config.learner.epochs * num_prompts * (1 + len(rollouts)),
        steps=config.learner.epochs * math.ceil(triplets / config.learner.global_batch),
    )


def shares_prompts(config: Config) -> bool:
    """Whether the learner runs a prompt once for its target and all generations: with `varlen`, which `auto` is on a CPU."""
    return config.model.attention == "varlen" or (config.model.attention == "auto" and not config.learner.gpus)


def model_size(directory: Path, *, trust_remote_code: bool = False) -> ModelSize:
    """Sizes from the config and the headers of the safetensors of a model that `check_weights` took; no weights are read."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code).get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(
        parameters=sum(map(math.prod, weight_shapes(directory).values())),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        context=getattr(config, "max_position_embeddings", 0) or 2**31,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def learner_bytes(size: ModelSize, learner: LearnerConfig) -> int:
    """Memory of one worker: weights, gradients, optimizer states by ZeRO stage, a micro-batch's activations, the head's chunk."""
    width = 2 if learner.precision == "bf16" else 4
    share = {stage: (learner.workers if learner.zero_stage >= stage else 1) for stage in (1, 2, 3)}
    moments = 4 * (1 if learner.optimizer == "rmsprop" else 2)
    master = 4 if learner.precision == "bf16" else 0
    weights = size.parameters * width / share[3]
    states = size.trained * (4 / share[2] + (moments + master) / share[1])
    kept = 1 if learner.gradient_checkpointing else 16  # hidden states a layer keeps for the backward pass
    activations = learner.micro_batch_tokens * size.hidden * width * (size.layers * kept + 24)
    head = 3 * _HEAD_CHUNK * size.vocabulary * 4
    # What is kept in the CPU's memory does not count on a GPU.
    held = {"none": weights + states, "optimizer": weights, "parameters": 0.0}[learner.offload if learner.gpus else "none"]
    return int(held + activations + head) + RUNTIME_BYTES


def step_checkpoint_bytes(size: ModelSize, learner: LearnerConfig) -> int:
    """Size of an update that is saved between steps: what is trained and the optimizer's states, in fp32."""
    return size.trained * 4 * (2 if learner.optimizer == "rmsprop" else 3)


def opponent_bytes(size: ModelSize, config: Config) -> int:
    """Memory of one engine on the CPU: weights and KV cache. On a GPU an engine takes `opponents.memory_share` of it."""
    width = 2 if config.learner.precision == "bf16" else 4
    weights = size.parameters + config.window * size.adapter
    return int(weights * width + config.opponents.cpu_cache_gib * GIB) + RUNTIME_BYTES


def scorer_bytes(size: ModelSize, config: Config) -> int:
    """Memory of one scorer: weights, a batch's activations, the head's chunk."""
    width = 2 if config.learner.precision == "bf16" else 4
    activations = config.scoring.batch_tokens * size.hidden * width * 16
    players = config.iterations if config.team.select == "all" else config.team.size
    weights = size.parameters + players * size.adapter
    return weights * width + activations + _HEAD_CHUNK * size.vocabulary * 4 + RUNTIME_BYTES


def checkpoint_bytes(size: ModelSize, config: Config) -> int:
    """Size on disk of a checkpoint that an update makes."""
    return size.trained * (2 if config.learner.precision == "bf16" else 4)


def start_bytes(size: ModelSize, config: Config) -> int:
    """Size on disk of the start model."""
    return size.parameters * (2 if config.learner.precision == "bf16" else 4)


def run_bytes(size: ModelSize, config: Config, num_prompts: int) -> int:
    """Disk a whole run takes: all checkpoints, two step checkpoints, and token ids as if every response had full length."""
    checkpoints = start_bytes(size, config) + config.iterations * checkpoint_bytes(size, config)
    if config.learner.save_steps or config.learner.save_minutes:
        checkpoints += 2 * step_checkpoint_bytes(size, config.learner)  # the one before goes once the next is committed
    plans = [plan_iteration(config, iteration, num_prompts) for iteration in range(config.iterations)]
    sequences = sum(plan.generate + 2 * plan.triplets for plan in plans)
    return checkpoints + sequences * config.data.max_length * 4


def shards_asked(config: Config) -> int:
    """Shards a checkpoint's engines are asked for at once: two full batches each, so that none runs dry as a shard ends.

    Of several replicas each has `AHEAD` of its `PORTIONS` of a shard at a time.
    """
    opponents = config.opponents
    held = 1.0 if opponents.replicas == 1 else AHEAD / PORTIONS
    return max(2, math.ceil(2 * opponents.batch * opponents.replicas / (held * config.data.shard_size)))


def num_askers(shards: int) -> int:
    """Processes that ask for so many shards at once."""
    return math.ceil(shards / ASKING_THREADS)


def free_disk(root: str) -> int:
    """Free bytes where runs will lie."""
    path = Path(root)
    while not os.path.exists(path):
        path = path.parent
    return shutil.disk_usage(path).free


def multiplies_bf16(cpuinfo: str | None = None) -> bool:
    """Whether a processor multiplies matrices in bf16, from the text of `/proc/cpuinfo` (this machine's by default).

    One that does not emulates it: an AVX2 processor was seen at 19 GFLOP/s in bf16 and 164 in fp32.

    >>> multiplies_bf16("flags : fpu avx512_bf16 sse"), multiplies_bf16("flags : fpu avx2 sse")
    (True, False)
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpuinfo.split())
