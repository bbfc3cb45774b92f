"""Daily questions: what serves, since when, does it still work, how do we go back."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.requests import rollback_request
from flows.rollout_model import rollout_model
from flows.verify_model import verify_model
from rollout.errors import BadInput
from rollout.record import Verdict
from tests.flows.conftest import TINY_REPO, Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_status_history_verify_and_rollback_follow_the_records(stage: Stage) -> None:
    target = ("--target", str(stage.target_file))
    assert "nothing serves" in shown("status", *target)
    with pytest.raises(BadInput, match="no record says"):
        verify_model(stage.request())

    first = rollout_model(stage.request())
    assert first.plan is not None
    commit = first.plan.model.commit_sha
    status = shown("status", *target)
    assert f"{TINY_REPO}@{commit}" in status
    assert "drift" not in status
    assert first.run_id in shown("history", *target)

    verified = verify_model(stage.request())
    assert verified.verdict is Verdict.DONE
    assert verified.run_id not in shown("history", *target), "a verification rolls nothing out"

    stage.write_model(max_model_len=512)
    request = rollback_request(stage.request(), commit[:8])
    assert (request.revision, request.max_model_len) == (commit, 1024)
    assert rollback_request(stage.request(), first.run_id) == request
    with pytest.raises(BadInput, match="begins with 'ffff'"):
        rollback_request(stage.request(), "ffff")
    with pytest.raises(BadInput):
        rollback_request(stage.request(), "")
