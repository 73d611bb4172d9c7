"""Named places at which a test may hold a process, to kill it or another one there. Does nothing unless a test arms it.

    a test                                   a process of the run
    writes `armed/1`: "written */pairs/*"    reaches a place of that name and path: renames the file to `held/1`, writes
                                             its process id into it, and waits
    kills whom it wants                      (dead, or still waiting)
    removes `held/1`                         goes on

`TPAW_FAULTS` names the folder of these files. Processes of a run have it from the driver's environment.
"""

import os
import time
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

POLL_S = 0.05


class Place(Enum):
    """Where a process can be held; each comes with a path inside the run."""

    WRITE = "write"
    """A file is complete beside its place, and not yet in it."""
    WRITTEN = "written"
    """A file is in its place."""
    MARK = "mark"
    """All files of a stage are there, its marker is not."""
    MARKED = "marked"
    """A stage is committed."""
    ANSWER = "answer"
    """An opponent's engine is in the middle of its requests."""
    SCORE = "score"
    """A scorer has computed a shard, and not yet written it."""
    STEP = "step"
    """A learner's worker is about to take an optimizer step."""


def reached(place: Place, path: str) -> None:
    """Wait here if a test has armed this place for this path; each arming holds one process once."""
    folder = os.environ.get("TPAW_FAULTS")
    if folder:
        _hold(Path(folder), place, path)


def _hold(folder: Path, place: Place, path: str) -> None:
    for armed in sorted((folder / "armed").iterdir()):
        held = folder / "held" / armed.name
        try:
            wanted, pattern = armed.read_text().split()
            if wanted != place.value or not fnmatchcase(path, pattern):
                continue
            armed.rename(held)
        except FileNotFoundError:  # another process was held for it
            continue
        held.write_text(f"{os.getpid()}\n")
        while held.exists():
            time.sleep(POLL_S)
