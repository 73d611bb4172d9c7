"""The images are what their linter takes, pinned, and made of files that are there. None is built here."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize(
    "file", [HOUSE / "cluster/Dockerfile", HOUSE / "cluster/Dockerfile.cpu"], ids=lambda file: file.name
)


@BOTH
def test_a_dockerfile_has_no_complaint_from_its_linter(file):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed")
    linted = subprocess.run([hadolint, str(file)], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@BOTH
def test_an_image_is_pinned_and_runs_as_the_user_of_the_manifests(file):
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    stages = [line.split()[1:] for line in lines if line.startswith("FROM ")]
    names = {stage[-1] for stage in stages}
    for source in {stage[0] for stage in stages} - names:
        assert re.fullmatch(r"(nvidia/cuda|python):[\w.-]+@sha256:[0-9a-f]{64}", source)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    final = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert "COPY . /opt/tpaw" in final and "USER 1000:1000" in final


@BOTH
def test_what_is_copied_into_an_image_is_there_and_not_ignored(file):
    ignored = (HOUSE / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", file.read_text(), re.MULTILINE)
    for source in " ".join(copied).split():
        assert (HOUSE / source).exists()
        assert source == "." or any(
            fnmatch(source, pattern) or fnmatch(pattern, f"{source}/*") or source.startswith(f"{pattern}/") for pattern in kept
        )


@BOTH
def test_the_images_python_is_the_projects(file):
    (version,) = re.findall(r'requires-python = ">=([\d.]+),', (HOUSE / "pyproject.toml").read_text())
    assert f"FROM python:{version}." in file.read_text()
