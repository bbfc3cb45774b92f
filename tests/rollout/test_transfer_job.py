"""The transfer's Job: what its pods are told."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from rollout.errors import BadInput
from rollout.model import ModelFile, PinnedModel
from rollout.rendering import KubernetesObject
from rollout.target import Target
from rollout.transfer import TransferSpec
from rollout.transfer_job import ShardRequest, shard_of, transfer_objects

REQUEST = ShardRequest(
    pinned=PinnedModel(
        repo_id="org/model",
        revision="main",
        commit_sha="a" * 40,
        files=(ModelFile(path="model.safetensors", size_bytes=1, sha256="b" * 64),),
    ),
    target=Target(name="test", project="my-project", region="europe-west1", bucket="weights", namespace="models"),
    spec=TransferSpec(pods=8, pod_image="worker@sha256:0"),
    shards=8,
)


def by_kind(**more: Any) -> dict[str, KubernetesObject]:
    objects = transfer_objects(REQUEST, **{"instance": "server", "rollout_id": "r1", "token": None, **more})
    return {each["kind"]: each for each in objects}


def test_every_pod_gets_the_same_request_and_its_own_index() -> None:
    objects = by_kind()
    job, config = objects["Job"], objects["ConfigMap"]
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == (REQUEST.job_name, "models")
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 8, 8)
    pod = spec["template"]["spec"]
    assert pod["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"] == "weights-writer"
    (container,) = pod["containers"]
    assert container["image"] == "worker@sha256:0"
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "640Mi"}
    assert pod["volumes"] == [{"name": "request", "configMap": {"name": config["metadata"]["name"]}}]
    assert shard_of(config["data"]["request.json"], "7") == (REQUEST, 7)


def test_a_model_of_a_thousand_files_fits_into_what_kubernetes_allows() -> None:
    files = tuple(
        ModelFile(path=f"model-{index:05d}-of-01000.safetensors", size_bytes=4_300_000_000, sha256="b" * 64)
        for index in range(1000)
    )
    large = REQUEST.model_copy(update={"pinned": REQUEST.pinned.model_copy(update={"files": files})})
    objects = transfer_objects(large, instance="server", rollout_id="r1", token=None)
    config = next(each for each in objects if each["kind"] == "ConfigMap")
    assert len(config["data"]["request.json"]) < 2**20
    assert all(len(str(each)) < 2**17 for each in objects if each is not config)


def test_the_token_is_in_a_secret_and_never_in_the_job() -> None:
    objects = by_kind(token="hf_never_show_this")
    secret = objects["Secret"]
    (container,) = objects["Job"]["spec"]["template"]["spec"]["containers"]
    (token,) = [entry for entry in container["env"] if entry["name"] == "HF_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == {
        "name": secret["metadata"]["name"],
        "key": "hf_api_token",
        "optional": True,
    }
    assert base64.b64decode(secret["data"]["hf_api_token"]) == b"hf_never_show_this"
    assert "hf_never_show_this" not in str(objects["Job"]) + str(objects["ConfigMap"])
    assert "Secret" not in by_kind()


def test_the_same_work_has_the_same_name_and_other_work_another() -> None:
    assert REQUEST.job_name == REQUEST.model_copy().job_name
    assert REQUEST.job_name != REQUEST.model_copy(update={"shards": 4}).job_name


@pytest.mark.parametrize("index", ["8", "-1", "", None])
def test_an_index_outside_of_the_job_is_told_so(index: str | None) -> None:
    with pytest.raises(BadInput, match="none of 8 shares"):
        shard_of(REQUEST.model_dump_json(), index)


def test_pods_without_an_image_are_refused_with_the_spec() -> None:
    with pytest.raises(ValueError, match="pods=2 need pod_image"):
        TransferSpec(pods=2)
