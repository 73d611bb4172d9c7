"""The reproducibility sheet."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from tpaw_ray.config import resolve_config
from tpaw_ray.runs import environment as sheet
from tpaw_ray.runs.environment import environment

CONFIG = resolve_config({"run": {"name": "demo", "seed": 7}, "model": {"path": "m"}, "data": {"path": "d"}})
RESOURCES = {"memory": 1e9, "CPU": 4.0, "node:10.0.0.1": 1.0, "node:__internal_head__": 1.0, "GPU": 1.0}


def test_versions_are_those_of_the_installed_packages_and_absent_ones_are_left_out(monkeypatch):
    monkeypatch.setattr(sheet, "PACKAGES", ("torch", "transformers", "no-such-package-anywhere"))
    assert environment(CONFIG, {})["packages"] == {"torch": version("torch"), "transformers": version("transformers")}


def test_the_clusters_resources_are_sorted_and_without_addresses():
    assert list(environment(CONFIG, RESOURCES)["cluster"].items()) == [("CPU", 4.0), ("GPU", 1.0), ("memory", 1e9)]


def test_machine_and_seed_are_told():
    found = environment(CONFIG, RESOURCES)
    assert (found["seed"], found["python"], found["cores"]) == (7, platform.python_version(), os.cpu_count())
    assert found["memory_gib"] > 0.1
    assert found["cpu"] == found["cpu"].strip()


def test_the_commit_is_that_of_the_source_tree():
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert environment(CONFIG, {})["commit"] == (head or None)


def test_there_is_no_commit_where_git_is_missing(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(sheet.subprocess, "run", absent)
    assert environment(CONFIG, {})["commit"] is None


def test_the_sheet_is_json():
    found = environment(CONFIG, RESOURCES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
