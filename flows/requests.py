"""From words on a command line to a `RolloutRequest`."""

from __future__ import annotations

from pathlib import Path

import yaml

from rollout.catalog import load_model, load_target, unreadable, validated
from rollout.clients.records import RecordStore
from rollout.errors import BadInput
from rollout.ledger import applied, in_order
from rollout.policy import RolloutPolicy
from rollout.record import RolloutReport
from rollout.request import RolloutRequest, resolve


def request_of(model: str, target: str, revision: str | None = None, policy_file: Path | None = None) -> RolloutRequest:
    """The request, with the policy of a YAML file or the default one. Raises `BadInput`, also for what it names.

    Its presets are loaded here already, so that a wrong name does not cost the start of a flow and its server.
    """
    policy = RolloutPolicy()
    if policy_file is not None:
        try:
            data = yaml.safe_load(policy_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read the policy: {unreadable(error)}.", where=str(policy_file)) from error
        except yaml.YAMLError as error:
            raise BadInput(f"the policy is not valid YAML: {error}", where=str(policy_file)) from error
        policy = validated(RolloutPolicy, data or {}, where=str(policy_file))
    request = RolloutRequest(model=model, target=target, revision=revision, policy=policy)
    resolve(request)
    return request


def rollback_request(request: RolloutRequest, to: str) -> RolloutRequest:
    """The request that serves again what a recorded rollout served: its commit, image, replicas and context window.

    `to` is the beginning of a run id or of a commit; of several rollouts of one commit, the newest counts. Raises
    `BadInput` if the target's records know of none.
    """
    instance = load_model(request.model).serving.name
    candidates = [
        report
        for report in in_order(RecordStore(load_target(request.target)).read_all())
        if report.plan is not None and report.plan.serving.name == instance and applied(report)
    ]
    report = next((report for report in reversed(candidates) if _is_meant(report, to)), None)
    if report is None or report.plan is None:
        raise BadInput(
            f"no rollout of {instance} has a run or commit that begins with {to!r}.",
            where=f"target {request.target}",
            resolution=f"Look at: llm-rollout history --target {request.target}",
        )
    serving = report.plan.serving
    return request.model_copy(
        update={
            "revision": report.plan.model.commit_sha,
            "image": serving.image,
            "replicas": serving.replicas,
            "max_model_len": serving.max_model_len,
        }
    )


def _is_meant(report: RolloutReport, to: str) -> bool:
    assert report.plan is not None
    return bool(to) and (report.run_id.startswith(to) or report.plan.model.commit_sha.startswith(to))
