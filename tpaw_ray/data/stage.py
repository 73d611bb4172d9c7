"""How a stage walks its shards on Ray Data: a task a shard, counts as shards finish, errors as they were raised."""

import pickle
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import ray

from tpaw_ray.errors import TpawError


def for_each_shard(
    shards: Sequence[dict[str, Any]],
    work: Callable[[dict[str, Any]], int],
    *,
    name: str,
    cpus: float,
    concurrency: int | None,
    advance: Callable[[int], None],
) -> int:
    """Run `work` on every shard's row in a Ray Data task; it returns how many items it did, which `advance` gets.

    Args:
        shards: one flat row a shard.
        work: called in the tasks, so it must pickle.
        name: what Ray's dashboard calls the tasks.
        cpus: CPUs Ray sets aside for a task.
        concurrency: tasks at once; None leaves it to Ray Data.

    Returns the sum over all shards.

    Raises:
        TpawError: the first one that `work` raises, whatever its kind.
    """
    if not shards:
        return 0
    done = 0
    tasks = ray.data.from_items(list(shards), override_num_blocks=len(shards))
    results = tasks.map(_Guarded(work, name), num_cpus=cpus, concurrency=concurrency)
    # Without prefetching, which holds a finished shard back until the next one is done.
    tables: Any = iter(results.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"))
    with closing(tables):  # an iterator that is left to the garbage collector would start Ray again after its end
        for table in tables:
            for row in table.to_pylist():
                if row["error"]:
                    raise pickle.loads(row["error"])
                done += row["count"]
                advance(row["count"])
    return done


class _Guarded:
    """Turns errors meant for the user into data: Ray Data would hand on their text only."""

    def __init__(self, work: Callable[[dict[str, Any]], int], name: str) -> None:
        self.work = work
        self.__name__ = name  # Ray Data asks a callable for the name it shows

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"count": self.work(row), "error": b""}
        except TpawError as error:
            return {"count": 0, "error": pickle.dumps(error)}
