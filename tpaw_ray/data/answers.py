"""The final answer in a text, in one spelling, so that two answers can be compared as strings."""

import re
from decimal import Decimal

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


def final_answer(text: str, pattern: str) -> str | None:
    """The first group of the last match of `pattern` in `text`, normalised; None where nothing matches.

    Numbers lose commas, `$`, trailing dots and needless zeros. What is not a number keeps its commas, which may matter there,
    and loses only surrounding spaces and trailing dots.

    >>> final_answer("6 + 6 = 12\\n#### $1,072.50.", r"####\\s*(.*)")
    '1072.5'
    >>> final_answer("#### 72.0", r"####\\s*(.*)"), final_answer("#### Paris, France.", r"####\\s*(.*)")
    ('72', 'Paris, France')
    """
    matches = list(re.finditer(pattern, text))
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
