"""The three patch formats of the API server besides apply: JSON merge, strategic merge, JSON patch."""

from __future__ import annotations

import copy
from typing import Any

from sandbox.cluster import schema
from sandbox.cluster.errors import ApiError, bad_request


def merge(target: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386): maps merge, null deletes, everything else is replaced."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def strategic_merge(target: Any, patch: Any, node: schema.Node) -> Any:
    """Strategic merge: as `merge`, but lists with a merge key merge item by item; knows `$patch` directives."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if key.startswith("$"):
            _apply_directive(merged, key, value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = _strategic_value(merged.get(key), value, node, key)
    return merged


def _strategic_value(current: Any, value: Any, owner: schema.Node, key: str) -> Any:
    below = schema.child(owner, key)
    if isinstance(value, list):
        merge_key = schema.strategic_key(owner, key)
        if merge_key is not None:
            return _merge_lists(current or [], value, merge_key, schema.item(below))
        if schema.is_set(owner, key):
            return [*(current or []), *(each for each in value if each not in (current or []))]
        return copy.deepcopy(value)
    # Strategic merge goes into "atomic" structs (a LabelSelector) all the same: atomicity belongs to apply.
    if below.shape is schema.Shape.ATOMIC and isinstance(value, dict):
        return merge(current, value)
    return strategic_merge(current, value, below)


def _merge_lists(current: list[Any], patch: list[Any], key: str, node: schema.Node) -> list[Any]:
    if any(isinstance(each, dict) and each.get("$patch") == "replace" for each in patch):
        return [copy.deepcopy(each) for each in patch if each.get("$patch") != "replace"]
    result = list(current)
    for each in patch:
        if not isinstance(each, dict) or key not in each:
            raise bad_request(f"map: {each} does not contain declared merge key: {key}")
        place = next((index for index, old in enumerate(result) if old.get(key) == each[key]), None)
        if each.get("$patch") == "delete":
            if place is not None:
                del result[place]
        elif place is None:
            result.append(strategic_merge({}, each, node))
        else:
            result[place] = strategic_merge(result[place], each, node)
    return result


def _apply_directive(merged: dict[str, Any], key: str, value: Any) -> None:
    if key == "$retainKeys":
        for name in [name for name in merged if name not in value]:
            del merged[name]
    elif key.startswith("$deleteFromPrimitiveList/"):
        name = key.split("/", 1)[1]
        merged[name] = [each for each in merged.get(name, []) if each not in value]
    elif key.startswith("$setElementOrder/"):
        return  # kubectl's hint about the order of a merged list; the order has no meaning here
    else:
        raise bad_request(f"unknown strategic merge directive {key!r}")


def json_patch(target: Any, operations: Any) -> Any:
    """JSON patch (RFC 6902). A failing `test` or a missing path is 422, as the API server answers."""
    if not isinstance(operations, list):
        raise bad_request("json: cannot unmarshal object into Go value of type jsonpatch.Patch")
    document = {"": copy.deepcopy(target)}
    for operation in operations:
        try:
            _operate(document, operation)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            message = f"the server rejected our request due to an error in our request: {error}"
            raise ApiError(422, "Invalid", message, {}) from error
    return document[""]


def _operate(document: dict[str, Any], operation: dict[str, Any]) -> None:
    name, path = operation["op"], _tokens(operation["path"])
    if name == "add":
        _add(document, path, operation["value"])
    elif name == "remove":
        _remove(document, path)
    elif name == "replace":
        _remove(document, path)
        _add(document, path, operation["value"])
    elif name in {"move", "copy"}:
        source = _tokens(operation["from"])
        value = copy.deepcopy(_get(document, source))
        if name == "move":
            _remove(document, source)
        _add(document, path, value)
    elif name == "test":
        if _get(document, path) != operation["value"]:
            raise ValueError(f"testing value {operation['path']} failed")
    else:
        raise ValueError(f"Unexpected kind: {name}")


def _tokens(pointer: str) -> list[str]:
    """`/a/b~1c` -> ["", "a", "b/c"]; the leading empty token is the document itself."""
    if pointer and not pointer.startswith("/"):
        raise ValueError(f"a JSON pointer starts with '/': {pointer!r}")
    return [token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")]


def _get(document: Any, path: list[str]) -> Any:
    for token in path:
        document = document[int(token)] if isinstance(document, list) else document[token]
    return document


def _add(document: Any, path: list[str], value: Any) -> None:
    parent, last = _get(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        parent.insert(len(parent) if last == "-" else int(last), copy.deepcopy(value))
    else:
        parent[last] = copy.deepcopy(value)


def _remove(document: Any, path: list[str]) -> None:
    parent, last = _get(document, path[:-1]), path[-1]
    del parent[int(last) if isinstance(parent, list) else last]
