"""What a curve answers: knee, highest rate within the objectives, headroom, replicas, the autoscaler's threshold.

One value, so that the artifact, the report, the terminal and the JSON record say the same.
"""

from __future__ import annotations

import math

from rollout.autoscaling import METRIC, autoscaling_for
from rollout.benchmark import BenchmarkReport
from rollout.curve import TARGET_UTILISATION, Knee, headroom, highest_rate_within, operating_rate, replicas_for
from rollout.errors import BadInput
from rollout.objectives import Objectives
from rollout.profiles import MeasuredOn, Targets, measured_profile
from rollout.stage import LatencyMetric, Percentile
from rollout.values import Value


class Answers(Value):
    """Rates are in requests/s, of all the replicas that were measured together."""

    replicas: int
    """How many were measured."""
    knee: Knee | None
    not_reached: str
    """What is known where there is no knee."""
    within_objectives_per_s: float | None
    """Highest sustained rate that meets every latency limit, 0 if not even the lowest did; None without limits."""
    operating_rate_per_s: float
    """`TARGET_UTILISATION` of the knee, and within the limits."""
    demand_per_s: float | None
    headroom: float | None
    """Share of the knee that is free at the demand, or at the operating rate where no demand is stated; negative past
    the knee, None where no rate was sustained."""
    replicas_for_demand: int | None
    """None without a demand, and where no number of replicas meets the limits."""
    threshold: int | None
    """Mean of `metric` per replica that an autoscaler should hold; None where the curve gives none."""
    metric: str = METRIC
    no_threshold: str = ""
    """Why there is no threshold."""

    def rows(self) -> list[tuple[str, str]]:
        """(question, answer) for tables."""
        found = [("knee", self._knee())]
        if self.within_objectives_per_s is not None:
            found.append(
                (
                    "highest rate within the objectives",
                    f"{self.within_objectives_per_s:.3g} requests/s"
                    if self.within_objectives_per_s
                    else "none: even the lowest measured rate misses a limit",
                )
            )
        found.append(("rate to run at", self._operating_rate()))
        at = self.operating_rate_per_s if self.demand_per_s is None else self.demand_per_s
        if self.headroom is not None:
            free = f"{self.headroom:.0%} of the knee is free"
            past = f"none: {-self.headroom:.0%} past the knee"
            found.append((f"headroom at {at:.3g} requests/s", free if self.headroom >= 0 else past))
        if self.demand_per_s is not None:
            needed = "no number meets the limits" if self.replicas_for_demand is None else f"{self.replicas_for_demand}"
            found.append((f"replicas for {self.demand_per_s:.3g} requests/s", needed))
        found.append(
            (
                "autoscaler threshold",
                self.no_threshold if self.threshold is None else f"{self.threshold} × `{self.metric}` per replica",
            )
        )
        return found

    def _knee(self) -> str:
        knee = self.knee
        if knee is None:
            return self.not_reached
        return (
            f"{knee.rate_per_s:.3g} requests/s ({knee.lower_rate_per_s:.3g}–{knee.upper_rate_per_s:.3g}),"
            f" {knee.output_tokens_per_s:.0f} output tokens/s; confidence {knee.confidence.value}: {knee.reason}"
        )

    def _operating_rate(self) -> str:
        if not self.operating_rate_per_s:
            return "none"
        of = "the knee" if self.knee else "the highest sustained rate"
        together = f", {self.replicas} replicas together" if self.replicas > 1 else ""
        within = ", within the objectives" if self.within_objectives_per_s is not None else ""
        return f"{self.operating_rate_per_s:.3g} requests/s{together}: at most {TARGET_UTILISATION:.0%} of {of}{within}"


def answers_of(report: BenchmarkReport, objectives: Objectives | None = None, *, replicas: int = 1) -> Answers:
    """The answers of a sweep over `replicas` replicas; limits and demand are those of the objectives."""
    stages, curve = report.stages, report.curve
    limits = objectives.latencies if objectives else ()
    demand = objectives.demand_rate_per_s if objectives else None
    rate = operating_rate(stages, limits)
    threshold, why = _threshold(report, objectives, replicas)
    free = headroom(stages, rate if demand is None else demand)
    return Answers(
        replicas=replicas,
        knee=curve.knee,
        not_reached=curve.not_reached,
        within_objectives_per_s=highest_rate_within(stages, limits) if limits else None,
        operating_rate_per_s=rate,
        demand_per_s=demand,
        headroom=free if math.isfinite(free) else None,
        # The curve is that of all replicas, so it is asked for as many times the demand.
        replicas_for_demand=None if demand is None else replicas_for(demand * replicas, stages, limits),
        threshold=threshold,
        no_threshold=why,
    )


def _threshold(report: BenchmarkReport, objectives: Objectives | None, replicas: int) -> tuple[int | None, str]:
    """As the autoscaler of a rollout gets it, and why there is none."""
    medians = {
        f"{limit.metric.value}_ms": limit.limit_s * 1e3
        for limit in (objectives.latencies if objectives else ())
        if limit.percentile is Percentile.P50
        and limit.metric in (LatencyMetric.TTFT, LatencyMetric.NTPOT, LatencyMetric.ITL)
    }
    try:
        profile = measured_profile(report, MeasuredOn(name="this sweep", replicas=replicas))
        # How long a replica takes to start decides the pace of scaling down, not the threshold.
        return autoscaling_for(profile, Targets(**medians), startup_s=0.0).threshold, ""
    except BadInput as error:
        return None, f"none: {error.summary}"
