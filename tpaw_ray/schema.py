"""The columns of every table on disk, one frozen type each.

A table is written with `table_of(rows)` and read back with `rows_of(table, Type)`; the Arrow schema is derived from the
annotations, so that a column exists in exactly one place.
"""

from collections import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with its target response, rendered and tokenised once; these ids serve every later stage.

    Example: `Prompt(prompt_id="3f…", row=0, prompt_tokens=[1, 5], target_tokens=[7, 2], reference_answer="72")`.
    """

    prompt_id: str
    row: int
    """Row of the source, counted from 0."""
    prompt_tokens: Sequence[int]
    target_tokens: Sequence[int]
    """Ends with an end token."""
    reference_answer: str | None
    """The final answer found in the target; null where the data has none."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What an opponent said to a prompt. `finish_reason` is `stop` (an end token), `length`, or `set_aside`: without a response,
    because the prompt ended every engine it was given to."""

    prompt_id: str
    iteration: int
    opponent: int
    generated_tokens: Sequence[int]
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """Summed log-probability in nats of one response under one frozen player, end token included."""

    player: int
    response_id: str
    logp: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A checkpoint's greedy answer to a held-out prompt, judged. `correct` is null where there is no reference answer."""

    prompt_id: str
    generated_tokens: Sequence[int]
    text: str
    answer: str | None
    reference_answer: str | None
    correct: bool | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A triplet `(x, y, y_gen)` with its reference scores under every player, newest player first.

    `start_alpha` and `start_beta` are the weights at the start of the update, where the live policy is the newest player.
    In an update on targets alone, the generation and the lists of players are empty.
    """

    prompt_id: str
    iteration: int
    """Iteration in which `generated_tokens` was generated."""
    opponent: int
    prompt_tokens: Sequence[int]
    target_tokens: Sequence[int]
    generated_tokens: Sequence[int]
    players: Sequence[int]
    reference_target_logps: Sequence[float]
    reference_generated_logps: Sequence[float]
    start_alpha: Sequence[float]
    start_beta: Sequence[float]


_SCALARS = {str: pa.string(), int: pa.int32(), float: pa.float64(), bool: pa.bool_()}


def arrow_schema(row_type: type) -> pa.Schema:
    """The Arrow schema of a row type: `str | None` is nullable, `Sequence[int]` a list of int32.

    >>> arrow_schema(Score).names
    ['player', 'response_id', 'logp']
    """
    hints = get_type_hints(row_type)
    return pa.schema([_arrow_field(field.name, hints[field.name]) for field in fields(row_type)])


def table_of(rows: Iterable[Row], row_type: type[Row]) -> pa.Table:
    """Rows as an Arrow table with the type's schema, in the given order."""
    rows = list(rows)
    schema = arrow_schema(row_type)
    return pa.table(
        {name: pa.array([getattr(row, name) for row in rows], schema.field(name).type) for name in schema.names}, schema
    )


def rows_of(table: pa.Table, row_type: type[Row]) -> list[Row]:
    """The rows of a table, in order; extra columns are ignored, a missing one is a `KeyError` naming it."""
    columns = {name: table.column(name).to_pylist() for name in arrow_schema(row_type).names}
    return [row_type(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _arrow_field(name: str, hint: Any) -> pa.Field:
    if hint in _SCALARS:
        return pa.field(name, _SCALARS[hint], nullable=False)
    inner = get_args(hint)
    if get_origin(hint) is abc.Sequence:
        return pa.field(name, pa.list_(_SCALARS[inner[0]]), nullable=False)
    if len(inner) == 2 and inner[1] is type(None):
        return pa.field(name, _SCALARS[inner[0]])
    raise TypeError(f"column {name}: no Arrow type for {hint}")
