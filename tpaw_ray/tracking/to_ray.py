"""Ray's own metrics, for its dashboard and Prometheus: gauges of the last step and checkpoint, tagged with the run's name."""

import re
from collections.abc import Callable, Sequence

from ray.util.metrics import Gauge

from tpaw_ray.tracking.entries import Entry, Reached, Subject


def stage_gauges(run: str) -> Callable[[str, int, int], None]:
    """Gauges `tpaw_stage_done` and `tpaw_stage_total` of a run's stages, by name; returns what sets them."""
    done, total = (
        Gauge(f"tpaw_stage_{name}", description=f"Items {meaning} of a TPAW stage", tag_keys=("run", "stage"))
        for name, meaning in (("done", "done"), ("total", "in all"))
    )

    def progress(stage: str, items: int, of: int) -> None:
        tags = {"run": run, "stage": stage}
        done.set(items, tags=tags)
        total.set(of, tags=tags)

    return progress


class RayMetrics:
    """`train/loss` is the gauge `tpaw_train_loss`, which Prometheus sees as `ray_tpaw_train_loss`."""

    def __init__(self, subject: Subject) -> None:
        self.reached = Reached()
        self._tags = {"run": subject.name}
        self._gauges: dict[str, Gauge] = {}

    def log(self, entries: Sequence[Entry]) -> None:
        newest: dict[str, float] = {}
        for entry in entries:
            newest |= {**entry.values, "step": entry.step}
        for name, value in newest.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(
                    f"tpaw_{re.sub(r'[^A-Za-z0-9_]', '_', name)}", description=f"{name} of a TPAW run", tag_keys=("run",)
                )
            self._gauges[name].set(value, tags=self._tags)

    def close(self) -> None:
        """Nothing is kept; Ray forgets a driver's gauges when it leaves."""
