"""Rendered manifests are kept, so that a change of a template or a default shows as a diff for people to read.

`REGENERATE_GOLDENS=1 pytest tests/manifests` writes them anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rollout.catalog import load_model, load_target
from rollout.model import ModelFile, PinnedModel
from rollout.objects import serving_objects
from rollout.serving import ServingSpec
from rollout.target import Target, WeightsLayout
from rollout.universe import Universe
from rollout.vllm_flags import parse_arguments

HERE = Path(__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pinned(repo_id: str, weights_bytes: int) -> PinnedModel:
    files = (
        ModelFile(path="config.json", size_bytes=4096, git_blob_sha1="1" * 40),
        ModelFile(path="model.safetensors", size_bytes=weights_bytes, sha256="2" * 64),
    )
    return PinnedModel(repo_id=repo_id, revision="main", commit_sha=COMMIT, files=files)


GOLDENS = {
    "gemma-4-26b-a4b-it": ("s3ns-france", 51_600_000_000),
    "gemma-4-31b-it": ("s3ns-france", 62_500_000_000),
    "smollm2-135m-instruct": ("s3ns-france", 269_000_000),
}


def rendered(preset: str) -> tuple[dict[str, Any], ...]:
    target_name, weights_bytes = GOLDENS[preset]
    loaded = load_model(preset)
    model = pinned(loaded.model.repo_id, weights_bytes)
    return serving_objects(model, loaded.serving, load_target(target_name), rollout_id="0a1b2c3d4e")


@pytest.mark.parametrize("preset", GOLDENS)
def test_rendered_manifests_equal_their_golden(preset: str) -> None:
    golden = HERE / "goldens" / f"{preset}.yaml"
    objects = rendered(preset)
    if os.environ.get("REGENERATE_GOLDENS"):
        golden.write_text(yaml.safe_dump_all(objects, sort_keys=False, width=120), encoding="utf-8")
    assert objects == tuple(yaml.safe_load_all(golden.read_text(encoding="utf-8")))


@pytest.mark.parametrize("preset", GOLDENS)
def test_vllm_knows_every_argument(preset: str) -> None:
    deployment = next(item for item in rendered(preset) if item["kind"] == "Deployment")
    args = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert parse_arguments(args[3:])["model"].startswith("gs://")


ADDITIONS = {
    "ComputeClass": {"metadata.labels"},
    "Service": {"metadata.labels", "metadata.namespace"},
    "Deployment": {
        "metadata.annotations",
        "metadata.labels",
        "metadata.namespace",
        "spec.progressDeadlineSeconds",
        "spec.strategy",
        "spec.template.metadata.annotations",
        "spec.template.metadata.labels.app.kubernetes.io/instance",
        "spec.template.metadata.labels.app.kubernetes.io/managed-by",
        "spec.template.spec.securityContext",
        "spec.template.spec.serviceAccountName",
        "spec.template.spec.terminationGracePeriodSeconds",
        "spec.template.spec.containers[0].lifecycle",
        "spec.template.spec.containers[0].ports[0].protocol",
        "spec.template.spec.containers[0].readinessProbe",
        "spec.template.spec.containers[0].securityContext",
        "spec.template.spec.containers[0].startupProbe",
        # The tutorial's smoke request names the model, but its manifest never gives it that name.
        "spec.template.spec.containers[0].args: --served-model-name=NAME",
        # The tutorial's own option "to limit the context window".
        "spec.template.spec.containers[0].args: --max-model-len=16384",
    },
}
"""Everything that our manifests have and the tutorial's have not, each on purpose."""


@pytest.mark.parametrize(
    ("document", "bucket", "label"),
    [
        ("vllm-4-26b-a4b-it", "gemma-4-26b-it", "gemma-4-26b-a4b-it"),
        ("vllm-4-31b-it", "gemma-4-31b-it", "gemma-4-31b-it"),
    ],
)
def test_every_field_of_the_tutorial_is_there_and_every_addition_is_deliberate(
    document: str, bucket: str, label: str
) -> None:
    target = Target(
        name="tutorial",
        project="my-project",
        region="u-france-east1",
        universe=Universe(domain="s3nsapis.fr"),
        ksa="gemma-ksa",
        gsa="gemma-gsa",
        bucket=bucket,
        weights_layout=WeightsLayout.ROOT,
    )
    serving = ServingSpec(model_label=label, served_model_name="NAME")
    ours = {item["kind"]: item for item in serving_objects(pinned("google/x", 1), serving, target, rollout_id="id")}
    text = (HERE / "tutorial" / f"{document}.yaml").read_text(encoding="utf-8")
    for theirs in yaml.safe_load_all(text):
        missing, added = compare(theirs, ours[theirs["kind"]])
        assert missing == set()
        assert added == ADDITIONS[theirs["kind"]]


def compare(theirs: Any, ours: Any, path: str = "") -> tuple[set[str], set[str]]:
    """Paths that only one side has, or where the values differ (these count as missing)."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        missing, added = set(), set()
        for key in theirs.keys() | ours.keys():
            below = f"{path}.{key}" if path else str(key)
            if key not in ours:
                missing.add(below)
            elif key not in theirs:
                added.add(below)
            else:
                found = compare(theirs[key], ours[key], below)
                missing |= found[0]
                added |= found[1]
        return missing, added
    if isinstance(theirs, list) and isinstance(ours, list):
        if all(isinstance(item, str) for item in theirs + ours):
            return {f"{path}: {x}" for x in theirs if x not in ours}, {f"{path}: {x}" for x in ours if x not in theirs}
        if len(theirs) == len(ours):
            pairs = [compare(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(theirs, ours, strict=True))]
            return set().union(*(p[0] for p in pairs)), set().union(*(p[1] for p in pairs))
    return (set(), set()) if theirs == ours else ({f"{path}: {theirs!r} is {ours!r}"}, set())
