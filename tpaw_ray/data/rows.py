"""A row of the user's data as a conversation: which shapes are known, and what is said about a malformed row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tpaw_ray.config import ColumnsConfig
from tpaw_ray.errors import ConfigError, DataError
from tpaw_ray.wording import listed, one_line, shorten

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row of the source: the turns before the last assistant turn, and that turn's text. `rejected` is another response to the
    same prompt that given preferences hold the target against.

    Example: `Conversation(row=0, prompt=(Message(role="user", content="1+1?"),), target="2")`.
    """

    row: int
    prompt: tuple[Message, ...]
    target: str
    rejected: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which columns hold what: either `messages`, or `prompt` and `target`. `extra` is text that continues the prompt, `rejected`
    the response that is not preferred, alone or behind the prompt's turns."""

    messages: str | None = None
    prompt: str | None = None
    target: str | None = None
    system: str | None = None
    extra: str | None = None
    rejected: str | None = None

    def columns(self) -> tuple[str, ...]:
        """The columns every row must have."""
        return tuple(name for name in (self.messages, self.prompt, self.target, self.system, self.rejected) if name)


# In order of preference: UltraChat's and UltraFeedback's rows hold a bare `prompt` beside the full `messages`.
SHAPES = (
    Shape(messages="messages"),
    Shape(messages="conversations"),  # ShareGPT
    Shape(messages="real"),  # SPIN; its `generated` is not used
    Shape(prompt="prompt", target="completion"),
    Shape(prompt="question", target="answer"),
    Shape(prompt="instruction", target="output", extra="input"),  # Alpaca
    Shape(prompt="prompt", target="chosen"),
    Shape(messages="chosen"),
)
# Shapes of preference data, as in TRL. UltraFeedback's rows repeat the prompt in both responses.
PREFERENCES = (
    Shape(prompt="prompt", target="chosen", rejected="rejected"),
    Shape(messages="chosen", rejected="rejected"),
)


def fields_of(value: Any, place: str) -> Mapping[str, Any]:
    """The columns of a row, which may still be a line's bytes. Raises `DataError` where it is no object with named columns."""
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
                f"{place}: not valid JSON ({one_line(error)}): found {shorten(text.strip())}, expected one object a line"
            ) from error
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: found {_kind(value)}, expected an object with named columns")
    return value


def shape_of_columns(columns: ColumnsConfig, *, preferences: bool = False) -> Shape | None:
    """The shape that `data.columns` names, with the rejected response where `preferences` are given; None where it names no
    column of turns.

    Raises:
        ConfigError: when it names neither `messages` nor both `prompt` and `target`.
    """
    given = {name: column for name, column in columns.model_dump().items() if column is not None}
    rejected = given.pop("rejected", "rejected")
    if not given.keys() - {"system"}:
        return None
    if given.keys() - {"system"} not in ({"messages"}, {"prompt", "target"}):
        raise ConfigError(
            f"data.columns: found {', '.join(given)}; expected either messages, or prompt and target (and system with both)"
        )
    return Shape(**given, rejected=rejected if preferences else None)


def find_shape(fields: Mapping[str, Any], columns: ColumnsConfig, place: str, *, preferences: bool = False) -> Shape:
    """The first known shape whose columns a row has. Raises `DataError` with the columns found where there is none."""
    rejected = columns.rejected or "rejected"
    shapes = [replace(shape, rejected=rejected) for shape in PREFERENCES] if preferences else SHAPES
    for shape in shapes:
        if all(name in fields for name in shape.columns()):
            return replace(shape, system=columns.system)
    known = "; ".join(" + ".join(shape.columns()) for shape in shapes)
    raise DataError(
        f"{place}: unknown shape: found the columns {listed(fields)}; known shapes {'of preferences ' * preferences}are {known}. "
        "Say which columns hold what with data.columns.messages, or data.columns.prompt and data.columns.target"
        + (", and data.columns.rejected" if preferences else "")
    )


def conversation_of(fields: Mapping[str, Any], shape: Shape, row: int, place: str) -> Conversation:
    """A row as prompt turns and target: the last assistant turn is the target, what is before it the prompt.

    Raises:
        DataError: naming place and field, with what was found and what is expected.
    """
    for name in shape.columns():
        if name not in fields:
            raise DataError(f"{place}: {name}: missing; expected beside {listed(fields, '(no columns)')}")
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
    rejected = _rejected(fields, shape.rejected, prompt, place) if shape.rejected else None
    return Conversation(row=row, prompt=prompt, target=target, rejected=rejected)


def _rejected(fields: Mapping[str, Any], column: str, prompt: tuple[Message, ...], place: str) -> str:
    """The rejected response's text: a string, or the last turn of messages, which may repeat the prompt."""
    turns = _messages(fields[column], "assistant", place, column)
    if turns[-1].role != "assistant":
        raise DataError(f"{place}: {column}: found a last turn of the {turns[-1].role}, expected the assistant's")
    before = turns[:-1]
    if before and tuple(before) != prompt[len(prompt) - len(before) :]:
        raise DataError(f"{place}: {column}: its prompt differs from that of the chosen response; expected the same turns")
    if not turns[-1].content.strip():
        raise DataError(f"{place}: {column}: found the rejected response {shorten(turns[-1].content)}, expected text")
    return turns[-1].content


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
    if answered[: len(asked)] == asked:  # the whole conversation, which repeats the prompt
        return turns + answered
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
            raise DataError(f"{place}: {field}.{name}: missing; found {listed(item, 'an empty object')}")
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
