from __future__ import annotations

from typing import Any

from rollout.diff import diff_markdown, diff_object
from rollout.report import Action


def deployment(**changes: Any) -> dict[str, Any]:
    container = {
        "name": "inference-server",
        "image": "vllm:1",
        "args": ["--port=8080", "--max-model-len=16384"],
        "env": [{"name": "A", "value": "1"}],
        **changes,
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": "vllm",
            "namespace": "llm",
            "uid": "1",
            "resourceVersion": "7",
            "generation": 1,
            "managedFields": [{"manager": "x"}],
            "annotations": {"deployment.kubernetes.io/revision": "1"},
        },
        "spec": {"replicas": 1, "template": {"spec": {"containers": [container]}}},
        "status": {"readyReplicas": 1},
    }


def secret(token: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token"}, "data": {"hf_api_token": token}}


def test_what_servers_and_controllers_write_is_no_difference() -> None:
    live, planned = deployment(), deployment()
    planned["metadata"] = {"name": "vllm", "namespace": "llm", "resourceVersion": "9", "generation": 2}
    del planned["status"]
    assert diff_object(live, planned).action is Action.UNCHANGED


def test_a_changed_flag_is_named_by_its_path() -> None:
    diff = diff_object(deployment(), deployment(image="vllm:2", args=["--port=8080", "--max-model-len=8192"]))
    container = '.spec.template.spec.containers[name="inference-server"]'
    assert diff.action is Action.UPDATED
    assert diff.name == "llm/vllm"
    assert [(field.path, field.before, field.after) for field in diff.fields] == [
        (f"{container}.image", '"vllm:1"', '"vllm:2"'),
        (f"{container}.args[]", '"--max-model-len=16384"', ""),
        (f"{container}.args[]", "", '"--max-model-len=8192"'),
    ]


def test_the_order_of_arguments_is_a_difference() -> None:
    diff = diff_object(deployment(args=["a", "b"]), deployment(args=["b", "a"]))
    assert [field.after for field in diff.fields] == ['["b", "a"]']


def test_list_elements_are_compared_by_their_key() -> None:
    env = [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}]
    diff = diff_object(deployment(), deployment(env=env))
    (field,) = diff.fields
    assert field.path.endswith('.env[name="B"]')
    assert field.after == '{"name": "B", "value": "2"}'


def test_created_and_deleted_objects_are_told_apart() -> None:
    assert diff_object(None, deployment()).action is Action.CREATED
    assert diff_object(deployment(), None).action is Action.DELETED


def test_a_changed_secret_shows_that_it_changed_and_never_what_it_holds() -> None:
    diff = diff_object(secret("b2xk"), secret("bmV3"))
    assert diff.action is Action.UPDATED
    shown = diff_markdown((diff,)) + diff.model_dump_json()
    assert "b2xk" not in shown
    assert "bmV3" not in shown
    assert diff_object(secret("b2xk"), secret("b2xk")).action is Action.UNCHANGED


def test_the_markdown_lists_every_object_and_its_fields() -> None:
    created, updated = diff_object(None, secret("x")), diff_object(deployment(), deployment(image="vllm:2"))
    text = diff_markdown((created, updated))
    assert "- **created** Secret `token`" in text
    assert '  + .spec.template.spec.containers[name="inference-server"].image: "vllm:2"' in text


def test_a_change_names_its_first_fields() -> None:
    change = diff_object(deployment(), deployment(image="vllm:2")).change
    assert (change.action, change.kind, change.name) == (Action.UPDATED, "Deployment", "llm/vllm")
    assert change.detail.endswith(".image")
