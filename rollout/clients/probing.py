"""The same requests to two endpoints at the same time: what the comparison of two revisions rests on."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rollout.clients.streams import Endpoint, OutgoingRequest, StreamLoop, StreamsResult
from rollout.comparison import Sample
from rollout.delivery import ProbeSpec

_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")
_WARM_UP = "warm-up"


@dataclass(frozen=True)
class Probed:
    """An endpoint and what it answered so far."""

    base_url: str
    sample: Sample


class Prober:
    """Sends every probe to all endpoints; the first one of each is not counted, since it warms the way up."""

    def __init__(self, probed: Sequence[Probed], model: str, spec: ProbeSpec) -> None:
        self._probed = probed
        self._model = model
        self._spec = spec
        # Another run must not find these prompts in a prefix cache.
        self._salt = secrets.token_hex(8)
        self._sent = 0
        for each in probed:
            self._run(each.base_url, self._bodies(1, _WARM_UP), rate_per_s=spec.max_rate_per_s)

    def probe(self, count: int, rate_per_s: float) -> None:
        """`count` requests to each endpoint, side by side, evenly spread at `rate_per_s`; adds to the samples.

        In the order of sending, failed ones too: the same place in two samples is one pair.
        """
        bodies = self._bodies(count, str(self._sent))
        self._sent += count
        with ThreadPoolExecutor(len(self._probed)) as pool:
            list(pool.map(lambda each: self._measure(each, bodies, rate_per_s), self._probed))

    def _measure(self, probed: Probed, bodies: Sequence[bytes], rate_per_s: float) -> None:
        probed.sample.add(self._run(probed.base_url, bodies, rate_per_s=rate_per_s).records)

    def _run(self, base_url: str, bodies: Sequence[bytes], *, rate_per_s: float) -> StreamsResult:
        outgoing = [
            OutgoingRequest(at_s=index / rate_per_s, body=body, input_tokens=0, output_tokens=self._spec.output_tokens)
            for index, body in enumerate(bodies)
        ]
        loop = StreamLoop(Endpoint(f"{base_url}/v1/completions"), self._spec.timeout_s, self._spec.timeout_s)
        return loop.run(outgoing, duration_s=len(bodies) / rate_per_s)

    def _bodies(self, count: int, batch: str) -> list[bytes]:
        source = random.Random(f"{self._salt}-{batch}")
        return [json.dumps(self._body(source)).encode() for _ in range(count)]

    def _body(self, source: random.Random) -> dict[str, object]:
        return {
            "model": self._model,
            "prompt": " ".join(source.choices(_WORDS, k=self._spec.input_words)),
            "max_tokens": self._spec.output_tokens,
            # vLLM's way to an exact answer length: both revisions must do the same work.
            "min_tokens": self._spec.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
