"""The transfer's Job: what its pods are told."""

from __future__ import annotations

import pytest

from rollout.errors import BadInput
from rollout.model import ModelFile, PinnedModel
from rollout.target import Target
from rollout.transfer import TransferSpec
from rollout.transfer_job import ShardRequest, shard_of, transfer_job_object

REQUEST = ShardRequest(
    pinned=PinnedModel(
        repo_id="org/model",
        revision="main",
        commit_sha="a" * 40,
        files=(ModelFile(path="model.safetensors", size_bytes=1, sha256="b" * 64),),
    ),
    target=Target(name="test", project="my-project", region="europe-west1", bucket="weights", namespace="models"),
    spec=TransferSpec(),
    shards=8,
)


def test_every_pod_gets_the_same_request_and_its_own_index() -> None:
    job = transfer_job_object(REQUEST, image="worker@sha256:0", writer_ksa="weights-writer", labels={"a": "b"})
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == (REQUEST.job_name, "models")
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 8, 8)
    pod = spec["template"]["spec"]
    assert pod["serviceAccountName"] == "weights-writer"
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert shard_of(environment | {"JOB_COMPLETION_INDEX": "7"}) == (REQUEST, 7)
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "640Mi"}


def test_the_token_is_named_and_never_written_into_the_job() -> None:
    job = transfer_job_object(REQUEST, image="worker", writer_ksa="writer", hub_token_secret="my-token", labels={})
    (token,) = [
        entry for entry in job["spec"]["template"]["spec"]["containers"][0]["env"] if entry["name"] == "HF_TOKEN"
    ]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "my-token", "key": "hf_api_token", "optional": True}
    assert "value" not in token


def test_the_same_work_has_the_same_name_and_other_work_another() -> None:
    assert REQUEST.job_name == REQUEST.model_copy().job_name
    assert REQUEST.job_name != REQUEST.model_copy(update={"shards": 4}).job_name


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "TRANSFER_REQUEST and JOB_COMPLETION_INDEX are not set"),
        ({"TRANSFER_REQUEST": REQUEST.model_dump_json(), "JOB_COMPLETION_INDEX": "8"}, "none of 8 shares"),
        ({"TRANSFER_REQUEST": REQUEST.model_dump_json(), "JOB_COMPLETION_INDEX": "-1"}, "none of 8 shares"),
    ],
)
def test_a_pod_outside_of_the_job_is_told_so(environment: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        shard_of(environment)
