"""Questions to answer, from a file or from a run's held-out rows.

A file is JSONL, or a JSON list. Rows are those of AlpacaEval (`instruction`, perhaps `dataset`), of MT-Bench (`question_id`,
`category`, `turns`), or have `prompt` or `question` (a text) or `messages` (the last of which is the user's).
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpaw_ray.config import Config
from tpaw_ray.data.prompts import prompt_id
from tpaw_ray.data.rows import ROLES, Message, fields_of
from tpaw_ray.data.sources import read_conversations
from tpaw_ray.errors import DataError
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt
from tpaw_ray.wording import listed, one_line, shorten

LONGEST_ID = 1000
"""Characters of a question's id; MT-Bench's format reads digits as a number, of which Python takes no more than 4300."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a user says, turn by turn; each turn is asked when the one before was answered.

    Example: `Question(question_id="81", context=(), turns=("Write a haiku.", "Now in French."), category="writing")`.
    """

    question_id: str
    context: tuple[Message, ...] = ()
    """Turns that are given: a system message, an earlier exchange."""
    turns: tuple[str, ...]
    category: str = ""
    dataset: str = ""


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The questions of a file, its first `limit`.

    Raises:
        DataError: naming file, row and field, with what was found and what is expected.
    """
    questions = []
    for row, value in enumerate(_rows(Path(os.path.expanduser(path)))):
        if limit is not None and row == limit:
            break
        place = f"{path}, row {row}"
        questions.append(_question(fields_of(value, place), row, place))
    if not questions:
        raise DataError(f"{path}: holds no rows; expected at least one question")
    names = [question.question_id for question in questions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: question_id {shorten(twice)} stands in two rows; expected a name of its own for each")
    return questions


def heldout_questions(config: Config, store: RunStore, split: str, limit: int | None) -> list[Question]:
    """The held-out rows of a run as questions, in the order of its prompts; their texts are read from the run's data again.

    Raises:
        DataError: when the data cannot be read, or no longer holds a row that the run has held out.
    """
    wanted = [
        name
        for path in store.files(store.prompts(split))
        for name in store.read_columns(path, Prompt, "prompt_id")["prompt_id"].to_pylist()
    ][:limit]
    missing, found = set(wanted), {}
    for heldout in (True, False) if config.data.heldout_path else (False,):
        for conversation in read_conversations(config.data, heldout=heldout) if missing else ():
            name = prompt_id(conversation)
            if name in missing:
                missing.remove(name)
                *context, last = conversation.prompt
                found[name] = Question(question_id=name, context=tuple(context), turns=(last.content,), dataset=split)
    if missing:
        raise DataError(
            f"{config.data.path}: lacks {len(missing)} of the {len(wanted)} rows that {store.root} holds out for {split}; the "
            "data has changed since. Restore it, or give the questions in a file with --questions"
        )
    return [found[name] for name in wanted]


def _rows(path: Path) -> Iterator[Any]:
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        if content.lstrip().startswith(b"["):
            yield from json.loads(content.decode("utf-8"))
        else:
            yield from (line for line in content.split(b"\n") if line.strip())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; expected a file of questions") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({one_line(error)}); expected a list of questions, or one a line") from error


def _question(fields: Mapping[str, Any], row: int, place: str) -> Question:
    name = fields.get("question_id", row)
    if type(name) not in (str, int) or len(str(name)) > LONGEST_ID:
        raise DataError(
            f"{place}: question_id: found {shorten(name)}, expected a number or a text of at most {LONGEST_ID} characters"
        )
    _no_surrogate(str(name), place, "question_id")
    category, dataset = (fields.get(key) or "" for key in ("category", "dataset"))
    context, turns = _turns(fields, place)
    return Question(question_id=str(name), context=context, turns=turns, category=str(category), dataset=str(dataset))


def _turns(fields: Mapping[str, Any], place: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    if "turns" in fields:
        turns = fields["turns"]
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{place}: turns: found {shorten(turns)}, expected a list of texts")
        return (), tuple(_text(turn, place, f"turns[{index}]") for index, turn in enumerate(turns))
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{place}: messages: found {shorten(messages)}, expected a list of {{role, content}}")
        *context, last = (_message(one, place, f"messages[{index}]") for index, one in enumerate(messages))
        if last.role != "user":
            raise DataError(f"{place}: messages: the last is the {last.role}'s, expected the user's: it is what is answered")
        return tuple(context), (last.content,)
    for key in ("instruction", "prompt", "question"):
        if key in fields:
            extra = fields.get("input") if key == "instruction" else None
            text = _text(fields[key], place, key)
            return (), (f"{text}\n{_text(extra, place, 'input')}" if extra else text,)
    raise DataError(f"{place}: found the columns {listed(fields)}; expected instruction, turns, messages, prompt or question")


def _message(value: Any, place: str, field: str) -> Message:
    role = value.get("role") if isinstance(value, Mapping) else None
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{place}: {field}: found {shorten(value)}, expected {{role, content}} with one of {', '.join(ROLES)}")
    return Message(role=ROLES[role], content=_text(value.get("content"), place, f"{field}.content"))


def _text(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {field}: found {shorten(value)}, expected a text")
    _no_surrogate(value, place, field)
    return value


def _no_surrogate(value: str, place: str, field: str) -> None:
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"{place}: {field}: found a lone surrogate in {shorten(value)}, expected text that UTF-8 can hold")
