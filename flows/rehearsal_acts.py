"""The three acts of the rehearsal: roll out, roll out again, tear down. `flows.rehearsal` makes the stage for them."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

from flows.rollout_model import rollout_model
from flows.teardown_model import teardown_model
from rollout.benchmark import BenchmarkSpec
from rollout.errors import ExitCode, RolloutError
from rollout.objectives import Objectives
from rollout.policy import RolloutPolicy
from rollout.request import RolloutRequest
from rollout.show import step_table
from rollout.stage import LatencyLimit, LatencyMetric, Percentile
from rollout.workload import fixed_workload

MODEL = "smollm2-135m-instruct"

POLICIES = {
    "simulated": RolloutPolicy(
        benchmark=BenchmarkSpec(
            workload=fixed_workload(64, 32),
            start_rate_per_s=8,
            stage_duration_s=2.0,
            max_stages=6,
            resolution=0.3,
            stages_per_side=1,
            drain_timeout_s=10,
        ),
        objectives=Objectives(
            latencies=(LatencyLimit(metric=LatencyMetric.TTFT, percentile=Percentile.P90, limit_s=2.0),),
            smoke_checks=("health", "models", "chat"),
        ),
    ),
    "vllm": RolloutPolicy(
        benchmark=BenchmarkSpec(
            workload=fixed_workload(64, 16),
            start_rate_per_s=0.5,
            stage_duration_s=10.0,
            max_stages=8,
            resolution=0.3,
            stages_per_side=1,
            drain_timeout_s=30,
        ),
        objectives=Objectives(
            latencies=(LatencyLimit(metric=LatencyMetric.TTFT, percentile=Percentile.P90, limit_s=10.0),),
            smoke_checks=("health", "models", "chat"),
        ),
    ),
}
"""Short answers and short stages: the knee of the rehearsal's model on two cores.

The simulated engine takes some twenty seconds for it. Real vLLM makes about 60 tokens a second on two cores, so it is
asked for less, and for longer.
"""


def perform(out: Path, target_file: Path, engine: str) -> ExitCode:
    """Perform the acts; the records are `report.json` and `rerun.json` in `out`."""
    request = RolloutRequest(model=MODEL, target=str(target_file), policy=POLICIES[engine])
    report_file, rerun_file = out / "report.json", out / "rerun.json"
    marks = [time.monotonic()]

    def act(title: str) -> None:
        print(f"\n{title}", flush=True)

    act("Act 1: roll out")
    rollout_model(request, report_file=str(report_file))
    marks.append(time.monotonic())
    act("Act 2: roll out again, nothing has changed")
    rerun = rollout_model(request, report_file=str(rerun_file))
    marks.append(time.monotonic())
    act("Act 3: tear down")
    report = teardown_model(target=str(target_file), report_file=str(report_file))
    marks.append(time.monotonic())

    for title, shown in (("Rollout and teardown", report), ("Rerun", rerun)):
        act(title)
        for row in step_table(shown):
            print("  {} {:<22} {:>7} s  {}".format(*row))
    seconds = [later - earlier for earlier, later in itertools.pairwise(marks)]
    act("rollout {:.1f} s, rerun {:.1f} s, teardown {:.1f} s".format(*seconds))
    print(f"the record is in {report_file}")
    if not rerun.changed_nothing:
        raise RolloutError("the rerun changed something.", where=str(rerun_file), resolution="Its steps say what.")
    return report.exit_code


if __name__ == "__main__":
    try:
        sys.exit(int(perform(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
    except RolloutError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
