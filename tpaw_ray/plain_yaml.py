"""YAML as plain data: text, numbers, true and false, null, lists and mappings by text. What else YAML can do is refused.

Anchors and aliases can make a small file huge, tags make other types, and a key that stands twice would silently win or lose.
"""

import re
from typing import Any

import yaml

from tpaw_ray.wording import one_line, shorten

DEPTH = 20
"""Lists and mappings in one another; a config needs four."""
_PLAIN = ("str", "int", "float", "bool", "null", "seq", "map")
_UNWRITABLE = re.compile(r"[^\t\n\r -~\xa0-\ud7ff\ue000-\U0010ffff]")
"""Control characters and lone surrogates: no name of a file, no text of a template holds them."""


def parse_plain_yaml(text: str | bytes) -> Any:
    """The value a YAML document holds.

    Raises:
        ValueError: on one line, with what is wrong and where.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(where + ", ".join(filter(None, (error.context, error.problem)))) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(one_line(error)) from error


class _PlainLoader(yaml.SafeLoader):
    """Besides what it refuses it reads dates as text, as the config has none."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refused(event.start_mark, "found an anchor or alias (& or *); write the value out at each place")
        self.depth += 1
        if self.depth > DEPTH:
            raise _refused(event.start_mark, f"lists and mappings stand more than {DEPTH} deep in one another")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in {f"tag:yaml.org,2002:{kind}" for kind in _PLAIN}:
            raise _refused(
                node.start_mark, f"found {shorten(node.tag)}; expected text, a number, true, false, null, a list or a mapping"
            )
        try:
            value = super().construct_object(node, deep=deep)
        except ValueError as error:  # a number of more digits than Python reads
            raise _refused(node.start_mark, one_line(error)) from error
        if isinstance(value, str) and (found := _UNWRITABLE.search(value)):
            raise _refused(node.start_mark, f"found the character {found[0]!r} in a text; expected text that can be printed")
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """PyYAML's hook for a mapping: keys are texts, and none stands twice."""
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refused(
                    key_node.start_mark, f"found {shorten(key)} as a key; expected text (in quotes where YAML reads another type)"
                )
            if key in lines:
                raise _refused(
                    key_node.start_mark, f"{shorten(key)} stands twice, first in line {lines[key]}; only one value can hold"
                )
            lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _refused(mark: yaml.Mark, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
