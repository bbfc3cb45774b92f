"""The Kubernetes objects of a delivery by revisions: each version's own, and the front that leads to them.

A revision is the serving spec under names of its own (`rollout.delivery.revised`), so every task that serves, smokes or
measures a Deployment does so with a revision as well. All of them carry the label `app.kubernetes.io/instance` of the
model, by which teardown finds them. The front is what clients know: the Service of the spec and, with a Gateway, an
HTTPRoute. It is no part of a plan's objects, because applying it is what moves the traffic.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from rollout.delivery import IN_PLACE, DeliveryStrategy, GatewayRef, revised, revision_name, suffixed
from rollout.errors import BadInput
from rollout.model import PinnedModel
from rollout.objects import INSTANCE_LABEL, MANAGED_BY_LABEL, MANAGER, ownership_labels, serving_objects
from rollout.plan import RolloutPlan
from rollout.rendering import KubernetesObject, read_manifests, render
from rollout.serving import ServingSpec
from rollout.target import ClusterMode, Target

REVISION_LABEL = "llm-rollout.dev/revision"
LIVE_ANNOTATION = "llm-rollout.dev/live-revision"
"""On the front Service: the revision that a rollback leads to. Without it, an in-place Deployment is live."""
SERVER_LABEL = "ai.gke.io/inference-server"


def planned_objects(
    model: PinnedModel, serving: ServingSpec, target: Target, strategy: DeliveryStrategy, *, rollout_id: str
) -> tuple[KubernetesObject, ...]:
    """What a rollout applies before any traffic moves: all objects in place, or those of the new revision."""
    in_place = serving_objects(model, serving, target, rollout_id=rollout_id)
    if not strategy.by_revisions:
        return in_place
    revision = revision_name(_deployment(in_place))
    objects = serving_objects(model, revised(serving, revision), target, rollout_id=rollout_id)
    own = [_of_revision(item, serving.name, revision) for item in objects]
    if strategy.gateway is None:
        return tuple(own)
    own += health_checks(serving, target, revision, rollout_id=rollout_id)
    return (*own, *_gateway(strategy.gateway, target, rollout_id))


def revision_of_plan(plan: RolloutPlan) -> str:
    """The revision that a plan by revisions delivers."""
    return str(_deployment(plan.objects)["metadata"]["labels"][REVISION_LABEL])


def revision_plan(plan: RolloutPlan, *, replicas: int | None = None) -> RolloutPlan:
    """The plan as the tasks that serve and verify one Deployment need it: under the revision's own names."""
    own = plan.model_copy(update={"serving": revised(plan.serving, revision_of_plan(plan))})
    return with_replicas(own, replicas) if replicas else own


def with_replicas(plan: RolloutPlan, replicas: int) -> RolloutPlan:
    """The plan with another number of pods."""
    serving = plan.serving.model_copy(update={"replicas": replicas})
    objects = tuple(_scaled(item, replicas) for item in plan.objects)
    return plan.model_copy(update={"serving": serving, "objects": objects})


def plan_of_live(plans: Iterable[RolloutPlan], live: str) -> RolloutPlan | None:
    """The newest plan of the model that `live` comes from, under the names of what serves; None if there is none.

    `plans` come oldest first. `live` is the cluster's word (`Traffic.live`).
    """
    found: RolloutPlan | None = None
    for plan in plans:
        by_revisions = plan.policy.delivery.by_revisions
        if live == (revision_of_plan(plan) if by_revisions else IN_PLACE):
            found = revision_plan(plan) if by_revisions else plan
    return found


def revision_of(manifest: Mapping[str, Any], serving: ServingSpec) -> str | None:
    """Which revision of the model `serving.name` a live object belongs to.

    None for the front, for what several share, and for what goes with its owner.
    """
    metadata = manifest["metadata"]
    labels = metadata.get("labels") or {}
    if labels.get(INSTANCE_LABEL) != serving.name or metadata.get("ownerReferences"):
        return None
    if (manifest["kind"], metadata["name"]) in (("Service", serving.service_name), ("HTTPRoute", serving.name)):
        return None
    return str(labels.get(REVISION_LABEL, IN_PLACE))


def revisions_in(manifests: Iterable[Mapping[str, Any]], serving: ServingSpec) -> set[str]:
    """The revisions that have a Deployment among the live objects."""
    deployments = (item for item in manifests if item["kind"] == "Deployment")
    return {revision for item in deployments if (revision := revision_of(item, serving)) is not None}


# --- The front --------------------------------------------------------------------------------------------------------


def front_service(plan: RolloutPlan, live: str, selector: Mapping[str, str]) -> KubernetesObject:
    """The Service that clients know, leading to the pods of `selector`."""
    service = _service(plan, plan.serving.service_name, plan.serving.app)
    service["metadata"]["annotations"] = {LIVE_ANNOTATION: live}
    service["spec"]["selector"] = dict(selector)
    return service


def backend_service(plan: RolloutPlan, revision: str) -> KubernetesObject:
    """A revision's own Service: what the route's weights are about. Plans hold it; in-place Deployments lack it."""
    name = backend_name(plan.serving, revision)
    service = _service(plan, name, suffixed(plan.serving.app, revision))
    service["metadata"]["labels"][REVISION_LABEL] = revision
    return service


def backend_name(serving: ServingSpec, revision: str) -> str:
    """Name of a revision's own Service. The front has the plain name, so the in-place one needs another."""
    if revision == IN_PLACE:
        return f"{serving.service_name[: 62 - len(IN_PLACE)]}-{IN_PLACE}"
    return suffixed(serving.service_name, revision)


def health_checks(
    serving: ServingSpec, target: Target, revision: str, *, rollout_id: str
) -> tuple[KubernetesObject, ...]:
    """How GKE's load balancer asks whether a revision is well; other clusters' gateways ask Kubernetes."""
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return ()
    values = {
        "service_name": backend_name(serving, revision),
        "namespace": target.namespace,
        "labels": ownership_labels(rollout_id, instance=serving.name) | {REVISION_LABEL: revision},
        "port": serving.port,
    }
    return render(read_manifests(["health-check-policy.yaml"]), values)


def revision_selector(serving: ServingSpec, revision: str) -> dict[str, str]:
    """The pods of one revision."""
    return {"app": suffixed(serving.app, revision)}


def shared_selector(serving: ServingSpec) -> dict[str, str]:
    """The serving pods of all revisions: a canary without a Gateway."""
    return {MANAGED_BY_LABEL: MANAGER, INSTANCE_LABEL: serving.name, SERVER_LABEL: "vllm"}


def http_route(plan: RolloutPlan, gateway: GatewayRef, weights: Mapping[str, int]) -> KubernetesObject:
    """The route that splits requests over the revisions' Services by weight."""
    backends = [
        {"name": backend_name(plan.serving, revision), "port": plan.serving.port, "weight": weight}
        for revision, weight in sorted(weights.items())
    ]
    values = {
        "name": plan.serving.name,
        "namespace": plan.target.namespace,
        "labels": ownership_labels(plan.rollout_id, instance=plan.serving.name),
        "gateway": gateway.name,
        "backends": backends,
    }
    route = render(read_manifests(["weighted-route.yaml"]), values)[0]
    if gateway.hostnames:
        route["spec"]["hostnames"] = list(gateway.hostnames)
    return route


def route_weights(route: Mapping[str, Any], serving: ServingSpec, revisions: Iterable[str]) -> dict[str, int]:
    """The weights of a live route by revision; backends that are no revision of ours are passed over."""
    names = {backend_name(serving, revision): revision for revision in revisions}
    backends = [backend for rule in route["spec"].get("rules") or [] for backend in rule.get("backendRefs") or []]
    return {names[each["name"]]: int(each.get("weight", 1)) for each in backends if each["name"] in names}


# --- Parts ------------------------------------------------------------------------------------------------------------


def _gateway(gateway: GatewayRef, target: Target, rollout_id: str) -> tuple[KubernetesObject, ...]:
    if gateway.class_name is None:
        return ()
    values = {
        "gateway": gateway.name,
        "gateway_class": gateway.class_name,
        "namespace": target.namespace,
        "shared_labels": ownership_labels(rollout_id),
    }
    return render(read_manifests(["delivery-gateway.yaml"]), values)


def _service(plan: RolloutPlan, name: str, app: str) -> KubernetesObject:
    values = {
        "service_name": name,
        "namespace": plan.target.namespace,
        "labels": ownership_labels(plan.rollout_id, instance=plan.serving.name),
        "app": app,
        "port": plan.serving.port,
    }
    return render(read_manifests(["service.yaml"]), values)[0]


def _of_revision(manifest: KubernetesObject, instance: str, revision: str) -> KubernetesObject:
    """The object with the model's instance label instead of the revision's own, and with the revision's name."""
    if INSTANCE_LABEL not in manifest["metadata"]["labels"]:
        return manifest
    labelled = copy.deepcopy(manifest)
    labelled["metadata"]["labels"] |= {INSTANCE_LABEL: instance, REVISION_LABEL: revision}
    if labelled["kind"] == "Deployment":
        labelled["spec"]["template"]["metadata"]["labels"][INSTANCE_LABEL] = instance
    return labelled


def _scaled(manifest: KubernetesObject, replicas: int) -> KubernetesObject:
    if manifest["kind"] != "Deployment":
        return manifest
    return {**manifest, "spec": {**manifest["spec"], "replicas": replicas}}


def _deployment(objects: Iterable[KubernetesObject]) -> KubernetesObject:
    for item in objects:
        if item["kind"] == "Deployment":
            return item
    raise BadInput("the plan holds no Deployment.", where="delivery")
