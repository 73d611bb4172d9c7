"""What has been handed to a tracker that cannot be asked: a note beside what it writes."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from tpaw_ray.tracking.entries import Reached


class Note:
    """`Reached` on a disk. Written after entries were handed over, so that a kill in between repeats some and loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Reached:
        """What was noted last; nothing where there is no note."""
        if not self.path.exists():
            return Reached()
        return Reached(**json.loads(self.path.read_text(encoding="utf-8")))

    def write(self, reached: Reached) -> None:
        """Replace the note, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".writing")
        beside.write_text(json.dumps(asdict(reached)), encoding="utf-8")
        os.replace(beside, self.path)
