"""Credentials have no place in a config, which is copied into the run's folder and printed: they belong to the environment."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tpaw_ray.wording import LOGIN

_KEY = re.compile(
    r"(^|[_.-]|(?-i:(?<=[a-z])(?=[A-Z])))"  # a word's begin, in hfToken too
    r"(token|secret|passwd|password|authorization|credentials?|(api|access|private|secret)[_-]?key)$",
    re.IGNORECASE,
)
_SIGNED = re.compile(r"[?&][\w-]*(token|secret|password|signature|key)=", re.IGNORECASE)


def find_credentials(value: Any, key: str = "") -> str | None:
    """What in a tree of plain data looks like a credential, in words that do not repeat it; None where nothing does.

    >>> find_credentials({"opponents": {"engine_args": {"hf_token": "hf_abc"}}})
    'opponents.engine_args.hf_token: looks like a credential'
    >>> find_credentials({"data": {"path": "https://me:pw@host/x"}})
    'data.path: the address holds a password or token'
    >>> find_credentials({"max_new_tokens": 3, "root": "s3://bucket/a:b@c"})
    """
    if value and not isinstance(value, bool) and _KEY.search(key):
        return f"{key}: looks like a credential"
    if isinstance(value, Mapping):
        inner = [(f"{key}.{name}" if key else str(name), child) for name, child in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        inner = [(f"{key}.{index}", child) for index, child in enumerate(value)]
    elif isinstance(value, str) and "://" in value and (LOGIN.search(value) or _SIGNED.search(value)):
        return f"{key}: the address holds a password or token"
    else:
        return None
    return next((found for name, child in inner if (found := find_credentials(child, name))), None)
