"""How a stage walks its shards on Ray Data: counts as shards finish, errors as they were raised.

Work that computes (`for_each_shard`) runs in a task a shard. Work that only waits for actors (`ask_for_each_shard`) runs in
threads of few tasks: a process a shard would take seconds of a core to start, in order to wait.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset

from tpaw_ray.errors import TpawError
from tpaw_ray.plan import ASKING_CPUS, num_askers

Shard = dict[str, Any]
Work = Callable[[Shard], int]


def for_each_shard(shards: Sequence[Shard], work: Work, *, name: str, cpus: float, advance: Callable[[int], None]) -> int:
    """Run `work` on every shard's row in a Ray Data task; it returns how many items it did, which `advance` gets.

    Args:
        shards: one flat row a shard.
        work: called in the tasks, so it must pickle.
        name: what Ray's dashboard calls the tasks.
        cpus: CPUs Ray sets aside for a task.

    Returns the sum over all shards.

    Raises:
        TpawError: the first one that `work` raises, whatever its kind.
    """
    if not shards:
        return 0
    return _walk(_blocks(shards, len(shards)).map(_Guarded(work, name), num_cpus=cpus), advance)


def ask_for_each_shard(shards: Sequence[Shard], work: Work, *, name: str, at_once: int, advance: Callable[[int], None]) -> int:
    """As `for_each_shard`, for `work` that waits: so many shards are under way at once, in the order given.

    A task that died is run again with all of its shards, so `work` must find what it did before; and Ray drops as many answers of
    the second try as the first one gave, so whether a shard is done is for the caller to see where `work` left it.
    """
    if not shards:
        return 0
    at_once = min(at_once, len(shards))
    askers = num_askers(at_once)
    asking = _Asking(_Guarded(work, name), threads=-(-at_once // askers))
    dealt = [shard for first in range(askers) for shard in shards[first::askers]]  # each asker gets a block of these
    return _walk(
        _blocks(dealt, askers).map_batches(asking, batch_size=None, batch_format="pyarrow", num_cpus=ASKING_CPUS), advance
    )


def _blocks(shards: Sequence[Shard], number: int) -> Dataset:
    rows = ray.data.from_items(list(shards), override_num_blocks=number)
    rows.context.target_max_block_size = 1  # byte: what a task says of a shard is passed on at once
    rows.context.execution_no_progress_timeout_s = -1  # a shard may take longer than Ray Data's 30 minutes
    return rows


def _walk(results: Dataset, advance: Callable[[int], None]) -> int:
    done = 0
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

    def __init__(self, work: Work, name: str) -> None:
        self.work = work
        self.__name__ = name  # Ray Data asks a callable for the name it shows

    def __call__(self, row: Shard) -> Shard:
        try:
            return {"count": self.work(row), "error": b""}
        except TpawError as error:
            return {"count": 0, "error": pickle.dumps(error)}


class _Asking:
    """A task that asks for many shards at once, in threads."""

    def __init__(self, guarded: _Guarded, threads: int) -> None:
        self.guarded, self.threads = guarded, threads
        self.__name__ = guarded.__name__

    def __call__(self, shards: pa.Table) -> Iterator[pa.Table]:
        threads = ThreadPoolExecutor(self.threads)
        try:
            for answer in as_completed([threads.submit(self.guarded, row) for row in shards.to_pylist()]):
                yield pa.Table.from_pylist([answer.result()])
        finally:  # an error is not held back by the shards that wait
            threads.shutdown(wait=False, cancel_futures=True)
