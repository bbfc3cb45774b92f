"""Only the weights: prewarm a bucket, or publish a checkpoint for others to serve."""

from __future__ import annotations

from prefect import flow

from rollout.clients.transfer import nothing_to_do
from rollout.model import PinnedModel
from rollout.request import RolloutRequest, RolloutSpec, resolve
from rollout.transfer import TransferReport
from tasks.planning import pin_model
from tasks.provision import provision_bucket
from tasks.step import Story
from tasks.weights import bind_writer, check_weights_layout, publish_weights, publish_weights_by_pods, release_writer


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
    report = publish(spec, model, story)
    story.run(check_weights_layout, spec.target, report.uri, spec.serving.vllm_release)
    return report


def publish(spec: RolloutSpec, model: PinnedModel, story: Story) -> TransferReport:
    """From here, or by pods of the target's cluster, which must be there then."""
    transfer = spec.policy.transfer
    if not transfer.pods or nothing_to_do(model, spec.target, transfer) is not None:
        return story.run(publish_weights, model, spec.target, transfer)
    story.run(bind_writer, spec.target)
    try:
        return story.run(publish_weights_by_pods, model, spec.serving, spec.target, transfer)
    finally:
        story.run(release_writer, spec.target)
