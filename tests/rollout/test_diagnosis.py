# ruff: noqa: E501  (messages are kept whole)
"""A table of real messages and what they mean.

Sources: logs of vLLM 0.32 and a Kubernetes 1.36 control plane; the tutorials' troubleshooting sections; the public issue
trackers of vLLM, Argo Workflows, huggingface/Google-Cloud-Containers, cluster-autoscaler, camunda.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rollout.diagnosis import (
    HEALED_AFTER_S,
    Category,
    FaultHistory,
    StartupObservation,
    diagnose,
    diagnose_client_error,
)
from rollout.serving import ServingSpec
from rollout.target import Cluster, ClusterMode, Target
from rollout.universe import Universe

URI = "gs://gemma-4-31b-it/google/gemma-4-31B-it/0123"
GSA = "gemma-gsa@my-project.s3ns.iam.gserviceaccount.com"
CONTEXT = StartupObservation(
    serving=ServingSpec(served_model_name="google/gemma-4-31B-it"),
    target=Target(
        name="here",
        project="my-project",
        region="u-france-east1",
        universe=Universe(domain="s3nsapis.fr"),
        gsa="gemma-gsa",
        ksa="gemma-ksa",
        bucket="gemma-4-31b-it",
        hub_token_secret="hf-token",
    ),
    repo_id="google/gemma-4-31B-it",
    weights_uri=URI,
    weights_bytes=100 * 2**30,
)


def crashed(log: str) -> StartupObservation:
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    status = {"containerStatuses": [{"restartCount": 1, "state": {"waiting": BACK_OFF}, "lastState": ended}]}
    return dataclasses.replace(CONTEXT, pods=[pod(status)], logs={"pod-1": log})


BACK_OFF = {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}


def pod(status: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "pod-1", "uid": "1"}, "status": status}


def waiting(reason: str, message: str) -> StartupObservation:
    state = {"state": {"waiting": {"reason": reason, "message": message}}}
    return dataclasses.replace(CONTEXT, pods=[pod({"containerStatuses": [state]})])


def event(reason: str, message: str, kind: str = "Pod", name: str = "pod-1") -> dict[str, Any]:
    return {"reason": reason, "message": message, "involvedObject": {"kind": kind, "name": name}}


def pending(*events: dict[str, Any]) -> StartupObservation:
    return dataclasses.replace(CONTEXT, pods=[pod({"phase": "Pending"})], events=events)


def refused(message: str) -> StartupObservation:
    return dataclasses.replace(CONTEXT, events=[event("FailedCreate", message, "ReplicaSet", "rs-1")])


def called(message: str) -> StartupObservation:
    return dataclasses.replace(CONTEXT, client_errors=[message])


STORAGE_403 = (
    "google.api_core.exceptions.Forbidden: 403 GET https://storage.s3nsapis.fr/storage/v1/b/gemma-4-31b-it/o/config.json:"
    " {} does not have storage.objects.get access to the Google Cloud Storage object. Permission 'storage.objects.get'"
    " denied on resource (or it may not exist)."
)
WARDEN = (
    'Error creating: admission webhook "warden-validating.common-webhooks.networking.gke.io" denied the request: GKE'
    ' Warden rejected the request because it violates one or more constraints.\nViolations details: {"[denied by'
    " autogke-pod-limit-constraints]\":[\"Total memory requested by containers for workload 'vllm' is higher than the"
    " Autopilot maximum of '74Gi'.\"]}"
)
PULL = 'Failed to pull image "{0}": rpc error: code = {1} desc = failed to pull and unpack image "{0}": {2}'

MESSAGES = [
    # vLLM's command line
    (
        Category.UNKNOWN_ARGUMENT,
        crashed("usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --max-modle-len=16384"),
        "Did you mean --max-model-len?",
    ),
    (
        Category.UNKNOWN_ARGUMENT,
        crashed("api_server.py: error: argument --load-format: invalid choice: 'runai' (choose from auto, pt)"),
        "Correct the value",
    ),
    (
        Category.UNKNOWN_ARGUMENT,
        crashed("KeyError: 'invalid tool call parser: gemma4 (chose from { hermes,mistral })'"),
        "serving.tool_call_parser",
    ),
    # The path of the model
    (
        Category.WRONG_MODEL_PATH,
        crashed(
            "huggingface_hub.errors.HFValidationError: Repo id must use alphanumeric chars or '-', '_', '.', '--' and '..'"
            " are forbidden, '-' and '.' cannot start or end the name, max length is 96: '/data'."
        ),
        f"The weights of this rollout are at {URI}",
    ),
    (
        Category.WRONG_MODEL_PATH,
        crashed(
            "huggingface_hub.errors.HFValidationError: Repo id must use alphanumeric chars, '-', '_' or '.'. The name"
            " cannot start or end with '-' or '.' and the maximum length is 96: '/data'."
        ),
        f"gcloud storage ls {URI}/config.json",
    ),
    (
        Category.WRONG_MODEL_PATH,
        crashed("  Value error, Invalid repository ID or local directory specified: '/models/noconfig'."),
        URI,
    ),
    (
        Category.WRONG_MODEL_PATH,
        crashed(
            "OSError: /data is not a local folder and is not a valid model identifier listed on"
            " 'https://huggingface.co/models'"
        ),
        URI,
    ),
    # The weights
    (
        Category.WEIGHTS_INCOMPLETE,
        crashed(
            "(Worker pid=1) ERROR FileNotFoundError: Weight files referenced in index but missing:"
            " {'/models/x/model-00003-of-00004.safetensors'}\nRuntimeError: Engine core initialization failed."
        ),
        "Publish them again",
    ),
    (
        Category.WEIGHTS_INCOMPLETE,
        crashed(
            "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file"
            " not fully covered"
        ),
        "Publish them again",
    ),
    (
        Category.UNSUPPORTED_MODEL,
        crashed(
            "ValueError: The checkpoint you are trying to load has model type `gemma4` but Transformers does not recognize"
            " this architecture."
        ),
        "serving.image",
    ),
    (
        Category.GATED_MODEL,
        crashed(
            "OSError: You are trying to access a gated repo.\nMake sure to have access to it at"
            " https://huggingface.co/google/gemma-4-31B-it.\n401 Client Error."
        ),
        "Accept the licence at https://huggingface.co/google/gemma-4-31B-it",
    ),
    (
        Category.GATED_MODEL,
        crashed(
            "Access to model google/gemma-4-31B-it is restricted. You must have access to it and be authenticated."
        ),
        "the Secret block 'hf-token'",
    ),
    # Identity and bucket
    (
        Category.BUCKET_FORBIDDEN,
        crashed(STORAGE_403.format(GSA)),
        f"gcloud storage buckets add-iam-policy-binding gs://gemma-4-31b-it --member=serviceAccount:{GSA}",
    ),
    (
        Category.BUCKET_FORBIDDEN,
        crashed(STORAGE_403.format("other@my-project.s3ns.iam.gserviceaccount.com")),
        f"iam.gke.io/gcp-service-account={GSA}",
    ),
    (Category.BUCKET_FORBIDDEN, crashed(STORAGE_403.format("Anonymous caller")), "no Google identity at all"),
    (
        Category.BUCKET_FORBIDDEN,
        crashed(STORAGE_403.format("Caller")),
        "roles/iam.workloadIdentityUser on gemma-gsa@my-project.s3ns.iam.gserviceaccount.com",
    ),
    (
        Category.IDENTITY_NOT_BOUND,
        crashed(
            'google.auth.exceptions.RefreshError: ("Failed to retrieve token from the Google Compute Engine metadata'
            " service. Status: 403 Response: Unable to generate access token; IAM returned 403 Forbidden: Permission"
            " 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist)."
        ),
        "--member='serviceAccount:my-project.s3ns.svc.id.goog[default/gemma-ksa]'",
    ),
    (
        Category.BUCKET_MISSING,
        crashed("google.api_core.exceptions.NotFound: 404 GET …: The specified bucket does not exist."),
        "gs://gemma-4-31b-it",
    ),
    # Memory
    (
        Category.CONTEXT_TOO_LONG,
        crashed(
            "  Value error, User-specified max_model_len (999999) is greater than the derived max_model_len"
            " (max_position_embeddings=8192.0 or model_max_length=None in model's config.json)."
        ),
        "at most 8192",
    ),
    (
        Category.KV_CACHE_TOO_SMALL,
        crashed(
            "ValueError: To serve at least one request with the models's max seq len (262144), (24.0 GiB KV cache is needed,"
            " which is larger than the available KV cache memory (3.18 GiB). Based on the available memory, the estimated"
            " maximum model length is 34736. Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when"
            " initializing the engine."
        ),
        "Set serving.max_model_len to 34736 or less (now 16384)",
    ),
    (
        Category.KV_CACHE_TOO_SMALL,
        crashed(
            "ValueError: The model's max seq len (4096) is larger than the maximum number of tokens that can be stored in KV"
            " cache (3664). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`"
        ),
        "Set serving.max_model_len to 3664 or less",
    ),
    (
        Category.KV_CACHE_TOO_SMALL,
        crashed(
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when"
            " initializing the engine."
        ),
        "serving.tensor_parallel_size to 2",
    ),
    (
        Category.GPU_OUT_OF_MEMORY,
        crashed(
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.10 GiB"
            " of which 512.00 MiB is free."
        ),
        "serving.accelerator.count and serving.tensor_parallel_size to 2",
    ),
    (
        Category.GPU_OUT_OF_MEMORY,
        crashed(
            "ValueError: Free memory on device cuda:0 (3.25/23.43 GiB) on startup is less than desired GPU memory"
            " utilization (0.96, 22.49 GiB)."
        ),
        "serving.gpu_memory_utilization",
    ),
    (
        Category.TOO_FEW_GPUS,
        crashed("RuntimeError: World size (2) is larger than the number of available GPUs (1) in this node."),
        "Set serving.accelerator.count to 2",
    ),
    (
        Category.GPU_DRIVER,
        crashed("RuntimeError: CUDA driver version is insufficient for CUDA runtime version"),
        "release_channel: rapid",
    ),
    (
        Category.OUT_OF_MEMORY,
        dataclasses.replace(
            CONTEXT,
            pods=[
                pod({"containerStatuses": [{"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]}),
            ],
        ),
        "Raise serving.resources.memory (now 80Gi)",
    ),
    (
        Category.EPHEMERAL_STORAGE,
        dataclasses.replace(
            CONTEXT,
            pods=[
                pod(
                    {
                        "phase": "Failed",
                        "reason": "Evicted",
                        "message": "The node was low on resource: ephemeral-storage. Threshold quantity: 10120387530,"
                        " available: 303108Ki. Container inference-server was using 92343412Ki, request is 0, has larger"
                        " consumption of ephemeral-storage. ",
                    }
                )
            ],
        ),
        "LOCAL_MODEL_DIR: /dev/shm/model",
    ),
    (
        Category.EPHEMERAL_STORAGE,
        pending(event("Evicted", "Pod ephemeral local storage usage exceeds the total limit of containers 80Gi.")),
        "boot_disk_gib: 250",
    ),
    (
        Category.STARTUP_PROBE,
        pending(
            event("Unhealthy", "Startup probe failed: dial tcp 10.0.0.1:8080: connect: connection refused"),
            event("Killing", "Container inference-server failed startup probe, will be restarted"),
        ),
        "Set serving.ready_timeout_s to 3600 (twice that",
    ),
    # Images
    (
        Category.IMAGE_NOT_FOUND,
        waiting(
            "ErrImagePull", PULL.format("vllm:1", "NotFound", 'failed to resolve reference "vllm:1": vllm:1: not found')
        ),
        "Correct serving.image",
    ),
    (
        Category.IMAGE_NOT_FOUND,
        waiting("InvalidImageName", 'Failed to apply default image tag "V:1": couldn\'t parse image reference'),
        "Correct serving.image",
    ),
    (
        Category.IMAGE_FORBIDDEN,
        waiting(
            "ErrImagePull",
            PULL.format(
                "us-docker.pkg.dev/p/r/i:1",
                "Unknown",
                "failed to authorize: failed to fetch oauth token: unexpected status from GET request to"
                " https://us-docker.pkg.dev/v2/token: 403 Forbidden",
            ),
        ),
        "roles/artifactregistry.reader",
    ),
    (
        Category.IMAGE_PULL,
        waiting("ErrImagePull", PULL.format("vllm:1", "Unknown", "dial tcp 1.2.3.4:443: i/o timeout")),
        "reach the registry",
    ),
    (
        Category.EXECUTABLE_MISSING,
        waiting(
            "RunContainerError",
            "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed:"
            ' unable to start container process: exec: "./entrypoint.sh": stat ./entrypoint.sh: no such file or directory',
        ),
        "serving.command",
    ),
    (
        Category.EXECUTABLE_MISSING,
        crashed("/usr/bin/python: No module named vllm.entrypoints.api_server"),
        "serving.entrypoint",
    ),
    (
        Category.EXECUTABLE_MISSING,
        crashed(
            "/opt/venv/bin/python3: Error while finding module specification for 'vllm.entrypoints.api_server'"
            " (ModuleNotFoundError: No module named 'vllm')"
        ),
        "serving.entrypoint",
    ),
    (
        Category.CONTAINER_CONFIG,
        waiting("CreateContainerConfigError", 'secret "vllm-hf-token" not found'),
        "A rerun applies it",
    ),
    # Pods that are refused
    (Category.AUTOPILOT_LIMIT, refused(WARDEN), "serving.resources"),
    (
        Category.POD_REFUSED,
        refused(
            'Error creating: pods "vllm-1" is forbidden: error looking up service account default/gemma-ksa: serviceaccount'
            ' "gemma-ksa" not found'
        ),
        "target.ksa",
    ),
    (
        Category.QUOTA_EXCEEDED,
        refused(
            'Error creating: pods "vllm-1" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used:'
            " requests.nvidia.com/gpu=4, limited: requests.nvidia.com/gpu=4"
        ),
        "target.namespace",
    ),
    # The node
    (
        Category.NODE_LOST,
        dataclasses.replace(
            CONTEXT,
            nodes=[
                {
                    "metadata": {"name": "gk3-node-1"},
                    "status": {
                        "conditions": [
                            {
                                "type": "Ready",
                                "status": "Unknown",
                                "reason": "NodeStatusUnknown",
                                "message": "Kubelet stopped posting node status.",
                            }
                        ]
                    },
                }
            ],
        ),
        "kubectl describe node",
    ),
    # Pods without a node
    (
        Category.NO_GPU_NODE,
        pending(
            event(
                "FailedScheduling",
                "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available: 3 No"
                " preemption victims found for incoming pod.",
            )
        ),
        "u-france-east1 offers a3-edgegpu-8g-nolssd",
    ),
    (
        Category.NO_GPU_NODE,
        pending(
            event("FailedScheduling", "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.")
        ),
        "node auto-creation",
    ),
    (
        Category.QUOTA_EXCEEDED,
        pending(
            event("FailedScheduling", "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."),
            event("TriggeredScaleUp", "pod triggered scale-up: [{https://…/gk3-nap-grp 0->1 (max: 1000)}]"),
            event(
                "FailedScaleUp",
                "Node scale up in zones us-central1-c associated with this pod failed: GCE quota exceeded. Pod is at risk of"
                " not being scheduled.",
            ),
        ),
        "console.cloud.s3nscloud.fr/iam-admin/quotas?project=my-project",
    ),
    (
        Category.STOCK_OUT,
        pending(
            event("TriggeredScaleUp", "pod triggered scale-up: [{https://…/gk3-nap-grp 0->1 (max: 1000)}]"),
            event(
                "FailedScaleUp",
                "Node scale up in zones us-west1-b associated with this pod failed: GCE out of resources. Pod is at risk of"
                " not being scheduled.",
            ),
        ),
        "no a3-edgegpu-8g-nolssd free in u-france-east1",
    ),
    (
        Category.UNTOLERATED_TAINT,
        pending(
            event(
                "FailedScheduling",
                "0/9 nodes are available: 9 node(s) had untolerated taint {dedicated: training}. preemption: not helpful.",
            )
        ),
        "tolerates nvidia.com/gpu by itself",
    ),
    (
        Category.UNTOLERATED_TAINT,
        pending(
            event(
                "NotTriggerScaleUp",
                "pod didn't trigger scale-up: 1 node(s) had taint {k: v}, that the pod didn't tolerate",
            )
        ),
        "Remove the taint",
    ),
    (
        Category.COMPUTE_CLASS_MISSING,
        refused(
            "Error creating: admission webhook denied the request: When requesting 'nvidia.com/gpu' resources, you must"
            " specify either node selector 'cloud.google.com/gke-accelerator' with accelerator type or node selector"
            " 'cloud.google.com/compute-class' with existing custom compute class which has at least one GPU priority rule."
        ),
        "Apply the ComputeClass a3-edgegpu-8g-nolssd",
    ),
    (
        Category.COMPUTE_CLASS_MISSING,
        dataclasses.replace(
            pending(
                event(
                    "FailedScheduling", "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."
                )
            ),
            missing_compute_class="a3-edgegpu-8g-nolssd",
        ),
        "kubectl get computeclasses",
    ),
    (
        Category.UNSCHEDULABLE,
        dataclasses.replace(
            CONTEXT,
            pods=[
                pod(
                    {
                        "conditions": [
                            {
                                "type": "PodScheduled",
                                "status": "False",
                                "reason": "Unschedulable",
                                "message": "0/1 nodes are available: 1 node(s) were unschedulable. no new claims to"
                                " deallocate, preemption: 0/1 nodes are available: 1 Preemption is not helpful.",
                            }
                        ]
                    }
                )
            ],
        ),
        "serving.resources",
    ),
    # Our own calls
    (Category.SERVER_NOT_READY, called("curl: (52) Empty reply from server"), "`Application startup complete.`"),
    (Category.SERVER_NOT_READY, called("aiohttp.ServerDisconnectedError: Server disconnected"), "still be loading"),
    (
        Category.CONNECTION_REFUSED,
        called("curl: (7) Failed to connect to 127.0.0.1 port 8080 after 0 ms: Connection refused"),
        "port-forward",
    ),
    (
        Category.QUOTA_PROJECT,
        called(
            "PERMISSION_DENIED: Your application is authenticating by using local Application Default Credentials. The"
            " gkerecommender.googleapis.com API requires a quota project, which is not set by default."
        ),
        "gcloud config set billing/quota_project my-project",
    ),
    # Anything else
    (
        Category.CRASH_LOOP,
        crashed("INFO starting\nTraceback (most recent call last):\nZeroDivisionError: division by zero"),
        "Read the log",
    ),
]


@pytest.mark.parametrize(("category", "observation", "advice"), MESSAGES)
def test_a_real_message_gets_its_diagnosis(category: Category, observation: StartupObservation, advice: str) -> None:
    diagnosis = diagnose(observation)
    assert diagnosis is not None
    assert diagnosis.category is category
    assert advice in diagnosis.resolution
    assert "{" not in diagnosis.summary
    assert diagnosis.detail


def test_every_category_has_a_message() -> None:
    assert {category for category, _, _ in MESSAGES} == set(Category)


def test_the_detail_quotes_the_line_and_says_where_it_was() -> None:
    diagnosis = diagnose(crashed("INFO one\napi_server.py: error: unrecognized arguments: --x=1\nINFO two"))
    assert diagnosis is not None
    assert diagnosis.detail == "log of pod-1: api_server.py: error: unrecognized arguments: --x=1"


def test_a_start_without_complaints_has_no_diagnosis() -> None:
    running = pod(
        {"phase": "Running", "containerStatuses": [{"state": {"running": {"startedAt": "2026-11-22T20:00:00Z"}}}]}
    )
    log = "INFO Starting to load model\nLoading safetensors checkpoint shards:  25% Completed | 1/4"
    assert diagnose(dataclasses.replace(CONTEXT, pods=[running], logs={"pod-1": log})) is None


def test_a_pod_that_waits_for_a_triggered_node_is_not_a_fault() -> None:
    scheduling = event("FailedScheduling", "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.")
    triggered = event("TriggeredScaleUp", "pod triggered scale-up: [{https://…/grp 0->1 (max: 1000)}]")
    assert diagnose(pending(scheduling, triggered)) is None
    assert diagnose(pending(scheduling, triggered, scheduling)) is None


def test_a_scale_up_that_is_tried_elsewhere_makes_the_failed_one_history() -> None:
    scheduling = event("FailedScheduling", "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.")
    triggered = event("TriggeredScaleUp", "pod triggered scale-up: [{https://…/grp-b 0->1 (max: 1000)}]")
    failed = event("FailedScaleUp", "Node scale up in zones us-west1-b failed: GCE quota exceeded.")
    diagnosis = diagnose(pending(scheduling, triggered, failed))
    assert diagnosis is not None
    assert diagnosis.category is Category.QUOTA_EXCEEDED
    assert diagnose(pending(scheduling, triggered, failed, triggered)) is None


def test_a_pod_that_found_its_node_is_no_longer_unschedulable() -> None:
    placed = pod({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]})
    scheduling = event("FailedScheduling", "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.")
    assert diagnose(dataclasses.replace(CONTEXT, pods=[placed], events=[scheduling])) is None


RUNNING = {"containerStatuses": [{"state": {"running": {"startedAt": "2026-11-22T20:00:00Z"}}}]}
RECORDED = Path(__file__).with_name("recordings") / "vllm-0.32-start.txt"
MISSING_EXTENSION = (
    'WARNING 11-22 20:09:55 [interface.py:221] Failed to import from vllm._C: ModuleNotFoundError("No module named'
    " 'vllm._C'\")"
)


def test_the_recorded_log_of_a_good_start_is_no_fault_at_any_moment() -> None:
    lines = [MISSING_EXTENSION, *RECORDED.read_text(encoding="utf-8").splitlines()]
    for count in range(1, len(lines) + 1):
        running = dataclasses.replace(CONTEXT, pods=[pod(RUNNING)], logs={"pod-1": "\n".join(lines[:count])})
        assert diagnose(running) is None


def test_a_module_that_vllm_warns_about_does_not_explain_a_crash() -> None:
    diagnosis = diagnose(crashed(f"{MISSING_EXTENSION}\nZeroDivisionError: division by zero"))
    assert diagnosis is not None
    assert diagnosis.category is Category.CRASH_LOOP


def test_what_a_running_container_logs_is_only_a_suspicion_until_it_ends() -> None:
    log = "RuntimeError: CUDA driver version is insufficient for CUDA runtime version"
    suspected = diagnose(dataclasses.replace(CONTEXT, pods=[pod(RUNNING)], logs={"pod-1": log}))
    proven = diagnose(crashed(log))
    assert suspected is not None
    assert proven is not None
    assert (suspected.category, suspected.suspected) == (Category.GPU_DRIVER, True)
    assert (proven.category, proven.suspected) == (Category.GPU_DRIVER, False)


def test_a_suspicion_does_not_hide_what_is_certain() -> None:
    other = {"metadata": {"name": "pod-2", "uid": "2"}, "status": {"phase": "Pending"}}
    observation = dataclasses.replace(
        CONTEXT,
        pods=[pod(RUNNING), other],
        logs={"pod-1": "CUDA out of memory"},
        events=[event("FailedScheduling", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", name="pod-2")],
    )
    diagnosis = diagnose(observation)
    assert diagnosis is not None
    assert diagnosis.category is Category.NO_GPU_NODE


PULL_FAILED = event("Failed", PULL.format("vllm:1", "Unknown", "dial tcp 1.2.3.4:443: i/o timeout"))
PULL_WAITS = event("BackOff", 'Back-off pulling image "vllm:1"')
PULLING = event("Pulling", 'Pulling image "vllm:1"')


def test_a_pull_under_way_is_not_judged_by_the_one_before() -> None:
    backing_off = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": PULL_FAILED["message"]}}}
    waits = pod({"phase": "Pending", "containerStatuses": [backing_off]})
    failed = dataclasses.replace(CONTEXT, pods=[waits], events=[PULLING, PULL_FAILED, PULL_WAITS])
    again = dataclasses.replace(failed, events=[*failed.events, PULLING])
    diagnosis = diagnose(failed)
    assert diagnosis is not None
    assert diagnosis.category is Category.IMAGE_PULL
    assert diagnose(again) is None
    assert diagnose(dataclasses.replace(again, events=[*again.events, PULL_FAILED])) is not None


def test_the_root_certificate_that_comes_a_moment_later_is_no_fault() -> None:
    failed = 'MountVolume.SetUp failed for volume "kube-api-access-x2k" : configmap "{}" not found'
    assert diagnose(pending(event("FailedMount", failed.format("kube-root-ca.crt")))) is None
    diagnosis = diagnose(pending(event("FailedMount", failed.format("settings"))))
    assert diagnosis is not None
    assert diagnosis.category is Category.CONTAINER_CONFIG


ENDED = {"state": {"waiting": BACK_OFF}, "lastState": {"terminated": {"exitCode": 0, "reason": "Completed"}}}


def test_a_server_that_ends_without_an_error_is_a_crash_loop_too() -> None:
    diagnosis = diagnose(dataclasses.replace(CONTEXT, pods=[pod({"containerStatuses": [ENDED]})]))
    assert diagnosis is not None
    assert diagnosis.category is Category.CRASH_LOOP
    assert "serving.entrypoint" in diagnosis.resolution


def test_jobs_and_init_containers_may_end_without_an_error() -> None:
    of_job = pod({"containerStatuses": [{"state": ENDED["lastState"]}]}) | {"spec": {"restartPolicy": "Never"}}
    prepared = pod({"initContainerStatuses": [{"state": ENDED["lastState"]}]})
    assert diagnose(dataclasses.replace(CONTEXT, pods=[of_job, prepared])) is None


def test_a_fault_lasts_from_its_first_sight_and_begins_anew_once_it_had_healed() -> None:
    history = FaultHistory()
    assert history.note(Category.IMAGE_PULL, 10.0) == 0.0
    assert history.note(Category.STOCK_OUT, 20.0) == 0.0
    assert history.note(Category.IMAGE_PULL, 10.0 + HEALED_AFTER_S) == HEALED_AFTER_S
    assert history.note(Category.IMAGE_PULL, 400.0) == 0.0
    assert history.note(Category.IMAGE_PULL, 430.0) == 30.0


def test_a_crash_that_a_restart_may_have_healed_is_not_reported_while_it_runs() -> None:
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    running = pod({"containerStatuses": [{"restartCount": 1, "state": {"running": {}}, "lastState": ended}]})
    assert diagnose(dataclasses.replace(CONTEXT, pods=[running])) is None


def test_the_cause_in_the_log_comes_before_the_crash_that_it_made() -> None:
    observation = dataclasses.replace(
        crashed("torch.OutOfMemoryError: CUDA out of memory."),
        events=[event("BackOff", "Back-off restarting failed container inference-server in pod pod-1")],
    )
    diagnosis = diagnose(observation)
    assert diagnosis is not None
    assert diagnosis.category is Category.GPU_OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("cluster", "advice"),
    [
        (Cluster(mode=ClusterMode.STANDARD, node_pool={"max_nodes": 3}), "beyond max_nodes=3"),
        (Cluster(mode=ClusterMode.KUBECONFIG), "nothing creates nodes there"),
    ],
)
def test_the_advice_for_a_missing_gpu_fits_the_kind_of_cluster(cluster: Cluster, advice: str) -> None:
    assert CONTEXT.target is not None
    observation = dataclasses.replace(
        pending(event("FailedScheduling", "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")),
        target=CONTEXT.target.model_copy(update={"cluster": cluster}),
    )
    diagnosis = diagnose(observation)
    assert diagnosis is not None
    assert advice in diagnosis.resolution


def test_a_diagnosis_needs_no_plan() -> None:
    for category, observation, _ in MESSAGES:
        bare = dataclasses.replace(observation, serving=None, target=None, repo_id="", weights_uri="", weights_bytes=0)
        diagnosis = diagnose(bare)
        assert diagnosis is not None
        assert diagnosis.category is category
        assert diagnosis.resolution


def test_an_error_of_our_own_call_is_explained_with_the_plan_at_hand() -> None:
    diagnosis = diagnose_client_error("Connection refused", CONTEXT)
    assert diagnosis is not None
    assert diagnosis.category is Category.CONNECTION_REFUSED
    assert diagnose_client_error("all is well") is None


def test_faults_that_cannot_heal_get_no_patience() -> None:
    for category, observation, _ in MESSAGES:
        diagnosis = diagnose(observation)
        assert diagnosis is not None
        if category in (Category.WRONG_MODEL_PATH, Category.GPU_OUT_OF_MEMORY, Category.AUTOPILOT_LIMIT):
            assert diagnosis.patience_s == 0
        if category in (Category.BUCKET_FORBIDDEN, Category.STOCK_OUT):
            assert diagnosis.patience_s >= 300
