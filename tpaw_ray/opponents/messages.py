"""What is said between those who ask and an opponent, and how its engine is set up. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Any

from tpaw_ray.config import Config
from tpaw_ray.errors import GenerationError

SET_ASIDE = "set_aside"
"""Finish reason of a prompt that has no response, because it ends every engine it is given to."""


class EngineFailure(GenerationError):
    """An engine broke down while it worked. Its process ends and Ray starts another one, which is asked again."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Which engine of a run an opponent hosts: a checkpoint's number, which of its replicas, and where its folder is."""

    checkpoint: int
    replica: int
    path: str
    ready_file: str
    """There when the checkpoint is."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine is set up, whatever checkpoint it hosts. Fields as in `OpponentsConfig` where not said otherwise."""

    precision: str
    """`bf16` or `fp32`."""
    max_length: int
    """Longest prompt with its response, in tokens."""
    end_tokens: tuple[int, ...]
    """Tokens that end a response, and the only ones that do; the model directory's own are not read."""
    tensor_parallel: int = 1
    gpus: float = 0
    memory_share: float = 0.85
    cpu_cache_gib: float = 1.0
    batch: int = 256
    repeatable: bool = False
    threads: int | None = None
    trust_remote_code: bool = False
    lora_rank: int = 0
    adapters: int = 0
    """Adapters that an engine keeps in memory, of which one works at a time; 0 for an engine without."""
    engine_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Config, end_tokens: tuple[int, ...]) -> "EngineSettings":
        """The settings of every opponent of a run."""
        opponents = config.opponents
        return cls(
            precision=config.learner.precision,
            max_length=config.data.max_length,
            end_tokens=end_tokens,
            tensor_parallel=opponents.tensor_parallel,
            gpus=opponents.gpus,
            memory_share=opponents.memory_share,
            cpu_cache_gib=opponents.cpu_cache_gib,
            batch=opponents.batch,
            repeatable=opponents.repeatable,
            threads=opponents.threads,
            trust_remote_code=config.model.trust_remote_code,
            lora_rank=config.model.lora.rank,
            adapters=config.window if config.adapters else 0,
            engine_args=dict(opponents.engine_args),
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. Temperature 0 takes the most likely token (greedy)."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to answer, as token ids; `seed` decides the draw (see `request_seed`)."""

    prompt_id: str
    prompt_tokens: list[int]
    seed: int
    adapter: str = ""
    """Folder of the LoRA adapter that answers; by default the engine's own weights do."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """The answer to a request, as sampled: `stop` ends with an end token, `length` was cut off, `set_aside` has no tokens.

    Example: `Response(prompt_id="3f", generated_tokens=[9, 4, 5], finish_reason="stop")`.
    """

    prompt_id: str
    generated_tokens: list[int]
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine has done since its process started."""

    pid: int
    """Process id on the opponent's node."""
    import_s: float
    """Seconds spent importing vLLM."""
    start_s: float
    """Seconds from the checkpoint being there to the engine being ready."""
    sequences: int
    """Responses given."""
    generated_tokens: int
    in_flight: int
    """Sequences asked for and not yet answered."""
    most_in_flight: int
    """The most sequences the engine had at one step, waiting ones included."""
