"""A secret goes to whom it belongs, and to nobody else."""

from __future__ import annotations

import pytest

from rollout.target import Endpoints, Target
from tasks.credentials import hub_token

TARGET = Target(name="paris", project="my-project", region="europe-west9", bucket="my-bucket")


@pytest.mark.parametrize(
    ("hub", "sent"),
    [
        (None, "hf_mine"),
        ("https://huggingface.co", "hf_mine"),
        ("http://huggingface.co", None),
        ("https://huggingface.co.example.com", None),
        ("https://mirror.example.com", None),
        ("http://127.0.0.1:8080", None),
    ],
)
def test_the_environments_token_goes_to_hugging_face_alone(
    monkeypatch: pytest.MonkeyPatch, hub: str | None, sent: str | None
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert hub_token(TARGET.model_copy(update={"endpoints": Endpoints(hub=hub)})) == sent
