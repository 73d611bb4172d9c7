"""A disk that is really full: 20 MB in memory, mounted where only the test's own process sees it."""

import subprocess
import sys
import textwrap
from functools import cache

import pytest

BEGIN = """
import os, shutil, sys
from pathlib import Path
from tpaw_ray.errors import RunError
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation

disk = Path(sys.argv[1])
store = RunStore.open(str(disk), "demo")
filler = disk / "filler"

def fill(leave):
    "Fill the disk, but for so many bytes."
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))

def refused(act, path, reason="no space is left on the device; free some, then the same command continues the run"):
    "The act fails with the path and what to do, and a second time too."
    for _ in range(2):
        try:
            act()
        except RunError as error:
            assert str(error).startswith(path) and reason in str(error), error
        else:
            raise AssertionError("it was done")
    assert not list(disk.rglob("*.writing")), "half a file was left"
"""


def mount(folder, *command):
    return ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=20m tmpfs "$0" && exec "$@"', str(folder), *command]


@cache
def can_mount(folder):
    try:
        return subprocess.run(mount(folder, "true"), capture_output=True, timeout=60).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def on_small_disk(tmp_path):
    """Runs a program on a disk of 20 MB."""
    if not can_mount(tmp_path):
        pytest.skip("needs a user namespace in which a file system can be mounted (unshare -Urm)")

    def run(program):
        command = mount(tmp_path, sys.executable, "-c", BEGIN + textwrap.dedent(program), str(tmp_path))
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def test_rows_are_whole_or_absent_on_a_full_disk_and_written_once_there_is_room(on_small_disk):
    on_small_disk("""
        import random
        numbers = random.Random(0)
        rows = [
            Generation(prompt_id=str(i), iteration=0, opponent=0, finish_reason="stop",
                       generated_tokens=[numbers.randrange(2**31) for _ in range(1000)])
            for i in range(1000)
        ]
        path = store.path("rollout", "00000.parquet")
        write = lambda: store.write_rows(path, rows, Generation)
        for leave in (0, 1 << 20):  # for not even the folder, and for half of the file
            fill(leave)
            refused(write, path)
            assert not store.exists(path) and store.files(store.path("rollout")) == []
        filler.unlink()
        write()
        assert store.read_rows(path, Generation) == rows
        fill(1 << 20)
        refused(write, path)
        assert store.read_rows(path, Generation) == rows  # the earlier file is still whole
    """)


def test_a_stage_is_not_committed_on_a_full_disk(on_small_disk):
    on_small_disk("""
        directory = store.path("stage")
        store.write_bytes(directory + "/a.bin", bytes(1000))
        fill(0)
        refused(lambda: store.commit(directory, pairs=1), directory + "/committed.json")
        assert not store.is_committed(directory)
        filler.unlink()
        store.commit(directory, pairs=1)
        store.verify(directory)
    """)


def test_metrics_name_their_file_on_a_full_disk(on_small_disk):
    on_small_disk("""
        path = store.path("metrics.jsonl")
        store.write_bytes(path, b"")
        fill(0)
        refused(lambda: store.append_bytes(path, bytes(5000)), path)
        filler.unlink()
        store.append_bytes(path, b"row")
    """)


def test_a_disk_that_may_only_be_read_is_told(on_small_disk):
    on_small_disk("""
        import subprocess
        store.write_bytes(store.path("a"), b"1")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused(lambda: store.write_bytes(store.path("b"), b"1"), store.path("b"), "Read-only file system")
        assert store.read_bytes(store.path("a")) == b"1"
    """)


def test_a_checkpoint_is_whole_or_absent_on_a_full_disk(on_small_disk, tiny_model):
    on_small_disk(f"""
        from torch import distributed
        from tpaw_ray.learner.export import export_checkpoint
        from tpaw_ray.policy.model import load_model

        distributed.init_process_group("gloo", init_method="file://" + str(disk / "meet"), rank=0, world_size=1)
        model, made = load_model({str(tiny_model)!r}, precision="fp32"), store.checkpoint(1)
        export = lambda: export_checkpoint(model, store, start=Path({str(tiny_model)!r}), destination=made, adapter=False)
        export()
        size = sum(path.stat().st_size for path in Path(made).iterdir())
        shutil.rmtree(made)
        for leave in (size // 2, size - 4096, 0):  # for half the weights, for all but what stands beside them, for nothing
            fill(leave)
            refused(export, made)
            assert not Path(made).exists()
        filler.unlink()
        export()
        load_model(made, precision="fp32")
        assert sum(path.stat().st_size for path in Path(made).iterdir()) == size
    """)


def test_a_run_of_an_experiment_is_told_on_a_full_disk(on_small_disk):
    on_small_disk("""
        from tpaw_ray.config import resolve_config
        from tpaw_ray.experiment.commands import _Command
        from tpaw_ray.experiment.phases import Planned

        config = resolve_config({"run": {"name": "a"}, "model": {"path": "m"}, "data": {"path": "d"}})
        run = Planned(phase="final", method="m", seed=0, settings={}, config=config)
        folder = store.path("logs", *run.key.split("/"))
        Path(folder).mkdir(parents=True)
        fill(0)
        refused(lambda: _Command(run, store, "address"), folder)
    """)
