"""What a worker holds of a policy in training, on disk: a run of values of every trained parameter, and the optimizer's states.

    rank-000-000.safetensors     NAME, NAME/square_avg, …: flat, fp32; the metadata says at which value of NAME they begin

Every worker writes what it holds, and no value is written twice; a worker reads what it needs, whoever wrote it. So the group
that goes on may have another number of workers, or another ZeRO stage. Values are copied bit for bit.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

FILE_BYTES = 2**30
"""A file is written when it has so much: a worker needs no second copy of all that it holds."""
STATES = {"RMSprop": ("square_avg",), "AdamW": ("exp_avg", "exp_avg_sq")}
"""What torch's optimizers keep of every value, beside the steps taken."""
WEIGHTS = ""
"""Stands among the states' names for the values themselves."""


class Held(Protocol):
    """The values of a parameter, laid out flat, that the optimizer of this worker updates: a run of them."""

    start: int
    length: int

    def get(self, state: str) -> Tensor:
        """The values, or a state of them, fp32 `[length]`."""
        ...

    def put(self, state: str, values: Tensor) -> None:
        """Take over values, or a state of them."""
        ...


def write_fragments(engine: Any, folder: Path) -> None:
    """Write what this worker holds; all workers must call it, after at least one step.

    Raises:
        SafetensorError: when the file cannot be written.
    """
    rank, part = distributed.get_rank(), 0
    tensors, starts = dict[str, Tensor](), dict[str, int]()

    def write() -> None:
        nonlocal part
        save_file(tensors, folder / f"rank-{rank:03d}-{part:03d}.safetensors", metadata={"starts": json.dumps(starts)})
        part += 1
        tensors.clear()
        starts.clear()

    for name, parameter in trained(engine):
        held = held_of(engine, parameter)
        if held is None or (rank > 0 and isinstance(held, Whole)):
            continue
        starts[name] = held.start
        for state in (WEIGHTS, *_states(engine)):
            tensors[_key(name, state)] = held.get(state).to("cpu", copy=True)  # several views of one tensor cannot be written
        if sum(tensor.nbytes for tensor in tensors.values()) >= FILE_BYTES:
            write()
    if tensors:
        write()


def read_fragments(engine: Any, files: Iterable[Path], steps: int) -> None:
    """Put weights and optimizer where `steps` steps had left them; all workers must call it, before their first step.

    `files` are those of all workers that wrote.

    Raises:
        ValueError: when the files lack some of the values.
    """
    _lay_out_states(engine, steps)
    with Saved(files) as saved:
        for name, parameter in trained(engine):
            _set_weights(parameter, name, saved)
            held = held_of(engine, parameter)
            if held is not None:
                for state in (WEIGHTS, *_states(engine)):
                    held.put(state, saved.read(_key(name, state), held.start, held.start + held.length))


class Saved:
    """Fragments in files, whoever wrote them."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        self._opened = ExitStack()

    def __enter__(self) -> "Saved":
        for path in self._files:
            file = self._opened.enter_context(safe_open(path, framework="pt"))
            starts = json.loads(file.metadata()["starts"])
            for key in sorted(file.keys()):
                start = starts[key if key in starts else key.rpartition("/")[0]]
                self._parts.setdefault(key, []).append((start, file.get_slice(key)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._parts.clear()
        self._opened.close()

    def read(self, key: str, start: int, end: int) -> Tensor:
        """Values `start` to `end` of what is written under a key, `[end - start]`.

        Raises:
            ValueError: when some of them are nowhere.
        """
        found, missing = torch.empty(end - start), end - start
        for first, part in self._parts.get(key, []):
            low, high = max(start, first), min(end, first + part.get_shape()[0])
            if low < high:
                found[low - start : high - start] = part[low - first : high - first]
                missing -= high - low
        if missing:
            raise ValueError(f"{missing} of the values {start} to {end} of {key} are in none of its files")
        return found


def trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that an engine updates, by name; a tied one comes once."""
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def held_of(engine: Any, parameter: nn.Parameter) -> Held | None:
    """What this worker holds of a parameter; null where that is nothing."""
    if hasattr(parameter, "ds_id"):
        part = Zero3Part(parameter)
        return part if part.length > 0 else None
    if hasattr(parameter, "_hp_mapping"):
        return None if parameter._hp_mapping is None else ZeroPart(parameter._hp_mapping)
    values = _master(engine, parameter)
    return Whole(values, _torch_optimizer(engine).state[values])


class Whole:
    """Without ZeRO: every worker holds all of a parameter."""

    def __init__(self, values: Tensor, states: dict[str, Tensor]) -> None:
        self.values, self.states = values, states
        self.start, self.length = 0, values.numel()

    def get(self, state: str) -> Tensor:
        return (self.values.detach() if state == WEIGHTS else self.states[state]).view(-1)

    def put(self, state: str, values: Tensor) -> None:
        self.get(state).copy_(values)


class ZeroPart:
    """Under ZeRO 1 and 2: what DeepSpeed's flat fp32 partition has of a parameter."""

    def __init__(self, mapping: Any) -> None:
        self.mapping = mapping
        self.start, self.length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel

    def get(self, state: str) -> Tensor:
        held: Tensor = self.mapping.get_hp_fragment(state or None)
        return held

    def put(self, state: str, values: Tensor) -> None:
        self.get(state).data.copy_(values)


class Zero3Part:
    """Under ZeRO 3: every worker has an equal part of each parameter, the last ones filled up."""

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter
        self.size = parameter.ds_tensor.ds_numel
        self.start = distributed.get_rank() * self.size
        self.length = min(self.size, parameter.ds_numel - self.start)

    def get(self, state: str) -> Tensor:
        held: Tensor = (
            safe_get_local_fp32_param(self.parameter)
            if state == WEIGHTS
            else safe_get_local_optimizer_state(self.parameter, state)
        )
        return held[: self.length]

    def put(self, state: str, values: Tensor) -> None:
        filled = nn.functional.pad(values, (0, self.size - self.length))
        if state == WEIGHTS:
            safe_set_local_fp32_param(self.parameter, filled)
        else:
            safe_set_local_optimizer_state(self.parameter, filled, state)


def _key(name: str, state: str) -> str:
    return f"{name}/{state}" if state else name


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)  # DeepSpeed's wraps it, but in ZeRO 0 with fp32


def _states(engine: Any) -> tuple[str, ...]:
    return STATES[type(_torch_optimizer(engine)).__name__]


def _lay_out_states(engine: Any, steps: int) -> None:
    """Give the optimizer the states that its first step would make."""
    every = _torch_optimizer(engine).state
    for values in _optimized(engine):
        before = float(every[values].get("step", 0.0))  # without ZeRO, in bf16, DeepSpeed has taken one with no gradients
        states = {state: torch.zeros_like(values) for state in _states(engine)}
        every[values] = {"step": torch.tensor(before + steps), **states}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _optimized(engine: Any) -> list[Tensor]:
    """The tensors that torch's optimizer updates; under DeepSpeed each is this worker's parts of many parameters in a row."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [_master(engine, parameter) for _, parameter in trained(engine)]


def _master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Without ZeRO: the fp32 values of a parameter, which in bf16 are a tensor of their own."""
    groups = zip(getattr(engine.optimizer, "fp16_groups", ()), getattr(engine.optimizer, "fp32_groups", ()), strict=True)
    return next((high for lows, highs in groups for low, high in zip(lows, highs, strict=True) if low is parameter), parameter)


@torch.no_grad()
def _set_weights(parameter: nn.Parameter, name: str, saved: Saved) -> None:
    """Set what forward passes use, in whatever precision that is."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(saved.read(name, 0, parameter.numel()).view_as(parameter))
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if distributed.get_rank() == 0:
            parameter.copy_(saved.read(name, 0, parameter.numel()).view_as(parameter))
