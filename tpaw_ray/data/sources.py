"""The user's files as conversations: which file formats, and where a row stands.

A source is streamed, row by row; only a `.json` file that holds a list is read whole. Rows are counted from 0 over the whole
source, blank lines left out; lines of a file are counted from 1.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tpaw_ray.config import DataConfig
from tpaw_ray.data.rows import Conversation, conversation_of, fields_of, find_shape, shape_of_columns
from tpaw_ray.errors import DataError
from tpaw_ray.wording import listed, one_line

SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_NAMES = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
"""How the name of a file that holds one split begins."""
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A row as the file holds it. `value` is still bytes where the file is made of lines; `index` counts within the file."""

    file: str
    index: int
    line: int | None = None
    value: Any

    def place(self, row: int) -> str:
        if self.line is not None:
            return f"{self.file}, row {row} (line {self.line})"
        return f"{self.file}, row {row}" + (f" (row {self.index} of this file)" if self.index != row else "")


def read_conversations(data: DataConfig, *, heldout: bool = False, preferences: bool = False) -> Iterator[Conversation]:
    """Stream a source's rows as conversations, in the order of the source.

    With `heldout` it is `data.heldout_path` that is read, and whole: `data.limit` is for `data.path`. A folder's files are read
    in sorted order, sub-folders included; a folder with files of several splits is refused, since all would be trained on.
    The row shape is `data.columns` where given, otherwise found from the first row and the same for all rows; with `preferences`
    it has a rejected response.

    Raises:
        DataError: when the source is missing, empty or of an unknown shape, or at a malformed row: names the file, the row
            (and the line), the field, what was found and what is expected.
        ConfigError: when `data.columns` names neither `messages` nor both `prompt` and `target`.
    """
    source, split = (str(data.heldout_path), data.heldout_split) if heldout else (data.path, data.split)
    shape = shape_of_columns(data.columns, preferences=preferences)
    records = _read_source(source, split, data.subset)
    row = -1
    for row, record in enumerate(records if heldout else islice(records, data.limit)):
        place = record.place(row)
        fields = fields_of(record.value, place)
        shape = shape or find_shape(fields, data.columns, place, preferences=preferences)
        yield conversation_of(fields, shape, row, place)
    if row < 0:
        raise DataError(f"{source}: holds no rows; expected at least one conversation")


def check_first_rows(data: DataConfig, *, preferences: bool = False) -> None:
    """Read the first row of `data.path` and of `data.heldout_path` where that needs no hub and no `datasets`.

    Raises:
        DataError: as `read_conversations` does.
    """
    for source, heldout in ((data.path, False), (data.heldout_path, True)):
        if source is not None and (looks_like_path(source) or os.path.exists(source)) and not _is_saved(source):
            next(read_conversations(data, heldout=heldout, preferences=preferences and not heldout))


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a local file or folder, not a hub's `name` or `owner/name`.

    >>> looks_like_path("data/train.jsonl"), looks_like_path("./data"), looks_like_path("openai/gsm8k")
    (True, True, False)
    """
    return name.lower().endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)


# Files.


def _read_source(source: str, split: str, subset: str | None) -> Iterator[_Record]:
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):  # which, unlike `Path.is_file`, takes a name that no file system can hold as one that is not there
        return _read_file(path)
    if os.path.isdir(path):
        if _is_saved(source):
            return _read_saved(path, split)
        return _read_folder(path)
    if looks_like_path(source):
        raise DataError(f"{source}: no such file or folder; expected SFT data in {', '.join(SUFFIXES)} or a folder of them")
    return _read_hub(source, split, subset)


def _is_saved(source: str) -> bool:
    return any(os.path.isfile(f"{os.path.expanduser(source)}/{name}") for name in SAVED_BY_DATASETS)


def _read_folder(folder: Path) -> Iterator[_Record]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"{folder}: the folder holds no data; expected {', '.join(SUFFIXES)} files or a folder saved by `datasets`"
        )
    splits = {match[1].lower(): path for path in files if (match := SPLIT_NAMES.match(path.stem))}
    if len(splits) > 1:
        found = ", ".join(str(path) for path in splits.values())
        raise DataError(
            f"{folder}: holds files of several splits ({found}), which would all be trained on; name one file or folder in "
            "data.path, and the held-out one in data.heldout_path"
        )
    return chain.from_iterable(map(_read_file, files))


def _read_file(path: Path) -> Iterator[_Record]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown file type {suffix or '(no suffix)'!r}; expected {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix == ".json" and _starts_a_list(path):
            yield from _read_list(path)
        else:
            yield from _read_lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _starts_a_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_lines(path: Path) -> Iterator[_Record]:
    # Bytes, because only "\n" ends a line of JSONL: text mode would also end one at a lone "\r".
    with path.open("rb") as file:
        index = 0
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield _Record(file=str(path), index=index, line=number, value=line)
                index += 1


def _read_list(path: Path) -> Iterator[_Record]:
    try:
        values = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected a list of objects") from error
    for index, value in enumerate(values):
        yield _Record(file=str(path), index=index, value=value)


def _read_parquet(path: Path) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                rows = _rows_of_batch(batch, path, index)
                for value in rows:
                    yield _Record(file=str(path), index=index, value=value)
                    index += 1
    except (pa.ArrowException, OSError, ValueError) as error:  # the last for names that are not UTF-8
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(error)}; write or copy the file again") from error


def _rows_of_batch(batch: Any, path: Path, start: int) -> list[dict[str, Any]]:
    place = f"{path}, rows {start} to {start + batch.num_rows - 1}"
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: a text is not valid UTF-8: {error}; write it as UTF-8") from error
    except (ValueError, OverflowError) as error:  # a column twice, a time that Python cannot hold
        raise DataError(f"{place}: cannot be read as objects with named columns: {one_line(error)}") from error


def _read_saved(folder: Path, split: str) -> Iterator[_Record]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` lets through errors of Arrow, of JSON and of its own; all mean the same to the user
        raise DataError(f"{folder}: cannot be read as a folder saved by `datasets`: {one_line(error)}") from error
    if isinstance(saved, dict):
        if split not in saved:
            raise DataError(f"{folder}: has no split {split!r}; expected one of {listed(saved)}")
        saved = saved[split]
    return _records_of(saved, str(folder))


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[_Record]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # network, authentication, a missing subset or split: each its own type; the reason is passed on
        raise DataError(
            f"{name}: neither a local file or folder nor a data set the hub could give "
            f"(subset {subset or 'none'}, split {split}): {one_line(error)}"
        ) from error
    return _records_of(loaded, name)


def _records_of(rows: Iterable[Any], name: str) -> Iterator[_Record]:
    index = -1
    try:
        for index, value in enumerate(rows):
            yield _Record(file=name, index=index, value=value)
    except Exception as error:  # a damaged Arrow file or a column that `datasets` cannot decode: each its own type
        raise DataError(f"{name}, after row {index}: `datasets` cannot read on: {one_line(error)}") from error
