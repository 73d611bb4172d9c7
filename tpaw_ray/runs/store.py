"""The run's folder: where every file lies, and how a stage becomes committed.

It lies on a disk that every node sees, or in an object store (`address.py`). Files appear whole or not at all: on a disk they are
written beside, then renamed; in a store an object is there when its upload has ended. A stage is committed by `committed.json` in
its folder, written last, with counts and the checksum of every file; a stage without one is done again from its finished shards.

    runs/NAME/
      config.yaml  environment.json  metrics.jsonl  summary.json
      prompts/{train,validation,test}/00000.parquet …
      checkpoints/000 …                              Hugging Face directories
      evaluations/000/                               answers of checkpoint 0 to held-out prompts
      iterations/000/rollouts/opponent-000/          one file a shard of prompts
      iterations/000/scores/player-000/targets/ …    kept across iterations
      iterations/000/pairs/
      iterations/000/learner/
      iterations/000/steps/000012/                   an update under way
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.errors import DamageError, RunError
from tpaw_ray.faults import Place, reached
from tpaw_ray.plain_json import NUMBER, misfit, parse_plain_json
from tpaw_ray.runs.address import open_address, told
from tpaw_ray.runs.copies import BLOCK, cache_folder, copy_all, copy_of
from tpaw_ray.schema import arrow_schema, rows_of, table_of
from tpaw_ray.wording import listed

MARKER = "committed.json"
MARKED = {"counts": {str: NUMBER | str | None}, "files": {str: {"bytes": int, "sha256": str}}}
"""The shape of a marker (`plain_json.misfit`)."""
UNREADABLE = (OSError, pa.ArrowException, UnicodeDecodeError, KeyError)
"""What pyarrow raises where a Parquet file is damaged."""
Row = TypeVar("Row")
Found = TypeVar("Found")


def _check_rows(found: int, file: pq.ParquetFile) -> None:
    """Compare a number of rows with what a file's footer says, which has no checksum as the pages have."""
    if found != file.metadata.num_rows:
        raise pa.ArrowInvalid(f"found {found} rows, expected {file.metadata.num_rows}")


class Counts(dict[str, Any]):
    """The counts of a marker. One that is asked for and is not there is a `RunError` that names the marker."""

    def __init__(self, counts: dict[str, Any], path: str) -> None:
        super().__init__(counts)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise RunError(f"{self._path}: the run is damaged there (counts.{name}: missing)")


@dataclass(frozen=True)
class RunStore:
    """A run's folder on a disk or in an object store that every node of the cluster sees. Crosses process boundaries freely.

    It crosses them as its address alone: a process opens the store with the credentials of its own environment.

    Example: `RunStore.open("runs", "demo").pairs(2)` is `…/runs/demo/iterations/002/pairs`.
    """

    root: str
    filesystem: fs.FileSystem
    scheme: str = ""
    """How paths in an object store begin (`s3://`); empty on a disk."""

    @classmethod
    def open(cls, root: str, name: str) -> "RunStore":
        """The store of a run below a folder or an address such as `s3://bucket/prefix`. Nothing is created yet.

        Raises:
            RunError: when `root` is an address of an unknown kind, or one that holds keys.
        """
        scheme, address, filesystem = open_address(root)
        return cls(f"{address.rstrip('/')}/{name}", filesystem, scheme)

    @classmethod
    def around(cls, path: str) -> "RunStore":
        """A store to reach one file or folder with, for whoever knows nothing of the run but its path."""
        root, slash, name = path.removeprefix("file://").rpartition("/")
        return cls.open(root or slash, name)

    @classmethod
    def named(cls, path: str) -> "RunStore":
        """The store of what a user names: a folder, or an address such as `s3://bucket/prefix/name`.

        Raises:
            RunError: for an address of an unknown kind, or of a bucket alone.
        """
        address = path.rstrip("/")
        scheme, mark, inside = address.partition("://")
        if mark and "/" not in inside and scheme != "file":
            raise RunError(f"{address}: found a bucket; expected the address of a run's folder in it")
        return cls.around(address if mark or "/" in address else f"./{address}")

    def __reduce__(self) -> tuple[Any, ...]:
        return RunStore.around, (self.root,)

    def at(self, path: str) -> str:
        """A path as the file system takes it, without the scheme."""
        return path.removeprefix(self.scheme)

    @property
    def poll_s(self) -> float:
        """Seconds between two looks for what others make; a store is asked, and paid, for each."""
        return 2.0 if self.scheme else 0.1

    # Where things lie.

    def path(self, *parts: str) -> str:
        """A path inside the run."""
        return "/".join((self.root, *parts))

    def inside(self, path: str) -> str:
        """A path of this run as it is called inside the run: `iterations/000/pairs`."""
        return path.removeprefix(f"{self.root}/")

    def prompts(self, split: str) -> str:
        return self.path("prompts", split)

    def checkpoint(self, number: int) -> str:
        return self.path("checkpoints", f"{number:03d}")

    def evaluation(self, checkpoint: int) -> str:
        return self.path("evaluations", f"{checkpoint:03d}")

    def iteration(self, number: int) -> str:
        return self.path("iterations", f"{number:03d}")

    def rollout(self, rollout: Rollout) -> str:
        return f"{self.iteration(rollout.iteration)}/rollouts/opponent-{rollout.opponent:03d}"

    def target_scores(self, player: int) -> str:
        """Scores of the training targets: made in the iteration in which the player enters the team."""
        return f"{self.iteration(player)}/scores/player-{player:03d}/targets"

    def rollout_scores(self, player: int, rollout: Rollout) -> str:
        """Scores of a rollout: made in the first iteration that has both the player and the rollout."""
        made = max(player, rollout.iteration)
        return f"{self.iteration(made)}/scores/player-{player:03d}/rollout-{rollout.iteration:03d}-{rollout.opponent:03d}"

    def pairs(self, iteration: int) -> str:
        return f"{self.iteration(iteration)}/pairs"

    def learner(self, iteration: int) -> str:
        return f"{self.iteration(iteration)}/learner"

    def steps(self, iteration: int) -> str:
        """Step checkpoints of an update under way."""
        return f"{self.iteration(iteration)}/steps"

    @staticmethod
    def shard(directory: str, index: int) -> str:
        """A stage's file for one shard of prompts; shard `i` of every stage speaks of the same prompts."""
        return f"{directory}/{index:05d}.parquet"

    # Reading and writing.

    def exists(self, path: str) -> bool:
        with told(path, "looked at"):
            return self.filesystem.get_file_info(self.at(path)).type != fs.FileType.NotFound

    def changed_at(self, path: str) -> float:
        """When a file last changed: Unix time, by the clock of the machine or the store that it lies on.

        Raises:
            RunError: when there is no such file.
        """
        with told(path, "looked at"):
            changed = self.filesystem.get_file_info(self.at(path)).mtime_ns
            if changed is None:
                raise FileNotFoundError(path)
        return changed / 1e9

    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a file whole or not at all.

        Raises:
            RunError: naming the path, when the disk is full or the store does not answer, as all that read and write do.
        """
        with told(path, "written"):
            if self.scheme:
                reached(Place.WRITE, self.inside(path))
                self._put(self.at(path), content)
            else:
                self._put_beside(path, content)
        reached(Place.WRITTEN, self.inside(path))

    def _put_beside(self, path: str, content: bytes) -> None:
        beside = Path(f"{path}.{uuid.uuid4().hex[:8]}.writing")  # a name of its own: a dead node's task may still write
        try:
            beside.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a marker could outlive a power failure that its stage does not
            reached(Place.WRITE, self.inside(path))
            beside.replace(path)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            raise

    def _put(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is none."""
        with told(path, "removed"):
            kind = self.filesystem.get_file_info(self.at(path)).type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.at(path))
            elif kind == fs.FileType.File:
                self.filesystem.delete_file(self.at(path))

    def append_bytes(self, path: str, content: bytes) -> None:
        """Add to a file's end; in an object store the file is written anew."""
        if self.scheme:
            self.write_bytes(path, (self.read_bytes(path) if self.exists(path) else b"") + content)
            return
        with told(path, "written"), open(path, "ab") as file:
            file.write(content)

    def read_bytes(self, path: str) -> bytes:
        with told(path, "read"), self.filesystem.open_input_stream(self.at(path)) as stream:
            return stream.read()

    def check_writable(self) -> None:
        """Write a byte beside the run in an object store, and take it back.

        Raises:
            RunError: with the store's reason.
        """
        probe = f"{self.root}.writable"  # beside the run: pyarrow leaves the mark of a folder where it deletes
        self.write_bytes(probe, b"1")
        with told(probe, "deleted"):
            self.filesystem.delete_file(self.at(probe))

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def read_json(self, path: str, shape: Any = object) -> Any:
        """The value in a JSON file. Raises `RunError` naming the file when it is not JSON, or not of the shape (`misfit`)."""
        try:
            found = parse_plain_json(self.read_bytes(path))
        except ValueError as error:
            raise RunError(f"{path}: not valid JSON ({error}); the run is damaged there") from error
        if wrong := misfit(found, shape):
            raise RunError(f"{path}: the run is damaged there ({wrong})")
        return found

    def write_rows(self, path: str, rows: list[Row], row_type: type[Row], *, key: str = "") -> None:
        """Write rows as one Parquet file, whole or not at all. `key` is kept with them for `key_of`."""
        sink = pa.BufferOutputStream()
        table = table_of(rows, row_type).replace_schema_metadata({"key": key} if key else None)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.write_bytes(path, sink.getvalue().to_pybytes())

    def key_of(self, path: str) -> str:
        """The key a file of rows was written with; empty where it has none or is damaged."""
        content = pa.BufferReader(self.read_bytes(path))
        try:
            return bytes((pq.ParquetFile(content).schema_arrow.metadata or {}).get(b"key", b"")).decode()
        except UNREADABLE:
            return ""

    def read_rows(self, path: str, row_type: type[Row]) -> list[Row]:
        """The rows of a Parquet file. Raises `RunError` naming the file when it cannot be read or lacks a column."""
        return rows_of(self.read_columns(path, row_type), row_type)

    def read_columns(self, path: str, row_type: type, *names: str) -> pa.Table:
        """The columns of a row type from a Parquet file, or those that are named, as its schema has them.

        Raises:
            RunError: naming the file when it cannot be read, lacks one, or a page of it is not as it was written.
        """
        whole = arrow_schema(row_type)
        schema = pa.schema([whole.field(name) for name in names or whole.names])

        def read(file: pq.ParquetFile) -> pa.Table:
            if missing := [name for name in schema.names if name not in file.schema_arrow.names]:
                raise pa.ArrowInvalid(f"no {listed(missing)}; found columns {listed(file.schema_arrow.names)}")
            table = file.read(schema.names).select(schema.names).cast(schema)
            _check_rows(len(table), file)
            return table

        return self._parquet(path, read)

    def num_rows(self, path: str) -> int:
        """Rows of a Parquet file, from its footer. Raises `RunError` naming the file when it cannot be read."""
        return self._parquet(path, lambda file: int(file.metadata.num_rows))

    def _parquet(self, path: str, read: Callable[[pq.ParquetFile], Found]) -> Found:
        try:
            with self.filesystem.open_input_file(self.at(path)) as source:
                file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=True)
                _check_rows(sum(file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)), file)
                return read(file)
        except UNREADABLE as error:
            if self.scheme and not isinstance(error, FileNotFoundError):
                self.read_bytes(path)  # raises when it is the store that fails, and nothing should be removed for that
            stage = self._stage_of(path)
            raise RunError(f"{path}: cannot be read as Parquet ({error}); remove {stage} to have it made again") from error

    def _stage_of(self, path: str) -> str:
        """The folder of the committed stage that a file belongs to; its own folder where it belongs to none."""
        own = folder = path.rpartition("/")[0]
        while len(folder) > len(self.root):
            if self.is_committed(folder):
                return folder
            folder = folder.rpartition("/")[0]
        return own

    def num_tokens(self, path: str, row_type: type, column: str, take: int | None = None) -> int:
        """Tokens in a column of token ids, in the first `take` rows. Raises `RunError` as `read_columns` does."""
        lengths = pc.list_value_length(self.read_columns(path, row_type, column)[column].slice(0, take))
        return int(pc.sum(lengths).as_py() or 0)

    def files(self, directory: str) -> list[str]:
        """Finished files of a stage's folder, sorted, without its marker. An absent folder has none."""
        with told(directory, "listed"):
            found = self.filesystem.get_file_info(fs.FileSelector(self.at(directory), allow_not_found=True, recursive=True))
        hidden = (MARKER, ".writing")
        paths = (f"{self.scheme}{info.path}" for info in found if info.type == fs.FileType.File)
        return sorted(path for path in paths if not path.endswith(hidden))

    # Folders, for what reads and writes on a disk only.

    @contextmanager
    def making(self, directory: str) -> Iterator[Path]:
        """A folder on this node's disk to fill: when the block ends it becomes `directory`, or nothing does if it fails.

        Example::

            with store.making(store.checkpoint(1)) as folder:
                model.save_pretrained(folder)
        """
        folder = self._workplace(directory)
        try:
            with told(str(folder), "written"):
                folder.mkdir(parents=True, exist_ok=True)
                yield folder
            with told(directory, "written"):
                reached(Place.WRITE, self.inside(directory))
                if self.scheme:
                    copy_all(fs.LocalFileSystem(), str(folder), self.filesystem, self.at(directory))
                else:
                    folder.rename(directory)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def filling(self, directory: str) -> Iterator[Path]:
        """A folder on this node's disk for one process's files of several; `directory` has them all when all have ended."""
        if not self.scheme:
            with told(directory, "written"):
                Path(directory).mkdir(parents=True, exist_ok=True)
                yield Path(directory)
            return
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            place = Path(folder) / directory.rsplit("/", 1)[1]
            place.mkdir()
            yield place
            with told(directory, "written"):
                copy_all(fs.LocalFileSystem(), str(place), self.filesystem, self.at(directory))

    def _workplace(self, directory: str) -> Path:
        """The path of a folder in which `directory` is made. What both held before is removed."""
        if self.scheme:
            with told(directory, "made anew"):
                self.filesystem.delete_dir_contents(self.at(directory), missing_dir_ok=True)
            return Path(tempfile.mkdtemp(prefix="making-", suffix=".writing", dir=cache_folder()))
        beside = Path(f"{directory}.writing")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)
        return beside

    def on_disk(self, directory: str) -> str:
        """A committed folder as one of this node's disk: itself, or a copy that its checksums have been compared with.

        Raises:
            RunError: naming the first file that is not as it was committed.
        """
        if not self.scheme:
            return directory
        marker = self.read_bytes(f"{directory}/{MARKER}")
        key = hashlib.sha256(directory.encode() + marker).hexdigest()[:16]
        return copy_of(key, lambda folder: self.fetch(directory, folder))

    def fetch(self, directory: str, folder: Path) -> None:
        """Copy a committed folder into one of this node's disk, and compare the copy with the checksums.

        Raises:
            RunError: naming the first file that is not as it was committed.
        """
        self._marker(directory)  # a damaged one is named where it lies
        with told(directory, f"copied to {folder}"):
            copy_all(self.filesystem, self.at(directory), fs.LocalFileSystem(), str(folder))
        RunStore.around(str(folder)).verify(str(folder), directory)

    # Committing.

    def commit(self, directory: str, **counts: float | str | None) -> None:
        """Mark a stage as done: its counts, when it ended (Unix time), and size and SHA-256 of every file in its folder."""
        self._clear_leftovers(directory)
        files = {
            path.removeprefix(f"{directory}/"): {"bytes": size, "sha256": digest}
            for path in self.files(directory)
            for size, digest in (self._measure(path),)
        }
        reached(Place.MARK, self.inside(directory))
        self.write_json(f"{directory}/{MARKER}", {"counts": counts, "ended": round(time.time(), 3), "files": files})
        reached(Place.MARKED, self.inside(directory))

    def _clear_leftovers(self, directory: str) -> None:
        """Remove what killed processes had begun to write in a folder whose files are all there now."""
        if not self.scheme:
            for beside in Path(directory).rglob("*.writing"):
                with suppress(OSError):
                    beside.unlink()

    def reopen(self, directory: str) -> None:
        """Take the checksums out of a stage's marker, since its files are about to be made again. Its counts stay."""
        self.write_json(f"{directory}/{MARKER}", self._marker(directory) | {"files": {}})

    def is_reopened(self, directory: str) -> bool:
        """Whether a stage was reopened and not committed since."""
        return self.is_committed(directory) and not self._marker(directory)["files"]

    def is_committed(self, directory: str) -> bool:
        return self.exists(f"{directory}/{MARKER}")

    def counts(self, directory: str) -> Counts:
        """The counts a committed stage was marked with."""
        return Counts(self._marker(directory)["counts"], f"{directory}/{MARKER}")

    def verify(self, directory: str, called: str = "") -> None:
        """Compare a committed stage's files with their checksums; a copy is `called` what it was copied from.

        Raises:
            DamageError: naming the first file that is missing or differs.
            RunError: when the store does not answer.
        """
        for name, expected in self._marker(directory)["files"].items():
            path = f"{directory}/{name}"
            found = self._measure(path) if self.exists(path) else None
            if found != (expected["bytes"], expected["sha256"]):
                place = called or directory
                raise DamageError(f"{place}/{name}: differs from what was committed; remove {place} to have it made again")

    def checksums(self, directory: str) -> dict[str, str]:
        """The SHA-256 of every file of a committed stage, from its marker."""
        return {name: found["sha256"] for name, found in self._marker(directory)["files"].items()}

    def _marker(self, directory: str) -> dict[str, Any]:
        return self.read_json(f"{directory}/{MARKER}", MARKED)

    def checksum(self, path: str) -> str:
        """The SHA-256 of a file."""
        return self._measure(path)[1]

    def _measure(self, path: str) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with told(path, "read"), self.filesystem.open_input_stream(self.at(path)) as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                size += len(block)
        return size, digest.hexdigest()
