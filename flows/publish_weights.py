"""Only the weights: prewarm a bucket, or publish a checkpoint for others to serve."""

from __future__ import annotations

from prefect import flow

from rollout.request import RolloutRequest, resolve
from rollout.transfer import TransferReport
from tasks.planning import pin_model
from tasks.provision import provision_bucket
from tasks.step import Story
from tasks.weights import check_weights_layout, publish_weights


@flow(name="publish-weights", flow_run_name="weights {request.title}")
def publish_model_weights(request: RolloutRequest) -> TransferReport:
    """Transfer a model's weights from Hugging Face to the target's bucket, proven by hash, resumable.

    Args:
        request: Model, target and policy, as for the rollout.
    """
    spec = resolve(request)
    story = Story(lambda _: None)
    model = story.run(pin_model, spec)
    story.run(provision_bucket, spec.target)
    report = story.run(publish_weights, model, spec.target, spec.policy.transfer)
    story.run(check_weights_layout, spec.target, report.uri)
    return report
