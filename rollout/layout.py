"""Whether a model server could load from a path in a bucket: a pure check of a listing and the small files in it.

It answers the quickstart's "the pod is in a crash loop because the model path is wrong" before there is a pod: every
finding names the file that is missing or wrong, and the nearest path that would be right.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from rollout import preflight
from rollout.errors import CheckpointInvalid, LayoutInvalid
from rollout.selection import RESERVED_FOLDER, belongs_to_a_model
from rollout.transfer import WORK_FOLDER
from rollout.values import Value
from rollout.vllm_architectures import ARCHITECTURES, VLLM_VERSION

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
DOCUMENTS = (CONFIG, INDEX, TOKENIZER_CONFIG)
"""Files whose content the check reads."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

_TOKENIZERS: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("tekken.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
)
"""Each of these sets is a whole tokenizer; names that end in `.tiktoken` are one as well."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_WELCOME_FOLDERS = ("additional_chat_templates/", "1_Pooling/", RESERVED_FOLDER)
_DTYPE_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16},
    **{"U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6},
    "F4": 4,
}


class Severity(StrEnum):
    ERROR = "error"
    """A model server would not load this, or load something else."""
    WARNING = "warning"
    """It loads; something that people expect is missing or superfluous."""


class Finding(Value):
    severity: Severity
    path: str
    """Below the model path."""
    message: str
    """What is wrong, and what would be right."""


class LayoutReport(Value):
    """What lies at a model path, and what is wrong with it."""

    uri: str
    file_count: int
    total_bytes: int
    architecture: str = ""
    shards: tuple[str, ...] = ()
    tensor_count: int = 0
    tokenizer: str = ""
    chat_template: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def is_valid(self) -> bool:
        return not any(finding.severity is Severity.ERROR for finding in self.findings)

    @property
    def summary(self) -> str:
        """One line for people."""
        if not self.is_valid:
            errors = [finding for finding in self.findings if finding.severity is Severity.ERROR]
            return f"{len(errors)} errors; the first: {errors[0].message}"
        warnings = f"; {len(self.findings)} warnings" if self.findings else ""
        return (
            f"{self.architecture}: {len(self.shards)} shards with {self.tensor_count} tensors,"
            f" {self.total_bytes / 1e9:.2f} GB{warnings}"
        )

    def rows(self) -> list[dict[str, str | int | float]]:
        """What was looked at and what was found, for a table artifact."""
        seen: list[dict[str, str | int | float]] = [
            {"check": "architecture", "found": self.architecture or "–"},
            {"check": "shards", "found": len(self.shards)},
            {"check": "tensors", "found": self.tensor_count},
            {"check": "tokenizer", "found": self.tokenizer or "–"},
            {"check": "chat template", "found": self.chat_template or "–"},
            {"check": "files", "found": f"{self.file_count} with {self.total_bytes:,} bytes"},
        ]
        return seen + [{"check": finding.severity.value, "found": finding.message} for finding in self.findings]


def require_valid(report: LayoutReport) -> None:
    """Raise `LayoutInvalid` with every error of the report."""
    errors = [finding.message for finding in report.findings if finding.severity is Severity.ERROR]
    if errors:
        raise LayoutInvalid(" ".join(errors), where=report.uri, resolution="Then check again.")


def check_checkpoint(report: LayoutReport) -> preflight.Check:
    """The layout that the hub's files will have in the bucket, as a preflight check: before 52 GB move, not after."""
    name = "checkpoint"
    errors = [finding.message for finding in report.findings if finding.severity is Severity.ERROR]
    if errors:
        return preflight.failed(
            name,
            " ".join(errors),
            "Choose another revision, correct the include and exclude patterns, or tell its owner.",
        )
    if report.findings:
        return preflight.warning(
            name,
            " ".join(finding.message for finding in report.findings),
            "It loads; see whether that is what you want.",
        )
    return preflight.ok(name, f"{report.architecture}, {len(report.shards)} shards, {report.tokenizer}")


def parse_config(data: bytes | None, where: str) -> dict[str, Any]:
    """The content of a config.json; None if there is none.

    Raises:
        CheckpointInvalid: it is missing, or not a JSON object.
    """
    if data is None:
        raise CheckpointInvalid(
            "config.json is missing; params.json alone, Mistral's own format, is not enough.",
            where=where,
            resolution="Choose a repository or revision in the transformers format, or drop the exclude pattern.",
        )
    config = json_object(data)
    if config is None:
        raise CheckpointInvalid(
            "config.json is not a JSON object.",
            where=where,
            resolution="Choose another revision, or tell the repository's owner.",
        )
    return config


def json_object(data: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


class SafetensorsHeader(Value):
    """The table at the beginning of a safetensors file."""

    tensors: frozenset[str]
    file_bytes: int
    """How large the file has to be: 8 bytes, the header, the tensors."""


def header_bytes(first_bytes: bytes) -> int:
    """How many bytes the length field and the header take together, by the file's first 8 bytes.

    Raises:
        ValueError: not safetensors.
    """
    if len(first_bytes) < 8:
        raise ValueError("it is shorter than 8 bytes")
    length = int.from_bytes(first_bytes[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header would be {length:,} bytes long")
    return 8 + length


def parse_header(data: bytes) -> SafetensorsHeader:
    """Read the header of a safetensors file from its first `header_bytes` bytes.

    Raises:
        ValueError: with the reason, as a clause.
    """
    size = header_bytes(data)
    if len(data) < size:
        raise ValueError("it ends within its header")
    try:
        table = json.loads(data[8:size])
    except ValueError as error:
        raise ValueError("its header is not JSON") from error
    if not isinstance(table, dict):
        raise ValueError("its header is not a table")
    table.pop("__metadata__", None)
    end = max((_tensor_end(name, entry) for name, entry in table.items()), default=0)
    return SafetensorsHeader(tensors=frozenset(table), file_bytes=size + end)


def _tensor_end(name: str, entry: Any) -> int:
    try:
        begin, end = entry["data_offsets"]
        bits = _DTYPE_BITS[entry["dtype"]] * math.prod(entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header describes {name!r} in an unknown way") from error
    if (end - begin) * 8 != bits:
        raise ValueError(f"the shape of {name!r} does not fit its {end - begin} bytes")
    return int(end)


def shards_to_read(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The safetensors files at the root of the path, whose headers the check needs."""
    return tuple(sorted(path for path in sizes if "/" not in path and path.endswith(".safetensors")))


def check(
    uri: str,
    sizes: Mapping[str, int],
    documents: Mapping[str, bytes],
    headers: Mapping[str, SafetensorsHeader | str],
    *,
    config_paths: Sequence[str] = (),
    vllm_release: str | None = None,
) -> LayoutReport:
    """Check a model path, or the files of a commit that are to become one.

    Args:
        uri: `gs://…` of the path, or the repository at its commit.
        sizes: bytes of every object below it, by path.
        documents: content of those of `DOCUMENTS` that exist.
        headers: of the files that `shards_to_read` names; a text is why it could not be read. Empty: not asked for.
        config_paths: `gs://…` paths elsewhere in the bucket that hold a config.json: what may have been meant.
        vllm_release: of the image that will serve, if it is known. The list of architectures is one release's: only for
            that release is an unknown architecture an error.
    """
    return _Checker(uri, sizes, documents, headers, config_paths, vllm_release).report()


class _Checker:
    def __init__(
        self,
        uri: str,
        sizes: Mapping[str, int],
        documents: Mapping[str, bytes],
        headers: Mapping[str, SafetensorsHeader | str],
        config_paths: Sequence[str],
        vllm_release: str | None,
    ) -> None:
        self._uri = uri
        self._sizes = sizes
        self._documents = documents
        self._headers = headers
        self._config_paths = config_paths
        self._vllm_release = vllm_release
        self._findings: list[Finding] = []

    def report(self) -> LayoutReport:
        architecture = self._check_config()
        shards: tuple[str, ...] = ()
        tokenizer = template = ""
        if CONFIG in self._sizes:
            # Without it, nothing else says more than that the path is wrong.
            shards = self._check_weights()
            tokenizer = self._check_tokenizer()
            template = self._check_chat_template()
            self._check_foreign()
        read = [header for header in self._headers.values() if isinstance(header, SafetensorsHeader)]
        return LayoutReport(
            uri=self._uri,
            file_count=len(self._sizes),
            total_bytes=sum(self._sizes.values()),
            architecture=architecture,
            shards=shards,
            tensor_count=sum(len(header.tensors) for header in read),
            tokenizer=tokenizer,
            chat_template=template,
            findings=tuple(self._findings),
        )

    def _error(self, path: str, message: str) -> None:
        self._findings.append(Finding(severity=Severity.ERROR, path=path, message=message))

    def _warn(self, path: str, message: str) -> None:
        self._findings.append(Finding(severity=Severity.WARNING, path=path, message=message))

    def _check_config(self) -> str:
        if CONFIG not in self._sizes:
            found = "holds no config.json" if self._sizes else "is empty"
            nearest = nearest_path(self._uri, self._config_paths)
            right = f"Did you mean {nearest}?" if nearest else "No path in this bucket holds one: publish the weights."
            self._error(CONFIG, f"{self._uri} {found}. {right}")
            return ""
        config = self._document(CONFIG)
        if config is None:
            return ""
        names = config.get("architectures") or []
        if not isinstance(names, list) or not names:
            self._error(CONFIG, "config.json names no architecture: it is not the configuration of a language model.")
            return ""
        known = [name for name in names if name in ARCHITECTURES]
        if not known:
            self._unknown_architecture(str(names[0]))
        return str((known or names)[0])

    def _unknown_architecture(self, name: str) -> None:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.8)
        hint = f" The nearest one that it serves is {near[0]}." if near else ""
        message = f"config.json names the architecture {name}, which vLLM {VLLM_VERSION} does not serve.{hint}"
        if self._vllm_release is not None and _series(self._vllm_release) == _series(VLLM_VERSION):
            self._error(CONFIG, message)
        else:
            serves = f"vLLM {self._vllm_release}" if self._vllm_release else "of an unknown release"
            self._warn(CONFIG, f"{message} The image is {serves}: make sure that it does.")

    def _check_weights(self) -> tuple[str, ...]:
        present = shards_to_read(self._sizes)
        index = self._document(INDEX) if INDEX in self._sizes else None
        if index is None:
            self._check_unindexed(present)
            named = present
        else:
            named = self._check_index(index, present)
        for shard in named:
            self._check_shard(shard)
        return named

    def _check_unindexed(self, present: tuple[str, ...]) -> None:
        if not present:
            other = next((path for path in self._sizes if "/" not in path and path.endswith(_WEIGHT_SUFFIXES)), None)
            if other is None:
                self._error("model.safetensors", f"{self._uri} holds no weights: model.safetensors is missing.")
            else:
                self._warn(other, f"{other}: weights that are not safetensors load slowly and cannot be streamed.")
        elif len(present) > 1 and INDEX not in self._sizes:
            self._error(INDEX, f"{INDEX} is missing, but there are {len(present)} shards ({present[0]}, …).")

    def _check_index(self, index: dict[str, Any], present: tuple[str, ...]) -> tuple[str, ...]:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self._error(INDEX, f"{INDEX} has no weight_map.")
            return present
        named = tuple(sorted({str(shard) for shard in weight_map.values()}))
        for shard in named:
            if shard not in self._sizes:
                near = difflib.get_close_matches(shard, self._sizes, n=1, cutoff=0.6)
                found = f"; the nearest name there is {near[0]}" if near and near[0] not in named else ""
                self._error(shard, f"{self._uri}/{shard}, a shard that the index names, is missing{found}.")
        for shard in present:
            if shard not in named:
                self._error(shard, f"the index does not name {shard}, and a server that streams would load it as well.")
        self._compare_tensors(weight_map)
        self._compare_total(index, named)
        return named

    def _compare_total(self, index: Mapping[str, Any], named: Iterable[str]) -> None:
        """Where the headers were read, they say more; and some tools write a wrong total, so it is no error."""
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        found = sum(self._sizes.get(shard, 0) for shard in named)
        if not self._headers and isinstance(total, int | float) and found < total:
            self._warn(INDEX, f"the index speaks of {total:,} bytes of tensors, the shards have {found:,}.")

    def _compare_tensors(self, weight_map: Mapping[str, str]) -> None:
        by_shard: dict[str, set[str]] = {}
        for tensor, shard in weight_map.items():
            by_shard.setdefault(str(shard), set()).add(tensor)
        for shard, tensors in sorted(by_shard.items()):
            header = self._headers.get(shard)
            if not isinstance(header, SafetensorsHeader):
                continue
            for kind, names in (("lacks", tensors - header.tensors), ("also holds", header.tensors - tensors)):
                if names:
                    example = min(names)
                    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                    self._error(shard, f"index and shard disagree: {shard} {kind} the tensor {example}{more}.")

    def _check_shard(self, shard: str) -> None:
        header, size = self._headers.get(shard), self._sizes.get(shard)
        if size is None or header is None:
            return
        if isinstance(header, str):
            self._error(shard, f"{shard} cannot be read as safetensors: {header}.")
        elif header.file_bytes != size:
            self._error(shard, f"{shard} has {size:,} bytes, its header asks for {header.file_bytes:,}: send it again.")

    def _check_tokenizer(self) -> str:
        for names in _TOKENIZERS:
            if all(name in self._sizes for name in names):
                return " + ".join(names)
        tiktoken = next((path for path in self._sizes if "/" not in path and path.endswith(".tiktoken")), "")
        if not tiktoken:
            self._error("tokenizer.json", f"no tokenizer: {self._uri}/tokenizer.json (or tokenizer.model) is missing.")
        return tiktoken

    def _check_chat_template(self) -> str:
        for name in CHAT_TEMPLATES:
            if name in self._sizes:
                return name
        config = self._document(TOKENIZER_CONFIG) if TOKENIZER_CONFIG in self._sizes else None
        if config is not None and config.get("chat_template"):
            return TOKENIZER_CONFIG
        self._warn(CHAT_TEMPLATES[0], "no chat template: /v1/chat/completions will answer 400; completions work.")
        return ""

    def _check_foreign(self) -> None:
        unfinished = [path for path in self._sizes if path.startswith(WORK_FOLDER)]
        if unfinished:
            self._warn(unfinished[0], f"a transfer is going on or was left unfinished ({len(unfinished)} objects).")
        self._check_foreign_folders()
        self._check_foreign_files()

    def _check_foreign_files(self) -> None:
        """At the root; an image that copies the path to its disk copies these as well, at every start."""
        root = sorted(path for path in self._sizes if "/" not in path)
        if any(path.endswith(".safetensors") for path in root):
            doubles = [path for path in root if path.endswith(_WEIGHT_SUFFIXES) and not path.endswith(".safetensors")]
            if doubles:
                self._warn(doubles[0], f"weights in a second format beside safetensors: {', '.join(doubles)}.")
        foreign = [path for path in root if not path.endswith(_WEIGHT_SUFFIXES) and not belongs_to_a_model(path)]
        if foreign:
            self._warn(foreign[0], f"files that do not belong to the model: {', '.join(foreign)}.")

    def _check_foreign_folders(self) -> None:
        folders: dict[str, list[str]] = {}
        for path in sorted(self._sizes):
            if "/" in path and not path.startswith(_WELCOME_FOLDERS):
                folders.setdefault(path.partition("/")[0] + "/", []).append(path)
        for folder, paths in folders.items():
            weights = [path for path in paths if path.endswith(_WEIGHT_SUFFIXES)]
            if weights:
                self._error(folder, f"the folder {folder} holds weights ({weights[0]}), which break streaming.")
            else:
                self._warn(folder, f"the folder {folder} does not belong to the model ({paths[0]}).")

    def _document(self, path: str) -> dict[str, Any] | None:
        document = json_object(self._documents.get(path, b""))
        if document is None:
            self._error(path, f"{path} is not a JSON object.")
        return document


def _series(release: str) -> tuple[str, ...]:
    """`0.32.1` -> `0`, `32`: bug-fix releases serve the same architectures."""
    return tuple(release.split(".")[:2])


def nearest_path(uri: str, candidates: Sequence[str]) -> str | None:
    """Of the paths that hold a model, the one that was probably meant: below, then above, then the most alike."""
    below = sorted((path for path in candidates if path.startswith(f"{uri}/")), key=len)
    above = sorted((path for path in candidates if uri.startswith(f"{path}/")), key=len, reverse=True)
    alike = difflib.get_close_matches(uri, candidates, n=1, cutoff=0.0)
    return next(iter([*below, *above, *alike]), None)
