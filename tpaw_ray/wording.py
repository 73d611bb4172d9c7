"""Foreign text in what a person reads: text from data, files, models and libraries is shown, never obeyed by the terminal."""

import re
from collections.abc import Iterable

LOGIN = re.compile(r"://[^/@\s:]*(:[^@\s]*)?@")
"""User, password or token in an address: `://user:password@`. A password may hold a slash; `s3://bucket/a:b@c` has none."""


def visible(text: str) -> str:
    """Text in which every character that a terminal may obey instead of showing is written as its escape.

    That is all that Python's `repr` escapes: C0, DEL, C1, bidirectional and other format characters, lone surrogates. Only the
    newline stays, which our own messages use.

    >>> visible("a\\x1b[31mb\\n\\u202ec")
    'a\\\\x1b[31mb\\n\\\\u202ec'
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def shorten(value: object, length: int = 60) -> str:
    """A value's repr on one line, cut to `length` characters.

    >>> shorten("a" * 100, 8)
    "'aaaaaaa…"
    """
    if isinstance(value, str):
        value = value[: length + 1]
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # lists in lists without end; an integer of more digits than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= length else f"{text[:length]}…"


def listed(names: Iterable[object], none: str = "(none)") -> str:
    """Names, joined by commas; at most ten, each cut.

    >>> listed(range(12)), listed([])
    ('0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more', '(none)')
    """
    told = [visible(str(name)[:61]).replace("\n", "\\n") for name in names]
    cut = [name if len(name) <= 60 else f"{name[:60]}…" for name in told]
    more = f" and {len(cut) - 10} more" if len(cut) > 10 else ""
    return ", ".join(cut[:10]) + more or none


def one_line(error: BaseException) -> str:
    """An error's message on one line, without logins in addresses, cut to 300 characters; its type where it says nothing.

    >>> one_line(OSError("http://me:secret@host does not\\nanswer"))
    'http://…@host does not answer'
    """
    text = visible(LOGIN.sub("://…@", " ".join(str(error).split()))) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
