"""A model that turns out to be damaged while Ray starts: told alone, and nothing is left behind."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.tiny import write_tiny_model


def test_a_run_that_finds_it_while_ray_starts_tells_it_and_writes_nothing(tmp_path):
    weights = write_tiny_model(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "1+1=", "answer": "2"}))
    config = {
        "run": {"name": "t", "root": str(tmp_path / "runs")},
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "d.jsonl"), "prompt_length": 40, "max_length": 80},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", "from tpaw_ray.cli import main; main()", "run", str(tmp_path / "config.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (ended.returncode, ended.stdout) == (4, "")
    assert f"error: {weights}: not readable as safetensors" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "runs").exists()
