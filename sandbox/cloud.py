"""The whole embedded cloud: hub, storage, Google APIs, the recommender and a Kubernetes cluster, wired to each other.

Hub and storage move gigabytes, so each is a process of its own; Google's APIs and the cluster share this one, because
the cluster's node agent asks IAM who a pod is. Bucket, service accounts and policies live under `root` and are found
again by the next start; the cluster's objects end with the process.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import yaml

from rollout.target import Target
from sandbox.cluster import KubernetesServer
from sandbox.cluster.nodes import ACCELERATOR_LABEL, gpus_of
from sandbox.google_apis import GoogleApisServer
from sandbox.processes import Child
from sandbox.recommender import RecommenderServer

PROJECT = "rehearsal-project"
REGION = "u-france-east1"
UNIVERSE_DOMAIN = "s3nsapis.fr"
FOREIGN_BUCKET = "somebody-elses-bucket"
"""A name that another project has taken."""

CHECKOUT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 120.0
logger = logging.getLogger(__name__)


class EmbeddedCloud:
    """Start and stop everything; `target()` is all that a rollout needs to know of it."""

    def __init__(
        self,
        root: Path,
        *,
        hub_options: Sequence[str] = (),
        quotas: Mapping[str, float] | None = None,
        **cluster_settings: Any,
    ) -> None:
        """`hub_options` go to `python -m sandbox.hub`, e.g. a shaped link; `quotas` override the region's limits by
        metric; the rest goes to `KubernetesServer`."""
        self.root = root
        self._quotas = quotas
        self._hub_options = hub_options
        self._cluster_settings = cluster_settings
        self._children: list[Child] = []
        # Cluster and control plane tell each other of nodes through it: neither waits for the other's lock.
        self._books = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nodes")

    @property
    def hub_root(self) -> Path:
        """Where the hub's repositories are: publish models here before or after the start."""
        return self.root / "hub"

    def start(self) -> Self:
        hub = self._child("sandbox.hub", "--root", str(self.hub_root), *self._hub_options)
        storage_options = (
            "--root",
            str(self.root / "storage"),
            "--project",
            PROJECT,
            "--foreign-bucket",
            FOREIGN_BUCKET,
        )
        storage = self._child("sandbox.storage", *storage_options)
        self.hub_url: str = hub.ready_line(READY_TIMEOUT_S)["url"]
        self.storage_url: str = storage.ready_line(READY_TIMEOUT_S)["url"]
        self.google = GoogleApisServer(
            root=self.root / "google",
            project=PROJECT,
            region=REGION,
            universe_domain=UNIVERSE_DOMAIN,
            quotas=self._quotas,
        ).start()
        self.recommender = RecommenderServer().start()
        self.google.remove_nodes()
        self.google.on_nodes_gone(lambda names: self._book(self.kubernetes.remove_nodes, names))
        self.kubernetes = KubernetesServer(
            root=self.root / "cluster",
            tls=True,
            identity_of=self.google.workload_identity,
            on_node=self._book_node,
            environment={"STORAGE_EMULATOR_HOST": self.storage_url, "HF_ENDPOINT": self.hub_url},
            **self._cluster_settings,
        ).start()
        self.google.connect_cluster(endpoint=f"127.0.0.1:{self.kubernetes.port}", ca_pem=self.kubernetes.ca_pem)
        return self

    def stop(self) -> None:
        for server in ("kubernetes", "recommender", "google"):
            if hasattr(self, server):
                getattr(self, server).stop()
        for child in reversed(self._children):
            child.stop()
        self._books.shutdown(cancel_futures=True)

    def _book_node(self, event: str, node: dict[str, Any]) -> None:
        """Node pools, disks and quota follow the nodes that pods make boot."""
        name, labels = node["metadata"]["name"], node["metadata"]["labels"]
        if event == "DELETED":
            self._book(self.google.remove_node, name)
            return
        machine = {
            "machine_type": labels["node.kubernetes.io/instance-type"],
            "accelerator": labels.get(ACCELERATOR_LABEL, ""),
            "gpus": gpus_of(node),
        }
        self._book(self.google.boot_node, name, **machine)

    def _book(self, note: Callable[..., None], *arguments: Any, **options: Any) -> None:
        with contextlib.suppress(RuntimeError):  # after the end nobody keeps books
            self._books.submit(note, *arguments, **options).add_done_callback(_report_failure)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def target(self, **changes: Any) -> Target:
        """The cloud as a target; the same fields as a file in `deployments/targets/`."""
        google = self.google.url
        return Target.model_validate(
            {
                "name": "rehearsal",
                "project": PROJECT,
                "region": REGION,
                "universe": {"domain": UNIVERSE_DOMAIN},
                "credentials": "anonymous",
                "cluster": {"name": "rehearsal-cluster"},
                "namespace": "serving",
                "ksa": "model-ksa",
                "gsa": "model-gsa",
                "bucket": "rehearsal-models",
                "gpu_usd_per_hour": 10.0,
                "endpoints": {
                    "hub": self.hub_url,
                    "storage": self.storage_url,
                    "gkerecommender": self.recommender.url,
                    **dict.fromkeys(
                        (
                            *("container", "iam", "cloudresourcemanager", "serviceusage"),
                            *("cloudbilling", "compute"),
                        ),
                        google,
                    ),
                },
                **changes,
            }
        )

    def write_target(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.target().model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    def _child(self, module: str, *arguments: str) -> Child:
        log = self.root / "logs" / f"{module.rpartition('.')[2]}.log"
        child = Child([sys.executable, "-m", module, *arguments], log=log, cwd=CHECKOUT)
        self._children.append(child)
        return child


def _report_failure(booked: Future[None]) -> None:
    if not booked.cancelled() and (error := booked.exception()) is not None:
        logger.error("the books of the nodes are wrong", exc_info=error)
