"""The runs of an experiment as `tpaw run` commands, side by side on one Ray."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tpaw_ray.config import dump_config
from tpaw_ray.experiment.phases import Planned, may_start
from tpaw_ray.placement import Node
from tpaw_ray.runs.address import told
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import visible

LOOK_S = 0.2
STOP_S = 150.0
"""How long an interrupted run may take to end by itself: a store that does not answer is tried for over a minute."""
PROGRAM = (
    sys.executable,
    "-c",
    "from tpaw_ray.processes import end_with_parent; end_with_parent(); from tpaw_ray.cli import main; main()",
)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run's command ended. `said` is its error, or else its last line."""

    exit_code: int
    said: str
    seconds: float


class Commands:
    """Plays runs on the Ray at `address`, whose `nodes` may come and go; each one's config and output lie in `logs/` of the
    experiment's folder."""

    def __init__(self, store: RunStore, address: str, nodes: Callable[[], Sequence[Node]], most: int | None) -> None:
        self.store = store
        self.address = address
        self.nodes = nodes
        self.most = most

    def play(self, runs: Sequence[Planned], on_end: Callable[[Planned, Ended], None]) -> None:
        """Play runs, as many at once as may be; none ends another. An interrupt ends them all, and each can be continued."""
        waiting, running = deque(runs), list[_Command]()
        try:
            while waiting or running:
                while waiting and self._may_start(running, waiting[0]):
                    running.append(_Command(waiting.popleft(), self.store, self.address))
                for command in [one for one in running if one.has_ended()]:
                    running.remove(command)
                    on_end(command.run, command.close())
                time.sleep(LOOK_S)
        finally:
            for command in running:
                command.interrupt()
            for command in running:
                command.end()

    def _may_start(self, running: "Sequence[_Command]", coming: Planned) -> bool:
        return may_start([one.run.config for one in running], coming.config, self.nodes(), self.most)


class _Command:
    """One `tpaw run` under way."""

    def __init__(self, run: Planned, store: RunStore, address: str) -> None:
        self.run = run
        self._opened = ExitStack()
        folder = self._opened.enter_context(store.filling(store.path("logs", *run.key.split("/"))))
        config, self._output = folder / "config.yaml", folder / "output.txt"
        with told(str(folder), "written"):
            config.write_text(dump_config(run.config), encoding="utf-8")
            output = self._output.open("wb")
        self._started = time.monotonic()
        with output:
            self._process = subprocess.Popen(
                [*PROGRAM, "run", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"},
                process_group=0,  # a terminal's Ctrl-C reaches the experiment alone, which hands it on
            )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> Ended:
        """What became of a command that has ended."""
        said = last_words(self._output)
        self._opened.close()
        return Ended(exit_code=self._process.returncode, said=said, seconds=time.monotonic() - self._started)

    def interrupt(self) -> None:
        with suppress(ProcessLookupError):
            self._process.terminate()

    def end(self) -> None:
        """Wait until an interrupted command has ended, by force if need be."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._opened.close()


def last_words(output: Path) -> str:
    """The error that a command's output ends with, or else its last line."""
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return visible([*lines[-1:], *errors[-1:]][-1]) if lines else "(no output)"
