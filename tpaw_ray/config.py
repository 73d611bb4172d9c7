"""The typed config tree, its presets and how files and overrides become one resolved config.

Layers, later ones win: defaults, the file's preset, the file, the command line's preset, the command line's overrides.
Imports neither torch nor ray nor vllm, so that `tpaw --help` and config errors come at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from tpaw_ray.credentials import find_credentials
from tpaw_ray.errors import ConfigError
from tpaw_ray.plain_yaml import DEPTH, parse_plain_yaml
from tpaw_ray.wording import shorten

LARGEST = 2**31 - 1
"""Bound of every number that has no lower one: beyond it lie slips of the pen, and what 32 bits cannot hold."""
CONFIG_BYTES = 2**18
PROBLEMS_TOLD = 20
LOADED = (
    "model",
    "model_weights",
    "revision",
    "load_format",
    "model_loader_extra_config",
    "tokenizer",
    "tokenizer_revision",
    "hf_config_path",
    "config_format",
    "hf_overrides",
    "model_class_overrides",
    "trust_remote_code",
    "code_revision",
    "speculative_config",
    "spec_model",
)
"""Engine arguments by which vLLM would load other weights, another format or other code than the run's checkpoints."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # which Python counts as 1 or 0
        raise ValueError("Input should be a number, not true or false")
    return value


Number = BeforeValidator(_no_boolean)
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False), Number]
AtLeastOne = Annotated[float, Field(ge=1, le=LARGEST, allow_inf_nan=False), Number]
Fraction = Annotated[float, Field(ge=0, lt=1), Number]
Share = Annotated[float, Field(gt=0, le=1), Number]
Count = Annotated[int, Field(ge=1, le=LARGEST), Number]
Filled = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
NodeLabels = dict[LabelKey, LabelValue]
PerIteration = Positive | Annotated[list[Positive], Field(min_length=1)]


class Section(BaseModel):
    """A part of the config: unknown keys are refused and values do not change after resolving."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class RunConfig(Section):
    name: Name
    """Name of the run; its folder is `root/name`. Letters, digits, `.`, `_`, `-`."""
    root: Filled = "runs"
    """Where runs lie: a folder that every node sees, or an object store, `s3://bucket/prefix` or `gs://bucket/prefix`. Keys and
    endpoint are those of the environment of every node (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
    `AWS_ENDPOINT_URL`; `GOOGLE_APPLICATION_CREDENTIALS`) and never stand here."""
    seed: Annotated[int, Field(ge=0, le=LARGEST), Number] = 42
    """Seed of sampling and of the order of training."""
    overlap: bool = True
    """Have opponents and scorers stand ready, and fresh opponents speak, while the learner works. False leaves their nodes to an
    autoscaler meanwhile, and costs their start in every iteration."""
    wait_minutes: NonNegative = 0
    """How long a run waits for nodes that it needs and the cluster has not, at its start and when one is lost: an autoscaler
    takes some minutes. After that it ends with what is missing, and the same command continues it."""


class LoraConfig(Section):
    rank: Annotated[int, Field(ge=0, le=512), Number] = 0
    """Rank of the adapters that are trained in place of the weights; 0 trains the weights. The team is then one model with an
    adapter a checkpoint: one engine speaks for all opponents, scorers and learner hold the start model's weights once."""
    alpha: Count = 32
    """Scale of an adapter: what it adds is multiplied by `alpha / rank`."""
    target_modules: Literal["all-linear"] | Annotated[list[Filled], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter, by the ends of their names (`[q_proj, v_proj]`); by default all linear ones but the head."""


class ModelConfig(Section):
    path: Filled
    """The SFT model `θ_0`: a Hugging Face directory, or a hub name where a hub can be reached."""
    chat_template: str | None = None
    """A Jinja chat template, a file that holds one, or `plain` for base models; by default the tokenizer's own."""
    attention: Literal["auto", "varlen", "flash_attention_2", "sdpa", "eager"] = "auto"
    """Attention of scorer and learner. `flash_attention_2` and `varlen` (torch's own, on any device) run without padding; `auto`
    takes the first where GPU and package are there, otherwise the second; `sdpa` and `eager` pad to the longest sequence. With
    `varlen` the learner runs a prompt once for its target and all generations."""
    trust_remote_code: bool = False
    """Let the model directory's own Python code run."""
    lora: LoraConfig = LoraConfig()
    """LoRA: adapters are trained in place of the weights."""


class ColumnsConfig(Section):
    messages: Filled | None = None
    """Column with a list of `{role, content}` (or ShareGPT's `{from, value}`)."""
    prompt: Filled | None = None
    """Column with the prompt: a string or a list of messages."""
    target: Filled | None = None
    """Column with the target response: a string or a list of messages."""
    rejected: Filled | None = None
    """Column with the rejected response, for `team.data=given`: a string or a list of messages; by default `rejected`."""
    system: Filled | None = None
    """Column with a system message to put first."""


class DataConfig(Section):
    path: Filled
    """SFT data: a `.jsonl`, `.json` or `.parquet` file, a folder of them, a folder saved by `datasets`, or a hub name."""
    subset: Filled | None = None
    """Configuration name of a hub data set."""
    split: Filled = "train"
    """Split of a hub or saved data set."""
    heldout_path: Filled | None = None
    """Separate data (same shapes) whose rows form the test split; then none is split off `path` for test."""
    heldout_split: Filled = "test"
    """Split of `heldout_path` where that is a hub or saved data set."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which columns hold what, for data of a shape that is not recognised."""
    limit: Count | None = None
    """Use the first so many rows of the data, before splitting."""
    validation_fraction: Fraction = 0.05
    """Share of prompts held out for validation, chosen by a stable hash of the prompt."""
    test_fraction: Fraction = 0.05
    """Share of prompts held out for test, chosen by a stable hash of the prompt."""
    prompt_length: Count = 512
    """Longest prompt in tokens; rows with longer ones are left out and counted."""
    max_length: Count = 1024
    """Longest prompt with its response in tokens; rows with longer ones are left out and counted."""
    shard_size: Count = 1024
    """Prompts in a shard, the unit in which stages work and save."""


class TeamConfig(Section):
    size: Count = 3
    """`K`: players in the team."""
    select: Literal["last", "spaced", "all", "best"] = "last"
    """Which checkpoints play, beside the newest, which always does: the `last`, as in the paper; `spaced`, every second one back;
    `all` of them, whatever `size`; the `best` on validation."""
    data: Literal["replay", "fresh", "given", "none"] = "replay"
    """Responses that stand against the targets. `replay`: a checkpoint generates once and its rounds are kept; `fresh`: opponents
    generate anew each iteration; `given`: the data's rejected responses, as in DPO; `none`: targets alone, as in fine-tuning."""
    window: Count | None = None
    """Rounds (`replay`) or opponents (`fresh`) an update learns from, selected as the players are; by default `size`."""


class ObjectiveConfig(Section):
    reward_scale: PerIteration = 0.1
    """`λ` of equation (1); a list gives one value an iteration, the last one serves all later iterations."""
    eta: AtLeastOne = 6.0
    """`η` of equation (2); 1 switches target weighting off."""
    gamma: NonNegative = 0.5
    """`γ` of equation (4); 0 weighs all players alike."""
    weights: Literal["live", "frozen"] = "live"
    """`live`: weights from the policy at every step, as in the paper; `frozen`: those from the start of the update."""
    detach_weights: bool = True
    """Keep gradients from flowing through the weights."""


class SamplingConfig(Section):
    temperature: Positive = 1.0
    """Temperature of the opponents' sampling."""
    top_p: Share = 1.0
    """Nucleus of the opponents' sampling."""
    max_new_tokens: Count = 256
    """Longest generated response in tokens."""


class OpponentsConfig(Section):
    replicas: Count = 1
    """Engines a checkpoint."""
    tensor_parallel: Count = 1
    """Parts that one engine is spread over, each on a GPU of its own."""
    gpus: Annotated[float, Field(ge=0, le=1), Number] = 0
    """GPUs a part of an engine takes: 1, a fraction that shares one, or 0 to run the engine on the CPU."""
    cpus: NonNegative = 0.1
    """CPUs Ray sets aside for an engine; a scheduling figure, not a limit (see `threads`)."""
    node_labels: NodeLabels = {}
    """Labels that an engine's node must have, as in `{tpaw-role: opponent}`: those of `ray start --labels`, or of a worker
    group's `labels` in KubeRay. By default any node will do."""
    threads: Count | None = None
    """CPU threads of an engine; by default all cores of its machine."""
    memory_share: Share = 0.85
    """Share of the GPU's memory an engine may take (vLLM's `gpu_memory_utilization`)."""
    cpu_cache_gib: Positive = 1.0
    """Memory of an engine's KV cache on the CPU, in GiB."""
    batch: Count = 256
    """Sequences an engine works on at once (vLLM's `max_num_seqs`)."""
    repeatable: bool = False
    """Give each engine one call at a time (a shard, or a portion of one where replicas share it), though engines idle as it ends.
    What else is in an engine's batch can change a response, in bf16 above all: with this a run that was disturbed has the
    responses of one that was not."""
    max_set_aside: Fraction = 0.01
    """Share of the prompts that may be left out because they end every engine they are given to; more end the run."""
    engine_args: dict[str, Any] = {}
    """Further vLLM engine arguments, passed on as they are; none that say what is loaded, in which format or whose code runs."""

    @field_validator("engine_args")
    @classmethod
    def _engine_args_are_no_way_around(cls, value: dict[str, Any]) -> dict[str, Any]:
        if refused := [name for name in value if name in LOADED]:
            raise ValueError(
                f"{', '.join(refused)} has no place here: engines load the run's checkpoints as all other stages do, from "
                "safetensors alone; to let a model's own code run, set model.trust_remote_code"
            )
        # A number that is not one equals nothing, so that a run could never go on with its own config.
        if _holds_nan(value):
            raise ValueError("found .nan or .inf, expected finite numbers")
        return value

    @model_validator(mode="after")
    def _parts_have_gpus(self) -> "OpponentsConfig":
        if self.tensor_parallel > 1 and self.gpus < 1:
            raise ValueError(f"tensor_parallel ({self.tensor_parallel}) needs gpus: 1, a whole GPU for each part")
        return self

    @property
    def engine_gpus(self) -> float:
        """GPUs Ray sets aside for an engine, all its parts together."""
        return self.gpus * self.tensor_parallel


class ScoringConfig(Section):
    workers: Count = 1
    """Scorers that work side by side."""
    gpus: NonNegative = 0
    """GPUs a scorer takes."""
    cpus: NonNegative = 0.1
    """CPUs Ray sets aside for a scorer."""
    node_labels: NodeLabels = {}
    """Labels that a scorer's node must have."""
    threads: Count | None = None
    """CPU threads of a scorer; by default all cores of its machine."""
    batch_tokens: Count = 16384
    """Tokens in a forward pass, with the padding where `model.attention` needs it."""


class LearnerConfig(Section):
    workers: Count = 1
    """Workers of the Ray Train group."""
    gpus: NonNegative = 0
    """GPUs a worker takes; 0 trains on the CPU."""
    cpus: NonNegative = 0.1
    """CPUs Ray sets aside for a worker."""
    node_labels: NodeLabels = {}
    """Labels that a worker's node must have, as in `{tpaw-role: learner}`."""
    threads: Count | None = None
    """CPU threads of a worker; by default the machine's cores divided by `workers`."""
    zero_stage: Annotated[int, Field(ge=0, le=3), Number] = 2
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What a worker keeps in the CPU's memory in place of its GPU's: the optimizer's states (from ZeRO stage 1 on), or the
    parameters as well (stage 3). Takes longer, and is of no use without a GPU."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of learner, scorers and opponents."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """Optimizer, made anew at every iteration."""
    learning_rate: PerIteration = [5e-7, 5e-7, 1e-7, 1e-7]
    """Peak learning rate; a list gives one value an iteration, the last one serves all later iterations."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: Fraction = 0.1
    """Share of an update's steps in which the learning rate rises."""
    weight_decay: NonNegative = 0.0
    """Decoupled (AdamW) or added (RMSprop) weight decay."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm; 0 never clips."""
    epochs: Count = 2
    """Passes over the opponent data in an iteration."""
    global_batch: Count = 64
    """Triplets in a step, over all workers and micro-batches."""
    micro_batch_tokens: Count = 8192
    """Tokens in a micro-batch of one worker, with the padding where `model.attention` needs it; one triplet always fits."""
    save_steps: Count | None = None
    """Save the update every so many steps, so that it goes on from there after a death."""
    save_minutes: Positive | None = 30
    """Save the update when so many minutes have passed since it last was."""
    max_restarts: Annotated[int, Field(ge=0, le=LARGEST), Number] = 2
    """How often the worker group is started again after a worker died."""

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> "LearnerConfig":
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload: {self.offload} needs a zero_stage of {needed} at least, found {self.zero_stage}")
        return self


class EvaluationConfig(Section):
    split: Literal["validation", "test"] = "validation"
    """Held-out rows that every checkpoint answers."""
    limit: Count | None = None
    """Answer only the first so many held-out rows."""
    answer_pattern: str = r"####\s*(-?[0-9.,]*[0-9])"
    """Regular expression whose first group is the final answer; the last match in a text counts."""
    max_new_tokens: Count | None = None
    """Longest held-out answer in tokens; by default `sampling.max_new_tokens`."""


class WarningsConfig(Section):
    reward_fall: NonNegative | None = 3.0
    """Warn when the target reward's mean over the last quarter of an update is negative and below that of the quarter before by
    more than so many standard errors; null never warns, here and below."""
    length_over_targets: AtLeastOne | None = 2.0
    """Warn when an iteration's responses are on average longer than so many times the targets."""
    length_growth: AtLeastOne | None = 1.5
    """Warn when they are longer than so many times those of the iteration before."""
    empty_share: Fraction | None = 0.05
    """Warn when more than this share of them holds nothing but an end token."""
    cut_off_share: Fraction | None = 0.5
    """Warn when more than this share of them was cut off by its length."""


class TrackingConfig(Section):
    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Tools that get the run's rows as well. Servers, keys and offline modes are those of each tool's own environment variables
    (`WANDB_MODE`, `MLFLOW_TRACKING_URI` …); see `docs/trackers.md`."""
    project: Name = "tpaw"
    """Project (in MLflow, experiment) that the run belongs to there."""


class Config(Section):
    """Everything a run is made from."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    iterations: Annotated[int, Field(ge=1, le=998), Number] = 4
    """Iterations of generate, score, update; folders count them with three digits."""
    team: TeamConfig = TeamConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampling: SamplingConfig = SamplingConfig()
    opponents: OpponentsConfig = OpponentsConfig()
    scoring: ScoringConfig = ScoringConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    warnings: WarningsConfig = WarningsConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def window(self) -> int:
        """Rounds (or opponents) the update of an iteration learns from."""
        return self.team.window or (self.iterations if self.team.select == "all" else self.team.size)

    @property
    def adapters(self) -> bool:
        """Whether all checkpoints but the first are LoRA adapters on its weights."""
        return self.model.lora.rank > 0

    def base_of(self, checkpoint: int) -> int:
        """The checkpoint whose weights a checkpoint stands on: its own, or those of the start model."""
        return 0 if self.adapters else checkpoint

    @model_validator(mode="after")
    def _best_is_known(self) -> "Config":
        if self.team.select == "best" and (self.evaluation.split != "validation" or self.data.validation_fraction == 0):
            raise ValueError(
                f"team.select: best is chosen on validation, which needs evaluation.split: validation (found "
                f"{self.evaluation.split}) and data.validation_fraction above 0 (found {self.data.validation_fraction:g})"
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> "Config":
        if self.data.prompt_length >= self.data.max_length:
            raise ValueError(
                f"data.prompt_length ({self.data.prompt_length}) must be below data.max_length ({self.data.max_length}), "
                "which includes the response"
            )
        if self.data.validation_fraction + self.data.test_fraction >= 1:
            raise ValueError("data.validation_fraction and data.test_fraction leave nothing to train on")
        return self

    @field_validator("evaluation")
    @classmethod
    def _pattern_has_a_group(cls, value: EvaluationConfig) -> EvaluationConfig:
        import regex

        try:
            groups = regex.compile(value.answer_pattern).groups
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"answer_pattern is not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError("answer_pattern needs a group, as in '#### ([0-9]+)'")
        return value


def _method(data: str, size: int, window: int | None, eta: float, gamma: float) -> dict[str, dict[str, Any]]:
    return {"team": {"data": data, "size": size, "window": window}, "objective": {"eta": eta, "gamma": gamma}}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tpaw": _method("replay", 3, None, 6.0, 0.5),
    "spin": _method("replay", 1, 2, 1.0, 0.0),
    "without-target-weights": _method("replay", 3, None, 1.0, 0.5),
    "without-player-weights": _method("replay", 3, None, 6.0, 0.0),
    "without-team": _method("replay", 1, None, 6.0, 0.5),
    "dpo": _method("given", 1, None, 1.0, 0.0),
    "sft": _method("none", 1, None, 1.0, 0.0),
}
"""Methods as numbers. All set the same fields, so that one replaces another wholly."""

FINE_TUNING = (
    "preset=sft",
    "iterations=1",
    "learner.optimizer=adamw",
    "learner.learning_rate=2e-5",
    "learner.schedule=cosine",
    "learner.epochs=3",
)
"""What `tpaw sft` sets beside the user's config: the usual recipe of full fine-tuning, one checkpoint at its end."""


def at_iteration(value: float | Sequence[float], iteration: int) -> float:
    """A per-iteration setting at an iteration; the last value of a list serves all later ones.

    >>> at_iteration([5e-7, 1e-7], 0), at_iteration([5e-7, 1e-7], 7), at_iteration(0.1, 3)
    (5e-07, 1e-07, 0.1)
    """
    if isinstance(value, int | float):
        return float(value)
    return float(value[min(iteration, len(value) - 1)])


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Resolve a YAML file and dotted overrides (`objective.eta=1`, `preset=spin`) into a config.

    Raises:
        ConfigError: naming the file or override, the field, what was found and what is expected.
    """
    path = Path(path)
    content = read_mapping(path)
    return resolve_config(
        with_preset(content, str(path)), with_preset(_parse_overrides(overrides), "command line"), source=str(path)
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, unresolved.

    Raises:
        ConfigError: when it cannot be read, is too long, or holds something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the config: {error}") from error
    if len(text) > CONFIG_BYTES:
        raise ConfigError(f"{path}: cannot read the config: more than {CONFIG_BYTES:,} bytes; expected a YAML file of sections")
    try:
        content = parse_plain_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {'nothing' if content is None else shorten(content)}")
    return content


def resolve_config(*layers: Mapping[str, Any], source: str = "config") -> Config:
    """Merge layers (later ones win) and check the result.

    Raises:
        ConfigError: naming every field at fault, with what was found and what is expected.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merge(merged, layer)
    if found := find_credentials(merged):
        raise ConfigError(f"{source}: {found}; give it in the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY …), not in a config")
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in problems(error))) from error


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A resolved config with dotted overrides, as those of `load_config`, put over it.

    Raises:
        ConfigError: as `load_config` does.
    """
    return resolve_config(config.model_dump(mode="json"), _parse_overrides(overrides), source="command line")


def load_fine_tuning(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of `tpaw sft`: the file's model, data and resources, with a fine-tuning's recipe. The run is named after the
    file's, `NAME-sft`, unless an override names it.

    Raises:
        ConfigError: as `load_config` does.
    """
    config = load_config(path, [*FINE_TUNING, *overrides])
    if any(override.startswith("run.name=") for override in overrides):
        return config
    return load_config(path, [*FINE_TUNING, *overrides, f"run.name={config.run.name}-sft"])


def dump_config(config: Config) -> str:
    """The resolved config as YAML; reading it back gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_fields(section: type[Section] = Config, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Every leaf of the config as (dotted key, values, default, description): `docs/config.md` is made of it."""
    rows = []
    schema = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            rows += config_fields(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else yaml.safe_dump(field.default, default_flow_style=True, width=1000)
            default = default.removesuffix("...\n").strip()
            rows.append((f"{prefix}{name}", _values(schema[name]), default, field.description or ""))
    return rows


def _values(schema: Mapping[str, Any]) -> str:
    """The values a JSON schema lets through, in words.

    >>> _values({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}), _values({"enum": ["a", "b"]})
    ('integer ≥ 1 or null', 'a or b')
    """
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(schema["enum"])
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema and schema[key] < 2**31 - 1)
    kind = {"object": "mapping", "array": f"list of {_values(schema['items'])}" if "items" in schema else "list"}
    return f"{kind.get(schema['type'], schema['type'])} {bounds}".strip()


def with_preset(layer: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A layer in which the values of the preset it names stand instead of the name; its own count more.

    Raises:
        ConfigError: for a preset that there is not.
    """
    values = dict(layer)
    preset = values.pop("preset", None)
    if preset is None:
        return values
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"{source}: preset: found {preset!r}, expected one of {', '.join(PRESETS)}")
    merged = deepcopy(dict(PRESETS[preset]))
    merge(merged, values)
    return merged


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = key.split(".")
        if not separator or not all(parts) or len(parts) > DEPTH:
            raise ConfigError(f"override {shorten(override)}: expected key=value, as in objective.eta=6")
        try:
            value = parse_plain_yaml(text)
        except ValueError as error:  # the value is not told: it may be a password
            raise ConfigError(f"override {shorten(key)}: the value is not valid YAML: {error}") from error
        for part in reversed(parts):
            value = {part: value}
        merge(values, value)
    return values


def merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put a layer over a base, section by section; the base is changed."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = deepcopy(value)


def _holds_nan(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not isfinite(value)


def problems(error: ValidationError, section: type[Section] = Config) -> list[str]:
    """What is wrong with the values of a section, a line a field: found and expected."""
    lines: list[tuple[str, str]] = []
    beside: list[tuple[str, str]] = []
    leaves = list(_leaves(section))
    found_wrong = error.errors(include_url=False)
    for problem in found_wrong[:PROBLEMS_TOLD]:
        # The branches of a union are named after its types; a user's keys are not.
        field = ".".join(
            str(part) for part in problem["loc"] if not str(part).startswith(("constrained", "function-", "list[", "float"))
        )
        message, value = problem["msg"].removeprefix("Value error, "), problem["input"]
        # Of a number or a list of numbers, only what the value was meant for is told.
        in_a_list = any(str(part).startswith("list[") for part in problem["loc"])
        kind = problem["type"], type(value)
        meant = lines
        if (kind == ("float_type", list) and not in_a_list) or kind in [("list_type", one) for one in (str, bool, int, float)]:
            meant = beside
        if problem["type"] == "extra_forbidden":
            close = get_close_matches(field[:100], [*leaves, *section.model_fields], n=1)
            hint = f"did you mean {close[0]}?" if close else "see the config reference in docs/config.md"
            told = f"{field if len(field) <= 200 else f'{field[:200]}…'}: unknown key; {hint}"
        elif problem["type"] == "missing":
            told = f"{field}: required, but missing"
        elif problem["type"] == "model_type":
            keys = ", ".join(key.removeprefix(f"{field}.") for key in leaves if key.startswith(f"{field}."))
            told = f"{field}: found {shorten(value)}, expected a section with the keys {keys}"
        else:
            found = f", found {shorten(value)}" if not isinstance(value, dict | BaseModel) else ""
            told = f"{field + ': ' if field else ''}{message}{found}"
        meant.append((field, told))
    if len(found_wrong) > PROBLEMS_TOLD:
        lines.append(("", f"and {len(found_wrong) - PROBLEMS_TOLD} more problems"))
    fields = {field for field, _ in lines}
    return list(dict.fromkeys(told for _, told in [*[one for one in beside if one[0] not in fields], *lines]))


def _leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every leaf of a section by its dotted key."""
    for name, field in section.model_fields.items():
        inner = next((one for one in (field.annotation, *get_args(field.annotation)) if _is_section(one)), None)
        if inner:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)
