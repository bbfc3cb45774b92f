"""What sizing needs of a model, from the hub's metadata and config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

from rollout.clients.hub_facts import facts_from_hub
from rollout.target import Endpoints, Target
from sandbox.hub import HubServer

CONFIG = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "num_attention_heads": 4}
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 1000,
    "model-00002-of-00002.safetensors": b"b" * 500,
}


def test_the_weights_are_counted_and_not_read(tmp_path: Path) -> None:
    with HubServer(root=tmp_path / "hub") as hub:
        hub.store.publish("org/model", FILES)
        target = Target(
            name="t", project="my-project", region="us-central1", bucket="abc", endpoints=Endpoints(hub=hub.url)
        )

        facts = facts_from_hub("org/model", target)

        sent = sum(each.bytes_sent for each in hub.requests if each.path.endswith(".safetensors"))
    assert (facts.weights_bytes, facts.config, facts.gated) == (1500, CONFIG, False)
    assert facts.source.startswith("http://127.0.0.1:")
    assert sent <= 1  # at most the byte that proves the right to read
