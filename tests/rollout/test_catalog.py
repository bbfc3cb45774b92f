"""Presets by name or path; every mistake says what, where and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rollout import catalog
from rollout.errors import BadInput
from rollout.policy import RolloutPolicy, WarmUp
from rollout.request import RolloutRequest, resolve
from rollout.target import Approval


@pytest.mark.parametrize("name", catalog.known("models"))
def test_every_model_preset_loads(name: str) -> None:
    assert catalog.load_model(name).serving.served_model_name


@pytest.mark.parametrize("name", catalog.known("targets"))
def test_every_target_loads(name: str) -> None:
    assert catalog.load_target(name).bucket


def test_the_documents_models_and_the_documents_target_are_known() -> None:
    assert {"gemma-4-26b-a4b-it", "gemma-4-31b-it"} <= set(catalog.known("models"))
    assert catalog.load_target("s3ns-france").universe.domain == "s3nsapis.fr"
    assert catalog.load_target("s3ns-france").region == "u-france-east1"


def test_a_misspelt_preset_suggests_the_nearest() -> None:
    with pytest.raises(BadInput, match="Did you mean 'gemma-4-31b-it'"):
        catalog.load_model("gemma4-31b-it")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(BadInput, match=r"nowhere\.yaml: cannot read the file"):
        catalog.load_target("nowhere.yaml")


def test_every_wrong_field_of_a_file_is_named_without_its_value(tmp_path: Path) -> None:
    file = tmp_path / "target.yaml"
    file.write_text("name: Bad_Name\nproject: p\nregion: r\nbucket: b-ucket\nhub_token: hf_secret\n")
    with pytest.raises(BadInput) as caught:
        catalog.load_target(str(file))
    message = str(caught.value)
    assert "name: String should match pattern" in message
    assert "project: " in message
    assert "hub_token: Extra inputs are not permitted" in message
    assert "hf_secret" not in message


def test_runs_are_called_by_the_names_of_model_and_target_whatever_their_files_are_called(tmp_path: Path) -> None:
    file = tmp_path / "target.yaml"
    file.write_text("name: lab\nproject: my-project\nregion: europe-west4\nbucket: lab-models\n")
    assert RolloutRequest(model="gemma-4-31b-it", target="s3ns-france").title == "gemma-4-31b-it → s3ns-france"
    assert RolloutRequest(model="presets/tiny.yaml", target=str(file)).title == "tiny → lab"
    assert RolloutRequest(model="tiny", target="nowhere.yaml").title == "tiny → nowhere.yaml"


def test_wishes_of_the_request_lie_over_the_preset() -> None:
    spec = resolve(
        RolloutRequest(model="gemma-4-31b-it", target="s3ns-france", revision="v1", replicas=2, max_model_len=4096)
    )
    assert (spec.model.revision, spec.serving.replicas, spec.serving.max_model_len) == ("v1", 2, 4096)
    assert spec.serving.served_model_name == "google/gemma-4-31B-it"


@pytest.mark.parametrize("name", ["gemma-4-26b-a4b-it", "gemma-4-31b-it"])
def test_the_same_preset_runs_on_the_machines_that_its_target_names(name: str, tmp_path: Path) -> None:
    on_s3ns = resolve(RolloutRequest(model=name, target="s3ns-france")).serving.accelerator
    on_google = resolve(RolloutRequest(model=name, target="google-cloud")).serving.accelerator
    assert (on_s3ns.machine_type, on_s3ns.compute_class) == ("a3-edgegpu-8g-nolssd", "a3-edgegpu-8g-nolssd")
    assert (on_google.machine_type, on_google.compute_class) == ("a3-highgpu-8g", "h100")
    assert (on_google.type, on_google.count) == (on_s3ns.type, on_s3ns.count)

    path = tmp_path / "small.yaml"
    target = catalog.load_target("google-cloud").model_dump(mode="json")
    path.write_text(
        yaml.safe_dump({**target, "machines": {"nvidia-l4": {"machine_type": "g", "machine_gpu_count": 1}}})
    )
    assert resolve(RolloutRequest(model=name, target=str(path))).serving.accelerator == on_s3ns


def test_a_bare_off_in_yaml_is_no_truth_value() -> None:
    assert RolloutPolicy.model_validate(yaml.safe_load("warm_up: off")).warm_up is WarmUp.OFF


@pytest.mark.parametrize(
    ("asked", "least", "counts"),
    [
        ("never", "never", "never"),
        ("never", "on_change", "on_change"),
        ("always", "on_change", "always"),
        ("on_change", "always", "always"),
    ],
)
def test_no_form_goes_below_the_approval_that_the_target_asks_for(
    asked: str, least: str, counts: str, tmp_path: Path
) -> None:
    target = catalog.load_target("s3ns-france").model_copy(update={"approval": Approval(least)})
    path = tmp_path / "target.yaml"
    path.write_text(yaml.safe_dump(target.model_dump(mode="json")))
    request = RolloutRequest(target=str(path), policy=RolloutPolicy(approval=Approval(asked)))
    assert resolve(request).policy.approval is Approval(counts)


def test_an_impossible_wish_names_the_field(tmp_path: Path) -> None:
    preset = tmp_path / "model.yaml"
    preset.write_text(
        "model: {repo_id: a/b}\nserving: {served_model_name: m, tensor_parallel_size: 2, accelerator: {count: 1}}\n"
    )
    with pytest.raises(BadInput, match=r"raise accelerator\.count"):
        resolve(RolloutRequest(model=str(preset), target="s3ns-france"))
