"""Weights & Biases: its server, or with `WANDB_MODE=offline` files in the run's `tracking/wandb` for `wandb sync`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # protobuf makes it when it is imported

from tpaw_ray.tracking.entries import CHECKPOINT_MARK, STEP_MARK, Entry, Reached, Subject

AXIS = "step"
"""Our own axis: W&B's counter must rise with every entry, so that a checkpoint could not stand at the step that made it."""


class WeightsAndBiases:
    """A run of the run's id. The server tells what it has; offline, where each driver writes a folder, the folders do."""

    def __init__(self, subject: Subject) -> None:
        mode = wandb.setup().settings.mode
        if mode in ("online", "shared") and not wandb.login(prompt=False):
            raise RuntimeError("no API key is set: set WANDB_API_KEY, or WANDB_MODE=offline")
        subject.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for path in subject.folder.glob("wandb/offline-run-*/run-*.wandb") for row in history(path)]
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
        known = self._run.summary
        self.reached = Reached(
            steps=max([known.get(AXIS, 0), *(row[AXIS] for row in kept if STEP_MARK in row)]),
            checkpoint=int(
                max([known.get(CHECKPOINT_MARK, -1), *(row[CHECKPOINT_MARK] for row in kept if CHECKPOINT_MARK in row)])
            ),
        )

    def log(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            # Rises, and is the same whichever driver sends the entry: folders that were written offline fit together.
            counter = 2 * entry.step + (entry.checkpoint is not None)
            self._run.log({**entry.values, AXIS: entry.step}, step=counter)

    def close(self) -> None:
        self._run.finish()


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an offline file, as far as a killed process wrote them.

    W&B reads its files in Go only. The format is LevelDB's log behind a header of 7 bytes: blocks of 32 KiB; records of a
    checksum (4 bytes), a length (2), a kind (1: whole, 2: first part, 3: middle, 4: last) and that many bytes of protobuf.
    """
    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left  # too little for a record's head
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        part = content[place + 7 : place + 7 + length]
        if len(part) < length or kind not in (1, 2, 3, 4):
            return
        parts, place = part if kind <= 2 else parts + part, place + 7 + length
        if kind in (1, 4) and (record := Record.FromString(parts)).WhichOneof("record_type") == "history":
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
