"""Prepare a Prefect server for the deployments of prefect.yaml: pools, limits, a place for the secret, notifications.

Idempotent, and careful with what an operator has changed: a limit that was raised, a secret that was filled in and a
pool that was edited stay as they are. What is asked for by name (`pool`, `image`) is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any, cast

import yaml
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.variables import Variable
from pydantic import SecretStr

from rollout.errors import BadInput
from rollout.report import Action, Change
from rollout.target import Target
from tasks.janitor import FLOWS
from tasks.limits import gpu_limit, target_limit
from tasks.outcomes import ANNOUNCED_FLOWS, EXPIRED_PAUSE, OUTCOME_EVENT_PREFIX

LAPTOP_POOL = "laptop"
CLUSTER_POOL = "cluster"
POOL_VARIABLE = "llm_rollout_pool"
"""Which of the two pools the deployments of prefect.yaml go to."""

DEFAULT_GPUS = 8
"""Per target: one machine of eight. What a project really may use is its quota; raise the limit in the UI."""

PLACEHOLDER_TOKEN = "put-your-hugging-face-token-here"
"""Not a token: Hugging Face answers 401 to it, and the error says which Secret block to fill in."""

_SUBJECTS = {
    "failed": "A rollout failed",
    "rolled-back": "A rollout was rolled back; the old version serves",
    "objectives-missed": "A rollout missed its objectives",
    "not-approved": "A rollout was not approved; nothing was changed",
    "done": "A rollout is done",
}
"""Ends that only the run itself can tell apart: by its own event. The others are told by the server's word alone, which
comes exactly once whoever ended the run: its process, its worker, the server or the janitor."""
_OUTCOME_BODY = (
    "{{ event.payload.request.model }} on {{ event.payload.request.target }}: {{ event.payload.detail }}\n"
    "Run: {{ event.resource.name }}"
)
_FAILED, _CRASHED, _CANCELLED = (f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "Cancelled"))
_WAITING = ("prefect.flow-run.Suspended", "prefect.flow-run.Paused")
_DEPLOYED = {"prefect.resource.role": "deployment"}
_WAITING_BODY = "{{ flow_run.name }} shows its plan and waits: {{ flow_run|ui_url }}"
_RUN_BODY = "{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}"


def bootstrap(
    targets: Sequence[Target],
    *,
    pool: str | None = None,
    gpus: int = DEFAULT_GPUS,
    image: str | None = None,
    notify: str | None = None,
) -> tuple[Change, ...]:
    """Make what is missing on the Prefect server.

    Args:
        targets: One exclusion limit, one GPU limit and one Secret block each.
        pool: Where deployments go, `laptop` or `cluster`; None keeps what is set, or takes `laptop`.
        gpus: GPUs that rollouts to one target may take at once; only for limits that do not exist yet.
        image: Worker image of the cluster pool; None keeps what is set.
        notify: Notification block as `TYPE/NAME` (e.g. `slack-webhook/ops`); None makes no automations.

    Raises BadInput for a notification block that does not exist.
    """
    changes: list[Change] = []
    with get_client(sync_client=True) as client:
        changes.append(_ensure_pool(client, LAPTOP_POOL, "process", "Runs on the machine of the worker.", {}))
        changes.append(_ensure_cluster_pool(client, image))
        changes.append(_ensure_pool_variable(pool))
        for target in targets:
            changes.append(_ensure_limit(client, target_limit(target.name), 1))
            changes.append(_ensure_limit(client, gpu_limit(target.name), gpus))
            if target.hub_token_secret is not None:
                changes.append(_ensure_secret(target.hub_token_secret))
        if notify is not None:
            block_id = _notification_block(notify)
            changes += [_ensure_automation(client, automation) for automation in notifications(block_id)]
    unique: dict[tuple[str, str], Change] = {}
    for change in changes:  # several targets may share a Secret block
        unique.setdefault((change.kind, change.name), change)
    return tuple(unique.values())


def cluster_pool_template() -> dict[str, Any]:
    """The base job template of the Kubernetes pool, from `deployments/worker/kubernetes-pool.yaml`."""
    text = resources.files("deployments").joinpath("worker", "kubernetes-pool.yaml").read_text(encoding="utf-8")
    template: dict[str, Any] = yaml.safe_load(text)
    return template


def notifications(block_id: Any) -> tuple[AutomationCore, ...]:
    """The automations that tell people of every end of a run, exactly once, and of runs that wait for approval."""

    def tell(name: str, events: Sequence[str], subject: str, body: str, **where: Any) -> AutomationCore:
        return AutomationCore(
            name=f"llm-rollout: {name}",
            description="Made by `llm-rollout bootstrap`; it is brought up to date when that runs again.",
            trigger=EventTrigger(expect=set(events), posture=Posture.Reactive, threshold=1, **where),
            actions=[SendNotification(block_document_id=block_id, subject=subject, body=body)],
        )

    quiet = sorted(set(FLOWS) - set(ANNOUNCED_FLOWS))  # flows without an event of their own
    # Only a run of a deployment is ended by the server: any other waits in a process, which tells of its end itself.
    expired = {
        "match": {"prefect.state-message": f"{EXPIRED_PAUSE}*"},
        "match_related": [_runs_of(ANNOUNCED_FLOWS), _DEPLOYED],
    }
    return (
        *(tell(name, [OUTCOME_EVENT_PREFIX + name], subject, _OUTCOME_BODY) for name, subject in _SUBJECTS.items()),
        tell(
            "nobody answered", [_FAILED], "Nobody approved a rollout in time; nothing was changed", _RUN_BODY, **expired
        ),
        tell("crashed", [_CRASHED], "A run's worker died", _RUN_BODY, match_related=_runs_of(FLOWS)),
        tell("cancelled", [_CANCELLED], "A run was cancelled", _RUN_BODY, match_related=_runs_of(FLOWS)),
        tell("operation failed", [_FAILED], "A run failed", _RUN_BODY, match_related=_runs_of(quiet)),
        tell(
            "waiting for approval",
            _WAITING,
            "A rollout waits for your approval",
            _WAITING_BODY,
            match_related=_runs_of(ANNOUNCED_FLOWS),
        ),
    )


def _runs_of(flows: Sequence[str]) -> dict[str, Any]:
    """Matches what the server says of runs of these flows."""
    return {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}


def _ensure_pool(client: SyncPrefectClient, name: str, kind: str, description: str, template: dict[str, Any]) -> Change:
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        # An empty template is filled by the first worker with its own default.
        client.create_work_pool(
            WorkPoolCreate(name=name, type=kind, description=description, base_job_template=template)
        )
        return _change(Action.CREATED, "WorkPool", name, kind)
    if found.type != kind:
        raise BadInput(
            f"the work pool is of type {found.type}, not {kind}.",
            where=f"work pool {name}",
            resolution="Rename it, or delete it if nothing uses it, and run the bootstrap again.",
        )
    return _change(Action.UNCHANGED, "WorkPool", name, kind)


def _ensure_cluster_pool(client: SyncPrefectClient, image: str | None) -> Change:
    template = cluster_pool_template()
    if image is not None:
        template["variables"]["properties"]["image"]["default"] = image
    change = _ensure_pool(client, CLUSTER_POOL, "kubernetes", "Runs as Jobs in the cluster.", template)
    if change.action is Action.CREATED or image is None:
        return change
    found = client.read_work_pool(CLUSTER_POOL).base_job_template
    try:
        variable = found["variables"]["properties"]["image"]
    except KeyError as error:
        raise BadInput(
            "the pool's base job template has no variable `image`.",
            where=f"work pool {CLUSTER_POOL}",
            resolution="Delete the pool if nothing uses it, and run the bootstrap again; or set the image by hand.",
        ) from error
    if variable.get("default") == image:
        return change
    variable["default"] = image
    client.update_work_pool(CLUSTER_POOL, WorkPoolUpdate(base_job_template=found))
    return _change(Action.UPDATED, "WorkPool", CLUSTER_POOL, f"image {image}")


def _ensure_pool_variable(pool: str | None) -> Change:
    current = Variable.get(POOL_VARIABLE)
    wanted = pool or current or LAPTOP_POOL
    if current == wanted:
        return _change(Action.UNCHANGED, "Variable", POOL_VARIABLE, str(wanted))
    Variable.set(POOL_VARIABLE, wanted, overwrite=True)
    return _change(Action.UPDATED if current else Action.CREATED, "Variable", POOL_VARIABLE, str(wanted))


def _ensure_limit(client: SyncPrefectClient, name: str, limit: int) -> Change:
    try:
        found = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
        return _change(Action.CREATED, "ConcurrencyLimit", name, str(limit))
    return _change(Action.UNCHANGED, "ConcurrencyLimit", name, str(found.limit))


def _ensure_secret(name: str) -> Change:
    try:
        Secret.load(name)
    except ValueError:
        Secret(value=SecretStr(PLACEHOLDER_TOKEN)).save(name)
        return _change(Action.CREATED, "Secret", name, "a placeholder: put the Hugging Face token in, in the UI")
    return _change(Action.UNCHANGED, "Secret", name, "")


def _notification_block(slug: str) -> Any:
    try:
        block = cast(Block, Block.load(slug))
    except ValueError as error:
        raise BadInput(
            f"there is no notification block {slug!r} on the Prefect server.",
            where="notifications",
            resolution="Make one in the UI (Blocks, e.g. Slack Webhook) and give it as TYPE/NAME: slack-webhook/ops.",
        ) from error
    return block._block_document_id


def _ensure_automation(client: SyncPrefectClient, wanted: AutomationCore) -> Change:
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return _change(Action.CREATED, "Automation", wanted.name, "")
    current = found[0]
    same = current.trigger.model_dump(exclude={"id"}) == wanted.trigger.model_dump(exclude={"id"})
    if same and current.actions == wanted.actions and current.description == wanted.description:
        return _change(Action.UNCHANGED, "Automation", wanted.name, "")
    # Whether it is switched on is the operator's decision.
    client.update_automation(current.id, wanted.model_copy(update={"enabled": current.enabled}))
    return _change(Action.UPDATED, "Automation", wanted.name, "")


def _change(action: Action, kind: str, name: str, detail: str) -> Change:
    return Change(action=action, kind=kind, name=name, detail=detail)
