"""The test's side of `tpaw_ray.faults`: hold a process of a run at a named place, kill whom the test wants, let go."""

import os
import signal
import time
from pathlib import Path

from tpaw_ray.faults import Place


class Holding:
    """Places are armed one at a time; a place that was never reached stays armed, which `wait` tells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def arm(self, place: Place, pattern: str) -> None:
        """Have the next process wait that reaches a place with a path of this pattern."""
        beside = self.folder / "arming"
        beside.write_text(f"{place.value} {pattern}")
        beside.rename(self.folder / "armed")

    def wait(self, timeout_s: float = 120) -> int:
        """Wait until a process is held; its process id."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            held = self.folder / "held"
            if held.exists() and held.read_text().endswith("\n") and held.read_text().strip().isdigit():
                return int(held.read_text())
            time.sleep(0.05)
        raise AssertionError(f"no process came to {(self.folder / 'armed').read_text()}")

    def let_go(self) -> None:
        """Let the held process go on, if it still lives."""
        (self.folder / "held").unlink()

    def kill_at(self, place: Place, pattern: str, timeout_s: float = 120) -> int:
        """Kill the process that reaches a place."""
        self.arm(place, pattern)
        pid = self.wait(timeout_s)
        os.kill(pid, signal.SIGKILL)
        self.let_go()
        return pid
