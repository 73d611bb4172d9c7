"""The run's folder: where every file lies, and how a stage becomes committed.

Files appear whole or not at all (written beside, then renamed). A stage is committed by `committed.json` in its folder,
written last, with counts and the checksum of every file; a stage without one is done again from its finished shards.

    runs/NAME/
      config.yaml  environment.json  metrics.jsonl  summary.json
      prompts/{train,validation,test}/00000.parquet …
      checkpoints/000 …                              Hugging Face directories
      evaluations/000/                               answers of checkpoint 0 to held-out prompts
      iterations/000/rollouts/opponent-000/          one file a shard of prompts
      iterations/000/scores/player-000/targets/ …    kept across iterations
      iterations/000/pairs/
      iterations/000/learner/
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.errors import RunError
from tpaw_ray.schema import arrow_schema, rows_of, table_of

MARKER = "committed.json"
Row = TypeVar("Row")


@dataclass(frozen=True)
class RunStore:
    """A run's folder on a file system that every node of the cluster sees. Crosses process boundaries freely.

    Example: `RunStore.open("runs", "demo").pairs(2)` is `…/runs/demo/iterations/002/pairs`.
    """

    root: str
    filesystem: fs.FileSystem

    @classmethod
    def open(cls, root: str, name: str) -> "RunStore":
        """The store of a run below a local (or mounted) folder. Nothing is created yet.

        Raises:
            RunError: when `root` is an address of a remote store, which this version does not write to.
        """
        if "://" in root:
            raise RunError(f"run.root: found {root!r}; expected a folder that every node sees (local disk or NFS)")
        return cls(str(Path(root).expanduser().resolve() / name), fs.LocalFileSystem())

    # Where things lie.

    def path(self, *parts: str) -> str:
        """A path inside the run."""
        return "/".join((self.root, *parts))

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

    @staticmethod
    def shard(directory: str, index: int) -> str:
        """A stage's file for one shard of prompts; shard `i` of every stage speaks of the same prompts."""
        return f"{directory}/{index:05d}.parquet"

    # Reading and writing.

    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(path).type != fs.FileType.NotFound

    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        self.filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        beside = f"{path}.writing"
        with self.filesystem.open_output_stream(beside) as stream:
            stream.write(content)
        self.filesystem.move(beside, path)

    def read_bytes(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(path) as stream:
            return stream.read()

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def read_json(self, path: str) -> Any:
        """Raises `RunError` naming the file when it is not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise RunError(f"{path}: not valid JSON ({error}); the run is damaged there") from error

    def write_rows(self, path: str, rows: list[Row], row_type: type[Row], *, key: str = "") -> None:
        """Write rows as one Parquet file, whole or not at all. `key` is kept with them for `key_of`."""
        sink = pa.BufferOutputStream()
        table = table_of(rows, row_type).replace_schema_metadata({"key": key} if key else None)
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(path, sink.getvalue().to_pybytes())

    def key_of(self, path: str) -> str:
        """The key a file of rows was written with; empty where it has none or cannot be read."""
        try:
            with self.filesystem.open_input_file(path) as source:
                metadata = pq.ParquetFile(source).schema_arrow.metadata or {}
        except (OSError, pa.ArrowInvalid):
            return ""
        return bytes(metadata.get(b"key", b"")).decode()

    def read_rows(self, path: str, row_type: type[Row]) -> list[Row]:
        """The rows of a Parquet file. Raises `RunError` naming the file when it cannot be read or lacks a column."""
        return rows_of(self.read_columns(path, row_type), row_type)

    def read_columns(self, path: str, row_type: type) -> pa.Table:
        """The columns of a row type from a Parquet file, as its schema has them. Raises `RunError` as `read_rows` does."""
        table, schema = self.read_table(path), arrow_schema(row_type)
        try:
            return table.select(schema.names).cast(schema)
        except KeyError as error:
            found = ", ".join(table.column_names)
            raise RunError(f"{path}: {error.args[0]}; found columns {found}, expected those of {row_type.__name__}") from error

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table, or some columns of it. Raises `RunError` naming the file when it cannot be read."""
        try:
            with self.filesystem.open_input_file(path) as source:
                return pq.read_table(source, columns=columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"{path}: cannot be read as Parquet ({error}); remove its folder to have it made again") from error

    def num_rows(self, path: str) -> int:
        """Rows of a Parquet file, from its footer. Raises `RunError` naming the file when it cannot be read."""
        try:
            with self.filesystem.open_input_file(path) as source:
                return int(pq.ParquetFile(source).metadata.num_rows)
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"{path}: cannot be read as Parquet ({error}); remove its folder to have it made again") from error

    def num_tokens(self, path: str, column: str, take: int | None = None) -> int:
        """Tokens in a column of token ids, in the first `take` rows. Raises `RunError` as `read_table` does."""
        lengths = pc.list_value_length(self.read_table(path, [column])[column].slice(0, take))
        return int(pc.sum(lengths).as_py() or 0)

    def files(self, directory: str) -> list[str]:
        """Finished files of a stage's folder, sorted, without its marker. An absent folder has none."""
        found = self.filesystem.get_file_info(fs.FileSelector(directory, allow_not_found=True, recursive=True))
        hidden = (MARKER, ".writing")
        return sorted(info.path for info in found if info.type == fs.FileType.File and not info.path.endswith(hidden))

    # Committing.

    def commit(self, directory: str, **counts: float | str | None) -> None:
        """Mark a stage as done: its counts, when it ended (Unix time), and size and SHA-256 of every file in its folder."""
        files = {
            path.removeprefix(f"{directory}/"): {"bytes": size, "sha256": digest}
            for path in self.files(directory)
            for size, digest in (self._measure(path),)
        }
        self.write_json(f"{directory}/{MARKER}", {"counts": counts, "ended": round(time.time(), 3), "files": files})

    def is_committed(self, directory: str) -> bool:
        return self.exists(f"{directory}/{MARKER}")

    def counts(self, directory: str) -> dict[str, Any]:
        """The counts a committed stage was marked with."""
        return self.read_json(f"{directory}/{MARKER}")["counts"]

    def verify(self, directory: str) -> None:
        """Compare a committed stage's files with their checksums.

        Raises:
            RunError: naming the first file that is missing or differs.
        """
        for name, expected in self.read_json(f"{directory}/{MARKER}")["files"].items():
            path = f"{directory}/{name}"
            found = self._measure(path) if self.exists(path) else None
            if found != (expected["bytes"], expected["sha256"]):
                raise RunError(f"{path}: differs from what was committed; remove {directory} to have it made again")

    def checksums(self, directory: str) -> dict[str, str]:
        """The SHA-256 of every file of a committed stage, from its marker."""
        return {name: found["sha256"] for name, found in self.read_json(f"{directory}/{MARKER}")["files"].items()}

    def checksum(self, path: str) -> str:
        """The SHA-256 of a file."""
        return self._measure(path)[1]

    def _measure(self, path: str) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with self.filesystem.open_input_stream(path) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                size += len(block)
        return size, digest.hexdigest()
