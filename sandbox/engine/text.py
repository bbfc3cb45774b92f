"""What the simulated model says: the same answer for the same prompt, plausible, and as long as it is asked to be."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

RAYLEIGH = (
    "The sky is blue because of **Rayleigh scattering**. Sunlight looks white, but it holds all colors of the rainbow, "
    "and each color travels as a wave of its own length. The molecules of the air are far smaller than these waves, "
    "and scatter short waves much more strongly than long ones: blue light about four times as much as red. So blue "
    "light reaches your eyes from every part of the sky, while the rest passes almost straight through. Violet is "
    "scattered even more, but the sun sends less of it and our eyes are less sensitive to it. At sunset the light "
    "crosses much more air, the blue is scattered away, and orange and red are what remains."
)
RAYLEIGH_REASONING = (
    'The user asks "Why is the sky blue?". This is atmospheric scattering: explain Rayleigh scattering, say why '
    "shorter wavelengths scatter more, why the sky is not violet, and mention sunsets."
)
GENERAL = (
    "Here is a short answer. First, state what is known, and keep apart what was measured and what was assumed. "
    "Then change one thing at a time, and write down what happened. If the result differs from the expectation, "
    "look for the simplest explanation before a clever one. Finally, repeat the measurement, because a number that "
    "was seen once is an anecdote."
)
GENERAL_REASONING = "The user wants a direct answer. Restate the question, list the relevant facts, and conclude."
FILLER = (
    " Water runs downhill, and a river carries what the hills give it. A good map leaves out most of the land."
    " The tide comes in twice a day, and every boat rises with it. Old bridges stand because their weight holds them."
    " A clock needs a steady beat more than a strong spring. Bread rises slowly in a cold kitchen, and tastes better."
    " The road bends where the first traveller met a rock. Light from a distant star is older than the telescope."
)
"""What the answer goes on with when it must be longer than it naturally is (`ignore_eos`, `min_tokens`)."""

_CAPITALISED = re.compile(r"(?<![.!?] )(?<!^)\b[A-Z][a-z]+\b")
_INTEGER = re.compile(r"\b\d+\b")


def answer_for(question: str) -> str:
    """The natural answer to the last user message."""
    if re.search(r"\bsky\b.*\bblue\b", question, re.IGNORECASE | re.DOTALL):
        return RAYLEIGH
    return GENERAL


def reasoning_for(question: str) -> str:
    return RAYLEIGH_REASONING if answer_for(question) is RAYLEIGH else GENERAL_REASONING


def stable_number(text: str, seed: int) -> int:
    """The same number in every process for the same text and seed."""
    return zlib.crc32(text.encode(), seed & 0xFFFFFFFF)


def value_for(schema: dict[str, Any], question: str, *, root: dict[str, Any] | None = None) -> Any:
    """A value that `schema` (JSON Schema) accepts, with words and numbers of `question` where they fit.

    Knows types, enum, const, required and optional properties, items, minima, lengths, anyOf/oneOf, allOf and local
    references. NotImplementedError for a pattern: a wrong value would look like a broken engine.
    """
    root = root if root is not None else schema
    if "$ref" in schema:
        return value_for(_resolve(root, schema["$ref"]), question, root=root)
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return value_for(schema[key][0], question, root=root)
    if schema.get("allOf"):
        merged: dict[str, Any] = {}
        for part in schema["allOf"]:
            merged |= part
        return value_for(merged, question, root=root)
    if "pattern" in schema:
        raise NotImplementedError("JSON Schema `pattern` is not simulated")
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = next((each for each in kind if each != "null"), "null")
    return _value_of_type(kind, schema, question, root)


def _value_of_type(kind: str, schema: dict[str, Any], question: str, root: dict[str, Any]) -> Any:
    match kind:
        case "object":
            properties = schema.get("properties", {})
            return {name: value_for(each, question, root=root) for name, each in properties.items()}
        case "array":
            items = schema.get("items") or {"type": "string"}
            return [value_for(items, question, root=root) for _ in range(max(1, schema.get("minItems", 1)))]
        case "integer" | "number":
            found = _INTEGER.search(question)
            value = int(found[0]) if found else 1
            value = min(max(value, int(schema.get("minimum", value))), int(schema.get("maximum", value)))
            return value if kind == "integer" else float(value)
        case "boolean":
            return True
        case "null":
            return None
        case _:
            found = _CAPITALISED.search(question)
            text = found[0] if found else "example"
            return text.ljust(schema.get("minLength", 0), "e")[: schema.get("maxLength")]


def _resolve(root: dict[str, Any], reference: str) -> dict[str, Any]:
    if not reference.startswith("#/"):
        raise NotImplementedError(f"JSON Schema reference {reference!r} is not simulated")
    target: Any = root
    for part in reference[2:].split("/"):
        target = target[part]
    return dict(target)


def json_answer(schema: dict[str, Any], question: str) -> str:
    """A JSON document that `schema` accepts."""
    return json.dumps(value_for(schema, question), ensure_ascii=False)
