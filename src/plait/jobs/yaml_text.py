"""YAML as a person would write it: keys in their order, texts of several lines as blocks."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["documents"]


class _Dumper(yaml.SafeDumper):
    """Block style for what has lines, and lists indented under their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """No anchors: every place is written out."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def documents(*parts: tuple[str, dict[str, Any]]) -> str:
    """One YAML file of several (comment, document)."""
    texts = []
    for comment, data in parts:
        body = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
        texts.append(f"{comment}{body}")
    return "---\n".join(texts)
