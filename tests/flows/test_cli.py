"""What a user of the command line sees: one message that says what, where and what to do, and an exit code for CI."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import yaml

from flows.cli import DEFAULTS, main
from rollout.errors import ExitCode
from tests.flows.command_line import environment, run
from tests.flows.conftest import Stage

TARGET = {
    "name": "test",
    "project": "test-project",
    "region": "europe-west1",
    "cluster": {"name": "test"},
    "namespace": "serving",
    "ksa": "model-ksa",
    "gsa": "model-gsa",
    "bucket": "test-models",
    "endpoints": {"hub": "http://127.0.0.1:9", "storage": "http://127.0.0.1:9"},
    "credentials": "anonymous",
}
MODEL = "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A command that cannot work, and what its user must be told."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    exit_code: ExitCode = ExitCode.BAD_INPUT

    def __str__(self) -> str:
        return " ".join(self.arguments)


MISTAKES = [
    Mistake(("roll-out",), ("No such command", "roll-out")),
    Mistake(("plan", MODEL), ("Missing option", "--target")),
    Mistake(("plan", MODEL, "--target", "target.yaml", "--force"), ("No such option", "--force")),
    Mistake(("rehearse", "--engine", "sglang"), ("sglang", "simulated", "vllm")),
    Mistake(("plan", "smollm2-135m-instuct", "-t", "target.yaml"), ("Did you mean", MODEL)),
    Mistake(("plan", MODEL, "-t", "nowhere"), ("nowhere", "deployments/targets/", "google-cloud")),
    Mistake(("plan", MODEL, "-t", "absent.yaml"), ("absent.yaml", "No such file")),
    Mistake(("plan", MODEL, "-t", "binary.yaml"), ("binary.yaml",)),
    Mistake(("plan", MODEL, "-t", "broken.yaml"), ("broken.yaml", "not valid YAML")),
    Mistake(("plan", MODEL, "-t", "typo.yaml"), ("typo.yaml", "buckett", "Extra inputs", "bucket: Field required")),
    Mistake(("plan", "two words", "-t", "target.yaml"), ("model", "pattern")),
    Mistake(("plan", MODEL, "-t", "target.yaml", "--revision", "a b"), ("revision", "pattern")),
    Mistake(("rollout", MODEL, "-t", "target.yaml", "--policy", "absent.yaml"), ("absent.yaml", "No such file")),
    Mistake(("rollout", MODEL, "-t", "target.yaml", "--policy", "binary.yaml"), ("binary.yaml", "policy")),
    Mistake(("rollout", MODEL, "-t", "target.yaml", "--policy", "broken.yaml"), ("broken.yaml", "policy")),
    Mistake(("rollout", MODEL, "-t", "target.yaml", "--policy", "policy.yaml"), ("policy.yaml", "objectivs", "Extra")),
    Mistake(("check-layout", "gs://b/m", "-t", "nowhere"), ("nowhere", "deployments/targets/")),
    Mistake(("check-layout", "some/folder"), ("some/folder", "gs://bucket")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that `MISTAKES` name."""
    folder = tmp_path_factory.mktemp("mistakes")
    files = {
        "target.yaml": TARGET,
        "typo.yaml": {("buckett" if key == "bucket" else key): value for key, value in TARGET.items()},
        "policy.yaml": {"objectivs": {}},
    }
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "broken.yaml").write_text("a: [1", encoding="utf-8")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_told_in_one_message(
    mistake: Mistake, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder / word) if word.endswith(".yaml") else word for word in mistake.arguments]
    monkeypatch.setattr(sys, "argv", ["llm-rollout", *arguments])
    for name in DEFAULTS:  # restored afterwards: `main` sets them for its own process
        monkeypatch.setenv(name, os.environ.get(name, DEFAULTS[name]))
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == mistake.exit_code, told.err
    assert "Traceback" not in told.err
    for word in mistake.words:
        assert word in told.err
    assert told.out == ""


def test_a_wrong_name_is_found_before_any_server_is_asked(folder: Path) -> None:
    env = environment(PREFECT_API_URL="http://127.0.0.1:9/api")  # nobody listens there
    ended = run("rollout", "smollm2", "--target", str(folder / "target.yaml"), env=env)
    assert ended.returncode == ExitCode.BAD_INPUT
    assert ended.stderr.startswith("error: model: there is no preset 'smollm2'")
    assert "Traceback" not in ended.stderr


def test_a_prefect_server_that_does_not_answer_is_named(folder: Path) -> None:
    env = environment(PREFECT_API_URL="http://127.0.0.1:9/api")
    ended = run("plan", MODEL, "--target", str(folder / "target.yaml"), env=env)
    assert ended.returncode == ExitCode.FAILED
    assert ended.stderr.startswith("error: Failed to reach API at http://127.0.0.1:9/api")
    assert "Traceback" not in ended.stderr


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
class TestWithAServer:
    def test_a_failing_rollout_shows_its_step_and_its_error_once_each(self, stage: Stage) -> None:
        ended = run(
            *("rollout", str(stage.model_file), "--target", str(stage.target_file), "--revision", "no-such-branch"),
            *("--report", str(stage.report_file)),
        )
        assert ended.returncode == ExitCode.BAD_INPUT
        assert "Traceback" not in ended.stderr
        told = [line for line in ended.stderr.splitlines() if "'no-such-branch'" in line]
        assert len(told) == 2
        assert "Task run 'pin model'" in told[0]
        assert told[1].startswith("error: ")

    def test_the_debug_level_shows_the_traceback(self, stage: Stage) -> None:
        ended = run(
            *("plan", str(stage.model_file), "--target", str(stage.target_file), "--revision", "no-such-branch"),
            env=environment(PREFECT_LOGGING_LEVEL="DEBUG"),
        )
        assert ended.returncode == ExitCode.BAD_INPUT
        assert "Traceback" in ended.stderr

    def test_a_teardown_must_be_told_what_to_tear_down(self, stage: Stage) -> None:
        ended = run("teardown", "--target", str(stage.target_file))
        assert ended.returncode == ExitCode.BAD_INPUT
        assert "--model" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_file_that_is_no_record_is_named(self, stage: Stage) -> None:
        stage.report_file.write_text('{"schema_version": 1}', encoding="utf-8")
        ended = run("teardown", "--target", str(stage.target_file), "--report", str(stage.report_file))
        assert ended.returncode == ExitCode.BAD_INPUT
        assert "not a record of a rollout" in ended.stderr
        assert str(stage.report_file) in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_record_that_cannot_be_read_is_named(self, stage: Stage) -> None:
        stage.report_file.write_bytes(b"\xff\xfe\x00")
        ended = run("teardown", "--target", str(stage.target_file), "--report", str(stage.report_file))
        assert ended.returncode == ExitCode.BAD_INPUT
        assert str(stage.report_file) in ended.stderr
        assert "Traceback" not in ended.stderr
