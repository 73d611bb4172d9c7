"""The user's files as conversations: which file formats, which row shapes, and what is said about a malformed row.

A source is streamed, row by row; only a `.json` file that holds a list is read whole. Rows are counted from 0 over the whole
source, blank lines left out; lines of a file are counted from 1.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tpaw_ray.config import ColumnsConfig, DataConfig
from tpaw_ray.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row of the source: the turns before the last assistant turn, and that turn's text.

    Example: `Conversation(row=0, prompt=(Message(role="user", content="1+1?"),), target="2")`.
    """

    row: int
    prompt: tuple[Message, ...]
    target: str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which columns hold what: either `messages`, or `prompt` and `target`. `extra` is text that continues the prompt."""

    messages: str | None = None
    prompt: str | None = None
    target: str | None = None
    system: str | None = None
    extra: str | None = None

    def columns(self) -> tuple[str, ...]:
        """The columns every row must have."""
        return tuple(name for name in (self.messages, self.prompt, self.target, self.system) if name)


# In order of preference: UltraChat's and UltraFeedback's rows hold a bare `prompt` beside the full `messages`.
SHAPES = (
    Shape(messages="messages"),
    Shape(messages="conversations"),  # ShareGPT
    Shape(messages="real"),  # SPIN; its `generated` is not used
    Shape(prompt="prompt", target="completion"),
    Shape(prompt="question", target="answer"),
    Shape(prompt="instruction", target="output", extra="input"),  # Alpaca
)


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


def read_conversations(data: DataConfig, path: str | None = None) -> Iterator[Conversation]:
    """Stream a source's rows as conversations, in the order of the source.

    `path` is read in place of `data.path` (for `data.heldout_path`), and then whole: `data.limit` is for `data.path`.
    A folder's files are read in sorted order, sub-folders included: all of its files, whatever split their names speak of.
    The row shape is `data.columns` where given, otherwise found from the first row and the same for all rows.

    Raises:
        DataError: when the source is missing, empty or of an unknown shape, or at a malformed row: names the file, the row
            (and the line), the field, what was found and what is expected.
        ConfigError: when `data.columns` names neither `messages` nor both `prompt` and `target`.
    """
    source = data.path if path is None else path
    shape = _shape_of_columns(data.columns)
    records = _read_source(source, data)
    row = -1
    for row, record in enumerate(records if path is not None else islice(records, data.limit)):
        place = record.place(row)
        fields = _fields(record, place)
        shape = shape or _find_shape(fields, data.columns, place)
        yield _conversation(fields, shape, row, place)
    if row < 0:
        raise DataError(f"{source}: holds no rows; expected at least one conversation")


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a local file or folder, not a hub's `name` or `owner/name`.

    >>> looks_like_path("data/train.jsonl"), looks_like_path("./data"), looks_like_path("openai/gsm8k")
    (True, True, False)
    """
    return name.lower().endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)


def shorten(value: object, length: int = 60) -> str:
    """A value's repr on one line, cut to `length` characters.

    >>> shorten("a" * 100, 8)
    "'aaaaaaa…"
    """
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


# Files.


def _read_source(source: str, data: DataConfig) -> Iterator[_Record]:
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED_BY_DATASETS):
            return _read_saved(path, data.split)
        return _read_folder(path)
    if looks_like_path(source):
        raise DataError(f"{source}: no such file or folder; expected SFT data in {', '.join(SUFFIXES)} or a folder of them")
    return _read_hub(source, data)


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
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error


def _rows_of_batch(batch: Any, path: Path, start: int) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, rows {start} to {start + batch.num_rows - 1}: a text is not valid UTF-8: {error}") from error


def _read_saved(folder: Path, split: str) -> Iterator[_Record]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` lets through errors of Arrow, of JSON and of its own; all mean the same to the user
        raise DataError(f"{folder}: cannot be read as a folder saved by `datasets`: {one_line(error)}") from error
    if isinstance(saved, dict):
        if split not in saved:
            raise DataError(f"{folder}: data.split: found {split!r}, expected one of {', '.join(map(str, saved))}")
        saved = saved[split]
    return _records_of(saved, str(folder))


def _read_hub(name: str, data: DataConfig) -> Iterator[_Record]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, data.subset, split=data.split)
    except Exception as error:  # network, authentication, a missing subset or split: each its own type; the reason is passed on
        raise DataError(
            f"{name}: neither a local file or folder nor a data set the hub could give "
            f"(subset {data.subset or 'none'}, split {data.split}): {one_line(error)}"
        ) from error
    return _records_of(loaded, name)


def _records_of(rows: Iterable[Any], name: str) -> Iterator[_Record]:
    return (_Record(file=name, index=index, value=value) for index, value in enumerate(rows))


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


# Rows.


def _fields(record: _Record, place: str) -> Mapping[str, Any]:
    value = record.value
    if isinstance(value, bytes):
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{value[error.start]:02x} at position {error.start}"
            raise DataError(f"{place}: not valid UTF-8: found {found}; expected a UTF-8 file") from error
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: not valid JSON ({error}): found {shorten(text.strip())}, expected one object a line"
            ) from error
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: found {_kind(value)}, expected an object with named columns")
    return value


def _shape_of_columns(columns: ColumnsConfig) -> Shape | None:
    given = {name: column for name, column in columns.model_dump().items() if column is not None}
    if not given.keys() - {"system"}:
        return None
    if given.keys() - {"system"} not in ({"messages"}, {"prompt", "target"}):
        raise ConfigError(
            f"data.columns: found {', '.join(given)}; expected either messages, or prompt and target (and system with both)"
        )
    return Shape(**given)


def _find_shape(fields: Mapping[str, Any], columns: ColumnsConfig, place: str) -> Shape:
    for shape in SHAPES:
        if all(name in fields for name in shape.columns()):
            return Shape(**{**vars(shape), "system": columns.system})
    known = "; ".join(" + ".join(shape.columns()) for shape in SHAPES)
    raise DataError(
        f"{place}: unknown shape: found the columns {', '.join(map(str, fields)) or '(none)'}; known shapes are {known}. "
        "Say which columns hold what with data.columns.messages, or data.columns.prompt and data.columns.target"
    )


def _conversation(fields: Mapping[str, Any], shape: Shape, row: int, place: str) -> Conversation:
    for name in shape.columns():
        if name not in fields:
            raise DataError(f"{place}: {name}: missing; expected beside {', '.join(map(str, fields)) or '(no columns)'}")
    turns = _turns(fields, shape, place)
    source = shape.messages or shape.target
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None:
        raise DataError(f"{place}: {source}: found no assistant turn, expected one: the last is the target response")
    prompt, target = tuple(turns[:last]), turns[last].content
    if not prompt:
        raise DataError(f"{place}: {source}: found no turn before the target response, expected a prompt")
    if not any(turn.content.strip() for turn in prompt):
        raise DataError(f"{place}: {shape.messages or shape.prompt}: found an empty prompt, expected text")
    if not target.strip():
        raise DataError(f"{place}: {source}: found the target response {shorten(target)}, expected text")
    return Conversation(row=row, prompt=prompt, target=target)


def _turns(fields: Mapping[str, Any], shape: Shape, place: str) -> list[Message]:
    system = fields[shape.system] if shape.system else None
    turns = [] if system is None else _messages(system, "system", place, str(shape.system))
    if shape.messages:
        return turns + _messages(fields[shape.messages], None, place, shape.messages)
    prompt, target = str(shape.prompt), str(shape.target)
    asked = _messages(fields[prompt], "user", place, prompt)
    extra = fields.get(shape.extra) if shape.extra else None
    if extra:
        asked[-1:] = [Message(role=asked[-1].role, content=f"{asked[-1].content}\n{_text(extra, place, str(shape.extra))}")]
    answered = _messages(fields[target], "assistant", place, target)
    if not any(turn.role == "assistant" for turn in answered):
        raise DataError(f"{place}: {target}: found no assistant turn, expected one: the last is the target response")
    return turns + asked + answered


def _messages(value: Any, role: str | None, place: str, field: str) -> list[Message]:
    """The turns in a column: a list of messages or, where `role` says whose it would be, a string."""
    if role is not None and isinstance(value, str):
        return [Message(role=role, content=_text(value, place, field))]
    if not isinstance(value, list):
        expected = "a list of messages" if role is None else "a string or a list of messages"
        raise DataError(f"{place}: {field}: found {_kind(value)}, expected {expected}")
    if not value:
        raise DataError(f"{place}: {field}: found an empty list, expected messages")
    return [_message(item, place, f"{field}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, place: str, field: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{place}: {field}: found {_kind(item)}, expected {{role, content}} or {{from, value}}")
    speaker, text = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    for name in (speaker, text):
        if name not in item:
            raise DataError(f"{place}: {field}.{name}: missing; found {', '.join(map(str, item)) or 'an empty object'}")
    role = item[speaker]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{place}: {field}.{speaker}: found {shorten(role)}, expected one of {', '.join(ROLES)}")
    return Message(role=ROLES[role], content=_text(item[text], place, f"{field}.{text}"))


def _text(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {field}: found {_kind(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"the lone surrogate {value[error.start]!r} at character {error.start}"
        raise DataError(f"{place}: {field}: found {found}, expected text that can be written as UTF-8") from error
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)} {shorten(value)}"
