"""Step checkpoints: an update saves itself between steps, and goes on from there after a death.

    iterations/000/steps/000012/     twelve steps taken: what each worker holds (`fragments.py`), and the steps' metrics

The newest committed one counts, whatever group of workers wrote it.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import distributed

from tpaw_ray.config import Config
from tpaw_ray.errors import DamageError, RunError
from tpaw_ray.learner.engine import PolicyEngine
from tpaw_ray.runs.metrics import StepMetrics
from tpaw_ray.runs.store import RunStore


@dataclass(kw_only=True)
class Progress:
    """How far an update has come."""

    rows: list[StepMetrics] = field(default_factory=list)
    """A row a step taken."""
    seconds: float = 0.0
    """Seconds until the last step, loading included; those that were lost to a death are not in it."""


class StepCheckpoints:
    """Those of one update. Every worker has one, and all call it at the same steps."""

    def __init__(self, config: Config, store: RunStore, iteration: int, say: Callable[[str], object]) -> None:
        self.learner = config.learner
        self.store = store
        self.iteration = iteration
        self.say = say
        self.folder = store.steps(iteration)
        self.saved_at = time.monotonic()

    def restore(self, policy: PolicyEngine) -> Progress:
        """Put the policy where the newest step checkpoint that is whole left it; without one, no step is taken yet."""
        found = [self._newest() if distributed.get_rank() == 0 else ""]
        distributed.broadcast_object_list(found)  # what rank 0 sees counts for all
        name = found[0]
        if not name:
            return Progress()
        directory = f"{self.folder}/{name}"
        kept = self.store.read_json(f"{directory}/progress.json")
        files = [Path(self.store.on_disk(directory), file) for file in self.store.checksums(directory) if _holds_values(file)]
        try:
            policy.load(files, len(kept["rows"]))
        except (ValueError, SafetensorError) as error:
            raise RunError(f"{directory}: {error}; remove this folder to have the update begin anew") from error
        self.say(f"iteration {self.iteration}: the update goes on after step {len(kept['rows'])}")
        return Progress(rows=[StepMetrics(**row) for row in kept["rows"]], seconds=kept["seconds"])

    def due(self, steps: int) -> bool:
        """Whether it is time to save, so many steps having been taken."""
        every, minutes = self.learner.save_steps, self.learner.save_minutes
        if every and steps % every == 0:
            return True
        if minutes is None:
            return False
        late = torch.tensor(float(time.monotonic() - self.saved_at >= 60 * minutes))
        late = late.to("cuda") if distributed.get_backend() == "nccl" else late
        distributed.broadcast(late, src=0)  # clocks differ, and all must save or none
        return bool(late)

    def save(self, policy: PolicyEngine, progress: Progress) -> None:
        """Save the update as it stands. The step checkpoint before goes once this one is committed."""
        name = f"{len(progress.rows):06d}"
        directory = f"{self.folder}/{name}"
        if distributed.get_rank() == 0:
            self.store.remove(directory)  # what a group that died meanwhile had begun there, of another size perhaps
        distributed.barrier()
        with self.store.filling(directory) as place:
            policy.save(place)
        distributed.barrier()
        if distributed.get_rank() == 0:
            kept = {"rows": [asdict(row) for row in progress.rows], "seconds": progress.seconds}
            self.store.write_json(f"{directory}/progress.json", kept)
            self.store.commit(directory, workers=distributed.get_world_size())
            for other in self._names():
                if other != name:
                    self.store.remove(f"{self.folder}/{other}")
        distributed.barrier()
        self.saved_at = time.monotonic()

    def _names(self) -> list[str]:
        names = {path.removeprefix(f"{self.folder}/").split("/")[0] for path in self.store.files(self.folder)}
        return sorted(name for name in names if name.isdigit())

    def _newest(self) -> str:
        for name in reversed(self._names()):
            directory = f"{self.folder}/{name}"
            if not self.store.is_committed(directory):
                continue
            if not any(map(_holds_values, self.store.checksums(directory))):
                self.say(f"iteration {self.iteration}: {directory} is of an earlier version; the update begins anew")
                continue
            try:
                self.store.verify(directory)
                return name
            except DamageError as damage:
                self.say(f"{damage}; the update does without it")
        return ""


def _holds_values(file: str) -> bool:
    return file.endswith(".safetensors")
