"""Fill the placeholders of plain YAML manifests.

A placeholder is a quoted `"{{ name }}"`. It is substituted *after* parsing, so a value can never change a document's
structure, and a placeholder that stands alone keeps its value's type: `replicas: "{{ replicas }}"` becomes a number,
`args: "{{ args }}"` a list. There are no loops and no conditions: what is optional is a file that the caller selects.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import yaml

from rollout.errors import BadInput

KubernetesObject = dict[str, Any]

_PLACEHOLDER = re.compile(r"\{\{\s*([a-z][a-z0-9_]*)\s*\}\}")
_BRACES = re.compile(r"\{\{.*?\}\}")


class RenderingFailed(BadInput):
    """A manifest and its values do not fit together; `where` names the file."""


def read_manifests(names: Iterable[str]) -> dict[str, str]:
    """The text of the project's own manifests, by file name, in the order given."""
    folder = resources.files("manifests")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def render(manifests: Mapping[str, str], values: Mapping[str, Any]) -> tuple[KubernetesObject, ...]:
    """Render the manifests (file name -> YAML text of one object each), in their order.

    Strict both ways: raises RenderingFailed for a placeholder without a value and for a value that no file uses.
    """
    used: set[str] = set()
    objects = tuple(_render_file(name, text, values, used) for name, text in manifests.items())
    unused = sorted(values.keys() - used)
    if unused:
        raise RenderingFailed(
            f"no file has a placeholder for {', '.join(map(repr, unused))}.",
            where=", ".join(manifests) or "no manifests",
            resolution=_nearest(unused[0], placeholders(manifests.values())),
        )
    return objects


def placeholders(texts: Iterable[str]) -> set[str]:
    """The names of all placeholders in the texts; comments do not count."""
    return {name for text in texts for leaf in _leaves(yaml.safe_load(text)) for name in _PLACEHOLDER.findall(leaf)}


def _render_file(file: str, text: str, values: Mapping[str, Any], used: set[str]) -> KubernetesObject:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RenderingFailed(
            f"not valid YAML, or more than one document: {error}.",
            where=file,
            resolution='One object per file; placeholders are quoted: "{{ name }}".',
        ) from error
    if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
        raise RenderingFailed("not a Kubernetes object.", where=file, resolution="It needs apiVersion, kind, metadata.")
    rendered = _substitute(document, file, values, used)
    assert isinstance(rendered, dict)
    return rendered


def _substitute(node: Any, file: str, values: Mapping[str, Any], used: set[str]) -> Any:
    if isinstance(node, dict):
        return {_text(key, file, values, used): _substitute(value, file, values, used) for key, value in node.items()}
    if isinstance(node, list):
        return [_substitute(item, file, values, used) for item in node]
    if not isinstance(node, str):
        return node
    alone = _PLACEHOLDER.fullmatch(node)
    if alone:
        # A copy: two objects must not share one mutable list.
        return copy.deepcopy(_value(alone[1], file, values, used))
    return _text(node, file, values, used)


def _text(text: Any, file: str, values: Mapping[str, Any], used: set[str]) -> Any:
    """Keys and texts with placeholders among other characters: only scalars make sense here."""
    if not isinstance(text, str):
        return text
    for braces in _BRACES.findall(text):
        if not _PLACEHOLDER.fullmatch(braces):
            raise RenderingFailed(
                f"{braces} is not a placeholder.", where=file, resolution="Names are lower case with underscores."
            )

    def replace(match: re.Match[str]) -> str:
        value = _value(match[1], file, values, used)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RenderingFailed(
                f"the value of {match[1]!r} is a {type(value).__name__} and cannot stand inside the text {text!r}.",
                where=file,
                resolution="Let the placeholder stand alone.",
            )
        return str(value)

    return _PLACEHOLDER.sub(replace, text)


def _value(name: str, file: str, values: Mapping[str, Any], used: set[str]) -> Any:
    used.add(name)
    try:
        return values[name]
    except KeyError:
        raise RenderingFailed(
            f"the placeholder {name!r} has no value.", where=file, resolution=_nearest(name, values)
        ) from None


def _nearest(name: str, known: Iterable[str]) -> str:
    candidates = sorted(known)
    match = difflib.get_close_matches(name, candidates, n=1)
    return f"Did you mean {match[0]!r}?" if match else f"Known names: {', '.join(candidates) or 'none'}."


def _leaves(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(key)
            yield from _leaves(value)
    elif isinstance(node, list):
        for item in node:
            yield from _leaves(item)
    elif isinstance(node, str):
        yield node
