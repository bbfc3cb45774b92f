"""Back to nothing, with the proof."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from rollout.catalog import load_model, load_target, target_title
from rollout.clients.records import RecordStore, read_local
from rollout.errors import BadInput
from rollout.policy import Weights
from rollout.record import RolloutReport
from tasks.limits import target_alone
from tasks.record import recorded
from tasks.teardown import require_nothing_left, tear_down_rollout

TEARDOWN_DEADLINE_S = 1800.0
"""GKE deletes a cluster in five to ten minutes; three times that."""


def run_name() -> str:
    return f"teardown {target_title(flow_run.parameters['target'])}"


@flow(name="teardown-model", flow_run_name=run_name)
def teardown_model(
    target: str,
    model: str | None = None,
    report_file: str | None = None,
    weights: Weights = Weights.KEEP,
    run: str | None = None,
    instance: str | None = None,
) -> RolloutReport:
    """Remove a model server and everything that its rollouts made, and prove that nothing of it is left.

    Args:
        target: Name of an environment in deployments/targets/, or the path of such a file.
        model: Preset whose model server goes; not needed when a record says it.
        report_file: Record of the rollout; it is continued with the teardown. The bucket's records count in any case.
        weights: Whether the weights and a bucket of ours go as well.
        instance: Name of a Deployment of ours that no preset knows, e.g. of create-manifests.
        run: Beginning of the id of a rollout's run, also of one that was killed: the bucket's record says the rest.
    """
    where = load_target(target)
    earlier = read_local(Path(report_file)) if report_file and Path(report_file).exists() else None
    if earlier is None and run:
        earlier = RecordStore(where).named(run)
    if model is not None:
        instance = load_model(model).serving.name
    elif instance is None and earlier is not None:
        instance = earlier.instance
    if instance is None:
        raise BadInput(
            "neither a model preset nor a record says what to tear down.",
            where="teardown",
            resolution="Give --model, --instance, --run with the id of a rollout's run, or --report with its record.",
        )
    with target_alone(where.name), recorded(where, report_file, earlier=earlier) as record:
        owned = earlier.created if earlier else frozenset()
        teardown = record.story.run(tear_down_rollout, where, instance, weights, owned, TEARDOWN_DEADLINE_S)
        record.keep(teardown=teardown)
        record.milestone()
        require_nothing_left(teardown)
    return record.report
