"""The final answer in a text, in one spelling, so that two answers can be compared as strings."""

import re
from decimal import Decimal

from tpaw_ray.errors import ConfigError

PATIENCE_S = 5
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


def final_answer(text: str, pattern: str) -> str | None:
    """The first group of the last match of `pattern` in `text`, normalised; None where nothing matches.

    Numbers lose commas, `$`, trailing dots and needless zeros. What is not a number keeps its commas, which may matter there,
    and loses only surrounding spaces and trailing dots.

    >>> final_answer("6 + 6 = 12\\n#### $1,072.50.", r"####\\s*(.*)")
    '1072.5'
    >>> final_answer("#### 72.0", r"####\\s*(.*)"), final_answer("#### Paris, France.", r"####\\s*(.*)")
    ('72', 'Paris, France')

    Raises:
        ConfigError: when the pattern takes longer than any sensible one: repetitions in one another may take for ever.
    """
    import regex

    try:
        matches = list(regex.finditer(pattern, text, timeout=PATIENCE_S))  # Python's own `re` knows no limit
    except TimeoutError as error:
        raise ConfigError(
            f"evaluation.answer_pattern: found {pattern!r}, which takes more than {PATIENCE_S} s on a text of {len(text)} "
            "characters; expected a pattern without repetitions in one another, as in (a+)+"
        ) from error
    return _normalise(matches[-1].group(1) or "") if matches else None


def _normalise(answer: str) -> str | None:
    answer = answer.strip().rstrip(".").strip()
    digits = "".join(answer.replace(",", "").replace("$", "").split())
    if not _NUMBER.fullmatch(digits):
        return answer or None
    # `format` and not `normalize()`: the latter rounds to 28 digits and writes 100 as 1E+2.
    number = format(Decimal(digits), "f")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return "0" if number == "-0" else number
