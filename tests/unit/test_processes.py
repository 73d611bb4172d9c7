import ctypes
import gc
import os
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch  # noqa: F401  (its import loads libraries through ctypes, which a test replaces)

from tpaw_ray.processes import free_memory, model_process

HOLD_AND_FREE = """
import torch
from tpaw_ray.processes import free_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

before = resident()
held = [torch.ones(2**20) for _ in range(256)]  # 4 MiB each
del held
kept = resident() - before
free_memory()
print(kept, resident() - before)
"""


def test_a_cpu_process_keeps_freed_tensors_memory_until_it_is_told_to_give_it_back():
    if not sys.platform.startswith("linux"):
        pytest.skip("mallopt is glibc's")
    environment = os.environ | model_process(0)["env_vars"]
    found = subprocess.run([sys.executable, "-c", HOLD_AND_FREE], env=environment, capture_output=True, text=True, check=True)
    kept, left = map(float, found.stdout.split())
    assert kept > 900
    assert left < 200


@pytest.mark.parametrize(("gpus", "accelerator"), [(0, "cpu"), (0.5, "cuda")])
def test_a_process_knows_its_accelerator_and_sees_no_gpu_that_it_was_not_given(monkeypatch, gpus, accelerator):
    for name in ("DS_ACCELERATOR", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    variables = model_process(gpus)["env_vars"]
    assert variables["DS_ACCELERATOR"] == accelerator
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE"
    assert ("MALLOC_ARENA_MAX" in variables) == (gpus == 0)
    assert variables.get("CUDA_VISIBLE_DEVICES") == ("" if gpus == 0 else None)


def test_what_the_user_set_counts(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert model_process(0)["env_vars"]["OMP_WAIT_POLICY"] == "ACTIVE"


class Held:
    """Refers to itself, so that only a collection ends it."""

    def __init__(self):
        self.itself = self


def test_what_only_refers_to_itself_is_freed_also_where_the_c_library_cannot_trim(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # as on a system without glibc
    gc.disable()
    try:
        held = weakref.ref(Held())
        assert held() is not None
        free_memory()
        assert held() is None
    finally:
        gc.enable()


def test_a_process_ends_with_the_one_that_started_it_though_that_is_killed():
    if not sys.platform.startswith("linux"):
        pytest.skip("prctl is Linux's")
    child = (
        "import time; from tpaw_ray.processes import end_with_parent; end_with_parent(); "
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, start_new_session=True); "
        "print(child.stdout.readline(), child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as started:
        pid = int(started.stdout.readline().split()[-1])
        started.kill()
    deadline = time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
