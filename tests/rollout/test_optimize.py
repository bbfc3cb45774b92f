"""Optimised manifests: goldens, vLLM's own flags, a server-side dry run, and the choices behind them.

`REGENERATE_GOLDENS=1 pytest tests/rollout/test_optimize.py` writes the goldens anew.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from rollout.accelerators import ACCELERATORS, accelerator
from rollout.autoscaling import (
    CUSTOM_METRICS_API,
    Adapter,
    TargetUnreachable,
    autoscaling_for,
    check_metrics_adapter,
    scale_down_window_s,
)
from rollout.clients.cluster import ClusterClient
from rollout.clients.cluster_api import ClusterApi
from rollout.errors import BadInput
from rollout.fit import memory_fit, model_shape
from rollout.model_facts import MODELS, ModelFacts, known_model
from rollout.objects import removable
from rollout.optimize import (
    HF_SECRET,
    INFERENCE_EXTENSION_VERSION,
    VERSION_ANNOTATION,
    GeneratedManifests,
    ManifestRequest,
    Output,
    ServingStack,
    StorageBackend,
    ValidatedWith,
    apply_stages,
    check_gke_version,
    check_hub_secret,
    deployment_name,
    generate_manifests,
    scale_steps,
    server_version,
)
from rollout.preflight import CheckState
from rollout.profiles import Evidence, LoadPoint, Profile, Source, Targets
from rollout.report import Action
from rollout.sizing import FULL_CONTEXTS, size_serving
from rollout.target import Target
from rollout.universe import Universe
from rollout.vllm_flags import parse_arguments
from tests.engines import real_vllm_python
from tests.sandbox.cluster_support import REAL, api_server

GOLDENS = Path(__file__).parents[1] / "manifests" / "optimized"
DAY = date(2026, 11, 22)


def curve(model: str, chip: str, *, itl: bool = True) -> Profile:
    """Ten requests/s at saturation, 40 requests in flight there."""
    points = tuple(
        LoadPoint(
            requests_per_s=rate,
            output_tokens_per_s=rate * 100,
            ttft_ms=50 * (1 + rate / 10),
            ntpot_ms=20 * (1 + rate / 10),
            itl_ms=18 * (1 + rate / 10) if itl else None,
            running_requests=rate * 4,
        )
        for rate in (1.0, 5.0, 10.0)
    )
    source = Source(name="out/report.json", evidence=Evidence.MEASUREMENT, as_of=DAY)
    return Profile(model=model, accelerator=chip, points=points, source=source)


def generate(**fields: Any) -> GeneratedManifests:
    request = ManifestRequest(**fields)
    profile = curve(request.model, request.accelerator_type) if request.targets.given() else None
    return generate_manifests(request, known_model(request.model), on=DAY, profile=profile)


QWEN = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
GEMMA = "google/gemma-2-27b-it"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"

CASES: dict[str, dict[str, Any]] = {
    "basic": {"model": QWEN, "accelerator_type": "nvidia-tesla-a100"},
    "autoscaling-ntpot": {
        **{"model": GEMMA, "accelerator_type": "nvidia-l4", "model_server_version": "v0.7.2"},
        "targets": Targets(ntpot_ms=200),
    },
    "streamer": {
        **{"model": "openai/gpt-oss-120b", "accelerator_type": "nvidia-h100-80gb", "model_server_version": "v0.11.2"},
        **{"model_bucket_uri": "gs://my-bucket", "service_account": "llm-server", "accelerator_count": 2},
    },
    "fuse": {
        **{"model": GEMMA, "accelerator_type": "nvidia-l4", "model_server_version": "v0.7.2"},
        **{"model_bucket_uri": "gs://my-bucket/gemma/", "service_account": "llm-server"},
    },
    "tpu": {
        **{"model": LLAMA, "accelerator_type": "tpu-v6e-slice", "model_server_version": "v0.14.0"},
        **{"model_bucket_uri": "gs://my-bucket/llama", "service_account": "llm-server"},
    },
    "ram-cache": {"model": "meta-llama/Llama-3.3-70B-Instruct", "accelerator_type": "nvidia-h100-80gb"},
    "boot-disk": {
        **{"model": "meta-llama/Llama-3.3-70B-Instruct", "accelerator_type": "nvidia-h100-80gb"},
        "boot_disk_gib": 300,
    },
    "llm-d": {
        **{"model": "openai/gpt-oss-120b", "accelerator_type": "nvidia-h100-80gb"},
        **{"serving_stack": ServingStack.LLM_D, "targets": Targets(ttft_ms=80, itl_ms=30)},
    },
    "s3ns": {
        **{"model": "google/gemma-4-31B-it", "accelerator_type": "nvidia-h100-80gb", "namespace": "serving"},
        **{"universe": Universe(domain="s3nsapis.fr"), "project": "my-project", "project_number": "123456789012"},
        **{"model_bucket_uri": "gs://my-bucket/google/gemma-4-31B-it/main", "service_account": "gemma-ksa"},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_generated_manifests_equal_their_golden(case: str) -> None:
    golden = GOLDENS / f"{case}.yaml"
    text = generate(**CASES[case]).text()
    if os.environ.get("REGENERATE_GOLDENS"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_the_text_reads_back_as_the_objects(case: str) -> None:
    generated = generate(**CASES[case])

    for output in (Output.ALL, Output.MANIFEST):
        assert tuple(yaml.safe_load_all(generated.text(output))) == generated.objects
    assert list(yaml.safe_load_all(generated.text(Output.COMMENTS))) == []


def server_of(generated: GeneratedManifests) -> dict[str, Any]:
    (found,) = (
        each
        for each in generated.objects
        if each["kind"] == "Deployment" and each["metadata"]["name"] == generated.serving.name
    )
    return found


def container_of(generated: GeneratedManifests) -> dict[str, Any]:
    found: dict[str, Any] = server_of(generated)["spec"]["template"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chip", ACCELERATORS)
def test_every_known_model_fits_where_it_says_and_vllm_knows_the_flags(model: str, chip: str) -> None:
    if (model, chip) == ("meta-llama/Llama-3.3-70B-Instruct", "tpu-v5-lite-podslice"):
        with pytest.raises(BadInput, match="does not fit on 8 x tpu"):
            generate(model=model, accelerator_type=chip)
        return
    generated = generate(model=model, accelerator_type=chip)
    flags = parse_arguments(container_of(generated)["args"])
    serving, facts = generated.serving, known_model(model)
    shape = model_shape(facts.config)
    assert shape is not None
    fit = memory_fit(facts.weights_bytes, shape, serving, accelerator(chip))

    assert int(flags["tensor_parallel_size"]) == serving.accelerator.count
    assert int(flags["max_model_len"]) <= shape.max_position_embeddings
    assert fit.full_contexts >= FULL_CONTEXTS
    assert f"--max-model-len={fit.max_model_len}" in container_of(generated)["args"]
    assert fit.arithmetic() in generated.text(Output.COMMENTS)


PARSE = """
import contextlib, io, json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser(prog="api_server.py"))
refused = []
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(arguments)
    except SystemExit:
        refused.append([arguments, said.getvalue()[-500:]])
print("refused:", json.dumps(refused))
"""
"""Reads argument lists, and prints those that vLLM's own parser refuses."""


@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_vllms_own_parser_takes_every_argument() -> None:
    python = real_vllm_python()
    everything = [*CASES.values(), *({"model": model, "accelerator_type": "nvidia-b200"} for model in MODELS)]
    given = [container_of(generate(**case))["args"] for case in everything] + [["--no-such-flag"]]

    result = subprocess.run(
        [str(python), "-c", PARSE], input=json.dumps(given), capture_output=True, text=True, check=True
    )

    (line,) = (each for each in result.stdout.splitlines() if each.startswith("refused: "))
    # The last list shows that the parser does refuse.
    assert [arguments for arguments, _ in json.loads(line.removeprefix("refused: "))] == [["--no-such-flag"]]


# --- The API server's word --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[client.ApiClient]:
    """The real API server of `KUBECONFIG` or `KUBEBUILDER_ASSETS`, else the embedded one."""
    with api_server(tmp_path_factory.mktemp("cluster")) as connection:
        yield connection.api_client


@pytest.mark.parametrize("case", CASES)
def test_an_api_server_accepts_every_object(case: str, api: client.ApiClient) -> None:
    generated = generate(**CASES[case])
    namespace = generated.request.namespace
    core = client.CoreV1Api(api)
    if namespace not in {each.metadata.name for each in core.list_namespace().items}:
        core.create_namespace({"metadata": {"name": namespace}})
    target = Target(name="test", project="my-project", region="us-central1", bucket="my-bucket", namespace=namespace)

    # A bare API server has none of the definitions of GKE and of the inference extension.
    groups = {"", *(each.name for each in client.ApisApi(api).get_api_versions().groups)}
    served = [each for each in generated.objects if each["apiVersion"].rpartition("/")[0] in groups]
    assert "Deployment" in {each["kind"] for each in served}
    assert REAL or len(served) == len(generated.objects)

    preview = ClusterClient(ClusterApi(api), target).preview(served)

    assert len(preview.changes) == len(served)
    assert {change.action for change in preview.changes} == {Action.CREATED}


# --- Storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "version", "backend"),
    [
        ("nvidia-l4", "v0.11.1", StorageBackend.STREAMER),
        ("nvidia-l4", "v0.11.0", StorageBackend.FUSE),
        ("nvidia-l4", "0.32.0", StorageBackend.STREAMER),
        ("tpu-v6e-slice", "v0.14.0", StorageBackend.STREAMER),
        ("tpu-v6e-slice", "v0.13.9", StorageBackend.FUSE),
    ],
)
def test_the_fastest_way_that_the_version_knows_is_taken(chip: str, version: str, backend: StorageBackend) -> None:
    generated = generate(
        model=LLAMA, accelerator_type=chip, model_server_version=version, model_bucket_uri="gs://my-bucket/m"
    )
    args = container_of(generated)["args"]

    assert generated.storage is backend
    assert ("--load-format=runai_streamer" in args) == (backend is StorageBackend.STREAMER)
    assert f"--model={'gs://my-bucket/m' if backend is StorageBackend.STREAMER else '/data'}" in args


def test_the_iam_command_is_in_the_comments_and_as_data() -> None:
    generated = generate(**CASES["s3ns"])
    (grant,) = generated.grants

    assert grant.role == "roles/storage.objectViewer"
    assert grant.member.endswith(
        "/projects/123456789012/locations/global/workloadIdentityPools/my-project.s3ns.svc.id.goog"
        "/subject/ns/serving/sa/gemma-ksa"
    )
    assert f"# {grant.command}" in generated.text(Output.COMMENTS)


def test_tpus_share_a_cache_that_one_replica_writes_first() -> None:
    generated = generate(**CASES["tpu"])
    environment = {each["name"]: each.get("value") for each in container_of(generated)["env"]}

    assert environment["VLLM_XLA_CACHE_PATH"] == "/xla/xla-cache/llama"
    assert generated.grants[0].role == "roles/storage.objectUser"
    assert scale_steps(generated, 4) == (1, 4)
    assert scale_steps(generated, 1) == (1,)
    assert scale_steps(generated, 4, ready=2) == (2, 4)
    assert scale_steps(generated, 4, ready=6) == (4,)
    assert scale_steps(generate(**CASES["streamer"]), 4) == (4,)
    assert "remove VLLM_XLA_CACHE_PATH" in generated.text(Output.COMMENTS)
    assert container_of(generated)["resources"]["limits"]["google.com/tpu"] == "1"


def test_the_cache_lies_beside_the_weights_and_the_weights_stay_read_only() -> None:
    for version in ("v0.14.0", "v0.13.0"):  # streamed, and mounted
        pod = server_of(generate(**{**CASES["tpu"], "model_server_version": version}))["spec"]["template"]["spec"]
        mounts = {each["name"]: each for each in pod["containers"][0]["volumeMounts"]}

        assert (mounts["xla-cache"]["mountPath"], mounts["xla-cache"]["readOnly"]) == ("/xla", False)
        assert mounts.get("model", {"readOnly": True})["readOnly"]


def test_weights_at_the_root_of_a_bucket_have_no_place_for_a_cache_beside_them() -> None:
    generated = generate(**{**CASES["tpu"], "model_bucket_uri": "gs://my-bucket"})

    assert generated.scale_first_to is None
    assert generated.grants[0].role == "roles/storage.objectViewer"
    assert "VLLM_XLA_CACHE_PATH" not in {each["name"] for each in container_of(generated)["env"]}
    assert "at the root of their bucket" in generated.text(Output.COMMENTS)


def test_the_first_compilation_on_a_tpu_fits_into_every_deadline() -> None:
    generated = generate(**CASES["tpu"])
    probe, deadline_s = container_of(generated)["startupProbe"], server_of(generated)["spec"]["progressDeadlineSeconds"]
    thirty_minutes_s = 1800  # vLLM's TPU guide

    assert probe["failureThreshold"] * probe["periodSeconds"] > thirty_minutes_s
    # The node and the image come before the probe begins; the probe itself waits as long as the deadline.
    assert deadline_s > 600 + thirty_minutes_s + generated.serving.loading_s(
        known_model(generated.request.model).weights_bytes
    )
    assert probe["failureThreshold"] * probe["periodSeconds"] >= deadline_s
    assert f"--timeout={deadline_s}s" in generated.text(Output.COMMENTS)


def test_only_gpus_stream_in_shares() -> None:
    flag = '--model-loader-extra-config={"distributed": true}'

    assert flag in container_of(generate(**CASES["streamer"]))["args"]
    assert flag not in container_of(generate(**CASES["tpu"], accelerator_count=4))["args"]


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("1.29.6-gke.1254000", CheckState.OK),
        ("1.29.6-gke.1253999", CheckState.FAILED),
        ("1.29.5-gke.9999999", CheckState.FAILED),
        ("1.30.2-gke.1394000", CheckState.OK),
        ("1.30.1-gke.1394000", CheckState.FAILED),
        ("1.34.1-gke.1000", CheckState.OK),
        ("1.28.15-gke.2000000", CheckState.FAILED),
    ],
)
def test_gke_versions_that_cannot_load_from_cloud_storage_are_refused(version: str, state: CheckState) -> None:
    assert check_gke_version(version).state is state
    if state is CheckState.FAILED:
        with pytest.raises(BadInput, match="Upgrade to"):
            generate(**CASES["streamer"], gke_version=version)


def test_a_bucket_uri_must_name_a_bucket() -> None:
    with pytest.raises(ValueError, match="model_bucket_uri"):
        ManifestRequest(model=QWEN, accelerator_type="nvidia-l4", model_bucket_uri="/data")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def test_the_hub_token_comes_from_the_documented_secret() -> None:
    (token,) = (
        each for each in container_of(generate(**CASES["autoscaling-ntpot"]))["env"] if each["name"] == "HF_TOKEN"
    )

    assert token["valueFrom"]["secretKeyRef"] == {"name": HF_SECRET, "key": "hf_api_token", "optional": False}


def test_a_gated_model_without_its_secret_is_explained() -> None:
    gated, public = known_model(GEMMA), known_model(QWEN)

    assert "Does not have minimum availability" in generate(**CASES["autoscaling-ntpot"]).text()
    assert check_hub_secret(gated, exists=False).state is CheckState.FAILED
    assert check_hub_secret(gated, exists=True).state is CheckState.OK
    assert check_hub_secret(public, exists=False).state is CheckState.OK


def test_models_of_90_gib_are_cached_in_memory_or_on_a_larger_disk() -> None:
    in_memory, on_disk = generate(**CASES["ram-cache"]), generate(**CASES["boot-disk"])

    assert {"name": "HF_HOME", "value": "/dev/shm/hf_cache"} in container_of(in_memory)["env"]
    assert "HF_HOME" not in {each["name"] for each in container_of(on_disk)["env"]}
    (compute_class,) = (each for each in on_disk.objects if each["kind"] == "ComputeClass")
    assert compute_class["spec"]["priorities"][0]["storage"]["bootDiskSize"] == 300


def test_a_boot_disk_that_is_too_small_is_refused_before_the_eviction() -> None:
    with pytest.raises(BadInput, match="evicted"):
        generate(**{**CASES["boot-disk"], "boot_disk_gib": 100})


def test_a_memory_cache_must_fit_beside_the_server() -> None:
    large = ModelFacts(repo_id="org/large", weights_bytes=130 * 2**30, config=known_model(LLAMA).config)
    request = ManifestRequest(model="org/large", accelerator_type="nvidia-b200")
    too_large = large.model_copy(update={"weights_bytes": 275 * 2**30})

    assert {"name": "HF_HOME", "value": "/dev/shm/hf_cache"} in container_of(
        generate_manifests(request, large, on=DAY)
    )["env"]
    with pytest.raises(BadInput, match="--boot-disk-gib=325"):
        generate_manifests(request.model_copy(update={"accelerator_type": "nvidia-l4"}), too_large, on=DAY)


# --- Autoscaling ------------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_concurrency_at_the_target_less_the_buffer() -> None:
    # NTPOT 20·(1 + rate/10) reaches 30 ms at 5 requests/s, where 20 requests are in flight; 0.8 of them: 16.
    found = autoscaling_for(curve(QWEN, "nvidia-l4"), Targets(ntpot_ms=30), startup_s=400)

    assert found.threshold == 16
    assert found.scale_down_window_s == 800
    assert found.expected_output_tokens_per_s == pytest.approx(400)


def test_the_strictest_of_several_targets_decides() -> None:
    found = autoscaling_for(curve(QWEN, "nvidia-l4"), Targets(ntpot_ms=39, ttft_ms=60), startup_s=1)

    assert found.threshold == 6  # TTFT 60 ms at 2 requests/s: 8 in flight


def test_a_target_above_every_latency_means_maximum_throughput() -> None:
    found = autoscaling_for(curve(QWEN, "nvidia-l4"), Targets(ntpot_ms=5000), startup_s=1)

    assert found.threshold == 32
    assert any("maximum throughput" in reason for reason in found.reasons)


def test_a_target_below_every_latency_says_the_range() -> None:
    with pytest.raises(TargetUnreachable, match=r"NTPOT 22 to 40 ms"):
        autoscaling_for(curve(QWEN, "nvidia-l4"), Targets(ntpot_ms=10), startup_s=1)


def test_a_target_that_the_source_does_not_state_is_not_called_too_low() -> None:
    with pytest.raises(BadInput, match="does not state ITL") as refused:
        autoscaling_for(curve(QWEN, "nvidia-l4", itl=False), Targets(itl_ms=30, ttft_ms=90), startup_s=1)
    assert "NTPOT or TTFT" in str(refused.value)


def test_a_threshold_says_what_its_curve_was_measured_with() -> None:
    profile = curve(QWEN, "nvidia-l4").model_copy(
        update={"model_server_version": "v0.7.2", "use_case": "Deep Research"}
    )

    reason = autoscaling_for(profile, Targets(), startup_s=1).reasons[-1]

    assert reason == "From out/report.json, a measurement of 2026-11-22, with vllm v0.7.2, Deep Research."


def test_littles_law_stands_in_for_an_unmeasured_concurrency() -> None:
    profile = curve(QWEN, "nvidia-l4")
    points = tuple(point.model_copy(update={"running_requests": None}) for point in profile.points)

    found = autoscaling_for(profile.model_copy(update={"points": points}), Targets(), startup_s=1)

    assert found.threshold == 32  # 1000 tokens/s x 40 ms = 40 in flight


def test_the_autoscaler_owns_the_replicas_and_does_not_flap() -> None:
    generated = generate(**CASES["autoscaling-ntpot"])
    (hpa,) = (each for each in generated.objects if each["kind"] == "HorizontalPodAutoscaler")
    metric = hpa["spec"]["metrics"][0]["pods"]

    assert "replicas" not in server_of(generated)["spec"]
    assert metric["metric"]["name"] == "prometheus.googleapis.com|vllm:num_requests_running|gauge"
    assert metric["target"] == {"type": "AverageValue", "averageValue": "32"}
    assert hpa["spec"]["scaleTargetRef"]["name"] == generated.serving.name
    assert hpa["spec"]["behavior"]["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert hpa["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
    comments = generated.text(Output.COMMENTS)
    assert "custom-metrics-stackdriver-adapter" in comments
    assert "--role=roles/monitoring.viewer" in comments
    assert "/subject/ns/custom-metrics/sa/custom-metrics-stackdriver-adapter" in comments


def test_spare_replicas_and_a_wider_buffer_can_be_asked_for() -> None:
    generated = generate(**CASES["autoscaling-ntpot"], min_replicas=2)
    (hpa,) = (each for each in generated.objects if each["kind"] == "HorizontalPodAutoscaler")

    assert (hpa["spec"]["minReplicas"], hpa["spec"]["maxReplicas"]) == (2, 10)
    assert hpa["spec"]["metrics"][0]["pods"]["target"]["averageValue"] == "32"
    wider = generate(**CASES["autoscaling-ntpot"], utilisation=0.5).autoscaling
    assert wider is not None
    assert wider.threshold == 20  # half of the 40 in flight at saturation
    with pytest.raises(ValueError, match="min_replicas=11 is more than"):
        generate(**CASES["autoscaling-ntpot"], min_replicas=11)


def test_the_metric_is_named_as_the_adapter_names_it() -> None:
    generated = generate(**CASES["autoscaling-ntpot"], adapter=Adapter.PROMETHEUS)
    (hpa,) = (each for each in generated.objects if each["kind"] == "HorizontalPodAutoscaler")

    assert hpa["spec"]["metrics"][0]["pods"]["metric"]["name"] == "vllm:num_requests_running"


def test_a_cluster_without_the_adapter_is_told_how_to_get_it() -> None:
    assert check_metrics_adapter(["apps", CUSTOM_METRICS_API]).state is CheckState.OK
    missing = check_metrics_adapter(["apps"])
    assert missing.state is CheckState.FAILED
    assert "kubectl apply -f" in missing.resolution


def test_a_target_without_a_curve_is_refused() -> None:
    request = ManifestRequest(model=QWEN, accelerator_type="nvidia-l4", targets=Targets(ttft_ms=100))

    with pytest.raises(BadInput, match="benchmark first"):
        generate_manifests(request, known_model(QWEN), on=DAY)


@pytest.mark.parametrize(("startup_s", "window_s"), [(10, 300), (400, 800), (9000, 3600)])
def test_the_scale_down_window_is_two_starts_within_kubernetes_limits(startup_s: float, window_s: int) -> None:
    assert scale_down_window_s(startup_s) == window_s


# --- Stack, header, names ---------------------------------------------------------------------------------------------


def test_llm_d_routes_to_the_pods_through_the_picker() -> None:
    generated = generate(**CASES["llm-d"])
    objects = {(each["kind"], each["metadata"]["name"]): each for each in generated.objects}
    name = generated.serving.name
    pool, route = objects["InferencePool", name], objects["HTTPRoute", name]

    assert pool["spec"]["selector"]["matchLabels"] == server_of(generated)["spec"]["selector"]["matchLabels"]
    assert pool["spec"]["targetPorts"] == [{"number": 8000}]
    assert ("Service", pool["spec"]["endpointPickerRef"]["name"]) in objects
    assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == name
    assert ("Gateway", route["spec"]["parentRefs"][0]["name"]) in objects


def test_a_use_case_without_lengths_is_sized_at_the_floor_and_says_so() -> None:
    case = {**CASES["llm-d"], "use_case": "Multi Agent Large Document Summarization"}
    unstated, stated = generate(**case), generate(**case, input_length=30_000, output_length=1000)

    assert "not stated: sized for 2048 tokens a request" in unstated.text(Output.COMMENTS)
    assert "A request of 2048 tokens" in unstated.text(Output.COMMENTS)
    assert "not stated" not in stated.text(Output.COMMENTS)
    assert "A request of 31000 tokens" in stated.text(Output.COMMENTS)


def test_gke_asks_the_pods_of_llm_d_where_vllm_answers() -> None:
    generated = generate(**CASES["llm-d"])
    objects = {each["kind"]: each for each in generated.objects}
    policy = objects["HealthCheckPolicy"]["spec"]

    assert policy["targetRef"]["kind"] == "InferencePool"
    assert policy["targetRef"]["name"] == objects["InferencePool"]["metadata"]["name"]
    assert policy["default"]["config"]["httpHealthCheck"] == {"port": 8000, "requestPath": "/health"}


def test_the_picker_is_called_by_tls_and_has_the_version_of_its_definitions() -> None:
    generated = generate(**CASES["llm-d"])
    (service,) = (e for e in generated.objects if e["kind"] == "Service" and e["metadata"]["name"].endswith("-epp"))

    assert service["spec"]["ports"][0]["appProtocol"] == "http2"
    assert "releases/latest" not in generated.text()
    assert f"releases/download/{INFERENCE_EXTENSION_VERSION}/manifests.yaml" in generated.text(Output.COMMENTS)
    assert f"epp:{INFERENCE_EXTENSION_VERSION}" in generated.text(Output.MANIFEST)


def test_the_header_is_the_documented_one_in_comments_and_annotation() -> None:
    validated = ValidatedWith(
        cluster_version="1.34.1-gke.1829001", node_version="1.34.1-gke.1829001", gpu_driver_version="580.82.07"
    )
    generated = generate(**CASES["basic"], validated=validated)

    assert generated.header == (
        "Generated on 2026-11-22 using:",
        "GKE cluster 1.34.1-gke.1829001",
        "580.82.07 GPU driver for node version 1.34.1-gke.1829001",
        "Model server vllm v0.32.0",
    )
    assert generated.text(Output.MANIFEST).startswith("# Generated on 2026-11-22 using:\n# GKE cluster 1.34.1")
    for each in generated.objects:
        assert each["metadata"]["annotations"][VERSION_ANNOTATION] == "\n".join(generated.header)


@pytest.mark.parametrize("case", CASES)
def test_a_teardown_takes_what_is_the_models_own_and_leaves_what_others_use(case: str) -> None:
    generated = generate(**CASES[case])
    instance, namespace = generated.serving.name, generated.request.namespace
    other = generate(**(CASES["basic"] | {"namespace": namespace, "model": "openai/gpt-oss-20b"})).objects
    account = generated.request.service_account
    shared = [
        each for each in generated.objects if (each["kind"], each["metadata"]["name"]) == ("ServiceAccount", account)
    ]

    beside = removable([*generated.objects, *other], instance, [(namespace, "vllm-gpt-oss-20b")])
    alone = removable(generated.objects, instance)

    assert [each for each in generated.objects if each not in shared] == list(beside)
    assert list(alone) == list(generated.objects)
    assert removable(generated.objects, "vllm-another", [(namespace, instance)]) == ()


def test_an_autoscaler_comes_once_one_tpu_has_written_the_cache() -> None:
    generated = generate(**CASES["tpu"], targets=Targets(ttft_ms=80))

    alone, all_of_it = apply_stages(generated, 1)

    assert all_of_it == generated.objects
    assert [each for each in all_of_it if each not in alone] == [all_of_it[-1]]
    assert all_of_it[-1]["kind"] == "HorizontalPodAutoscaler"
    assert apply_stages(generated, 1, ready=1) == (generated.objects,)
    assert apply_stages(generate(**CASES["autoscaling-ntpot"]), 1) == (generate(**CASES["autoscaling-ntpot"]).objects,)


def test_what_is_stated_comes_before_what_was_seen_before_what_runs_now() -> None:
    stated = ValidatedWith(gpu_driver_version="580.82.07")
    now = ValidatedWith(cluster_version="1.35", node_version="1.34", gpu_driver_version="GKE's default")

    assert stated.or_else(ValidatedWith()).or_else(now) == now.model_copy(update={"gpu_driver_version": "580.82.07"})
    assert "not validated" not in "\n".join(generate(**CASES["basic"], validated=now).header)


def test_tpus_have_no_gpu_driver_in_the_header() -> None:
    assert not any("GPU driver" in line for line in generate(**CASES["tpu"]).header)


def test_the_service_listens_on_port_8000_under_the_deployments_name() -> None:
    generated = generate(**CASES["basic"])
    (service,) = (each for each in generated.objects if each["kind"] == "Service")

    assert service["metadata"]["name"] == server_of(generated)["metadata"]["name"]
    assert service["spec"]["ports"][0]["port"] == 8000


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("google/gemma-2-27b-it", "vllm-gemma-2-27b-it"),
        ("org/Some.Model_v1.5-" + "x" * 60, "vllm-some-model-v1-5-" + "x" * 31),
    ],
)
def test_names_are_dns_labels(model: str, name: str) -> None:
    assert deployment_name(model) == name


def test_a_tag_that_is_no_version_is_not_guessed_about() -> None:
    assert server_version("v0.11.2") == (0, 11, 2)
    assert server_version("0.14") == (0, 14, 0)
    with pytest.raises(BadInput, match="not a version"):
        server_version("gptoss")


def test_other_servers_are_googles_business() -> None:
    with pytest.raises(BadInput, match="--generator=google"):
        generate(model=QWEN, accelerator_type="nvidia-l4", model_server="tgi")


# --- Sizing -----------------------------------------------------------------------------------------------------------


def test_more_gpus_come_before_quantisation() -> None:
    plain = size_serving(known_model(GEMMA), accelerator("nvidia-l4"), tokens_per_request=2048)
    forced = size_serving(known_model(GEMMA), accelerator("nvidia-l4"), tokens_per_request=2048, count=2)

    assert (plain.accelerator_count, plain.extra_args) == (4, ())
    assert forced.extra_args == ("--quantization=fp8", "--kv-cache-dtype=fp8")


def small_gpu_sizing(config: dict[str, Any]) -> tuple[str, ...]:
    """Flags for 20 GiB of weights on one L4 with 24 GiB."""
    shape = {**known_model(LLAMA).config, **config}
    facts = ModelFacts(repo_id="my/own", weights_bytes=20 * 2**30, config=shape)
    return size_serving(facts, accelerator("nvidia-l4"), tokens_per_request=2048, count=1).extra_args


def test_a_quantised_checkpoint_is_not_quantised_again() -> None:
    assert "--quantization=fp8" in small_gpu_sizing({})
    awq = {"quantization_config": {"quant_method": "awq"}}
    for quantised in (awq, {"text_config": {**known_model(LLAMA).config, **awq}}):
        with pytest.raises(BadInput, match="does not fit"):
            small_gpu_sizing(quantised)


@pytest.mark.parametrize("model", ["openai/gpt-oss-20b", "openai/gpt-oss-120b"])
def test_gpt_oss_is_mxfp4_and_gets_no_fp8_cache(model: str) -> None:
    facts = known_model(model)

    assert facts.config["quantization_config"]["quant_method"] == "mxfp4"
    for chip in ACCELERATORS:
        args = container_of(generate(model=model, accelerator_type=chip))["args"]
        assert not [each for each in args if "fp8" in each]


def test_heads_must_be_divisible() -> None:
    with pytest.raises(BadInput, match="28 attention heads"):
        size_serving(known_model(QWEN), accelerator("nvidia-l4"), tokens_per_request=2048, count=8)


def test_what_fits_nowhere_shows_the_sum() -> None:
    huge = known_model(LLAMA).model_copy(update={"weights_bytes": 10**13})
    with pytest.raises(BadInput, match=r"usable − .* weights"):
        size_serving(huge, accelerator("nvidia-l4"), tokens_per_request=2048)


def test_longer_requests_than_the_context_are_refused() -> None:
    with pytest.raises(BadInput, match="exceed the model's context of 8192"):
        generate(model=GEMMA, accelerator_type="nvidia-h100-80gb", use_case="Advanced Customer Support")
