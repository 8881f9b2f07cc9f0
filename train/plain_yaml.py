"""YAML that holds values and nothing else: no objects, no aliases, no endless depth.

Aliases let a file of a kilobyte stand for gigabytes ("billion laughs"), and depth exhausts the stack of whoever walks
the result. Configurations need neither.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 32
MAX_CHARACTERS = 2**20


class _PlainLoader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*)")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def load_plain_yaml(text: str) -> Any:
    """The values of one YAML document.

    Raises:
        yaml.YAMLError: it is none, or holds what is not plain, or is longer than 2**20 characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, more than {MAX_CHARACTERS}")
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 — a safe loader, and narrower
    except (ValueError, OverflowError) as error:  # of a number or a date that cannot be
        raise yaml.YAMLError(str(error)) from error
