from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollout.clients.hub import HubClient
from rollout.clients.observe import has_chat_template
from rollout.model import ModelRef
from rollout.serving import ServingSpec
from rollout.target import Endpoints, Target
from sandbox.hub import HubServer

REPO = "tests/base"


@pytest.mark.parametrize(
    ("files", "arguments", "expected"),
    [
        ({}, (), False),
        ({"tokenizer_config.json": {}}, (), False),
        ({"tokenizer_config.json": {"chat_template": "{{ messages }}"}}, (), True),
        ({"chat_template.jinja": {}}, (), True),
        ({}, ("--chat-template=/templates/own.jinja",), True),
        ({}, ("--chat-template-content-format=openai",), False),
    ],
)
def test_a_chat_template_is_looked_for_where_vllm_looks(
    tmp_path: Path, files: dict[str, dict[str, str]], arguments: tuple[str, ...], expected: bool
) -> None:
    with HubServer(root=tmp_path / "hub") as hub:
        published = {"config.json": {}, "model.safetensors": {}} | files
        hub.store.publish(REPO, {name: json.dumps(each).encode() for name, each in published.items()})
        target = Target(
            name="test",
            project="my-project",
            region="europe-west1",
            bucket="weights",
            endpoints=Endpoints(hub=hub.url),
        )
        model = HubClient(hub.url, None).pin(ModelRef(repo_id=REPO))
        serving = ServingSpec(served_model_name="m", extra_args=arguments)
        assert has_chat_template(model, serving, target, None) is expected
