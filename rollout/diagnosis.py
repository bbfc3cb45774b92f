"""Why a model server does not start, or does not answer: pure functions from what was observed to a `Diagnosis`.

The texts are those of Kubernetes, GKE's autoscaler and admission webhook, containerd, vLLM, PyTorch, huggingface_hub
and Cloud Storage; `tests/rollout/test_diagnosis.py` holds a real message for every category.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rollout.serving import ServingSpec
from rollout.target import ClusterMode, IdentityMode, Target
from rollout.values import Value
from rollout.vllm_flags import nearest_flag


class Category(StrEnum):
    NO_GPU_NODE = "no GPU node"
    QUOTA_EXCEEDED = "quota exceeded"
    STOCK_OUT = "stock-out"
    AUTOPILOT_LIMIT = "Autopilot limit"
    UNTOLERATED_TAINT = "untolerated taint"
    COMPUTE_CLASS_MISSING = "compute class missing"
    UNSCHEDULABLE = "unschedulable"
    NODE_LOST = "node lost"
    POD_REFUSED = "pod refused"
    IMAGE_NOT_FOUND = "image not found"
    IMAGE_FORBIDDEN = "image forbidden"
    IMAGE_PULL = "image pull"
    EXECUTABLE_MISSING = "executable missing"
    CONTAINER_CONFIG = "container configuration"
    UNKNOWN_ARGUMENT = "unknown vLLM argument"
    WRONG_MODEL_PATH = "wrong model path"
    WEIGHTS_INCOMPLETE = "weights incomplete"
    UNSUPPORTED_MODEL = "unsupported model"
    GATED_MODEL = "gated model"
    BUCKET_MISSING = "bucket missing"
    BUCKET_FORBIDDEN = "bucket forbidden"
    IDENTITY_NOT_BOUND = "identity not bound"
    CONTEXT_TOO_LONG = "context too long"
    KV_CACHE_TOO_SMALL = "KV cache too small"
    GPU_OUT_OF_MEMORY = "GPU out of memory"
    TOO_FEW_GPUS = "too few GPUs"
    GPU_DRIVER = "GPU driver"
    OUT_OF_MEMORY = "out of memory"
    EPHEMERAL_STORAGE = "ephemeral storage"
    STARTUP_PROBE = "startup probe"
    CRASH_LOOP = "crash loop"
    SERVER_NOT_READY = "server not ready"
    CONNECTION_REFUSED = "connection refused"
    QUOTA_PROJECT = "quota project"


PATIENCE_S: Mapping[Category, float] = {
    # "Typically 2 minutes, potentially 7 or more": https://cloud.google.com/iam/docs/access-change-propagation
    Category.BUCKET_FORBIDDEN: 420.0,
    Category.IDENTITY_NOT_BOUND: 420.0,
    Category.IMAGE_FORBIDDEN: 120.0,
    # The autoscaler tries other zones and machine types; capacity comes and goes within minutes.
    Category.STOCK_OUT: 600.0,
    # Node auto-creation answers within a minute or two whether it will help.
    Category.NO_GPU_NODE: 300.0,
    Category.UNSCHEDULABLE: 300.0,
    Category.QUOTA_EXCEEDED: 120.0,
    Category.COMPUTE_CLASS_MISSING: 60.0,
    Category.UNTOLERATED_TAINT: 120.0,
    Category.POD_REFUSED: 60.0,
    # Kubernetes moves the pods of a silent node after 300 s, and GKE repairs it after about ten minutes.
    Category.NODE_LOST: 600.0,
    Category.CONTAINER_CONFIG: 60.0,
    # A registry that times out; kubelet backs off up to five minutes.
    Category.IMAGE_PULL: 300.0,
    # Two restarts' worth: kubelet's back-off is 10 s, then 20 s, then 40 s.
    Category.CRASH_LOOP: 60.0,
    Category.SERVER_NOT_READY: 600.0,
    Category.CONNECTION_REFUSED: 60.0,
}
"""Seconds that a fault may heal by itself; what is not listed never does, and ends a wait at once."""

HEALED_AFTER_S = 120.0
"""A fault that was not seen for so long has healed, and starts with its whole patience when it comes back. Longer than
what lies between two sightings of one that lasts: vLLM reads its weights about a minute after its start, and a pull
that times out takes 30 s. Shorter than the pull of a 15 GB image that goes well for minutes and then fails."""


class Diagnosis(Value):
    """What is wrong and what to do about it."""

    category: Category
    summary: str
    """One sentence for the headline."""
    detail: str
    """The message that shows it, and where it was seen."""
    resolution: str
    """What to change, in terms of the spec's fields or as a command."""
    suspected: bool = False
    """From the log of a container that still runs: vLLM warns in the words of failures, so only its end proves it."""

    @property
    def patience_s(self) -> float:
        """How long it may still heal by itself, in seconds."""
        return PATIENCE_S.get(self.category, 0.0)

    def as_text(self) -> str:
        return f"{self.summary} {self.resolution}\n{self.detail}"


@dataclass(frozen=True)
class StartupObservation:
    """What was seen of a model server that should start. Objects are as Kubernetes' API returns them."""

    pods: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Mapping[str, Any]] = ()
    """Events about these pods and what creates them, oldest first."""
    nodes: Sequence[Mapping[str, Any]] = ()
    """The nodes of pods that are not ready."""
    logs: Mapping[str, str] = field(default_factory=dict)
    """The tail of each pod's log: of the running container, or of the last one that ended."""
    client_errors: Sequence[str] = ()
    """What our own calls got: the endpoint's, or a Google API's."""
    serving: ServingSpec | None = None
    target: Target | None = None
    repo_id: str = ""
    weights_uri: str = ""
    """Where the weights are: the path that `--model` should have."""
    weights_bytes: int = 0
    missing_compute_class: str = ""
    """A ComputeClass that the pods select and that does not exist: no message of Kubernetes says so."""


class _Source(StrEnum):
    LOG = "log"
    POD = "pod"
    NODE = "node"
    EVENT = "event"
    CLIENT = "client"


@dataclass(frozen=True)
class _Evidence:
    source: _Source
    where: str
    text: str


_Advice = Callable[[re.Match[str], StartupObservation], str]


@dataclass(frozen=True)
class _Rule:
    category: Category
    sources: frozenset[_Source]
    pattern: re.Pattern[str]
    summary: str
    """May use the pattern's named groups: `{length}`."""
    advice: str | _Advice

    def match(self, evidence: _Evidence) -> re.Match[str] | None:
        return self.pattern.search(evidence.text) if evidence.source in self.sources else None

    def diagnose(self, match: re.Match[str], evidence: _Evidence, observation: StartupObservation) -> Diagnosis:
        advice = self.advice if isinstance(self.advice, str) else self.advice(match, observation)
        return Diagnosis(
            category=self.category,
            summary=self.summary.format_map({key: value or "?" for key, value in match.groupdict().items()}),
            detail=f"{evidence.where}: {_around(match)}",
            resolution=advice,
        )


class FaultHistory:
    """Since when each kind of fault lasts."""

    def __init__(self) -> None:
        self._first_seen_s: dict[Category, float] = {}
        self._last_seen_s: dict[Category, float] = {}

    def note(self, category: Category, now_s: float) -> float:
        """Take in that the fault is there at `now_s`, on any clock; returns for how many seconds it has lasted."""
        if now_s - self._last_seen_s.get(category, float("-inf")) > HEALED_AFTER_S:
            self._first_seen_s[category] = now_s
        self._last_seen_s[category] = now_s
        return now_s - self._first_seen_s[category]


def diagnose(observation: StartupObservation) -> Diagnosis | None:
    """The most telling explanation of what was observed, or None while nothing is wrong.

    Rules come in the order of the causes: a message in the log explains the crash that Kubernetes reports. What a
    container that still runs has logged is a suspicion, and comes last.
    """
    found = _by_rule(_evidence(observation), observation) or _crash_loop(observation)
    if found:
        return found
    suspected = _by_rule(_log_evidence(observation, of_running=True), observation)
    return suspected and suspected.model_copy(update={"suspected": True})


def _by_rule(items: Iterable[_Evidence], observation: StartupObservation) -> Diagnosis | None:
    evidence = list(items)
    for rule in _RULES:
        # The newest evidence speaks first.
        for item in reversed(evidence):
            match = rule.match(item)
            if match:
                return rule.diagnose(match, item, observation)
    return None


def diagnose_client_error(message: str, observation: StartupObservation | None = None) -> Diagnosis | None:
    """Explain what a call of ours got: from the endpoint (`Connection refused`) or from a Google API."""
    base = observation or StartupObservation()
    return diagnose(
        StartupObservation(client_errors=(message,), serving=base.serving, target=base.target, repo_id=base.repo_id)
    )


# --- Evidence -------------------------------------------------------------------------------------------------------


def _evidence(observation: StartupObservation) -> Iterator[_Evidence]:
    pods = {pod["metadata"]["name"]: pod for pod in observation.pods}
    for event in observation.events:
        if not _is_history(event, pods, observation.events):
            where = f"event on {_involved(event)}"
            yield _Evidence(_Source.EVENT, where, f"{event.get('reason')}: {event.get('message') or ''}")
    for pod in observation.pods:
        where = f"pod {pod['metadata']['name']}"
        for text in _pod_statements(pod, observation.events):
            yield _Evidence(_Source.POD, where, text)
    for node in observation.nodes:
        for text in _node_statements(node):
            yield _Evidence(_Source.NODE, f"node {node['metadata']['name']}", text)
    if observation.missing_compute_class:
        yield _Evidence(_Source.POD, "cluster", f"compute class {observation.missing_compute_class} does not exist")
    yield from _log_evidence(observation, of_running=False)
    for message in observation.client_errors:
        yield _Evidence(_Source.CLIENT, "our call", message)


def _log_evidence(observation: StartupObservation, *, of_running: bool) -> Iterator[_Evidence]:
    running = {pod["metadata"]["name"] for pod in observation.pods if _is_running(pod)}
    for name, log in observation.logs.items():
        if (name in running) == of_running:
            text = _complaints(log) if of_running else log
            yield _Evidence(_Source.LOG, f"log of {name}", text)


def is_complaint(line: str) -> bool:
    """Whether a line of a log may tell of a fault: worth a look, and no proof."""
    return _COMPLAINT.search(line) is not None


_COMPLAINT = re.compile(r"rror|Exception|Forbidden|denied|does not have|does not exist|restricted|gated")


def _complaints(log: str) -> str:
    """The lines that can be of interest while all is well: a long log is looked at after every line that comes."""
    return "\n".join(line for line in log.splitlines() if is_complaint(line))


def _is_running(pod: Mapping[str, Any]) -> bool:
    return any((container.get("state") or {}).get("running") for container in container_statuses(pod))


_PLACING = frozenset({"FailedScheduling", "NotTriggerScaleUp", "FailedScaleUp"})
_PREPARING = frozenset({"Failed", "BackOff", "FailedMount", "ErrImagePull", "InspectFailed"})
_PULLS = frozenset({"Pulling", "Pulled"})
_IMAGE_STATES = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError"})


def _is_history(
    event: Mapping[str, Any], pods: Mapping[str, Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether what the event complains about has been overcome: events stay for an hour after their cause."""
    reason, name = event.get("reason"), (event.get("involvedObject") or {}).get("name")
    pod = pods.get(str(name))
    if reason == "FailedCreate":
        return bool(pods)
    if pod is None:
        return False
    if reason in _PLACING:
        return _is_scheduled(pod) or _node_is_coming(str(name), events)
    if reason in _PREPARING:
        return _is_running(pod) or _is_pulled_anew(str(name), events)
    return False


def _is_pulled_anew(pod_name: str, events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether kubelet is pulling, or has pulled, since the last failure to prepare the pod: it tries again by itself.

    The container keeps the failure as its state until the pull has ended.
    """
    reasons = [event.get("reason") for event in events if (event.get("involvedObject") or {}).get("name") == pod_name]
    last = next((reason for reason in reversed(reasons) if reason in _PREPARING | _PULLS), None)
    return last in _PULLS


def _is_scheduled(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(condition["type"] == "PodScheduled" and condition["status"] == "True" for condition in conditions)


def _node_is_coming(pod_name: str, events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a scale-up was triggered that has not failed since; then waiting for a node is all there is to do."""
    coming = False
    for event in events:
        if (event.get("involvedObject") or {}).get("name") == pod_name:
            coming = (coming or event.get("reason") == "TriggeredScaleUp") and event.get("reason") != "FailedScaleUp"
    return coming


def _involved(event: Mapping[str, Any]) -> str:
    involved = event.get("involvedObject") or {}
    return f"{str(involved.get('kind', 'object')).lower()} {involved.get('name', '?')}"


def _pod_statements(pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The parts of a pod's status that can tell what is wrong, as lines of text."""
    status = pod.get("status") or {}
    if status.get("reason"):
        yield f"{status['reason']}: {status.get('message') or ''}"
    for condition in status.get("conditions") or []:
        unplaced = condition.get("type") == "PodScheduled" and condition.get("status") == "False"
        if unplaced and not _node_is_coming(pod["metadata"]["name"], events):
            yield f"{condition.get('reason')}: {condition.get('message') or ''}"
    pulled_anew = _is_pulled_anew(pod["metadata"]["name"], events)
    for container in container_statuses(pod):
        for state in _telling_states(container):
            if pulled_anew and state.get("reason") in _IMAGE_STATES:
                continue
            if state.get("reason") or state.get("message"):
                code = f" (exit code {state['exitCode']})" if "exitCode" in state else ""
                yield f"{state.get('reason')}{code}: {state.get('message') or ''}"


def _node_statements(node: Mapping[str, Any]) -> Iterator[str]:
    for condition in (node.get("status") or {}).get("conditions") or []:
        if condition["type"] == "Ready" and condition["status"] != "True":
            yield f"NotReady: {condition.get('reason')}: {condition.get('message') or ''}"


def _telling_states(container: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How the container is, and how it ended last unless it runs again: a restart may have healed it."""
    state = container.get("state") or {}
    ended = (container.get("lastState") or {}).get("terminated")
    if ended and (state.get("running") is None or ended.get("reason") == "OOMKilled"):
        yield ended
    yield from (value for value in state.values() if value)


def container_statuses(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Statuses of all containers of a pod; empty before the kubelet has it."""
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def restarts(pod: Mapping[str, Any]) -> int:
    return sum(int(container.get("restartCount") or 0) for container in container_statuses(pod))


def _around(match: re.Match[str], limit: int = 600) -> str:
    """The whole lines that the match touches, shortened in the middle of nothing but their ends."""
    text = match.string
    start = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.end())
    lines = text[start : end if end >= 0 else len(text)].strip()
    return lines if len(lines) <= limit else f"{lines[:limit]}…"


# --- Advice ---------------------------------------------------------------------------------------------------------


def _right_path(match: re.Match[str], observation: StartupObservation) -> str:
    if observation.weights_uri:
        return (
            f"The weights of this rollout are at {observation.weights_uri}: `--model` must be exactly that path, which"
            f" holds config.json. Remove other model paths from serving.extra_args and serving.env, check with"
            f" `gcloud storage ls {observation.weights_uri}/config.json`, and run again."
        )
    return (
        "Give the exact path that holds config.json and all weights. vLLM takes a path that it does not find for a"
        " Hugging Face repository, hence the misleading message."
    )


def _bucket_of(observation: StartupObservation) -> str:
    if observation.target:
        return f"gs://{observation.target.bucket}"
    uri = observation.weights_uri
    return "/".join(uri.split("/")[:3]) if uri.startswith("gs://") else "gs://BUCKET"


def _grant_reader(match: re.Match[str], observation: StartupObservation) -> str:
    caller, target = match["member"] or "", observation.target
    if target is None or target.cluster.mode is ClusterMode.KUBECONFIG:
        member = _as_member(caller) or "MEMBER"
    elif caller.lower().startswith("anonymous"):
        return (
            f"The pod has no Google identity at all: see that Workload Identity is enabled on the cluster, and that the"
            f" pod runs as the service account {target.ksa}."
        )
    elif target.identity is IdentityMode.DIRECT:
        principal = target.workload_identity_member.removeprefix("serviceAccount:")
        return (
            f"Missing is roles/storage.objectViewer on {_bucket_of(observation)} for the principal of {principal}. A"
            f" rerun adds it."
        )
    elif caller and caller != target.gsa_email:
        return _link_identity(f"{caller}, not {target.gsa_email}", target)
    elif not caller:
        return _link_identity(f"itself, not {target.gsa_email}", target)
    else:
        member = _as_member(caller)
    bucket, permission = _bucket_of(observation), match["permission"] or "storage.objects.get"
    return (
        f"Missing is the binding of {member} to roles/storage.objectViewer on {bucket} (it holds {permission}). A rerun"
        f" adds it, or: gcloud storage buckets add-iam-policy-binding {bucket} --member={shlex.quote(member)}"
        f" --role=roles/storage.objectViewer"
    )


def _as_member(caller: str) -> str:
    return f"serviceAccount:{caller}" if "@" in caller else caller


def _link_identity(who: str, target: Target) -> str:
    return (
        f"The pod acts as {who}. Two things make it: the annotation iam.gke.io/gcp-service-account={target.gsa_email}"
        f" on the service account {target.namespace}/{target.ksa}, and roles/iam.workloadIdentityUser on"
        f" {target.gsa_email} for {target.workload_identity_member}. A rerun sets both; then the pod must restart."
    )


def _bind_identity(_: re.Match[str], observation: StartupObservation) -> str:
    target = observation.target
    if target is None:
        return "Grant roles/iam.workloadIdentityUser on the Google service account to the Kubernetes service account."
    return (
        f"Missing is roles/iam.workloadIdentityUser on {target.gsa_email} for {target.workload_identity_member}. A"
        f" rerun adds it, or: gcloud iam service-accounts add-iam-policy-binding {target.gsa_email}"
        f" --role=roles/iam.workloadIdentityUser --member={shlex.quote(target.workload_identity_member)}"
        f" --project={target.project}"
    )


def _accept_licence(match: re.Match[str], observation: StartupObservation) -> str:
    repo = match.groupdict().get("repo") or observation.repo_id or "the model"
    block = observation.target.hub_token_secret if observation.target else None
    where = f"the Secret block {block!r}" if block else "target.hub_token_secret"
    return (
        f"Accept the licence at https://huggingface.co/{repo} with the account of the token in {where}, and see that"
        f" the token may read gated repositories; then run again."
    )


def _shorter_context(match: re.Match[str], observation: StartupObservation) -> str:
    found = match.groupdict()
    longest = found.get("estimate") or found.get("tokens")
    spec = observation.serving
    first = f"Set serving.max_model_len to {longest} or less" if longest else "Lower serving.max_model_len"
    now = f" (now {spec.max_model_len})" if spec and spec.max_model_len else ""
    utilization = ""
    if spec and spec.gpu_memory_utilization < 0.95:
        utilization = f", or raise serving.gpu_memory_utilization (now {spec.gpu_memory_utilization:g}) towards 0.95"
    return f"{first}{now}{utilization}, or {_more_gpus(spec)}."


def _more_gpus(spec: ServingSpec | None) -> str:
    if spec is None:
        return "spread the model over more GPUs"
    count = spec.tensor_parallel_size * 2
    if count > spec.accelerator.machine_gpu_count:
        return f"choose a GPU with more memory than {spec.accelerator.type} in serving.accelerator"
    return f"set serving.accelerator.count and serving.tensor_parallel_size to {count}"


def _fit_gpu(_: re.Match[str], observation: StartupObservation) -> str:
    spec = observation.serving
    if spec is None:
        return "Lower max_num_seqs or gpu_memory_utilization, or spread the model over more GPUs."
    size = f" The weights alone are {observation.weights_bytes / 1e9:.0f} GB." if observation.weights_bytes else ""
    return (
        f"Lower serving.max_num_seqs (now {spec.max_num_seqs}) or serving.gpu_memory_utilization (now"
        f" {spec.gpu_memory_utilization:g}), or {_more_gpus(spec)}.{size}"
    )


def _model_limit(match: re.Match[str], _: StartupObservation) -> str:
    return f"Set serving.max_model_len to at most {float(match['limit']):.0f}: that is the limit in its config.json."


def _correct_flag(match: re.Match[str], _: StartupObservation) -> str:
    flag = match["argument"].split()[0].partition("=")[0]
    nearest = nearest_flag(flag)
    meant = f" Did you mean {nearest}?" if nearest else ""
    return f"Correct or remove {flag} in serving.extra_args; the image's vLLM does not know it.{meant}"


def _bigger_disk(_: re.Match[str], observation: StartupObservation) -> str:
    size = f"{observation.weights_bytes / 2**30:.0f} GiB of weights" if observation.weights_bytes else "The weights"
    spec = observation.serving
    now = spec.accelerator.boot_disk_gib if spec else None
    variable = spec.cache_variable if spec else "HF_HOME"
    disk = max(200, round(observation.weights_bytes * 2.5 / 2**30 / 50) * 50)
    return (
        f"{size} do not fit on the node's boot disk ({now or 100} GiB, of which 90 % are usable). Either cache in RAM:"
        f" serving.env {{{variable}: /dev/shm/model}} with serving.resources.memory to match; or a larger boot disk:"
        f" serving.accelerator.boot_disk_gib: {disk} (Autopilot's ComputeClass) or"
        f" target.cluster.node_pool.boot_disk_gib: {disk} (Standard). Streaming with serving.load_format:"
        f" runai_streamer needs neither."
    )


def _more_memory(_: re.Match[str], observation: StartupObservation) -> str:
    spec = observation.serving
    now = f" (now {spec.resources.memory})" if spec else ""
    return (
        f"Raise serving.resources.memory{now}: the weights pass through RAM while they load, and /dev/shm counts too;"
        f" or stream them with serving.load_format: runai_streamer."
    )


def _longer_probe(_: re.Match[str], observation: StartupObservation) -> str:
    spec = observation.serving
    if spec is None or not observation.weights_bytes:
        return "Give the startup probe a higher failureThreshold: the model takes longer to load than it allows."
    budget_s = spec.startup_failure_threshold(observation.weights_bytes, period_s=1)
    return (
        f"Loading {observation.weights_bytes / 1e9:.1f} GB took longer than the probe's {budget_s} s. Set"
        f" serving.ready_timeout_s to {2 * budget_s} (twice that: the probe waits as long), or load faster:"
        f" serving.load_format: runai_streamer with vLLM's own image."
    )


def _gpu_place(_: re.Match[str], observation: StartupObservation) -> str:
    spec, target = observation.serving, observation.target
    if spec is None or target is None:
        return "Add nodes with the GPU that the pod asks for."
    what = f"{spec.accelerator.count} × {spec.accelerator.type}"
    if target.cluster.mode is ClusterMode.STANDARD and target.cluster.node_pool:
        pool = target.cluster.node_pool
        return (
            f"No node has {what} free, and the pool {pool.name} may not grow beyond max_nodes={pool.max_nodes}: raise"
            f" target.cluster.node_pool.max_nodes, or tear down a model that holds GPUs; with serving.strategy:"
            f" recreate an update needs no spare GPU."
        )
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return f"No node of the cluster has {what} free, and nothing creates nodes there: add one, or free one."
    return (
        f"Check that {target.region} offers {spec.accelerator.machine_type} (`gcloud compute accelerator-types list`),"
        f" and that node auto-creation is enabled for the ComputeClass {spec.accelerator.compute_class}."
    )


def _raise_quota(match: re.Match[str], observation: StartupObservation) -> str:
    target, spec = observation.target, observation.serving
    if target is None:
        return "Ask for more GPU quota in the region."
    gpu = spec.accelerator.type if spec else "GPU"
    return (
        f"Ask for quota of {gpu} in {target.region} at"
        f" {target.universe.console}/iam-admin/quotas?project={target.project} (per GPU"
        " model and for GPUS_ALL_REGIONS), or free GPUs; then run again."
    )


def _other_capacity(_: re.Match[str], observation: StartupObservation) -> str:
    spec, target = observation.serving, observation.target
    machine = spec.accelerator.machine_type if spec else "this machine type"
    region = target.region if target else "the region"
    return (
        f"Google has no {machine} free in {region} right now. Run again later, take another serving.accelerator or"
        f" target.region, or reserve capacity (https://cloud.google.com/compute/docs/instances/reservations-overview)."
    )


def _compute_class_advice(_: re.Match[str], observation: StartupObservation) -> str:
    name = observation.serving.accelerator.compute_class if observation.serving else None
    return (
        f"Apply the ComputeClass {name or 'that the pod selects'} (the plan holds it on Autopilot), or set"
        f" serving.accelerator.compute_class to one that `kubectl get computeclasses` lists."
    )


def _set_quota_project(_: re.Match[str], observation: StartupObservation) -> str:
    project = observation.target.project if observation.target else "PROJECT_ID"
    return (
        f"Run `gcloud config set billing/quota_project {project}` and `gcloud auth application-default"
        f" set-quota-project {project}`."
    )


# --- Rules, causes first --------------------------------------------------------------------------------------------


def _rule(
    category: Category, sources: str, pattern: str, summary: str, advice: str | _Advice, flags: re.RegexFlag = re.M
) -> _Rule:
    return _Rule(
        category, frozenset(_Source(name) for name in sources.split()), re.compile(pattern, flags), summary, advice
    )


_RULES: tuple[_Rule, ...] = (
    # What vLLM's command line refuses.
    _rule(
        Category.UNKNOWN_ARGUMENT,
        "log pod",
        r"error: unrecognized arguments: (?P<argument>\S.*)$",
        "vLLM does not know the argument {argument}.",
        _correct_flag,
    ),
    _rule(
        Category.UNKNOWN_ARGUMENT,
        "log pod",
        r"error: argument (?P<argument>-\S+): (?P<why>.*)$",
        "vLLM refuses the value of {argument}: {why}.",
        "Correct the value in serving.extra_args (or the ServingSpec field that sets the flag) and run again.",
    ),
    _rule(
        Category.UNKNOWN_ARGUMENT,
        "log pod",
        r"invalid (?P<kind>tool call|reasoning) parser: (?P<parser>[\w.-]+)",
        "This vLLM has no {kind} parser {parser}.",
        "Set serving.tool_call_parser or serving.reasoning_parser to one that the log lists, or take a newer image.",
    ),
    # What it cannot find or read.
    _rule(
        Category.GATED_MODEL,
        "log pod client",
        r"(?:Access to model (?P<repo>[\w./-]+) is restricted|[Cc]annot access gated repo|trying to access a gated repo"
        r"|GatedRepoError)",
        "The model is gated and the token may not read it.",
        _accept_licence,
    ),
    _rule(
        Category.IDENTITY_NOT_BOUND,
        "log pod client",
        r"Permission '?iam\.serviceAccounts\.getAccessToken'? denied",
        "The Kubernetes service account may not act as the Google service account.",
        _bind_identity,
    ),
    _rule(
        Category.BUCKET_FORBIDDEN,
        "log pod client",
        r"(?P<member>Anonymous caller|[\w.+-]+@[\w.-]+|principal(?:Set)?://\S+)? ?(?:Caller )?does not have"
        r" (?P<permission>storage\.[\w.]+) access to the Google Cloud Storage",
        "The pods may not read the weights: they lack {permission}.",
        _grant_reader,
    ),
    _rule(
        Category.BUCKET_FORBIDDEN,
        "log pod client",
        r"(?P<member>)Permission '(?P<permission>storage\.[\w.]+)' denied on resource",
        "The pods may not read the weights: {permission} is denied.",
        _grant_reader,
    ),
    _rule(
        Category.BUCKET_MISSING,
        "log pod client",
        r"The specified bucket does not exist",
        "The bucket of the weights does not exist.",
        lambda _, seen: f"Expected is {_bucket_of(seen)}: publish the weights first, or correct target.bucket.",
    ),
    _rule(
        Category.WEIGHTS_INCOMPLETE,
        "log pod",
        r"(?:Weight files referenced in index but missing: (?P<files>.*)|SafetensorError: .*"
        r"|Error while deserializing header.*|Cannot find any model weights with .*)",
        "The weights are incomplete or damaged.",
        "Publish them again: that verifies every object against the hub's hashes and replaces what differs.",
    ),
    _rule(
        Category.WRONG_MODEL_PATH,
        "log pod",
        r"(?:HFValidationError: Repo id must .*'(?P<path>[^'\n]+)'\.?$"
        r"|Invalid repository ID or local directory specified: '(?P<local>[^']+)'"
        r"|(?P<name>\S+) is not a local folder and is not a valid model identifier"
        r"|HFValidationError: Repo id must)",
        "vLLM finds no model at the path that it was given.",
        _right_path,
    ),
    _rule(
        Category.UNSUPPORTED_MODEL,
        "log pod",
        r"(?:Model architectures (?P<architectures>\[.*?\]) are not supported|has model type `(?P<type>\w+)` but"
        r" Transformers does not recognize this architecture)",
        "This image's vLLM does not know the model's architecture.",
        "Set serving.image to a newer vLLM (the model's card names the first release that serves it).",
    ),
    # What does not fit.
    _rule(
        Category.CONTEXT_TOO_LONG,
        "log pod",
        r"User-specified max_model_len \((?P<wanted>\d+)\) is greater than the derived max_model_len"
        r" \(max_position_embeddings=(?P<limit>[\d.]+)",
        "serving.max_model_len={wanted} is longer than the model allows.",
        _model_limit,
    ),
    _rule(
        Category.KV_CACHE_TOO_SMALL,
        "log pod",
        r"To serve at least one request with the models?'s max seq len \((?P<length>\d+)\),"
        r" \((?P<needed>[\d.]+ GiB) KV cache is needed, which is larger than the available KV cache memory"
        r" \((?P<available>[\d.]+ GiB)\)(?:.*?estimated maximum model length is (?P<estimate>\d+))?",
        "One request of {length} tokens needs {needed} of KV cache, and {available} are left beside the weights.",
        _shorter_context,
    ),
    _rule(
        Category.KV_CACHE_TOO_SMALL,
        "log pod",
        r"max seq len \((?P<length>\d+)\) is larger than the maximum number of tokens that can be stored in KV cache"
        r" \((?P<tokens>\d+)\)",
        "A context of {length} tokens is longer than the KV cache, which holds {tokens}.",
        _shorter_context,
    ),
    _rule(
        Category.KV_CACHE_TOO_SMALL,
        "log pod",
        r"No available memory for the cache blocks",
        "The weights leave no GPU memory for the KV cache.",
        _fit_gpu,
    ),
    _rule(
        Category.GPU_OUT_OF_MEMORY,
        "log pod",
        r"(?:CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory"
        r"|Free memory on device (?:\S+ )?\((?P<free>[\d./]+ GiB)\) on startup is less than desired)",
        "The GPU has too little memory for the model.",
        _fit_gpu,
    ),
    _rule(
        Category.TOO_FEW_GPUS,
        "log pod",
        r"World size \((?P<wanted>\d+)\) is larger than the number of available GPUs \((?P<available>\d+)\)",
        "vLLM is to run on {wanted} GPUs, and the pod has {available}.",
        lambda match, _: f"Set serving.accelerator.count to {match['wanted']}, or serving.tensor_parallel_size to fit.",
    ),
    _rule(
        Category.GPU_DRIVER,
        "log pod",
        r"(?:CUDA driver version is insufficient|Failed to infer device type|no CUDA-capable device is detected"
        r"|The NVIDIA driver on your system is too old)",
        "The container sees no usable GPU driver.",
        "Take an image for an older CUDA, or a cluster with a newer driver: target.cluster.release_channel: rapid.",
    ),
    _rule(
        Category.EPHEMERAL_STORAGE,
        "pod event",
        r"(?:low on resource: ephemeral-storage|ephemeral local storage usage exceeds|exceeds the total limit of"
        r" containers|exceeded its local ephemeral storage limit)",
        "The pod was evicted: it used up the node's disk.",
        _bigger_disk,
    ),
    _rule(
        Category.OUT_OF_MEMORY,
        "pod event",
        r"^(?:OOMKilled|Evicted: .*low on resource: memory|OOMKilling)",
        "The container was killed for want of memory.",
        _more_memory,
    ),
    _rule(
        Category.STARTUP_PROBE,
        "event",
        r"failed (?:startup|liveness) probe, will be restarted",
        "The startup probe killed the container while it was still loading.",
        _longer_probe,
    ),
    _rule(
        Category.NODE_LOST,
        "node",
        r"^NotReady: (?P<why>.*)",
        "The pod's node does not answer.",
        "Kubernetes moves its pods after five minutes, and GKE repairs or replaces it; see `kubectl describe node`.",
    ),
    # What never got to start.
    _rule(
        Category.IMAGE_FORBIDDEN,
        "pod event",
        r"(?:[Ff]ailed to pull|[Ee]rrImagePull|ImagePullBackOff)[\s\S]*(?:401 Unauthorized|403 Forbidden|unauthorized"
        r"|denied|authentication required|authorization failed)",
        "The registry refuses the image.",
        lambda _, seen: (
            f"Let the nodes' service account read {_image(seen)} (roles/artifactregistry.reader on its repository), or"
            f" set serving.image to one that they may pull."
        ),
    ),
    _rule(
        Category.IMAGE_NOT_FOUND,
        "pod event",
        r"(?:InvalidImageName|(?:[Ff]ailed to pull|[Ee]rrImagePull|ImagePullBackOff)[\s\S]*(?:not found|NotFound"
        r"|manifest unknown|does not exist|no such host|name unknown))",
        "The image does not exist.",
        lambda _, seen: f"Correct serving.image: {_image(seen)} names no image in its registry.",
    ),
    _rule(
        Category.IMAGE_PULL,
        "pod event",
        r"(?:[Ff]ailed to pull image|ErrImagePull|ImagePullBackOff|RegistryUnavailable|ImageInspectError)",
        "The image cannot be pulled.",
        lambda _, seen: f"Check that the nodes reach the registry of {_image(seen)}; kubelet keeps trying.",
    ),
    _rule(
        Category.EXECUTABLE_MISSING,
        "pod event log",
        r"(?:exec: \"(?P<file>[^\"]+)\": .*(?:no such file|not found|permission denied)"
        r"|exec .*: no such file or directory"
        # Python's own words about `-m`; a module that vLLM itself misses is a warning of its.
        r"|^\S*python[\d.]*: (?:No module named|Error while finding module specification for) '?vllm[\w.]*)",
        "The image has no such entry point.",
        "serving.command and serving.entrypoint belong to the image: `command: [./entrypoint.sh]` with `python -m"
        " vllm.entrypoints.api_server` for the tutorial's, `command: []` with `[vllm, serve]` for vLLM's own.",
    ),
    _rule(
        Category.CONTAINER_CONFIG,
        "pod event",
        # Kubernetes puts kube-root-ca.crt into a new namespace a moment after the first pod asks for it.
        r"(?:CreateContainerConfigError|FailedMount): .*"
        r"(?P<what>(?:secret|configmap) \"(?!kube-root-ca\.crt)[^\"]+\" not found)",
        "The container refers to something that does not exist: {what}.",
        "A rerun applies it; if it is not ours, create it or drop the reference from serving.env.",
    ),
    _rule(
        Category.COMPUTE_CLASS_MISSING,
        "event pod client",
        r"(?:[Cc]ompute ?class \S* ?(?:not found|does not exist|is not available)"
        r"|computeclasses\S* \"[^\"]+\" not found|with existing custom compute class)",
        "The compute class that the pod selects does not exist.",
        _compute_class_advice,
    ),
    _rule(
        Category.AUTOPILOT_LIMIT,
        "event client",
        r"(?:GKE Warden rejected the request|denied by autogke-[\w-]+|higher than the Autopilot maximum)",
        "GKE Autopilot refuses the pod: it exceeds what Autopilot allows.",
        "Bring serving.resources within the limits that the message names (they depend on the machine type, see"
        " https://cloud.google.com/kubernetes-engine/docs/concepts/autopilot-resource-requests), or use a Standard"
        " cluster: target.cluster.mode: standard.",
    ),
    _rule(
        Category.POD_REFUSED,
        "event",
        r"FailedCreate: .*error looking up service account (?P<account>\S+):",
        "The Kubernetes service account {account} does not exist.",
        "A rerun creates it; check target.ksa and target.namespace.",
    ),
    _rule(
        Category.QUOTA_EXCEEDED,
        "event",
        r"FailedCreate: .*exceeded quota: (?P<quota>[^,]+), requested: (?P<requested>.*)",
        "The namespace's ResourceQuota {quota} is used up.",
        "Raise it, use another target.namespace, or tear down a model there.",
    ),
    _rule(
        Category.POD_REFUSED,
        "event",
        r"FailedCreate: (?P<why>.*)",
        "Kubernetes refuses to create the pod.",
        "The message names what to change in the serving spec, or the admission policy that refuses it.",
    ),
    # What finds no node.
    _rule(
        Category.QUOTA_EXCEEDED,
        "event client",
        r"(?:GCE quota exceeded|QUOTA_EXCEEDED|[Qq]uota '?(?P<metric>[\w-]+)'? exceeded|Insufficient regional quota)",
        "The project's quota does not allow another GPU node.",
        _raise_quota,
    ),
    _rule(
        Category.STOCK_OUT,
        "event client",
        r"(?:GCE out of resources|ZONE_RESOURCE_POOL_EXHAUSTED|does not have enough resources available|GCE_STOCKOUT"
        r"|stockout)",
        "Google has no such machine free at this moment.",
        _other_capacity,
    ),
    _rule(
        Category.NO_GPU_NODE,
        "event pod",
        r"Insufficient nvidia\.com/gpu",
        "No node has a free GPU for the pod.",
        _gpu_place,
    ),
    _rule(
        Category.UNTOLERATED_TAINT,
        "event pod",
        r"(?:untolerated taint|had taint \{[^}]*\}, that the pod didn't tolerate)",
        "Every node that would fit has a taint that the pod does not tolerate.",
        "Remove the taint, or use nodes that GKE makes for the pod: it tolerates nvidia.com/gpu by itself.",
    ),
    _rule(
        Category.NO_GPU_NODE,
        "event pod",
        r"didn't match Pod's node affinity/selector",
        "No node matches the pod's node selector.",
        _gpu_place,
    ),
    _rule(
        Category.UNSCHEDULABLE,
        "event pod",
        r"(?:FailedScheduling|Unschedulable|NotTriggerScaleUp|FailedScaleUp): (?P<why>.*)",
        "The scheduler finds no node for the pod.",
        "Compare serving.resources with the nodes: the message counts what each lacks.",
    ),
    # What our own calls got.
    _rule(
        Category.QUOTA_PROJECT,
        "client",
        r"(?:requires a quota project|PERMISSION_DENIED[\s\S]*quota project|quota project[\s\S]*PERMISSION_DENIED"
        r"|SERVICE_DISABLED[\s\S]*gkerecommender)",
        "The call names no project that its quota is counted for.",
        _set_quota_project,
    ),
    _rule(
        Category.SERVER_NOT_READY,
        "client",
        r"(?:Empty reply from server|Remote end closed connection without response|Server disconnected"
        r"|Connection aborted|Connection reset by peer|RemoteDisconnected|IncompleteRead)",
        "Empty reply from server: the connection was closed without an answer.",
        "The container may still be loading the model: look at the pod's log until it says `Connected` or `Application"
        " startup complete.`, then repeat.",
    ),
    _rule(
        Category.CONNECTION_REFUSED,
        "client",
        r"(?:[Cc]onnection refused|Failed to establish a new connection|ConnectionRefusedError)",
        "Connection refused: nothing listens at the endpoint.",
        "Start the port-forward again (`kubectl port-forward svc/… 8080:8080`), and check that the Service has a ready"
        " pod (`kubectl get endpointslices`).",
    ),
)


def _image(observation: StartupObservation) -> str:
    return observation.serving.image if observation.serving else "the image"


_ERROR_LINE = re.compile(r"^.*(?:Error|Exception|error:|CRITICAL|FATAL).*$", re.M)


def _crash_loop(observation: StartupObservation) -> Diagnosis | None:
    """No rule knows the message: report the crash itself, led by the last error line of the log."""
    for pod in observation.pods:
        for ended in (state for container in container_statuses(pod) for state in _telling_states(container)):
            if not ended.get("exitCode"):
                continue
            return Diagnosis(
                category=Category.CRASH_LOOP,
                summary=f"The container exits with code {ended['exitCode']}.",
                detail=_end_of_log(pod, ended, observation),
                resolution="Read the log above; the line quoted is the last error in it.",
            )
        for ended in _ended_without_error(pod):
            return Diagnosis(
                category=Category.CRASH_LOOP,
                summary="The container ends by itself, with exit code 0: it runs no server.",
                detail=_end_of_log(pod, ended, observation),
                resolution="serving.command and serving.entrypoint must name a program that stays in the foreground:"
                " `[./entrypoint.sh]` with the tutorial's arguments, or `[vllm, serve]` with an empty command.",
            )
    return None


def _ended_without_error(pod: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Ends with code 0 of containers that should run for ever: not those of a Job, nor init containers."""
    if (pod.get("spec") or {}).get("restartPolicy", "Always") != "Always":
        return
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        yield from (state for state in _telling_states(container) if state.get("exitCode") == 0)


def _end_of_log(pod: Mapping[str, Any], ended: Mapping[str, Any], observation: StartupObservation) -> str:
    name = pod["metadata"]["name"]
    return f"log of {name}: {_last_error(observation.logs.get(name) or ended.get('message') or '')}"


def _last_error(log: str) -> str:
    lines: Iterable[str] = _ERROR_LINE.findall(log) or log.strip().splitlines()[-3:]
    return "\n".join(list(lines)[-3:]) or "(empty)"
