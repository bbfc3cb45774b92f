from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.rendering import RenderingFailed, placeholders, read_manifests, render

HEAD = 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: "{{ name }}"}\n'


def one(text: str, **values: object) -> dict[str, object]:
    return render({"file.yaml": HEAD + text}, {"name": "n", **values})[0]


@pytest.mark.parametrize("value", [3, 1.5, True, None, ["a", 1], {"k": ["v"]}, "text", "{{ name }}"])
def test_a_lone_placeholder_keeps_its_values_type(value: object) -> None:
    assert one('data: "{{ value }}"', value=value)["data"] == value


def test_a_text_can_hold_several_placeholders() -> None:
    assert one('data: "{{ a }}:{{ b }}/{{a}}"', a="x", b=8080)["data"] == "x:8080/x"


def test_keys_can_hold_placeholders() -> None:
    assert one('data: {"{{ key }}.io": 1}', key="example")["data"] == {"example.io": 1}


@given(st.text())
def test_no_value_can_change_the_structure(value: str) -> None:
    assert one('data: {a: "x{{ value }}", b: 1}', value=value)["data"] == {"a": f"x{value}", "b": 1}


def test_a_value_used_twice_is_not_shared() -> None:
    rendered = one('data: {a: "{{ value }}", b: "{{ value }}"}', value={"k": 1})["data"]
    assert isinstance(rendered, dict)
    assert rendered["a"] == rendered["b"]
    assert rendered["a"] is not rendered["b"]


def test_a_placeholder_without_a_value_names_file_and_nearest_name() -> None:
    with pytest.raises(RenderingFailed, match=r"file\.yaml: .*'replicsa' has no value\. Did you mean 'replicas'\?"):
        one('data: "{{ replicsa }}"', replicas=1)


def test_a_value_that_no_file_uses_is_refused() -> None:
    with pytest.raises(RenderingFailed, match=r"file\.yaml: .*'nmae'.* Did you mean 'name'\?"):
        one("data: {}", nmae=1)


def test_comments_are_not_placeholders() -> None:
    assert placeholders([HEAD + '# "{{ other }}"\ndata: {}']) == {"name"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("data: {{ value }}", "not valid YAML"),
        ("data: {}\n---\n" + HEAD, "more than one document"),
        ('data: "{{ Value }}"', "is not a placeholder"),
        ('data: "{{ value.x }}"', "is not a placeholder"),
        ('data: "at {{ value }}"', "cannot stand inside the text"),
    ],
)
def test_what_is_not_plain_yaml_with_placeholders_is_refused(text: str, why: str) -> None:
    with pytest.raises(RenderingFailed, match=why):
        one(text, value=[1])


def test_a_file_that_is_no_kubernetes_object_is_refused() -> None:
    with pytest.raises(RenderingFailed, match="not a Kubernetes object"):
        render({"x.yaml": "a: 1"}, {})


def test_every_placeholder_of_every_manifest_is_explained_in_the_readme() -> None:
    from importlib import resources

    folder = resources.files("manifests")
    names = [file.name for file in folder.iterdir() if file.name.endswith(".yaml")]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    used = placeholders(read_manifests(names).values())
    assert {name for name in used if f"`{name}`" not in readme} == set()
    assert {name for name in names if f"`{name}`" not in readme} == set()
