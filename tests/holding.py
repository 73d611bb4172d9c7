"""The test's side of `tpaw_ray.faults`: hold processes of a run at named places, kill whom the test wants, let go."""

import os
import signal
import time
from pathlib import Path

from tpaw_ray.faults import Place


class Holding:
    """Any number of places, armed under names of their own; each holds the first process that comes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.armed, self.held = folder / "armed", folder / "held"
        self.armed.mkdir()
        self.held.mkdir()

    def arm(self, place: Place, pattern: str, name: str = "0") -> None:
        """Have the next process wait that reaches a place with a path of this pattern."""
        beside = self.folder / name
        beside.write_text(f"{place.value} {pattern}")
        beside.rename(self.armed / name)

    def caught(self) -> dict[str, int]:
        """The names of places at which a process waits, and its process id."""
        found = {path.name: path.read_text() for path in self.held.iterdir()}
        return {name: int(text) for name, text in sorted(found.items()) if text.strip().isdigit() and text.endswith("\n")}

    def wait(self, timeout_s: float = 120) -> int:
        """Wait until a process is held; its process id."""
        deadline = time.monotonic() + timeout_s
        while not (caught := self.caught()):
            left = [path.read_text() for path in self.armed.iterdir()]
            assert time.monotonic() < deadline, f"no process came to {left}"
            time.sleep(0.05)
        return next(iter(caught.values()))

    def let_go(self, name: str = "0") -> None:
        """Let the held process go on, if it still lives."""
        (self.held / name).unlink()

    def disarm(self, name: str = "0") -> None:
        """Take back what nobody has come to."""
        (self.armed / name).unlink()

    def kill_at(self, place: Place, pattern: str, timeout_s: float = 120) -> int:
        """Kill the process that reaches a place."""
        self.arm(place, pattern)
        pid = self.wait(timeout_s)
        os.kill(pid, signal.SIGKILL)
        self.let_go()
        return pid
