"""Processes: the environment of one that runs a model, how it gives memory back, where small ones run, how one is interrupted."""

import ctypes
import gc
import os
import signal
from typing import Any

_PR_SET_PDEATHSIG = 1


def model_process(gpus: float) -> dict[str, Any]:
    """The `runtime_env` of an actor that runs a model on that many GPUs, or on CPUs for 0.

    On CPUs, glibc takes the memory of every large tensor from the system and gives it back at once, zeroed anew each time: a
    fifth of an update's time. Here a process keeps what it has, in one arena; learner and scorers call `free_memory` when
    they rest. See mallopt(3). What the driver's own environment says counts more, but for the GPUs.
    """
    preferred = {
        "DS_ACCELERATOR": "cuda" if gpus else "cpu",
        # Threads that spin while they wait starve each other as soon as a core is shared: 420 instead of 7900 tokens/s were
        # seen for a tiny model on two cores.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not gpus:
        preferred |= {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(2**62),
            "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages
        }
    variables = {name: os.environ.get(name, value) for name, value in preferred.items()}
    return {"env_vars": variables if gpus else variables | {"CUDA_VISIBLE_DEVICES": ""}}  # a GPU beside it belongs to others


def beside_the_driver() -> dict[str, Any]:
    """Options of a small actor that must not be lost with a node of the cluster: it runs where its starter does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def end_with_parent() -> None:
    """Have the kernel terminate this process when the thread that started it ends, however it ends; see prctl(2). Linux only."""
    library = ctypes.CDLL(None)
    if hasattr(library, "prctl"):
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def interrupt(thread: int) -> None:
    """Interrupt a thread of this process, by its `ident`, as Ctrl-C would; a command in the background may ignore that one."""
    heard = signal.SIGTERM if callable(signal.getsignal(signal.SIGTERM)) else signal.SIGINT
    signal.pthread_kill(thread, heard)


def free_memory() -> None:
    """Give memory that nothing refers to any more back to the devices and to the system, for others to use."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc's
        library.malloc_trim(0)
