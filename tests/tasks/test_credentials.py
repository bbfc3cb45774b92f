"""A token that merely lies in the environment goes to the hub that it belongs to, and nowhere else."""

from __future__ import annotations

import pytest

from rollout.target import Endpoints, Target
from tasks.credentials import hub_token


@pytest.mark.parametrize(
    ("hub", "token"),
    [
        (None, "hf_of_the_user"),
        ("https://huggingface.co", "hf_of_the_user"),
        ("https://huggingface.co/", "hf_of_the_user"),
        ("http://huggingface.co", None),
        ("https://huggingface.co.example.com", None),
        ("https://mirror.example.com", None),
        ("http://127.0.0.1:8000", None),
    ],
)
def test_the_environments_token_goes_to_huggingface_co_only(
    hub: str | None, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    target = Target(
        name="t", project="some-project", region="europe-west1", bucket="weights", endpoints=Endpoints(hub=hub)
    )
    assert hub_token(target) == token
