"""A real Kubernetes control plane for tests, from the binaries that `KUBEBUILDER_ASSETS` names (envtest's convention).

`etcd` and `kube-apiserver` are needed. Where the folder also holds `kube-controller-manager` and `kube-scheduler` (a
Kubernetes release has them; envtest's archive does not), they run too, so that Deployments make pods and namespaces
end. Nodes are `tests.real_nodes`.
"""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.engines import free_port

TOKEN = "envtest"
READY_TIMEOUT_S = 120.0
CONTROLLERS = ("kube-controller-manager", "kube-scheduler")


def has_controllers(assets: Path) -> bool:
    return all((assets / name).is_file() for name in CONTROLLERS)


@contextlib.contextmanager
def control_plane(assets: Path, root: Path) -> Iterator[Path]:
    """Yields the kubeconfig of a cluster administrator; logs and data are in `root`."""
    client_port, peer_port, secure_port = free_port(), free_port(), free_port()
    client_url, peer_url = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    url, certificate = f"https://127.0.0.1:{secure_port}", root / "certs" / "apiserver.crt"
    key, tokens, kubeconfig = root / "sa.key", root / "tokens.csv", root / "kubeconfig"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    tokens.write_text(f"{TOKEN},admin,admin,system:masters\n", encoding="ascii")
    kubeconfig.write_text(yaml.safe_dump(_kubeconfig(url, certificate)), encoding="utf-8")
    etcd = [
        str(assets / "etcd"),
        f"--data-dir={root / 'etcd'}",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=default={peer_url}",
        "--unsafe-no-fsync",
    ]
    server = [
        str(assets / "kube-apiserver"),
        f"--etcd-servers={client_url}",
        f"--cert-dir={certificate.parent}",
        "--bind-address=127.0.0.1",
        f"--secure-port={secure_port}",
        f"--token-auth-file={tokens}",
        "--authorization-mode=RBAC",
        # Without controllers nobody makes the default account that this plugin waits for.
        *([] if has_controllers(assets) else ["--disable-admission-plugins=ServiceAccount"]),
        "--service-account-issuer=https://localhost",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-cluster-ip-range=10.0.0.0/24",
    ]
    manager = [
        str(assets / "kube-controller-manager"),
        f"--kubeconfig={kubeconfig}",
        f"--service-account-private-key-file={key}",
        "--leader-elect=false",
        "--secure-port=0",
        "--node-monitor-grace-period=1h",  # the tests' node renews no lease
    ]
    scheduler = [
        str(assets / "kube-scheduler"),
        f"--kubeconfig={kubeconfig}",
        "--leader-elect=false",
        "--secure-port=0",
    ]
    with contextlib.ExitStack() as running:
        log = running.enter_context((root / "control-plane.log").open("wb"))

        def start(*command: str) -> None:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            running.callback(process.wait)
            running.callback(process.terminate)

        start(*etcd)
        start(*server)
        _await_ready(url, root / "control-plane.log")
        if has_controllers(assets):
            start(*manager)
            start(*scheduler)
        yield kubeconfig


def _kubeconfig(url: str, certificate: Path) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "envtest", "cluster": {"server": url, "certificate-authority": str(certificate)}}],
        "users": [{"name": "envtest", "user": {"token": TOKEN}}],
        "contexts": [{"name": "envtest", "context": {"cluster": "envtest", "user": "envtest"}}],
        "current-context": "envtest",
    }


def _await_ready(url: str, log: Path) -> None:
    """The server's certificate is not known before it runs, and a readiness probe needs none."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = urllib.request.Request(f"{url}/readyz", headers={"Authorization": f"Bearer {TOKEN}"})
    end = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, urllib.error.URLError):
            if urllib.request.urlopen(request, timeout=5, context=context).status == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(f"no kube-apiserver at {url}: {log.read_text(errors='replace')[-2000:]}")
