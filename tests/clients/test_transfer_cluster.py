"""The transfer by pods: a Job in a real (small) cluster, from its start to the ready marker, and how it fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.clients.cluster import ClusterClient
from rollout.clients.transfer_cluster import publish_by_pods
from rollout.errors import TransferFailed
from rollout.objects import INSTANCE_LABEL
from rollout.report import StepStatus
from rollout.target import Cluster, ClusterMode, WeightsLayout
from rollout.transfer import Progress, TransferReport, TransferSpec
from rollout.transfer_job import ShardRequest, transfer_objects
from sandbox.cluster import KubernetesServer, NodeSettings
from sandbox.faults import Reply
from sandbox.hub import HubToken
from tests.clients.weights_place import MIB, SPEC, WeightsPlace, model_files, on_hub, start

BY_PODS = TransferSpec.model_validate(SPEC.model_dump() | {"pods": 3, "pod_image": "worker/llm-rollout:1"})
TOKEN = "hf_of_the_target"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with KubernetesServer(
        folder / "state",
        runners={"worker/": (sys.executable, "-m", "sandbox.worker")},
        nodes=NodeSettings(creation_s=0.0),
        image_pull_s=0.0,
    ) as server:
        kubeconfig = server.kubeconfig(folder / "kubeconfig")
        yield Cluster(mode=ClusterMode.KUBECONFIG, kubeconfig=str(kubeconfig))


@pytest.fixture
def place(tmp_path: Path, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[WeightsPlace]:
    """A private model and a bucket, with a namespace of its own in the cluster."""
    hub, storage = start(tmp_path, tokens={TOKEN: HubToken("me", private=frozenset({"org/model"}))})
    place = WeightsPlace(
        hub, storage, layout=WeightsLayout.CONTENT_ADDRESSED, files=model_files(shards=4, shard_bytes=6 * MIB)
    )
    hub.store.restrict("org/model", private=True)
    changes = {"cluster": cluster, "namespace": f"n{abs(hash(request.node.name)) % 10**8}"}
    place.target = place.target.model_copy(update=changes)
    yield place
    hub.stop()
    storage.stop()


def publish(place: WeightsPlace, spec: TransferSpec = BY_PODS, **more: Any) -> TransferReport:
    options: dict[str, Any] = {"token": TOKEN, "on_progress": lambda _: None, **more}
    return publish_by_pods(place.pin(TOKEN), place.target, spec, instance="server", rollout_id="r1", **options)


def left_behind(place: WeightsPlace) -> set[str]:
    found = ClusterClient.connect(place.target).inventory({INSTANCE_LABEL: "server"})
    return {each["kind"] for each in found}


def test_pods_share_the_files_and_leave_proven_weights_and_nothing_else(place: WeightsPlace) -> None:
    seen: list[Progress] = []
    told: list[str] = []
    report = publish(place, on_progress=seen.append, on_pods=told.append)
    pinned = place.pin(TOKEN)
    place.assert_published(pinned)
    assert [file.path for file in report.files] == [file.path for file in pinned.files]
    assert report.bytes_sent == report.total_bytes == pinned.total_bytes
    assert len({line.partition(":")[0] for line in told}) == 3, "one pod a share"
    assert seen[0].bytes_total == pinned.total_bytes
    assert left_behind(place) == set()
    again = publish(place)
    assert (again.status, again.bytes_sent) == (StepStatus.UNCHANGED, 0)


def test_a_share_that_fails_ends_the_job_with_its_last_words_and_a_rerun_sends_what_is_missing(
    place: WeightsPlace,
) -> None:
    place.hub.faults.add(on_hub(Reply(status=500), path="00002-of-00004"))
    spec = BY_PODS.model_copy(update={"attempts": 1})
    with pytest.raises(TransferFailed, match=r"MaxFailedIndexesExceeded: weights-\w+-\d-\w+ said: .*00002-of-00004"):
        publish(place, spec)
    place.hub.faults.clear()
    report = publish(place, spec)
    place.assert_published(place.pin(TOKEN))
    assert report.bytes_sent < report.total_bytes
    assert left_behind(place) == set()


def test_a_job_that_a_killed_run_left_at_work_is_gone_on_with(place: WeightsPlace) -> None:
    pinned = place.pin(TOKEN)
    request = ShardRequest(pinned=pinned, target=place.target, spec=BY_PODS, shards=3)
    objects = transfer_objects(request, instance="server", rollout_id="r1", token=TOKEN)
    ClusterClient.connect(place.target).apply(objects)
    report = publish(place)
    place.assert_published(pinned)
    assert report.bytes_sent == pinned.total_bytes, "nothing was sent twice"


def test_an_image_that_cannot_be_pulled_is_the_reason_that_is_told(place: WeightsPlace) -> None:
    spec = BY_PODS.model_copy(update={"pod_image": "example.com/no-such-image:1"})
    with pytest.raises(TransferFailed, match=r"(?s)the transfer does not start: .*no-such-image"):
        publish(place, spec)
    assert left_behind(place) == set()
