"""Which profile fits a demand: from measured profiles and from Google's, ranked by cost. Changes nothing."""

from __future__ import annotations

from prefect import flow

from rollout.catalog import load_target
from rollout.quickstart import RecommendRequest
from rollout.recommend import Recommendation
from tasks.quickstart import recommend_options
from tasks.step import Story


@flow(name="recommend-model", flow_run_name="recommend {request.model} on {request.target}")
def recommend_model(request: RecommendRequest) -> Recommendation:
    """Rank the profiles that meet latency targets, demand and budget; say why the others lost.

    Args:
        request: What the model must do, and where.
    """
    return Story(lambda _: None).run(recommend_options, request, load_target(request.target))
