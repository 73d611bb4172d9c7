"""A run as a victim: `tpaw run` in a session of its own, held at named places, with any of its processes killed there."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.holding import Holding
from tpaw_ray.faults import Place

TPAW = Path(sys.executable).with_name("tpaw")
TITLES = {"opponent": "ray::Opponent", "scorer": "ray::Scorer", "learner worker": "ray::RayTrainWorker"}
"""What Ray calls the processes of each kind of actor."""
TIMED = ("seconds", "tokens_per_s", "ended", "waited")
"""What differs between two runs of the same config, in any JSON of the run's folder."""
LINGERING = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "default_worker.py")
"""Processes of Ray's own that see late that a killed driver's Ray is gone: idle agents after a minute or two, and a worker that
was just starting, which nobody has given any work, after half a minute."""
SKIPPED = ("environment.json", "driver.json", "ray_train/")


class Victim:
    """A run's command, started again as often as it is killed."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.arguments = arguments
        self.holding = Holding(folder)
        self.log = folder / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self.sessions: set[int] = set()

    def start(self) -> None:
        """Start the command, unless it runs."""
        if self.process and self.process.poll() is None:
            return
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [TPAW, *self.arguments],
                stdout=log,
                stderr=log,
                env=environment | {"TPAW_FAULTS": str(self.holding.folder)},
                start_new_session=True,
            )
        self.sessions.add(self.process.pid)

    def killed_at(self, places: dict[str, tuple[Place, str]], victim: str) -> Iterator[tuple[str, bool]]:
        """Run to the end of all places, in whatever order they come, and kill the victim at each.

        Yields the place's name, and whether there was such a process, while the run is held there.
        """
        self.arm(places)
        done: set[str] = set()
        while len(done) < len(places):
            name = self.next_held()
            found = self.kill(victim)
            done.add(name)
            yield name, found
            self.holding.let_go(name)
            self.arm_again(places, done)

    def arm(self, places: dict[str, tuple[Place, str]]) -> None:
        for name, (place, pattern) in places.items():
            self.holding.arm(place, pattern, name)

    def arm_again(self, places: dict[str, tuple[Place, str]], done: set[str]) -> None:
        """Arm the places again at which a process was held that has been killed meanwhile."""
        living = {pid for pid, _ in self._living()}
        for name, pid in self.holding.caught().items():
            if pid not in living and name not in done:
                self.holding.let_go(name)
                self.holding.arm(*places[name], name)

    def next_held(self, timeout_s: float = 300) -> str:
        """Run until a process is held at one of the armed places; its name."""
        self.start()
        deadline = time.monotonic() + timeout_s
        while not (caught := self.holding.caught()):
            left = [path.name for path in self.holding.armed.iterdir()]
            assert self.process.poll() is None, f"the run ended before {left}: {self.log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"never reached {left}: {self.log.read_text()[-2000:]}"
            time.sleep(0.05)
        return next(iter(caught))

    def kill(self, victim: str) -> bool:
        """Kill the driver, or all processes of a kind of actor; whether there were any."""
        pids = [self.process.pid] if victim == "driver" else self.pids(TITLES[victim])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if victim == "driver":
            self.process.wait()
            self.await_silence(but=LINGERING)
        return bool(pids)

    def finish(self, timeout_s: float = 300) -> None:
        """Run to the end."""
        self.start()
        code = self.process.wait(timeout_s)
        assert code == 0, self.log.read_text()[-3000:]
        self.await_silence()

    def pids(self, title: str = "") -> list[int]:
        """Living processes of the command whose title begins so."""
        return [pid for pid, found in self._living() if found.startswith(title)]

    def await_silence(self, timeout_s: float = 180, but: tuple[str, ...] = ()) -> None:
        """Wait until no process of any start of the command is left, `but` some, as must be once its driver has ended."""
        deadline = time.monotonic() + timeout_s
        while left := [one for one in self._living() if not any(name in one[1] for name in but)]:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.2)

    def _living(self) -> list[tuple[int, str]]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if os.getsid(int(entry.name)) in self.sessions and state != "Z":
                    found.append((int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")))
            except (ProcessLookupError, FileNotFoundError):
                continue  # it ended while we looked
        return found


def contents(root: Path, committed_only: bool = False) -> dict[str, str]:
    """A checksum of every file of a run, but for what is timed; `committed_only`, of those in a stage that has its marker."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not path.is_file() or name.startswith(SKIPPED) or "/steps/" in name or name.endswith(".writing"):
            continue
        if committed_only and not any((folder / "committed.json").exists() for folder in stage_of(path, root)):
            continue
        found[name] = hashlib.sha256(_lasting(path)).hexdigest()
    return found


def stage_of(path: Path, root: Path) -> list[Path]:
    """The folders of a run that a file lies in, but for those of whole iterations, which hold several stages."""
    return [folder for folder in path.parents if root in folder.parents and folder.parent.name != "iterations"]


def _lasting(path: Path) -> bytes:
    """A file's content without what is timed; a marker's checksums of files that hold times are left out too."""
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        return json.dumps([_without_times(json.loads(line)) for line in content.splitlines()]).encode()
    if path.suffix == ".json" and path.name in ("committed.json", "row.json", "summary.json"):
        return json.dumps(_without_times(json.loads(content))).encode()
    return content


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(child) for key, child in value.items() if key not in TIMED and not key.endswith(".jsonl")}
    return [_without_times(child) for child in value] if isinstance(value, list) else value
