from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rollout.benchmark import BenchmarkSpec, PlannedStage, next_stage
from rollout.benchmark import Endpoint as ApiEndpoint
from rollout.clients.loadgen import LoadGenerator, client_side, run_benchmark
from rollout.clients.openai_api import OpenAiApi
from rollout.clients.streams import Endpoint, KernelClock, OutgoingRequest, StreamLoop, StreamsResult
from rollout.curve import build_curve
from rollout.errors import BadInput, RolloutError
from rollout.objectives import Objectives
from rollout.stage import FailureKind, LatencyLimit, LatencyMetric, RequestRecord, Stage
from rollout.workload import PrefixSharing, fixed_workload
from sandbox.server import LoopbackServer
from tests.endless_server import MODEL as ENDLESS
from tests.endless_server import endless_server
from tests.engines import MODEL, free_port, simulated_engine

WORKLOAD = fixed_workload(40, 8)
LATENCY = {"base_s": 0.005, "per_sequence_s": 0.0, "per_prefill_token_s": 1e-5, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("truth") / "truth.jsonl"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, truth: Path) -> Iterator[str]:
    with simulated_engine(tmp_path_factory.mktemp("engine"), latency=LATENCY, truth=truth) as url:
        yield url


def spec(**fields: Any) -> BenchmarkSpec:
    return BenchmarkSpec(**({"workload": WORKLOAD, "stage_duration_s": 1.0} | fields))


def measure(url: str, benchmark: BenchmarkSpec, rate: float = 20.0) -> Stage:
    generator = LoadGenerator(OpenAiApi(url), MODEL, benchmark)
    return generator.measure(PlannedStage(rate_per_s=rate, duration_s=benchmark.stage_duration_s))


def test_a_stage_counts_tokens_exactly_and_sees_the_server(engine: str, truth: Path) -> None:
    stage = measure(engine, spec())
    noted = [json.loads(line) for line in truth.read_text().splitlines()[-20:]]
    assert stage.completed == stage.requests == 20
    assert {each["prompt_tokens"] for each in noted} == {40}
    assert {each["output_tokens"] for each in noted} == {8}
    assert {each["cached_tokens"] for each in noted} == {0}
    assert stage.itl_s is not None
    assert stage.itl_s.count == 20 * 7
    assert stage.itl_s.mean >= 0.004
    assert stage.server is not None
    assert stage.server.generation_tokens == 160
    assert stage.client is not None


def test_chat_prompts_count_the_template_too(engine: str, truth: Path) -> None:
    stage = measure(engine, spec(endpoint=ApiEndpoint.CHAT))
    assert stage.completed == 20
    assert {json.loads(line)["prompt_tokens"] for line in truth.read_text().splitlines()[-20:]} == {40}
    assert stage.itl_s is not None
    assert stage.itl_s.count == 20 * 7


def test_a_shared_prefix_is_found_in_the_prefix_cache(engine: str) -> None:
    shared = fixed_workload(100, 4, shared_prefix=PrefixSharing(tokens=80))
    stage = measure(engine, spec(workload=shared))
    assert stage.server is not None
    assert stage.server.prefix_cache_hit_ratio is not None
    assert stage.server.prefix_cache_hit_ratio > 0.5


def test_a_repeated_stage_does_not_hit_the_cache_of_the_first(engine: str) -> None:
    generator = LoadGenerator(OpenAiApi(engine), MODEL, spec())
    stages = [generator.measure(PlannedStage(rate_per_s=10, duration_s=1), repeat=n) for n in range(2)]
    assert [stage.server.prefix_cache_hit_ratio for stage in stages if stage.server] == [0, 0]


def test_a_second_run_has_prompts_of_its_own_unless_it_is_given_those_of_the_first(engine: str) -> None:
    once = spec(rates_per_s=(5.0,))
    first, second = (run_benchmark(engine, once, model=MODEL) for _ in range(2))
    repeated = run_benchmark(engine, spec(rates_per_s=(5.0,), prompt_salt=first.prompt_salt), model=MODEL)
    ratios = [
        report.stages[0].server.prefix_cache_hit_ratio for report in (second, repeated) if report.stages[0].server
    ]
    assert ratios == [0, pytest.approx(0.8)]  # whole blocks of 16 tokens of the prompts' 40
    assert repeated.prompt_salt == first.prompt_salt != second.prompt_salt
    assert repeated.stages[0].prompt_share == 1
    assert any("prefix cache" in note for note in repeated.notes)


def test_a_sweep_reports_stages_and_resumes_after_the_last_finished_one(engine: str) -> None:
    benchmark = spec(rates_per_s=(5.0, 10.0, 20.0))
    seen: list[Stage] = []
    objectives = Objectives(latencies=(LatencyLimit(metric=LatencyMetric.TTFT, limit_s=5.0),))
    report = run_benchmark(engine, benchmark, model=MODEL, on_stage=seen.append, objectives=objectives)
    assert [stage.rate_per_s for stage in seen] == [5, 10, 20]
    assert tuple(seen) == report.stages
    assert report.environment.server_version == "0.32.0"
    assert seen[0].goodput_per_s == pytest.approx(seen[0].requests_per_s)
    again: list[Stage] = []
    resumed = run_benchmark(engine, benchmark, model=MODEL, on_stage=again.append, completed=seen[:2])
    assert [stage.rate_per_s for stage in again] == [20]
    assert resumed.stages[:2] == report.stages[:2]


def test_a_finished_sweep_measures_nothing_again(engine: str) -> None:
    stages = run_benchmark(engine, spec(rates_per_s=(5.0,)), model=MODEL).stages
    assert run_benchmark(engine, spec(rates_per_s=(5.0,)), model=MODEL, completed=stages).stages == stages


def test_lengths_are_cut_to_the_context_window_and_the_report_says_so(engine: str) -> None:
    report = run_benchmark(engine, spec(workload=fixed_workload(9000, 100), rates_per_s=(1.0,)), model=MODEL)
    assert report.spec.workload.name.endswith("-within-8192")
    assert report.stages[0].completed == 1


def test_an_unknown_model_is_refused_before_any_load(engine: str) -> None:
    with pytest.raises(BadInput, match="serves tiny, not other"):
        run_benchmark(engine, spec(), model="other")


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("step_s", [-30.0, -0.5, 0.5, 3600.0])
def test_a_wall_clock_that_is_set_does_not_move_what_was_measured(step_s: float) -> None:
    wall, monotonic = Clock(1_000_000.0), Clock(500.0)
    kernel = KernelClock(500.0, wall=wall, monotonic=monotonic)

    def stamp() -> bytes:
        return struct.pack("qq", int(wall.now), round(wall.now % 1 * 1e9))

    def go_on(seconds: float) -> None:
        wall.now += seconds
        monotonic.now += seconds

    go_on(2.0)
    assert kernel.arrival(stamp(), 1.9, 2.1) == pytest.approx(2.0, abs=1e-6)
    early = stamp()
    wall.now += step_s
    go_on(0.25)
    # What was stamped just before the step, or after it and before the comparison, is dated by the monotonic clock.
    assert kernel.arrival(stamp(), 2.2, 2.3) == 2.3
    kernel.compare()
    assert kernel.arrival(early, 2.2, 2.3) == 2.3
    assert kernel.arrival(stamp(), 2.2, 2.3) == pytest.approx(2.25, abs=1e-6)


Handler = Callable[[web.Request], Any]


class Scripted(LoopbackServer):
    """One handler for every POST."""

    def __init__(self, handler: Handler, *, ssl_context: ssl.SSLContext | None = None) -> None:
        super().__init__(ssl_context=ssl_context)
        self._handler = handler

    def build_app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._handler)
        return app


def event(text: str = " a", **fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]} | fields).encode() + b"\n\n"


USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


def streaming(*parts: bytes) -> Handler:
    """Each part in a chunk of its own, wherever its events begin and end."""

    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.002)
        await response.write_eof()
        return response

    return handler


def send(url: str, count: int = 1, *, drain_s: float = 30.0, timeout_s: float = 30.0) -> list[RequestRecord]:
    loop = StreamLoop(Endpoint(f"{url}/v1/completions"), timeout_s, drain_s)
    requests = [OutgoingRequest(0.01 * n, b"{}", input_tokens=5, output_tokens=3) for n in range(count)]
    return loop.run(requests, duration_s=0.01 * count).records


WHOLE = event() + event() + event() + USAGE + DONE


@pytest.mark.parametrize(
    "parts",
    [
        (event(), event(), event(), USAGE, DONE),
        (WHOLE,),
        tuple(bytes([byte]) for byte in WHOLE),
        (WHOLE.replace(b"\n", b"\r\n"),),
        (event(), event(), event(), event("", finish_reason="length"), USAGE, DONE),
        (b": a comment\n\n", event(), event().replace(b'": ', b'":'), event(), USAGE, DONE),
    ],
    ids=["one-each", "all-at-once", "byte-by-byte", "crlf", "empty-last-piece", "comments-and-blanks"],
)
def test_streams_are_read_however_they_are_cut(parts: tuple[bytes, ...]) -> None:
    with Scripted(streaming(*parts)) as server:
        (record,) = send(server.url)
    assert record.failure is None, record.detail
    assert (record.input_tokens, record.output_tokens, len(record.token_times_s)) == (7, 3, 3)
    assert list(record.token_times_s) == sorted(record.token_times_s)


def test_without_usage_pieces_are_counted() -> None:
    with Scripted(streaming(event(), event(), DONE)) as server:
        (record,) = send(server.url)
    assert (record.input_tokens, record.output_tokens) == (5, 2)


@pytest.mark.parametrize(
    "oddity",
    [b"null", b"5", b'"x"', b"[1]", b'{"usage": {"prompt_tokens": null, "completion_tokens": "3"}}', b'{"usage": 3}'],
)
def test_an_odd_closing_event_ends_no_sweep(oddity: bytes) -> None:
    with Scripted(streaming(event(), event(), b"data: " + oddity + b"\n\n", DONE)) as server:
        (record,) = send(server.url)
    assert record.failure is None, record.detail
    assert (record.input_tokens, record.output_tokens) == (5, 2)


def answering(status: int, body: Any) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response(body, status=status)

    return handler


async def dropping(request: web.Request) -> web.StreamResponse:
    response = await streaming(event())(request)
    assert request.transport is not None
    request.transport.abort()
    return response


ERROR = {"error": {"message": "because", "code": 400}}


@pytest.mark.parametrize(
    ("handler", "kind", "detail"),
    [
        (answering(400, ERROR), FailureKind.REJECTED, "HTTP 400: because"),
        (answering(429, ERROR), FailureKind.OVERLOADED, "HTTP 429: because"),
        (answering(503, ["busy"]), FailureKind.OVERLOADED, "busy"),
        (answering(500, ERROR), FailureKind.SERVER_ERROR, "HTTP 500: because"),
        (answering(500, {"error": {"message": None}}), FailureKind.SERVER_ERROR, "HTTP 500: {"),
        (answering(500, {"error": {"message": {"a": 1}}}), FailureKind.SERVER_ERROR, "HTTP 500: {'a': 1}"),
        (streaming(event(), event()), FailureKind.BROKEN_STREAM, "without `data: [DONE]`"),
        (streaming(event(), b'data: {"error": {"message": "lost"}}\n\n', DONE), FailureKind.BROKEN_STREAM, "lost"),
        (streaming(USAGE, DONE), FailureKind.BROKEN_STREAM, "without a token"),
    ],
)
def test_failures_are_told_apart(handler: Handler, kind: FailureKind, detail: str) -> None:
    with Scripted(handler) as server:
        (record,) = send(server.url)
    assert record.failure is kind
    assert detail in record.detail


def test_a_refused_connection_is_a_failure_of_its_own_kind() -> None:
    (record,) = send(f"http://127.0.0.1:{free_port()}")
    assert record.failure is FailureKind.REFUSED


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(b"", FailureKind.CONNECTION), (b"SSH-2.0-x\r\n\r\n", FailureKind.BROKEN_STREAM)],
    ids=["hangs-up", "not-http"],
)
def test_servers_that_do_not_speak_http(answer: bytes, kind: FailureKind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            for _ in range(2):  # the probe of the address comes first
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(65536):
                        connection.sendall(answer)

        thread = threading.Thread(target=reply, daemon=True)
        thread.start()
        (record,) = send(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert record.failure is kind


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    return web.Response()


def test_answers_that_never_come_are_cut_off_as_unfinished_or_timed_out() -> None:
    with Scripted(silent) as server:
        (unfinished,) = send(server.url, drain_s=0.3)
        (timed_out,) = send(server.url, timeout_s=0.3)
    assert unfinished.failure is FailureKind.UNFINISHED
    assert unfinished.ttft_s >= 0.3
    assert timed_out.failure is FailureKind.TIMEOUT


def test_a_kept_connection_that_closes_is_replaced() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = await streaming(WHOLE)(request)
        assert request.transport is not None
        request.transport.close()
        return response

    with Scripted(handler) as server:
        records = send(server.url, 20)
    assert [record.failure for record in records] == [None] * 20


def test_tls_streams_are_read_too(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Scripted(streaming(event(), event(), event(), USAGE, DONE), ssl_context=context) as server:
        endpoint = Endpoint(f"{server.url}/v1/completions")
        endpoint.tls = ssl.create_default_context(cafile=str(certificate))
        requests = [OutgoingRequest(0.01 * n, b"{}", 5, 3) for n in range(5)]
        records = StreamLoop(endpoint, 30, 30).run(requests, duration_s=0.05).records
    assert [(record.failure, record.output_tokens) for record in records] == [(None, 3)] * 5


def self_signed(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1 in one file."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_an_endpoint_that_answers_nothing_is_no_endpoint_for_a_benchmark() -> None:
    with Scripted(answering(500, ERROR)) as server, pytest.raises(RolloutError):
        LoadGenerator(OpenAiApi(server.url), MODEL, spec()).warm_up()


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:80", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BadInput):
        Endpoint(url)


def records(delay_s: float) -> list[RequestRecord]:
    return [RequestRecord(scheduled_s=n, sent_s=n + delay_s, output_tokens=10) for n in range(50)]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (StreamsResult(records(0.001), 0, cpu_s=1, busy_share=0.1), None),
        (StreamsResult(records(0.001), 0, cpu_s=1, busy_share=0.9), "its loop was 90% busy"),
        (StreamsResult(records(0.2), 0, cpu_s=1, busy_share=0.1), "it sent requests 200 ms late (p90)"),
        (StreamsResult(records(0.001), 0, cpu_s=1, busy_share=0.1, out_of_files=True), "file descriptors"),
    ],
)
def test_the_client_says_when_it_is_the_limit(result: StreamsResult, reason: str | None) -> None:
    limited_by = client_side(result).limited_by
    assert (limited_by is None) if reason is None else (reason in (limited_by or ""))


def test_past_its_own_limit_the_client_says_so_and_calls_it_no_knee(tmp_path: Path) -> None:
    benchmark = spec(workload=fixed_workload(8, 1000), drain_timeout_s=120.0)
    with endless_server(tmp_path) as url:
        generator = LoadGenerator(OpenAiApi(url), ENDLESS, benchmark)
        # The second is several times what one core can read.
        easy, beyond = (generator.measure(PlannedStage(rate_per_s=rate, duration_s=1.0)) for rate in (10.0, 1500.0))
    assert easy.client is not None
    assert beyond.client is not None
    assert beyond.client.limited_by is not None
    curve = build_curve([easy, beyond])
    assert curve.points[-1].client_limited
    assert curve.knee is None
    assert "the load generator itself was the limit" in curve.not_reached
    assert next_stage(benchmark, [easy, beyond]) is None, "more load than the client can make proves nothing"


def test_running_out_of_files_is_the_clients_fault(tmp_path: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
        "from rollout.clients.streams import *;"
        "requests = [OutgoingRequest(0.0, b'{}', 1, 1) for _ in range(60)];"
        "result = StreamLoop(Endpoint(sys.argv[1]), 5, 0.3).run(requests, duration_s=0.1);"
        "print(result.out_of_files)"
    )
    import subprocess
    import sys

    with Scripted(silent) as server:
        done = subprocess.run(
            [sys.executable, "-c", script, f"{server.url}/v1/completions"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    assert done.stdout.strip() == "True"
