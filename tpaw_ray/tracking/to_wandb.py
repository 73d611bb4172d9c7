"""Weights & Biases: its server, or with `WANDB_MODE=offline` files in the run's `tracking/wandb` for `wandb sync`."""

from collections.abc import Sequence

import wandb

from tpaw_ray.tracking.entries import CHECKPOINT_MARK, Entry, Reached, Subject
from tpaw_ray.tracking.note import Note

AXIS = "step"
"""Our own axis: W&B's counter only rises, so a checkpoint's entry could not stand at the step that made it."""


class WeightsAndBiases:
    """A run of the run's id, resumed where the server knows it; offline each driver writes a folder, of the same id."""

    def __init__(self, subject: Subject) -> None:
        mode = wandb.setup().settings.mode
        if mode in ("online", "shared") and not wandb.login(prompt=False):
            raise RuntimeError("no API key is set: set WANDB_API_KEY, or WANDB_MODE=offline")
        subject.folder.mkdir(parents=True, exist_ok=True)
        self._note = Note(subject.folder / "wandb.json")
        self._run = wandb.init(
            project=subject.project,
            id=subject.id,
            name=subject.name,
            resume="allow",
            dir=subject.folder,
            reinit="create_new",
            # The address of a git remote may hold a token; the commit is in the environment.
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_code=True, disable_git=True),
        )
        self._run.config.update(subject.config, allow_val_change=True)
        self._run.define_metric("*", step_metric=AXIS)
        noted, known = self._note.read(), self._run.summary
        self.reached = Reached(
            steps=max(noted.steps, int(known.get(AXIS, 0))),
            checkpoint=max(noted.checkpoint, int(known.get(CHECKPOINT_MARK, -1))),
        )
        self._handed = self.reached

    def log(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._run.log({**entry.values, AXIS: entry.step})
        self._handed = self._handed.after(entries)
        self._note.write(self._handed)

    def close(self) -> None:
        self._run.finish()
