"""A Kubernetes cluster on loopback: an API server, a controller manager, a scheduler and node agents in one process.

Simulated: the kinds that a rollout needs (see `resources`), with create, read, list, watch, the four patch formats,
server-side apply with field managers and conflicts, dry runs, deletion with propagation and finalizers, status and
scale; Deployments, ReplicaSets, Jobs, autoscalers (see `autoscaling`), endpoints and garbage collection; nodes that are
made when a pod asks for a GPU; and containers as processes of this machine, with logs, probes, events and forwarded
ports. Statuses, bodies, messages and the order of events follow a real Kubernetes 1.36 control plane.

Not simulated: admission webhooks, quotas, OpenAPI, other kinds and API versions (404), persistent volumes, networking
between pods, priorities and preemption. Objects live as long as the process.
"""

from sandbox.cluster.autoscaling import AutoscalerSettings
from sandbox.cluster.nodes import Machine, NodeSettings
from sandbox.cluster.server import Faults, KubernetesServer

__all__ = ["AutoscalerSettings", "Faults", "KubernetesServer", "Machine", "NodeSettings"]
