"""A real browser for tests: found on the machine, or installed by `cluster/chromium.sh`."""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

OURS = Path(sys.prefix, "chromium")
"""Where `cluster/install.sh` puts one."""
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def chromium(playwright):
    """The program and the variables it needs; skips the test where there is none."""
    given = os.environ.get("TPAW_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found:
        return found, {}
    if Path(playwright.chromium.executable_path).exists():
        return playwright.chromium.executable_path, {}
    if (OURS / "chromium").exists():
        return str(OURS / "chromium"), {"LD_LIBRARY_PATH": str(OURS / "al2023/lib"), "FONTCONFIG_FILE": str(OURS / "fonts.conf")}
    pytest.skip(f"no browser: set TPAW_CHROMIUM, or run cluster/chromium.sh {OURS} (it needs node and npm)")


@contextmanager
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program, variables = chromium(playwright)
        opened = playwright.chromium.launch(executable_path=program, args=ARGUMENTS, env={**os.environ, **variables})
        yield opened
        opened.close()
