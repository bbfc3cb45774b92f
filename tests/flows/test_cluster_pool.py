"""The pool `cluster`: prefect-kubernetes starts a run as a Job, from our template, with the rights of its Role."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes import client, config, utils
from prefect.client.orchestration import get_client
from prefect.deployments.runner import EntrypointType

from flows.bootstrap import CLUSTER_POOL, LAPTOP_POOL, bootstrap
from flows.ci import start
from flows.plan_model import plan_model
from sandbox.cluster import KubernetesServer, NodeSettings
from tests.flows.command_line import Session, environment, wait_for
from tests.flows.conftest import Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
MANIFESTS = REPOSITORY / "deployments" / "worker" / "manifests"
NAMESPACE, WORKER, JOBS = "llm-rollout", "llm-rollout-worker", "llm-rollout-job"
IN_ORDER = ("Namespace", "ServiceAccount", "Role", "RoleBinding")
IMAGE = "worker/llm-rollout:1"
BIN = str(Path(sys.executable).parent)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KubernetesServer]:
    """A cluster with what an operator applies for the worker; its image is this checkout."""
    settings = NodeSettings(creation_s=0.1)
    runners = {"worker/": ("env", f"PATH={BIN}:/usr/bin:/bin", f"PYTHONPATH={REPOSITORY}")}
    with KubernetesServer(tmp_path / "kubernetes", token="operator", runners=runners, nodes=settings) as server:
        api = config.new_client_from_config(str(server.kubeconfig(tmp_path / "operator")))
        documents = [yaml.safe_load(file.read_text()) for file in MANIFESTS.glob("*.yaml")]
        for kind in IN_ORDER:
            for document in documents:
                if document["kind"] == kind:
                    utils.create_from_dict(api, document)
        yield server


def test_a_run_becomes_a_job_that_the_worker_may_start_and_watch(
    stage: Stage, cluster: KubernetesServer, tmp_path: Path
) -> None:
    bootstrap([stage.target], pool=LAPTOP_POOL)  # makes both pools; the runs of other tests go to the other
    name = f"pool-{uuid.uuid4().hex[:6]}"
    request = stage.request().model_dump(mode="json")
    plan_model.to_deployment(  # type: ignore[union-attr]
        name,
        parameters={"request": request},
        work_pool_name=CLUSTER_POOL,
        job_variables={"image": IMAGE},
        entrypoint_type=EntrypointType.MODULE_PATH,
    ).apply()
    worker_kubeconfig = cluster.kubeconfig(tmp_path / "worker", token=cluster.service_account_token(NAMESPACE, WORKER))
    env = environment(**settings_of_worker(), KUBECONFIG=str(worker_kubeconfig), PREFECT_WORKER_QUERY_SECONDS="1")
    line = ("worker", "start", "--pool", CLUSTER_POOL, "--name", name)
    with (
        get_client(sync_client=True) as prefect,
        Session(*line, log=tmp_path / "worker.log", env=env, program="prefect") as worker,
    ):
        run = start(prefect, f"plan-model/{name}", request, None)
        batch = client.BatchV1Api(config.new_client_from_config(str(tmp_path / "operator")))
        worker.wait_until(lambda: bool(batch.list_namespaced_job(NAMESPACE).items))
        (job,) = batch.list_namespaced_job(NAMESPACE).items
        assert job.spec.backoff_limit == 0, "a run that was evicted is not repeated"
        pod = job.spec.template.spec
        assert (pod.service_account_name, pod.restart_policy) == (JOBS, "Never")
        assert pod.containers[0].image == IMAGE
        wait_for(lambda: prefect.read_flow_run(run.id).state.is_final())  # type: ignore[union-attr]
        ended = prefect.read_flow_run(run.id)
        assert ended.state is not None
        assert ended.state.is_completed(), f"{ended.state.message}\n{worker.output}"
        wait_for(lambda: batch.list_namespaced_job(NAMESPACE).items[0].status.succeeded == 1)
        assert "forbidden" not in worker.output.lower(), worker.output


def settings_of_worker() -> dict[str, str]:
    """What the worker's Deployment tells it, but for the server, which is the test's."""
    deployment = yaml.safe_load((MANIFESTS / "worker-deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"] if each["name"] != "PREFECT_API_URL"}
