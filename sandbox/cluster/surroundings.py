"""What a container finds around it without namespaces of its own: its volumes, and the Services that it may call.

A process here sees the machine's files and the machine's loopback. So the paths of its mounts and the names of Services
are given to it as tables, and the program that plays an image looks its paths and hosts up in them:

    SANDBOX_MOUNTS    {"/etc/config": "<folder on this machine>"}          JSON, for ConfigMap and emptyDir volumes
                      {"/data": "gs://bucket/prefix"}                      for Cloud Storage FUSE
    SANDBOX_SERVICES  {"name.namespace.svc.cluster.local:8080": "127.0.0.1:41234"}

A bucket that is mounted by Cloud Storage FUSE is no folder: the simulated engine reads it through the API, as the pod's
identity. Not simulated: other kinds of volumes, mount options, what is written to a mounted bucket, read-only mounts,
ConfigMaps that change, and Services whose pods change after the container has started.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.cluster.resources import CONFIG_MAP, POD, SERVICE
from sandbox.cluster.selectors import is_subset
from sandbox.cluster.store import Store

FUSE_DRIVER = "gcsfuse.csi.storage.gke.io"
_ONLY_DIR = "only-dir:"

if TYPE_CHECKING:
    from sandbox.cluster.agent import NodeAgents


def mount_volumes(store: Store, pod: dict[str, Any], container: dict[str, Any], folder: Path) -> dict[str, str]:
    """Mount path -> folder on this machine, or address in a bucket. All containers of a pod share those in `folder`."""
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    mounts: dict[str, str] = {}
    for mount in container.get("volumeMounts", []):
        volume, place = volumes[mount["name"]], folder / mount["name"]
        if "configMap" in volume:
            place.mkdir(parents=True, exist_ok=True)
            config_map = store.get(CONFIG_MAP, pod["metadata"]["namespace"], volume["configMap"]["name"])
            for name, text in ((config_map or {}).get("data") or {}).items():
                (place / name).write_text(text, encoding="utf-8")
        elif "emptyDir" in volume:
            place.mkdir(parents=True, exist_ok=True)
        elif (volume.get("csi") or {}).get("driver") == FUSE_DRIVER:
            mounts[mount["mountPath"]] = _mounted_bucket(volume["csi"]["volumeAttributes"])
            continue
        else:
            continue
        mounts[mount["mountPath"]] = str(place)
    return mounts


def _mounted_bucket(attributes: dict[str, str]) -> str:
    options = attributes.get("mountOptions", "").split(",")
    folder = next((each.removeprefix(_ONLY_DIR) for each in options if each.startswith(_ONLY_DIR)), "")
    return f"gs://{attributes['bucketName']}/{folder}".rstrip("/")


def service_addresses(agents: NodeAgents) -> dict[str, str]:
    """Every Service that has a ready pod -> the address of one of them on this machine."""
    found: dict[str, str] = {}
    for service in agents.store.find(SERVICE):
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        selector = service["spec"].get("selector")
        pods = agents.store.find(POD, namespace) if selector else []
        chosen = [each for each in pods if is_subset(selector, each["metadata"].get("labels") or {})]
        ready = [each for each in chosen if agents.ready(each)]
        for port in service["spec"].get("ports", []) if ready else []:
            target = agents.resolve_port(ready[0], port.get("targetPort", port["port"]))
            host_port = agents.host_port(ready[0], target)
            if host_port is not None:
                found[f"{name}.{namespace}.svc.cluster.local:{port['port']}"] = f"127.0.0.1:{host_port}"
    return found
