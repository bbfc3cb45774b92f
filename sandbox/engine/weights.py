"""Where the engine reads its weights, and whether they can be loaded: Cloud Storage, the hub, or a local folder.

Only what vLLM needs to decide is read: the listing, config.json, tokenizer and index, and the header of each shard.
The bytes themselves stay where they are; loading them costs simulated time (see `startup.load_seconds`). What is
missing or broken ends in the message that vLLM 0.32 gives for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import requests

LOCAL_COPY = "/data"
"""Where the weights of a `gs://` path are inside the container (GKE Inference Quickstart); vLLM's messages say it."""

REQUEST_TIMEOUT_S = 60.0
"""Everything read here is small and comes from loopback; a machine under full load may still need seconds."""

_HEADER_GUESS_BYTES = 256 * 1024
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""


class WeightsError(Exception):
    """The checkpoint cannot be loaded; the text is what vLLM, or the image's entrypoint, says last in its log."""


class ConfigError(WeightsError):
    """Found while vLLM's API server reads the configuration."""


class LoadError(WeightsError):
    """Found while a worker process loads the weights."""


class EntrypointError(WeightsError):
    """Found while the image's entrypoint copies the weights; vLLM never starts."""


class Source(Protocol):
    path: str
    """What vLLM's messages call the folder."""

    def sizes(self) -> dict[str, int]:
        """Files by relative name, with their sizes in bytes."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` up to (not including) `end` of a file; fewer when it is shorter."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the engine knows about its model once it is loaded."""

    path: str
    config: dict[str, Any]
    shards: dict[str, int]
    """Weight files and their sizes in bytes."""
    tokenizer_json: bytes | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        return sum(self.shards.values())

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the configuration (multimodal models nest it)."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def is_multimodal(self) -> bool:
        return isinstance(self.config.get("vision_config"), dict)

    @property
    def can_think(self) -> bool:
        """Whether the model answers `enable_thinking`: its chat template is where that switch takes effect."""
        return "enable_thinking" in (self.chat_template or "")


def open_source(model: str, environment: Mapping[str, str] = os.environ) -> Source:
    """Where `--model` points to: `gs://bucket[/prefix]`, a folder or mounted bucket, or a repository of the hub."""
    mounted: str = json.loads(environment.get("SANDBOX_MOUNTS", "{}")).get(model, "")
    if mounted.startswith("gs://"):
        return StorageSource(mounted, environment)
    if model.startswith("gs://"):
        return StorageSource(model, environment)
    if Path(model).is_dir():
        return FolderSource(Path(model))
    if model.startswith(("/", ".")) or model.count("/") > 1:
        raise _not_a_repository(model)
    return HubSource(model, environment)


def _not_a_repository(path: str) -> ConfigError:
    """What huggingface_hub says of a path that vLLM did not find and therefore takes for a repository's name."""
    if path.count("/") > 1:
        return ConfigError(
            "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or"
            f" 'namespace/repo_name': '{path}'. Use `repo_type` argument if needed."
        )
    return ConfigError(
        "huggingface_hub.errors.HFValidationError: Repo id must use alphanumeric chars, '-', '_' or '.'. The name"
        f" cannot start or end with '-' or '.' and the maximum length is 96: '{path}'."
    )


def read_checkpoint(source: Source) -> Checkpoint:
    """Check that `source` holds a loadable checkpoint and read its small files. Raises WeightsError."""
    sizes = source.sizes()
    if "config.json" not in sizes:
        raise ConfigError(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            f"  Value error, Invalid repository ID or local directory specified: '{source.path}'.\n"
            "Please verify the following requirements:\n"
            "1. Provide a valid Hugging Face repository ID.\n"
            "2. Specify a local directory that contains a recognized configuration file.\n"
            "   - For Hugging Face models: ensure the presence of a 'config.json'.\n"
            "   - For Mistral models: ensure the presence of a 'params.json'.\n"
            " [type=value_error, input_value=ArgsKwargs((), {'model': ...nderer_num_workers': 1}),"
            " input_type=ArgsKwargs]\n"
            "    For further information visit https://errors.pydantic.dev/2.14/v/value_error"
        )
    config = _read_json(source, "config.json")
    if not config.get("model_type"):
        raise ConfigError(
            f"ValueError: Unrecognized model in {source.path}. Should have a `model_type` key in its config.json."
        )
    tokenizer_config = _read_json(source, "tokenizer_config.json") if "tokenizer_config.json" in sizes else {}
    return Checkpoint(
        path=source.path,
        config=config,
        shards=weight_files(sizes, source),
        tokenizer_json=source.read("tokenizer.json") if "tokenizer.json" in sizes else None,
        chat_template=_chat_template(source, sizes, tokenizer_config),
        special_tokens=_special_tokens(tokenizer_config),
    )


def check_shards(source: Source, checkpoint: Checkpoint) -> None:
    """What a worker would find while loading: every shard must be as long as its header says. Raises LoadError."""
    for name, size in checkpoint.shards.items():
        if name.endswith(".safetensors"):
            _check_safetensors(source, name, size)


def weight_files(sizes: dict[str, int], source: Source) -> dict[str, int]:
    """The files that hold weights, as vLLM chooses them. Raises LoadError when one is missing."""
    found = {name: size for name, size in sorted(sizes.items()) if "/" not in name and name.endswith(".safetensors")}
    if "model.safetensors.index.json" in sizes:
        index = _read_json(source, "model.safetensors.index.json")
        referenced = set(index.get("weight_map", {}).values())
        if missing := sorted(referenced - set(found)):
            paths = ", ".join(f"'{source.path}/{name}'" for name in missing)
            raise LoadError(f"FileNotFoundError: Weight files referenced in index but missing: {{{paths}}}")
        found = {name: size for name, size in found.items() if name in referenced}
    if not found:
        raise LoadError(f"RuntimeError: Cannot find any model weights with `{source.path}`")
    return found


def _check_safetensors(source: Source, name: str, size: int) -> None:
    problem = "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: "
    start = source.read(name, 0, _HEADER_GUESS_BYTES)
    if len(start) < 8:
        raise LoadError(problem + "header too small")
    (header_bytes,) = struct.unpack("<Q", start[:8])
    if header_bytes > _MAX_HEADER_BYTES:
        raise LoadError(problem + "header too large")
    if 8 + header_bytes > size:
        raise LoadError(problem + "invalid header length")
    raw = start[8 : 8 + header_bytes]
    if len(raw) < header_bytes:
        raw += source.read(name, 8 + len(raw), 8 + header_bytes)
    try:
        tensors = json.loads(raw)
    except ValueError as error:
        raise LoadError(problem + f"invalid JSON in header: {error}") from error
    data_bytes = max((entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"), default=0)
    if 8 + header_bytes + data_bytes != size:
        raise LoadError(problem + "incomplete metadata, file not fully covered")


def _read_json(source: Source, name: str) -> dict[str, Any]:
    try:
        value = json.loads(source.read(name))
    except ValueError as error:
        raise ConfigError(
            f"OSError: It looks like the config file at '{source.path}/{name}' is not a valid JSON file."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"OSError: The file at '{source.path}/{name}' does not hold a JSON object.")
    return value


def _chat_template(source: Source, sizes: dict[str, int], tokenizer_config: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in sizes:
        return source.read("chat_template.jinja").decode()
    template = tokenizer_config.get("chat_template")
    return template if isinstance(template, str) else None


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = tokenizer_config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


class FolderSource:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = str(folder)

    def sizes(self) -> dict[str, int]:
        return {
            file.relative_to(self._folder).as_posix(): file.stat().st_size
            for file in self._folder.rglob("*")
            if file.is_file()
        }

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)


class StorageSource:
    """Objects below `gs://bucket[/prefix]`, read with the pod's identity through the JSON API."""

    def __init__(self, uri: str, environment: Mapping[str, str]) -> None:
        self._bucket, _, prefix = uri.removeprefix("gs://").partition("/")
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.path = LOCAL_COPY
        endpoint = environment.get("STORAGE_EMULATOR_HOST")
        if not endpoint:
            raise EntrypointError(f"STORAGE_EMULATOR_HOST is not set: there is no Cloud Storage to read {uri} from")
        self._base = (endpoint if "://" in endpoint else f"http://{endpoint}").rstrip("/") + "/storage/v1/b/"
        self._checksums: dict[str, str] = {}
        self._session = requests.Session()
        if identity := environment.get("SANDBOX_IDENTITY"):
            self._session.headers["Authorization"] = f"Bearer sandbox-identity:{identity}"

    def sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        page_token = ""
        while True:
            parameters = {"prefix": self._prefix} | ({"pageToken": page_token} if page_token else {})
            page = self._get(f"{quote(self._bucket, safe='')}/o", parameters).json()
            for entry in page.get("items", []):
                name = entry["name"].removeprefix(self._prefix)
                if name and not name.endswith("/"):
                    sizes[name] = int(entry["size"])
                    self._checksums[name] = str(entry["crc32c"])
            page_token = page.get("nextPageToken", "")
            if not page_token:
                break
        if not sizes:
            # Nothing was copied, so the folder is not there and vLLM takes its path for a repository's name.
            raise _not_a_repository(self.path)
        return sizes

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        return self._get(self._media_path(name), {"alt": "media"}, _range_header(start, end)).content

    def copy_to(self, cache: Path) -> Path:
        """Copy all files into a folder of `cache` named after their contents, unless it is there, and return it."""
        sizes = self.sizes()
        listing = json.dumps(sorted(self._checksums.items()))
        folder = cache / hashlib.sha256(listing.encode()).hexdigest()[:16]
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            for name, size in sizes.items():
                self._copy_file(name, size, Path(partial) / "model" / name)
            with contextlib.suppress(OSError):  # another pod was faster with the same contents
                (Path(partial) / "model").rename(folder)
        return folder

    def _copy_file(self, name: str, size: int, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for chunk in self._get(self._media_path(name), {"alt": "media"}, stream=True).iter_content(2**20):
                file.write(chunk)
        if target.stat().st_size != size:
            raise EntrypointError(f"{name} ended after {target.stat().st_size} of {size} bytes")

    def _media_path(self, name: str) -> str:
        return f"{quote(self._bucket, safe='')}/o/{quote(self._prefix + name, safe='')}"

    def _get(
        self,
        path: str,
        parameters: dict[str, str],
        headers: dict[str, str] | None = None,
        *,
        stream: bool = False,
    ) -> requests.Response:
        try:
            response = self._session.get(
                self._base + path, params=parameters, headers=headers, timeout=REQUEST_TIMEOUT_S, stream=stream
            )
        except requests.RequestException as error:
            raise EntrypointError(f"requests.exceptions.{type(error).__name__}: {error}") from error
        if response.ok:
            return response
        kinds = {401: "Unauthorized", 403: "Forbidden", 404: "NotFound"}
        kind = kinds.get(response.status_code, "GoogleAPICallError")
        raise EntrypointError(
            f"google.api_core.exceptions.{kind}: {response.status_code} GET"
            f" https://storage.googleapis.com/storage/v1/b/{path}: {_google_message(response)}"
        )


class HubSource:
    """A repository of the Hugging Face Hub at `HF_ENDPOINT`, at its main branch."""

    def __init__(self, repo_id: str, environment: Mapping[str, str]) -> None:
        self._repo_id = repo_id
        self.path = repo_id
        self._endpoint = environment.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._session = requests.Session()
        if token := environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"):
            self._session.headers["Authorization"] = f"Bearer {token}"
        self._commit = self._get(f"/api/models/{repo_id}/revision/main").json()["sha"]

    def sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        next_page: str | None = f"{self._endpoint}/api/models/{self._repo_id}/tree/{self._commit}?recursive=true"
        while next_page:
            page = self._get(next_page.removeprefix(self._endpoint))
            sizes |= {
                entry["path"]: int((entry.get("lfs") or entry)["size"])
                for entry in page.json()
                if entry.get("type") == "file"
            }
            next_page = page.links.get("next", {}).get("url")
        return sizes

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        path = f"/{self._repo_id}/resolve/{self._commit}/{quote(name)}"
        return self._get(path, _range_header(start, end)).content

    def _get(self, path: str, headers: dict[str, str] | None = None) -> requests.Response:
        try:
            response = self._session.get(self._endpoint + path, headers=headers, timeout=REQUEST_TIMEOUT_S)
        except requests.RequestException as error:
            raise ConfigError(
                f"OSError: We couldn't connect to '{self._endpoint}' to load the files, and couldn't find them in the"
                " cached files."
            ) from error
        if response.ok:
            return response
        code = response.headers.get("X-Error-Code", "")
        cause = f"{response.status_code} Client Error. ({response.url})"
        if code == "GatedRepo":
            raise ConfigError(
                "OSError: You are trying to access a gated repo.\nMake sure to have access to it at"
                f" https://huggingface.co/{self._repo_id}.\n{cause}\nAccess to model {self._repo_id} is restricted."
                " You must have access to it and be authenticated to access it. Please log in."
            )
        if response.status_code in (401, 404):
            raise ConfigError(
                f"OSError: {self._repo_id} is not a local folder and is not a valid model identifier listed on"
                " 'https://huggingface.co/models'\nIf this is a private repository, make sure to pass a token having"
                " permission to this repo either by logging in with `hf auth login` or by passing `token=<your_token>`"
            )
        raise ConfigError(f"huggingface_hub.errors.HfHubHTTPError: {cause}")


def _range_header(start: int, end: int | None) -> dict[str, str] | None:
    if end is None:
        return {"Range": f"bytes={start}-"} if start else None
    return {"Range": f"bytes={start}-{end - 1}"}


def _google_message(response: requests.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip() or response.reason
