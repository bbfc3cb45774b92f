from __future__ import annotations

import json

import pytest

from rollout.clients.observe import has_chat_template
from rollout.serving import ServingSpec


@pytest.mark.parametrize(
    ("files", "arguments", "expected"),
    [
        ({}, (), False),
        ({"tokenizer_config.json": {}}, (), False),
        ({"tokenizer_config.json": {"chat_template": "{{ messages }}"}}, (), True),
        ({"tokenizer_config.json": []}, (), False),
        ({"chat_template.jinja": {}}, (), True),
        ({}, ("--chat-template=/templates/own.jinja",), True),
        ({}, ("--chat-template-content-format=openai",), False),
    ],
)
def test_a_chat_template_is_looked_for_where_vllm_looks(
    files: dict[str, object], arguments: tuple[str, ...], expected: bool
) -> None:
    contents = {name: json.dumps(each).encode() for name, each in files.items()}
    serving = ServingSpec(served_model_name="m", extra_args=arguments)
    assert has_chat_template(serving, contents, contents.get("tokenizer_config.json")) is expected
