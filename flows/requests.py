"""From words on a command line to a `RolloutRequest`."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml

from rollout.catalog import load_model, load_target, unreadable, validated
from rollout.clients.records import RecordStore
from rollout.errors import BadInput
from rollout.ledger import applied, in_order
from rollout.policy import RolloutPolicy
from rollout.request import RolloutRequest, resolve
from rollout.values import Value

ValueT = TypeVar("ValueT", bound=Value)


def request_of(model: str, target: str, revision: str | None = None, policy_file: Path | None = None) -> RolloutRequest:
    """The request, with the policy of a YAML file or the default one. Raises `BadInput`, also for what it names.

    Its presets are loaded here already, so that a wrong name does not cost the start of a flow and its server.
    """
    policy = RolloutPolicy() if policy_file is None else settings_of(RolloutPolicy, policy_file, "policy")
    request = RolloutRequest(model=model, target=target, revision=revision, policy=policy)
    resolve(request)
    return request


def settings_of(kind: type[ValueT], path: Path, what: str) -> ValueT:
    """A value of `kind` from a YAML file, called `what` in messages; what the file leaves out has its default.

    Raises `BadInput`.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the {what}: {unreadable(error)}.", where=str(path)) from error
    except yaml.YAMLError as error:
        raise BadInput(f"the {what} is not valid YAML: {error}", where=str(path)) from error
    return validated(kind, data or {}, where=str(path))


def rollback_request(request: RolloutRequest, to: str, preset_file: Path) -> RolloutRequest:
    """The request that serves again exactly what a recorded rollout served.

    `to` is the beginning of a run id or of a commit; of several rollouts of one commit, the newest counts. Commit and
    serving spec come from the record, not from today's preset, and go into `preset_file`, where they can be read. The
    objectives are the record's; the traffic moves as in the newest rollout, because that is how it can move now.
    Raises `BadInput` if the target's records know of none.
    """
    instance = load_model(request.model).serving.name
    plans = [
        (report.run_id, report.plan)
        for report in in_order(RecordStore(load_target(request.target)).read_all())
        if report.plan is not None and report.plan.serving.name == instance and applied(report)
    ]
    meant = [plan for run_id, plan in plans if to and (run_id.startswith(to) or plan.model.commit_sha.startswith(to))]
    if not meant:
        raise BadInput(
            f"no rollout of {instance} has a run or commit that begins with {to!r}.",
            where=f"target {request.target}",
            resolution=f"Look at: llm-rollout history --target {request.target}",
        )
    plan, newest = meant[-1], plans[-1][1]
    model = {"repo_id": plan.model.repo_id, "revision": plan.model.commit_sha}
    preset_file.parent.mkdir(parents=True, exist_ok=True)
    preset_file.write_text(
        f"# What rollout {plan.rollout_id} served on {plan.target.name}.\n"
        + yaml.safe_dump({"model": model, "serving": plan.serving.model_dump(mode="json")}, sort_keys=False),
        encoding="utf-8",
    )
    policy = plan.policy.model_copy(
        update={
            "approval": request.policy.approval,
            "teardown": request.policy.teardown,
            "delivery": newest.policy.delivery,
        }
    )
    return RolloutRequest(model=str(preset_file), target=request.target, policy=policy)
