"""What can be known of a run without starting it: `tpaw plan`, and the checks every start begins with."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tpaw_ray.config import Config
from tpaw_ray.cost import Cost, Device, Lengths, Stage, iteration_cost, iteration_seconds, stage_devices
from tpaw_ray.data.prompts import PromptSurvey, survey_prompts
from tpaw_ray.data.sources import check_first_rows
from tpaw_ray.data.template import end_tokens, load_tokenizer
from tpaw_ray.errors import CheckpointError, ResourceError, RunError
from tpaw_ray.placement import Demand, Node, by_labels, demands, label_text, this_machine, unmet
from tpaw_ray.plan import (
    GIB,
    IterationPlan,
    ModelSize,
    checkpoint_bytes,
    free_disk,
    learner_bytes,
    model_size,
    multiplies_bf16,
    opponent_bytes,
    plan_iteration,
    run_bytes,
    scorer_bytes,
    start_bytes,
)
from tpaw_ray.policy.directory import check_directory, check_weights, own_code
from tpaw_ray.policy.start import locate
from tpaw_ray.runs.continuation import check_same_run
from tpaw_ray.runs.progress import say
from tpaw_ray.runs.store import RunStore
from tpaw_ray.tracking.follow import check_installed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from, checked."""

    model: Path
    tokenizer: "PreTrainedTokenizerBase"
    ends: tuple[int, ...]
    """Tokens that end a response."""
    size: ModelSize


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The work ahead. Memory and disk in bytes, estimates without fragmentation."""

    state: str
    start: Start
    survey: PromptSurvey
    iterations: tuple[IterationPlan, ...]
    costs: tuple[Mapping[Stage, Cost], ...]
    """By iteration and stage; responses are taken to be as long as the targets, up to `sampling.max_new_tokens`."""
    opponent_bytes: int
    scorer_bytes: int
    learner_bytes: int
    run_bytes: int
    free_bytes: float
    """Infinite in an object store."""
    demands: tuple[Demand, ...]
    nodes: list[Node]
    warnings: tuple[str, ...]


def check_folders(config: Config, store: RunStore) -> Path:
    """The checks that import nothing large: the run's folder, the first rows of local data, and the model's folder, returned.

    Raises:
        RunError: when the run was started with another config, or its folder cannot be written to.
        ConfigError: when the package of a tracker is not installed.
        DataError: when local data is missing, or its first row cannot be read.
        CheckpointError: when there is no such model, or it would have to be unpickled or to run code of its own.
    """
    check_same_run(config, store)
    check_installed(config)
    if store.scheme:
        store.check_writable()
    else:
        beside = _nearest(Path(store.root))
        if not (beside.is_dir() and os.access(beside, os.W_OK | os.X_OK)):
            raise RunError(f"run.root: {store.root} cannot be made: {beside} is not a folder that can be written to")
    check_first_rows(config.data, preferences=config.team.data == "given")
    directory = locate(config.model.path)
    check_directory(directory, trust_remote_code=config.model.trust_remote_code)
    return directory


def check_start(config: Config, store: RunStore, model: Path) -> Start:
    """The checks that take no reading of data: model, tokenizer, template, lengths, disk for the checkpoints.

    Raises:
        CheckpointError: when the model or its tokenizer is damaged or too short for `data.max_length`, or they do not fit.
        ConfigError: when there is no usable chat template, or the model has no such layers as adapters shall have.
        ResourceError: when the disk cannot hold the checkpoints.
    """
    check_weights(model, trust_remote_code=config.model.trust_remote_code)
    tokenizer = load_tokenizer(config.model)  # after the model, whose config it reads too
    size = model_size(model, trust_remote_code=config.model.trust_remote_code)
    if config.adapters:
        from tpaw_ray.policy.adapter import adapter_size

        size = replace(size, adapter=adapter_size(model, config.model))
    if config.data.max_length > size.context:
        raise CheckpointError(
            f"data.max_length: found {config.data.max_length}, but {model} was made for at most {size.context} tokens"
        )
    ends = end_tokens(tokenizer, str(model))
    if ends[-1] >= size.vocabulary:
        raise CheckpointError(
            f"{model}: the end token {ends[-1]} of tokenizer or config.json is beyond the model's vocabulary of "
            f"{size.vocabulary}; expected model and tokenizer of one kind"
        )
    missing = [number for number in range(config.iterations + 1) if not store.is_committed(store.checkpoint(number))]
    needed = sum(checkpoint_bytes(size, config) if number else start_bytes(size, config) for number in missing)
    if needed > (free := _free(store)):
        raise ResourceError(
            f"{store.root}: {len(missing)} checkpoints need {needed / GIB:.1f} GiB, the disk has {free / GIB:.1f} GiB free"
        )
    return Start(model=model, tokenizer=tokenizer, ends=ends, size=size)


def forecast(config: Config) -> Forecast:
    """Check everything that can be checked without starting, and count the work ahead. Nothing is written.

    Raises:
        TpawError: the first problem found, as `check_folders` and `check_start` name it; `DataError` for a row that cannot be
            used; `ResourceError` when the cluster (that of `RAY_ADDRESS`, otherwise this machine) lacks what the config asks for.
    """
    store = RunStore.open(config.run.root, config.run.name)
    start = check_start(config, store, check_folders(config, store))
    needed, nodes = demands(config), nodes_ahead()
    if (missing := unmet(needed, nodes)) and not config.run.wait_minutes:
        raise ResourceError(missing)
    survey = survey_prompts(config, start.tokenizer)
    iterations = tuple(plan_iteration(config, iteration, survey.counts.train) for iteration in range(config.iterations))
    found = Forecast(
        state=_state(config, store),
        start=start,
        survey=survey,
        iterations=iterations,
        costs=tuple(_cost(config, start.size, survey, plan) for plan in iterations),
        opponent_bytes=opponent_bytes(start.size, config),
        scorer_bytes=scorer_bytes(start.size, config),
        learner_bytes=learner_bytes(start.size, config.learner),
        run_bytes=run_bytes(start.size, config, survey.counts.train),
        free_bytes=_free(store),
        demands=needed,
        nodes=nodes,
        warnings=(*([f"waits for nodes: {missing}"] if missing else []), *_warnings(config, start, survey, nodes)),
    )
    return found


def nodes_ahead() -> list[Node]:
    """The nodes of the cluster at `RAY_ADDRESS`, or this machine, on which a run would start Ray."""
    if not os.environ.get("RAY_ADDRESS"):
        return [this_machine()]
    import ray

    from tpaw_ray.nodes import cluster_nodes

    try:
        ray.init(log_to_driver=False, ignore_reinit_error=True)
    except Exception as error:  # Ray raises bare exceptions for a cluster it cannot reach
        raise ResourceError(f"the cluster at {os.environ['RAY_ADDRESS']} cannot be reached: {error}") from error
    nodes = cluster_nodes()
    ray.shutdown()
    return nodes


def _cost(config: Config, size: ModelSize, survey: PromptSurvey, plan: IterationPlan) -> Mapping[Stage, Cost]:
    lengths = Lengths(
        prompt=survey.mean_prompt_tokens,
        target=survey.mean_target_tokens,
        generated=min(survey.mean_target_tokens, config.sampling.max_new_tokens),
    )
    return iteration_cost(config, size, lengths, plan, prompts=survey.counts.train, heldout=_answered(config, survey))


def _answered(config: Config, survey: PromptSurvey) -> int:
    heldout: int = getattr(survey.counts, config.evaluation.split)
    return min(heldout, config.evaluation.limit or heldout)


def show(found: Forecast, config: Config, console: Console, device: Device | None = None) -> None:
    """Print a forecast as a person reads it, with hours where it is said what a device achieves."""
    counts, survey, size = found.survey.counts, found.survey, found.start.size
    facts = {
        "run": found.state,
        "model": f"{found.start.model}: {size.parameters:,} parameters, vocabulary {size.vocabulary:,}, {_context(size)}",
        "ends of a response": ", ".join(map(repr, found.start.tokenizer.convert_ids_to_tokens(list(found.start.ends)))),
        "rows": f"{counts.rows}: {counts.train} train, {counts.validation} validation, {counts.test} test, "
        f"{counts.too_long} too long, {counts.duplicates} duplicates, {counts.leaked} also held out",
        "prompt tokens": f"{survey.mean_prompt_tokens:.0f} on average, {survey.max_prompt_tokens} at most",
        "target tokens": f"{survey.mean_target_tokens:.0f} on average, {survey.max_target_tokens} at most",
        "memory, estimated": f"{found.opponent_bytes / GIB:.1f} GiB an opponent, {found.scorer_bytes / GIB:.1f} GiB a scorer, "
        f"{found.learner_bytes / GIB:.1f} GiB a learner worker",
        "disk": f"up to {found.run_bytes / GIB:.2f} GiB"
        + (f", {found.free_bytes / GIB:.1f} GiB free" if math.isfinite(found.free_bytes) else ""),
        **{
            " ".join(["at the same time", label_text(labels)]).strip(): ", ".join(
                f"{amount:g} of {there:g} {name}" for name, (amount, there) in sums.items()
            )
            for labels, sums in by_labels(found.demands, found.nodes)
        },
    }
    width = max(map(len, facts))
    for name, fact in facts.items():
        say(console, f"{name:<{width}}  {fact}")
    table = Table(title="the work ahead, in sequences")
    for column in ("iteration", "players", "generate", "score", "triplets", "update", "steps"):
        table.add_column(column, justify="right")
    for plan in found.iterations:
        cells = (plan.iteration, plan.players, plan.generate, plan.score, plan.triplets, plan.update, plan.steps)
        table.add_row(*map(str, cells))
    console.print(table)
    console.print(_cost_table(found, config, device))
    if device:
        hours = sum(iteration_seconds(config, costs, device) for costs in found.costs) / 3600
        say(console, f"computed, with scoring beside generation: {_number(hours)} hours, start-up aside")
    answered = _answered(config, survey)
    say(console, f"every checkpoint answers {answered} held-out prompts ({config.evaluation.split})")
    for warning in found.warnings:
        say(console, f"warning: {warning}")


def _cost_table(found: Forecast, config: Config, device: Device | None) -> Table:
    table = Table(title="the same, as if responses were as long as targets")
    columns = ("stage", "sequences", "tokens", "TFLOP", "GB moved", "devices")
    for column in (*columns, *(["hours"] if device else [])):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, devices in stage_devices(config).items():
        cost = sum((costs[stage] for costs in found.costs[1:]), found.costs[0][stage])
        figures = [cost.sequences, cost.tokens, cost.flops / 1e12, cost.bytes / 1e9, devices]
        hours = [device.seconds(cost, devices) / 3600] if device else []
        table.add_row(stage, *map(_number, [*figures, *hours]))
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _context(size: ModelSize) -> str:
    return f"context {size.context}" if size.context < 2**31 else "context not stated"


def _free(store: RunStore) -> float:
    return math.inf if store.scheme else free_disk(store.root)


def _nearest(path: Path) -> Path:
    while not os.path.exists(path):
        path = path.parent
    return path


def _state(config: Config, store: RunStore) -> str:
    done = sum(store.is_committed(store.iteration(number)) for number in range(config.iterations))
    if done == config.iterations:
        return f"{store.root}: all {done} iterations are done; nothing to do"
    if done or store.exists(store.root):
        return f"{store.root}: goes on after {done} of {config.iterations} iterations"
    return f"{store.root}: new, {config.iterations} iterations"


def _warnings(config: Config, start: Start, survey: PromptSurvey, nodes: Sequence[Node]) -> tuple[str, ...]:
    counts, learner = survey.counts, config.learner
    heldout = getattr(counts, config.evaluation.split)
    reach = survey.max_prompt_tokens + config.sampling.max_new_tokens
    used = [config.opponents.gpus, config.scoring.gpus, learner.gpus]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_cpu = (
        (opponent_bytes(start.size, config) * config.opponents.replicas if not config.opponents.gpus else 0)
        + (scorer_bytes(start.size, config) if not config.scoring.gpus else 0)
        + (learner_bytes(start.size, learner) * learner.workers if not learner.gpus else 0)
    )
    said = {
        own_code(start.model): config.model.trust_remote_code,
        f"no prompts are held out for {config.evaluation.split}: checkpoints are not evaluated": not heldout,
        "no held-out prompt has a final answer that evaluation.answer_pattern finds: accuracy stays empty": heldout
        and not survey.judged,
        f"{counts.too_long} of {counts.rows} rows are too long and left out; raise data.prompt_length or data.max_length": (
            counts.too_long > 0.05 * counts.rows
        ),
        f"a learner.global_batch of {learner.global_batch} is more than the first iteration's {counts.train} triplets": (
            learner.global_batch > counts.train
        ),
        f"the longest prompt with sampling.max_new_tokens is {reach} tokens; responses end at data.max_length": (
            reach > config.data.max_length
        ),
        "learner.precision is bf16, in which this CPU cannot multiply; fp32 may be several times as fast": (
            learner.precision == "bf16" and not all(used) and not os.environ.get("RAY_ADDRESS") and not multiplies_bf16()
        ),
        "there are GPUs, but opponents.gpus, scoring.gpus and learner.gpus are 0": not any(used)
        and any(node.resources.get("GPU") for node in nodes),
        f"what runs on the CPU may need {on_cpu / GIB:.1f} GiB at the same time; this machine has {memory / GIB:.1f} GiB": (
            on_cpu > memory and not os.environ.get("RAY_ADDRESS")
        ),
    }
    return tuple(text for text, holds in said.items() if holds)
