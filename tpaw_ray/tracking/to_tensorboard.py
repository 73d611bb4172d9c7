"""TensorBoard: event files in the run's `tracking/tensorboard`, written with TensorBoard's own writer and no torch."""

import logging
import time
from collections.abc import Sequence

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tpaw_ray.tracking.entries import CHECKPOINT_MARK, STEP_MARK, Entry, Reached, Subject


class TensorBoard:
    """One event an entry, so that a kill leaves whole entries only; a driver that comes later reads what is there and goes on."""

    def __init__(self, subject: Subject) -> None:
        folder = subject.folder / "tensorboard"
        started = any(folder.glob("events.*"))
        self.reached = _reached(str(folder)) if started else Reached()
        self._writer = EventFileWriter(str(folder))
        if not started:
            # Indented by four: Markdown shows the lines as they stand, whatever is in them.
            text = "\n".join(f"    {line}" for line in yaml.safe_dump(subject.config, sort_keys=False).splitlines())
            self._writer.add_event(Event(wall_time=time.time(), step=0, summary=text_pb("config", text)))
            self._writer.flush()

    def log(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in entry.values.items()]
            self._writer.add_event(Event(wall_time=time.time(), step=entry.step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _reached(folder: str) -> Reached:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every file that it reads
    found = EventAccumulator(folder)
    found.Reload()
    tags = found.Tags()["scalars"]
    return Reached(
        steps=found.Scalars(STEP_MARK)[-1].step if STEP_MARK in tags else 0,
        checkpoint=int(found.Scalars(CHECKPOINT_MARK)[-1].value) if CHECKPOINT_MARK in tags else -1,
    )
