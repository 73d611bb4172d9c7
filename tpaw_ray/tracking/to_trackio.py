"""Trackio: its folder on this machine (`TRACKIO_DIR`), or the server or Space of `TRACKIO_SERVER_URL` or `TRACKIO_SPACE_ID`."""

import os
from collections.abc import Sequence

import trackio
from trackio.sqlite_storage import SQLiteStorage

from tpaw_ray.tracking.entries import CHECKPOINT_MARK, STEP_MARK, Entry, Reached, Subject
from tpaw_ray.tracking.note import Note


class Trackio:
    """A run named by the run's id. On this machine its database tells what is there; elsewhere a note does."""

    def __init__(self, subject: Subject) -> None:
        self._note = Note(subject.folder / "trackio.json")
        self._run = trackio.init(
            project=subject.project,
            name=subject.id,
            resume="allow",
            config=subject.config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        elsewhere = os.environ.get("TRACKIO_SERVER_URL") or os.environ.get("TRACKIO_SPACE_ID")
        self.reached = self._note.read() if elsewhere else _kept(subject.project, self._run.id)
        self._handed = self.reached

    def log(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._run.log(dict(entry.values), step=entry.step)
        self._handed = self._handed.after(entries)
        self._note.write(self._handed)

    def close(self) -> None:
        self._run.finish()


def _kept(project: str, run: str) -> Reached:
    rows = SQLiteStorage.get_logs(project, run_id=run, max_points=None)
    return Reached(
        steps=max((row["step"] for row in rows if STEP_MARK in row), default=0),
        checkpoint=max((int(row[CHECKPOINT_MARK]) for row in rows if CHECKPOINT_MARK in row), default=-1),
    )
