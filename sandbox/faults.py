"""Faults that a stand-in injects on purpose: which requests are hit, by what, reproducibly.

A `FaultPlan` holds rules; a rule pairs a `Fault` (a value) with the requests it may hit. `sandbox.wire` carries the
faults out. Whether a request is hit depends on the seed, the request itself and how many times that same request was
made before, never on the timing of threads: the same transfer over the same plan meets the same faults.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, Self, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Share: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]

_VOLATILE_QUERY = frozenset({"upload_id", "uploadId", "Expires", "Policy", "Signature", "Key-Pair-Id"})
"""Query parameters that differ between two runs of the same transfer (signatures, session names)."""


class _FaultValue(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reply(_FaultValue):
    """Answer with an error instead of doing the work: 429, 500, 502, 503, 504, 408…"""

    kind: Literal["reply"] = "reply"
    status: Annotated[int, Field(ge=400, le=599)] = 503
    retry_after_s: Annotated[int, Field(ge=0)] | None = None
    """Sent as `Retry-After`."""


class Redirect(_FaultValue):
    """Send the client to the same path on another origin (307), e.g. to see whether it carries its token along."""

    kind: Literal["redirect"] = "redirect"
    origin: str
    """Scheme, host and port without a trailing slash, e.g. `http://127.0.0.1:9`."""


class Stall(_FaultValue):
    """Send nothing for `seconds`, then go on: before the first byte (`at=0`), or after that share of the body."""

    kind: Literal["stall"] = "stall"
    seconds: Annotated[float, Field(gt=0)]
    at: Share = 0.0


class Drop(_FaultValue):
    """Reset the connection (TCP RST).

    `during="request"`: after that share of the request's body was read, before the server does anything with it.
    `during="response"`: the work is done, and the connection dies after that share of the answer's body (`at=0`:
    before the status line), so that the client cannot know.
    """

    kind: Literal["drop"] = "drop"
    during: Literal["request", "response"] = "response"
    at: Share = 0.5


class Truncate(_FaultValue):
    """Announce the whole body, send that share of it, then close the connection in good order (TCP FIN)."""

    kind: Literal["truncate"] = "truncate"
    at: Share = 0.5


class Corrupt(_FaultValue):
    """Flip every bit of one byte of the body, at that share of its length. Status and headers stay right."""

    kind: Literal["corrupt"] = "corrupt"
    at: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5


class IgnoreRange(_FaultValue):
    """Answer a range request with 200 and the whole file. Hits only requests that carry a Range header."""

    kind: Literal["ignore-range"] = "ignore-range"


class MisstateLength(_FaultValue):
    """Lie about Content-Length and keep to the lie, so that HTTP itself sees nothing wrong.

    `factor` < 1 sends fewer bytes than asked for; > 1 pads with zero bytes.
    """

    kind: Literal["misstate-length"] = "misstate-length"
    factor: Annotated[float, Field(ge=0.0, le=4.0)] = 0.5


Fault: TypeAlias = Annotated[
    Reply | Redirect | Stall | Drop | Truncate | Corrupt | IgnoreRange | MisstateLength, Field(discriminator="kind")
]


class FaultRule(_FaultValue):
    """One fault and the requests that it may hit."""

    fault: Fault
    method: str | None = None
    """Only this HTTP method; any if None."""
    path: str = ""
    """Regular expression searched in the request's path with query, percent-encoded as sent."""
    probability: Share = 1.0
    first: Annotated[int, Field(ge=1)] | None = None
    """Hit at most so many requests, then rest."""

    def matches(self, method: str, path_qs: str, headers: Mapping[str, str]) -> bool:
        if self.method is not None and self.method != method:
            return False
        if isinstance(self.fault, IgnoreRange) and "Range" not in headers:
            return False
        if isinstance(self.fault, Truncate | Corrupt | MisstateLength) and method == "HEAD":
            return False
        return re.search(self.path, path_qs) is not None


class _PlanDocument(_FaultValue):
    seed: int = 0
    rules: tuple[FaultRule, ...] = ()


class FaultPlan:
    """The rules in force at one server, and the count of what they did. Safe to change and read from any thread."""

    def __init__(self, rules: Iterable[FaultRule] = (), *, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._seed = seed
        self._rules: list[FaultRule] = list(rules)
        self._hits: Counter[int] = Counter()
        self._seen: Counter[str] = Counter()
        self._injected: Counter[str] = Counter()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read `{"seed": 1, "rules": [{"fault": {"kind": "drop"}, "path": "resolve", "probability": 0.01}]}`."""
        document = TypeAdapter(_PlanDocument).validate_json(text)
        return cls(document.rules, seed=document.seed)

    def add(self, *rules: FaultRule) -> None:
        """Put further rules in force; earlier rules win over later ones."""
        with self._lock:
            self._rules.extend(rules)

    def clear(self) -> None:
        """Lift all rules. What was counted stays."""
        with self._lock:
            self._rules.clear()
            self._hits.clear()

    @property
    def injected(self) -> dict[str, int]:
        """How many times each kind of fault was carried out, e.g. `{"drop": 3}`."""
        with self._lock:
            return dict(self._injected)

    def draw(self, method: str, path_qs: str, headers: Mapping[str, str]) -> Fault | None:
        """Decide what happens to this request; at most one fault hits it."""
        key = _request_key(method, path_qs, headers)
        with self._lock:
            if not self._rules:
                return None
            self._seen[key] += 1
            for index, rule in enumerate(self._rules):
                if not rule.matches(method, path_qs, headers):
                    continue
                if rule.first is not None and self._hits[index] >= rule.first:
                    continue
                if self._chance(index, key) < rule.probability:
                    self._hits[index] += 1
                    return rule.fault
        return None

    def record(self, fault: Fault) -> None:
        """Count a fault as carried out: called by the code that injects it."""
        with self._lock:
            self._injected[fault.kind] += 1

    def _chance(self, rule_index: int, key: str) -> float:
        text = f"{self._seed}|{rule_index}|{self._seen[key]}|{key}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


def _request_key(method: str, path_qs: str, headers: Mapping[str, str]) -> str:
    parts = urlsplit(path_qs)
    query = sorted((k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if k not in _VOLATILE_QUERY)
    return repr((method, parts.path, query, headers.get("Range"), headers.get("Content-Range")))
