"""The loop every worker of the Ray Train group runs: wait for an order, update the live policy, export, report.

Axes: `B` triplet, `K` player.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from torch import Tensor, distributed

from tpaw_ray.algorithm.objective import TeamLoss, target_loss, team_loss, weighted_loss
from tpaw_ray.config import Config, at_iteration
from tpaw_ray.errors import DivergedError, LearnerError, RunError
from tpaw_ray.faults import Place, reached
from tpaw_ray.learner.batches import TripletLengths, Unit, epoch_steps, micro_batches, num_steps
from tpaw_ray.learner.engine import PolicyEngine
from tpaw_ray.learner.export import export_checkpoint
from tpaw_ray.learner.saves import StepCheckpoints
from tpaw_ray.learner.triplets import Lengths, TripletBatch, lengths_of, read_pairs, triplet_batch
from tpaw_ray.runs.metrics import MetricsLog, StepMetrics
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Pair


def work(config: Config, store: RunStore, mailbox: Any) -> None:
    """Serve update orders until the mailbox is closed. Runs on every worker; rank 0 speaks to the driver."""
    torch.set_num_threads(threads_of(config))
    first_rank = distributed.get_rank() == 0
    done = -1
    while (iteration := ray.get(mailbox.next_order.remote(done))) is not None:
        if not store.is_committed(store.checkpoint(iteration + 1)):
            try:
                update(config, store, iteration, Reports(mailbox if first_rank else None))
            except (LearnerError, RunError) as error:  # a restart of the group would find it again
                if first_rank or isinstance(error, RunError):  # every worker finds the same, but for what befalls a folder
                    ray.get(mailbox.give_up.remote(error))
                return
        done = iteration
        ray.train.report({"iteration": iteration})


@dataclass(frozen=True)
class Reports:
    """What the update says to the driver; rank 0 speaks for all, the others have no mailbox."""

    mailbox: Any

    def row(self, row: StepMetrics) -> None:
        if self.mailbox is not None:
            self.mailbox.report.remote(row)

    def remark(self, text: str) -> None:
        if self.mailbox is not None:
            self.mailbox.remark.remote(text)


def update(config: Config, store: RunStore, iteration: int, report: Reports) -> None:
    """Train `θ_{t+1}` from `θ_t` on the pairs of iteration `t` and write it as a checkpoint."""
    began = time.perf_counter()
    rank, learner = distributed.get_rank(), config.learner
    pairs = read_pairs(store, iteration)
    lengths = lengths_of(pairs)
    total = num_steps(len(pairs), learner.global_batch, learner.epochs)
    start, base = (store.on_disk(store.checkpoint(number)) for number in (iteration, config.base_of(iteration)))
    policy = PolicyEngine(config, base=base, checkpoint=start, iteration=iteration, num_steps=total)
    saves = StepCheckpoints(config, store, iteration, report.remark)
    progress = saves.restore(policy)
    began -= progress.seconds
    for row in progress.rows:
        report.row(row)
    for epoch, step in steps_of(config, lengths, iteration)[len(progress.rows) :]:
        number = len(progress.rows)
        reached(Place.STEP, f"{store.inside(store.steps(iteration))}/{number:06d}/rank-{rank}")
        row = take_step(config, policy, pairs, lengths, step, iteration=iteration, epoch=epoch, step=number, steps=total)
        progress.rows.append(row)
        progress.seconds = time.perf_counter() - began
        report.row(row)
        if number + 1 < total and saves.due(number + 1):
            saves.save(policy, progress)
    attention = policy.attention
    made = store.checkpoint(iteration + 1)
    export_checkpoint(policy.model, store, start=Path(start), destination=made, adapter=config.adapters)
    policy.close()
    # An opponent on the same device starts when the checkpoint is committed, so the memory must be free by then.
    if rank == 0:
        rows = progress.rows
        MetricsLog(store).write_update(iteration, rows)
        store.commit(
            store.learner(iteration),
            sequences=sum(row.sequences for row in rows),
            tokens=sum(row.tokens for row in rows),
            seconds=time.perf_counter() - began,
            attention=attention,
        )
        store.commit(made, steps=total, triplets=len(pairs))
    distributed.barrier()


def steps_of(config: Config, lengths: Lengths, iteration: int) -> list[tuple[int, list[int]]]:
    """Every optimizer step of an update in order: its epoch, and the indices of its triplets."""
    return [
        (epoch, step)
        for epoch in range(config.learner.epochs)
        for step in epoch_steps(lengths.prompts, config.learner.global_batch, f"{config.run.seed}/{iteration}/{epoch}")
    ]


def take_step(
    config: Config,
    policy: PolicyEngine,
    pairs: Sequence[Pair],
    lengths: Sequence[TripletLengths],
    triplets: Sequence[int],
    *,
    iteration: int,
    epoch: int,
    step: int,
    steps: int,
) -> StepMetrics:
    """One optimizer step on some triplets, over all workers.

    Raises:
        DivergedError: when loss or gradient is not a finite number, naming the prompts of the step.
    """
    started = time.perf_counter()
    workers = distributed.get_world_size()
    shares = micro_batches(
        lengths,
        triplets,
        workers=workers,
        budget=config.learner.micro_batch_tokens,
        packed=policy.packed,
        share_prompts=policy.shares_prompts,
    )
    players = list(pairs[0].players)
    tally = Tally(len(players), policy.device)
    whole = len(triplets) if players else sum(lengths[index].target_length - lengths[index].prompt_length for index in triplets)
    for units in shares[distributed.get_rank()]:
        backward(config, policy, pairs, units, iteration, share=workers / whole, tally=tally)
    grad_norm, learning_rate = policy.step()
    row = tally.metrics(
        iteration=iteration,
        epoch=epoch,
        step=step,
        steps=steps,
        players=players,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        seconds=time.perf_counter() - started,
    )
    if not (math.isfinite(row.loss) and math.isfinite(grad_norm or 0.0)):
        named = ", ".join(sorted({pairs[index].prompt_id for index in triplets})[:4])
        raise DivergedError(
            f"iteration {iteration}, step {step}: loss {row.loss}, gradient norm {grad_norm}; prompts {named}, … "
            "The update was stopped before the checkpoint was written; a lower learner.learning_rate may help"
        )
    return row


def backward(
    config: Config,
    policy: PolicyEngine,
    pairs: Sequence[Pair],
    units: Sequence[Unit],
    iteration: int,
    *,
    share: float,
    tally: "Tally",
) -> None:
    """Add a micro-batch's part to the step's gradient.

    DeepSpeed averages gradients over workers, so `share` is workers / triplets of the step: the sum over all
    micro-batches of all workers is then the mean over the step's triplets. Of targets alone it is the mean over their tokens.
    """
    if not units:
        policy.engine.backward(_idle_loss(policy))
        return
    batch = triplet_batch(pairs, units, share_prompts=policy.shares_prompts).to(policy.device)
    logps_S = policy.engine(batch.tokens)
    if len(batch.generated_B):
        losses = batch_loss(config, batch, logps_S, iteration)
        losses_B = losses.losses_B
        tally.add(losses, logps_S.detach(), batch, config.objective.eta)
    else:
        losses_B = target_loss(logps_S[batch.target_B])
        tally.add_targets(losses_B.detach(), logps_S.detach(), batch)
    policy.engine.backward(losses_B.sum() * share)
    tally.work += torch.tensor([len(logps_S), len(batch.tokens.input_ids_N)], dtype=torch.float64, device=policy.device)


def batch_loss(config: Config, batch: TripletBatch, logps_S: Tensor, iteration: int) -> TeamLoss:
    """Equations (1) to (5) on a micro-batch, with live or frozen weights."""
    losses = team_loss(
        logps_S[batch.target_B],
        logps_S[batch.generated_B],
        batch.reference_target_logps_BK,
        batch.reference_generated_logps_BK,
        reward_scale=at_iteration(config.objective.reward_scale, iteration),
        eta=config.objective.eta,
        gamma=config.objective.gamma,
        detach_weights=config.objective.detach_weights,
    )
    if config.objective.weights == "live":
        return losses
    return weighted_loss(losses.target_rewards_BK, losses.generated_rewards_BK, batch.start_alpha_BK, batch.start_beta_BK)


def _idle_loss(policy: PolicyEngine) -> Tensor:
    # Workers meet in every forward and backward pass, so one without triplets must run one too, with weight 0.
    from tpaw_ray.policy.batch import token_batch

    return policy.engine(token_batch([[0]], [[0]]).to(policy.device)).sum() * 0.0


class Tally:
    """Sums of a step over this worker's triplets; `metrics` adds those of all workers."""

    TARGETS = ("triplets", "loss", "target_logp", "target_length")
    RESPONSES = ("target_reward", "generated_reward", "target_weight_share", "generated_logp", "generated_length")

    def __init__(self, num_players: int, device: torch.device) -> None:
        self.names = (*self.TARGETS, *(self.RESPONSES if num_players else ()))
        self.sums = torch.zeros(len(self.names) + num_players, dtype=torch.float64, device=device)
        self.drift = torch.zeros((), dtype=torch.float64, device=device)
        self.work = torch.zeros(2, dtype=torch.float64, device=device)  # sequences, tokens

    def add(self, losses: TeamLoss, logps_S: Tensor, batch: TripletBatch, eta: float) -> None:
        """Count a micro-batch of triplets."""
        targets_BK, generated_BK = losses.target_rewards_BK.detach(), losses.generated_rewards_BK.detach()
        self._sum(
            *self._targets(losses.losses_B.detach(), logps_S, batch),
            targets_BK.mean(1),
            generated_BK.mean(1),
            (losses.target_weights_BK == eta).double().mean(1),
            logps_S[batch.generated_B],
            batch.response_lengths_S[batch.generated_B],
            *losses.player_weights_BK.detach().unbind(1),
        )
        self.drift = torch.maximum(
            self.drift, torch.maximum(targets_BK[:, 0].abs().max(), generated_BK[:, 0].abs().max()).double()
        )

    def add_targets(self, losses_B: Tensor, logps_S: Tensor, batch: TripletBatch) -> None:
        """Count a micro-batch of targets alone."""
        self._sum(*self._targets(losses_B, logps_S, batch))

    def _targets(self, losses_B: Tensor, logps_S: Tensor, batch: TripletBatch) -> tuple[Tensor, ...]:
        return torch.ones_like(losses_B), losses_B, logps_S[batch.target_B], batch.response_lengths_S[batch.target_B]

    def _sum(self, *per_triplet: Tensor) -> None:
        self.sums += torch.stack([values.double().sum() for values in per_triplet])

    def metrics(self, *, players: list[int], seconds: float, **where: float | None) -> StepMetrics:
        """The means of the step over all workers; every worker must call it."""
        sums = torch.cat([self.sums, self.work])
        distributed.all_reduce(sums)
        distributed.all_reduce(self.drift, op=distributed.ReduceOp.MAX)
        *totals, sequences, tokens = sums.tolist()
        named = dict(zip(self.names, totals, strict=False))
        count = named["triplets"]
        means: dict[str, float | None] = dict.fromkeys(self.RESPONSES) | {name: total / count for name, total in named.items()}
        if players:
            means["margin"] = named["target_reward"] / count - named["generated_reward"] / count
        else:
            means |= {"margin": None, "loss": named["loss"] / named["target_length"]}
        return StepMetrics(
            players=players,
            player_weights=[total / count for total in totals[len(self.names) :]],
            newest_reward_max_abs=self.drift.item() if players else None,
            sequences=int(sequences),
            tokens=int(tokens),
            tokens_per_s=tokens / seconds,
            seconds=seconds,
            **means | {"triplets": int(count)},  # type: ignore[arg-type]
            **where,  # type: ignore[arg-type]
        )


def threads_of(config: Config) -> int:
    """CPU threads of a worker."""
    import os

    return config.learner.threads or max(1, (os.cpu_count() or 1) // config.learner.workers)
