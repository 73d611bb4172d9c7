"""JSON as plain data, and whether it has the shape that its reader needs: damage is told, not tripped over."""

import json
from typing import Any

from tpaw_ray.wording import one_line, shorten

DEPTH = 50
"""Lists and objects in one another; what we write needs half of it where a config is in it."""
DIGITS = 30
"""Of an integer; a larger one cannot be counted with."""
NUMBER = int | float
_ABSENT = object()


def parse_plain_json(text: str | bytes) -> Any:
    """The value a JSON document holds.

    Raises:
        ValueError: on one line, with what is wrong and where.
    """
    try:
        found = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise ValueError(one_line(error)) from error
    level = [found]
    for _ in range(DEPTH):
        parts = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for part in parts for one in part]
        if not level:
            return found
    raise ValueError(f"lists and objects stand more than {DEPTH} deep in one another")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def misfit(value: object, shape: Any, place: str = "") -> str:
    """Where a value is not of a shape, and what stands there; empty where it fits.

    A shape is a type, `[shape]` for a list, `{"key": shape}` for an object with these keys at least, and `{str: shape}` for an
    object of any keys.

    >>> misfit({"counts": {"rows": "x"}, "files": {}}, {"counts": {str: int}, "files": dict})
    "counts.rows: found 'x', expected int"
    >>> misfit({"counts": {}}, {"counts": {str: int}, "files": dict})
    'files: missing'
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    at = f"{place[1:100]}: " if place else ""
    if value is _ABSENT:
        return f"{at}missing"
    if not isinstance(value, kind):
        return f"{at}found {shorten(value)}, expected {getattr(kind, '__name__', kind)}"
    inner: list[tuple[object, object, Any]] = []
    if isinstance(shape, list) and isinstance(value, list):
        inner = [(index, one, shape[0]) for index, one in enumerate(value)]
    elif isinstance(shape, dict) and isinstance(value, dict):
        inner = [(key, one, shape[str]) for key, one in value.items()] if str in shape else []
        inner += [(key, value.get(key, _ABSENT), one) for key, one in shape.items() if key is not str]
    return next((found for key, one, of in inner if (found := misfit(one, of, f"{place}.{key}"))), "")
