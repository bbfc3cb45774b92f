"""What a person approves: the page that the form shows, and the digest that ties the answer to it. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rollout.objectives import Objectives
from rollout.plan import RolloutPlan
from rollout.preflight import CheckState
from rollout.report import Action
from rollout.values import content_digest, field_title

_ACTING = {Action.CREATED, Action.UPDATED, Action.DELETED}

LISTED_CHANGES = 20
"""Of a rollout into an empty project there are about a dozen."""


NOT_SHOWN = {"checks", "checkpoint_config", "has_chat_template", "project_number"}
"""Fields of a plan that an approval does not depend on: read from elsewhere, and nothing changes by them."""


def approval_markdown(plan: RolloutPlan) -> str:
    """The plan for a narrow dialog: lists and no tables, the costs first. The whole plan is the artifact `plan`."""
    acting = [change for change in plan.changes if change.action in _ACTING]
    counted = ", ".join(f"{count} to {action.planned}" for action, count in Counter(c.action for c in acting).items())
    price = "no price is known" if plan.usd_per_hour is None else f"{plan.usd_per_hour:,.2f} USD per hour"
    accelerator = plan.serving.accelerator
    lines = [
        f"**{plan.model.repo_id}** at `{plan.model.short_sha}` on **{plan.target.name}**",
        "",
        f"- costs **{price}** while it runs: {plan.serving.replicas} × {accelerator.count} {accelerator.type}",
        f"- transfers **{plan.transfer_bytes / 1e9:.2f} GB** to `gs://{plan.target.bucket}`",
        f"- objectives: {_objectives(plan.policy.objectives)}",
        f"- afterwards: teardown {plan.policy.teardown.value.replace('_', ' ')}",
        *(f"- ⚠ {check.name}: {check.why}" for check in plan.checks if check.state is CheckState.WARNING),
        f"- changes: **{counted or 'none'}**",
        *(f"    - {c.action.planned} {c.kind} `{c.name}`" for c in acting[:LISTED_CHANGES]),
    ]
    if len(acting) > LISTED_CHANGES:
        lines.append(f"    - and {len(acting) - LISTED_CHANGES} more")
    if plan.object_diff:
        lines += ["", "What changes in the live objects:", "", plan.object_diff]
    lines += ["", "Nothing has changed yet. The whole plan is the artifact `plan` of this run."]
    return "\n".join(lines)


def shown_digest(plan: RolloutPlan) -> str:
    """Digest of what the approver decides on: what changes, what it moves and costs.

    The preflight checks are left out: their texts hold figures that move from minute to minute (quota in use). So is
    the id of the run that brought what serves: what it is counts.
    """
    unseen: dict[str, Any] = dict.fromkeys(NOT_SHOWN, True) | {"live_before": {"run_id"}}
    return content_digest(plan.model_dump(mode="json", exclude=unseen), 16)


def _objectives(objectives: Objectives) -> str:
    limits = [
        f"{limit.metric.value.upper()} {limit.percentile.value} ≤ {limit.limit_s:g} s" for limit in objectives.latencies
    ]
    others = objectives.model_dump(mode="json", exclude={"latencies"}, exclude_none=True)
    limits += [f"{field_title(name).lower()} {_text(value)}" for name, value in others.items() if value not in ([], {})]
    return "; ".join(limits) or "none"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
