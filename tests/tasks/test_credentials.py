"""A token that merely lies in the environment goes to the hub that it belongs to, and nowhere else."""

from __future__ import annotations

import pytest
from prefect.blocks.system import Secret
from pydantic import SecretStr

from rollout.errors import BadInput
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


@pytest.mark.usefixtures("prefect_server")
def test_the_block_counts_before_the_environment_which_does_where_there_is_no_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = {"name": "t", "project": "some-project", "region": "europe-west1", "bucket": "weights"}
    target = Target(**facts, hub_token_secret="credentials-of-a-pipeline")
    mirror = target.model_copy(update={"endpoints": Endpoints(hub="https://mirror.example.com")})
    with pytest.raises(BadInput, match="there is no Secret block 'credentials-of-a-pipeline'") as missing:
        hub_token(target)
    assert "HF_TOKEN" in str(missing.value)

    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    assert hub_token(target) == "hf_of_the_user"
    with pytest.raises(BadInput) as for_a_mirror:
        hub_token(mirror)
    assert "HF_TOKEN" not in str(for_a_mirror.value)

    Secret(value=SecretStr("hf_of_the_block")).save("credentials-of-a-pipeline")
    assert hub_token(target) == hub_token(mirror) == "hf_of_the_block"
