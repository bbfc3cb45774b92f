"""What the layout check finds, and what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rollout.errors import CheckpointInvalid, LayoutInvalid
from rollout.layout import (
    CONFIG,
    INDEX,
    LayoutReport,
    SafetensorsHeader,
    Severity,
    check,
    check_checkpoint,
    header_bytes,
    parse_config,
    parse_header,
    require_valid,
)
from rollout.preflight import CheckState

URI = "gs://bucket/org/m/sha"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Place:
    """A right model path, to be damaged."""

    def __init__(self) -> None:
        self.documents = {
            CONFIG: json.dumps({"architectures": ["Gemma4ForConditionalGeneration"]}),
            INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}),
            "tokenizer_config.json": "{}",
        }
        self.headers: dict[str, SafetensorsHeader | str] = {
            SHARDS[0]: SafetensorsHeader(tensors=frozenset({"a"}), file_bytes=100),
            SHARDS[1]: SafetensorsHeader(tensors=frozenset({"b"}), file_bytes=100),
        }
        self.sizes = {name: len(text) for name, text in self.documents.items()}
        self.sizes |= {"tokenizer.json": 5, "chat_template.jinja": 5, ".llm-rollout/ready.json": 5}
        self.sizes |= dict.fromkeys(SHARDS, 100)

    def check(self, **more: Any) -> LayoutReport:
        documents = {name: text.encode() for name, text in self.documents.items() if name in self.sizes}
        return check(URI, self.sizes, documents, self.headers, **more)

    def errors(self, **more: Any) -> list[str]:
        return [finding.message for finding in self.check(**more).findings if finding.severity is Severity.ERROR]

    def warnings(self) -> list[str]:
        return [finding.message for finding in self.check().findings if finding.severity is Severity.WARNING]


@pytest.fixture
def place() -> Place:
    return Place()


def test_a_right_path_has_no_findings(place: Place) -> None:
    report = place.check()
    require_valid(report)
    assert report.findings == ()
    assert report.summary.startswith("Gemma4ForConditionalGeneration: 2 shards with 2 tensors")
    assert {"check": "chat template", "found": "chat_template.jinja"} in report.rows()


@pytest.mark.parametrize(
    ("elsewhere", "meant"),
    [
        ([f"{URI}/deeper", "gs://bucket/other"], f"{URI}/deeper"),
        (["gs://bucket/org/m", "gs://bucket"], "gs://bucket/org/m"),
        (["gs://bucket/org/n/sha", "gs://bucket/zzz"], "gs://bucket/org/n/sha"),
    ],
)
def test_a_missing_config_names_the_nearest_path_that_has_one(place: Place, elsewhere: list[str], meant: str) -> None:
    del place.sizes[CONFIG]
    assert place.errors(config_paths=elsewhere) == [f"{URI} holds no config.json. Did you mean {meant}?"]


def test_an_empty_path_in_an_empty_bucket_says_so(place: Place) -> None:
    place.sizes = {}
    assert place.errors() == [f"{URI} is empty. No path in this bucket holds one: publish the weights."]


def test_a_missing_shard_is_named(place: Place) -> None:
    del place.sizes[SHARDS[1]], place.headers[SHARDS[1]]
    (message,) = place.errors()
    assert message.startswith(f"{URI}/{SHARDS[1]}, a shard that the index names, is missing")
    with pytest.raises(LayoutInvalid, match=SHARDS[1]):
        require_valid(place.check())


def test_a_truncated_shard_states_both_sizes(place: Place) -> None:
    place.sizes[SHARDS[0]] = 99
    assert place.errors() == [f"{SHARDS[0]} has 99 bytes, its header asks for 100: send it again."]


def test_a_shard_that_is_no_safetensors_says_why(place: Place) -> None:
    place.headers[SHARDS[0]] = "its header is not JSON"
    assert place.errors() == [f"{SHARDS[0]} cannot be read as safetensors: its header is not JSON."]


def test_an_index_that_places_a_tensor_elsewhere_is_an_error_for_both_shards(place: Place) -> None:
    place.documents[INDEX] = json.dumps({"weight_map": {"a": SHARDS[1], "b": SHARDS[1], "c": SHARDS[0]}})
    assert [message.partition(" the tensor")[0] for message in place.errors()] == [
        f"index and shard disagree: {SHARDS[0]} lacks",
        f"index and shard disagree: {SHARDS[0]} also holds",
        f"index and shard disagree: {SHARDS[1]} lacks",
    ]


def test_shards_without_an_index_need_one(place: Place) -> None:
    del place.sizes[INDEX]
    assert place.errors() == [f"{INDEX} is missing, but there are 2 shards ({SHARDS[0]}, …)."]


def test_one_file_needs_no_index(place: Place) -> None:
    del place.sizes[INDEX], place.sizes[SHARDS[1]], place.headers[SHARDS[1]]
    assert place.errors() == []


def test_a_shard_that_the_index_does_not_name_is_foreign(place: Place) -> None:
    place.sizes["model-old.safetensors"] = 10
    place.headers["model-old.safetensors"] = SafetensorsHeader(tensors=frozenset(), file_bytes=10)
    assert place.errors() == [
        "the index does not name model-old.safetensors, and a server that streams would load it as well."
    ]


def test_no_weights_at_all_is_an_error_and_bin_files_are_a_warning(place: Place) -> None:
    for name in (INDEX, *SHARDS):
        del place.sizes[name]
    place.headers = {}
    assert place.errors() == [f"{URI} holds no weights: model.safetensors is missing."]
    place.sizes["pytorch_model.bin"] = 10
    assert place.errors() == []
    assert "not safetensors" in place.warnings()[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[", "config.json is not a JSON object."),
        ("[]", "config.json is not a JSON object."),
        ('{"architectures": 1}', "config.json names no architecture"),
        ("{}", "config.json names no architecture: it is not the configuration of a language model."),
        ('{"architectures": ["Gemma4ForCausalLMs"]}', "The nearest one that it serves is Gemma4ForCausalLM."),
        ('{"architectures": ["StableDiffusion"]}', "StableDiffusion, which vLLM 0.32.0 does not serve."),
    ],
)
def test_a_configuration_that_vllm_does_not_serve_is_an_error(place: Place, config: str, message: str) -> None:
    place.documents[CONFIG] = config
    assert message in place.errors(vllm_release="0.32.1")[0]


@pytest.mark.parametrize(
    ("release", "image"), [(None, "The image is of an unknown release"), ("0.40.0", "The image is vLLM 0.40.0")]
)
def test_an_architecture_newer_than_the_list_is_a_warning_that_names_the_lists_release(
    place: Place, release: str | None, image: str
) -> None:
    place.documents[CONFIG] = '{"architectures": ["Gemma5ForCausalLM"]}'
    report = place.check(vllm_release=release)
    assert report.is_valid
    (warning,) = report.findings
    assert "vLLM 0.32.0 does not serve" in warning.message
    assert image in warning.message


def test_the_files_of_a_commit_are_checked_as_what_they_will_be_in_the_bucket(place: Place) -> None:
    place.headers = {}
    assert check_checkpoint(place.check()).state is CheckState.OK
    place.documents[INDEX] = json.dumps(
        {"metadata": {"total_size": 10**9}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    )
    assert "1,000,000,000 bytes of tensors, the shards have 200" in check_checkpoint(place.check()).why
    del place.sizes[SHARDS[1]]
    check = check_checkpoint(place.check())
    assert check.state is CheckState.FAILED
    assert SHARDS[1] in check.why


@pytest.mark.parametrize("data", [None, b"[", b"[]", b"\xff", b"[" * 10**6])
def test_a_configuration_that_is_none_is_an_error_that_says_where(data: bytes | None) -> None:
    with pytest.raises(CheckpointInvalid, match=r"^org/model@abc: config\.json is .* Choose another re|in the trans"):
        parse_config(data, "org/model@abc")


def test_no_tokenizer_is_an_error_and_half_of_one_is_none(place: Place) -> None:
    del place.sizes["tokenizer.json"]
    place.sizes["vocab.json"] = 1
    assert place.errors() == [f"no tokenizer: {URI}/tokenizer.json (or tokenizer.model) is missing."]
    place.sizes["merges.txt"] = 0
    assert place.check().tokenizer == "vocab.json + merges.txt"


def test_no_chat_template_is_a_warning_unless_the_tokenizer_has_one(place: Place) -> None:
    del place.sizes["chat_template.jinja"]
    assert place.warnings() == ["no chat template: /v1/chat/completions will answer 400; completions work."]
    place.documents["tokenizer_config.json"] = '{"chat_template": "{{ x }}"}'
    assert place.warnings() == []


def test_an_original_folder_breaks_streaming_and_another_one_is_only_superfluous(place: Place) -> None:
    place.sizes |= {"original/consolidated.00.pth": 1, "images/a.png": 1, "additional_chat_templates/t.jinja": 1}
    assert place.errors() == [
        "the folder original/ holds weights (original/consolidated.00.pth), which break streaming."
    ]
    assert place.warnings() == ["the folder images/ does not belong to the model (images/a.png)."]


def test_files_at_the_root_that_are_not_the_models_are_named(place: Place) -> None:
    place.sizes |= {"x.tar": 5, "secrets.env": 1, "LICENSE": 1, "generation_config.json": 1, "modeling.py": 1}
    assert place.warnings() == ["files that do not belong to the model: secrets.env, x.tar."]
    assert place.errors() == []


def test_weights_in_a_second_format_are_named(place: Place) -> None:
    place.sizes |= {"pytorch_model.bin": 9, "model.gguf": 9}
    assert place.warnings() == ["weights in a second format beside safetensors: model.gguf, pytorch_model.bin."]


def test_an_unfinished_transfer_is_a_warning(place: Place) -> None:
    place.sizes[".llm-rollout/transfer/incoming/x.1"] = 1
    assert "left unfinished (1 objects)" in place.warnings()[0]


def header(table: object) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


def test_a_header_tells_how_large_its_file_has_to_be() -> None:
    data = header({"__metadata__": {}, "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}})
    assert parse_header(data) == SafetensorsHeader(tensors=frozenset({"a"}), file_bytes=len(data) + 12)
    assert header_bytes(data) == len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"abc", "shorter than 8 bytes"),
        ((10**9).to_bytes(8, "little"), "would be 1,000,000,000 bytes"),
        (header({"a": 1})[:-1], "ends within its header"),
        ((4).to_bytes(8, "little") + b"{{{{", "not JSON"),
        (header([1]), "not a table"),
        (header({"a": {"dtype": "XX", "shape": [], "data_offsets": [0, 1]}}), "in an unknown way"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "does not fit its 4 bytes"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_header(data)
