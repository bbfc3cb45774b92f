"""Every fault does on the wire what its docstring says, and the same plan hits the same requests again."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from aiohttp import web
from pydantic import ValidationError

from sandbox.faults import (
    Corrupt,
    Drop,
    Fault,
    FaultPlan,
    FaultRule,
    IgnoreRange,
    MisstateLength,
    Redirect,
    Reply,
    Stall,
    Truncate,
)
from sandbox.server import LoopbackServer
from sandbox.shaping import Link, Shape, TokenBucket
from sandbox.wire import RequestLog, SlicedBody, wire_middlewares

CONTENT = bytes(range(256)) * 4096


class OneFile(LoopbackServer):
    """Serves one file with ranges, and counts the bytes of uploads."""

    def __init__(self, path: Path, plan: FaultPlan) -> None:
        super().__init__()
        self.path, self.plan, self.log, self.uploaded = path, plan, RequestLog(), list[int]()

    def build_app(self) -> web.Application:
        link = Link()
        middlewares = wire_middlewares(
            log=self.log, plan=self.plan, link=link, error_response=lambda status: web.json_response({}, status=status)
        )
        app = web.Application(middlewares=middlewares, client_max_size=2**30)

        async def get(request: web.Request) -> web.StreamResponse:
            window = request.http_range
            if window.start is None:
                return SlicedBody(self.path, link=link)
            stop = window.stop or len(CONTENT)
            return SlicedBody(self.path, offset=window.start, count=stop - window.start, status=206, link=link)

        async def put(request: web.Request) -> web.Response:
            self.uploaded.append(len(await request.read()))
            return web.Response(text="stored")

        app.router.add_get("/file", get)
        app.router.add_put("/file", put)
        return app


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OneFile]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with OneFile(path, FaultPlan()) as running:
        yield running


def fetch(server: OneFile, **headers: str) -> requests.Response:
    return requests.get(f"{server.url}/file", headers=headers, timeout=60, allow_redirects=False)


def test_a_server_without_faults_sends_files_and_ranges_bit_exactly(server: OneFile) -> None:
    assert fetch(server).content == CONTENT
    answer = fetch(server, Range="bytes=1000-500000")
    assert answer.status_code == 206
    assert answer.content == CONTENT[1000:500001]
    assert [record.bytes_sent for record in server.log.snapshot()] == [len(CONTENT), 499001]


@pytest.mark.parametrize(
    "fault", [Drop(at=0.0), Drop(at=0.5), Truncate(at=0.25), Truncate(at=0.0)], ids=lambda fault: repr(fault)
)
def test_a_cut_answer_is_an_error_to_the_client(server: OneFile, fault: Fault) -> None:
    server.plan.add(FaultRule(fault=fault, first=1))
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        fetch(server)
    assert fetch(server).content == CONTENT
    assert server.plan.injected == {fault.kind: 1}
    assert server.log.snapshot()[0].fault == fault.kind


def test_a_corrupted_body_differs_in_one_byte_only(server: OneFile) -> None:
    server.plan.add(FaultRule(fault=Corrupt(at=0.5)))
    received = fetch(server, Range="bytes=100-1099").content
    assert [i for i in range(1000) if received[i] != CONTENT[100 + i]] == [500]


@pytest.mark.parametrize(("factor", "expected"), [(0.5, CONTENT[:500]), (1.5, CONTENT[:1000] + bytes(500))])
def test_a_misstated_length_looks_right_to_http(server: OneFile, factor: float, expected: bytes) -> None:
    server.plan.add(FaultRule(fault=MisstateLength(factor=factor)))
    answer = fetch(server, Range="bytes=0-999")
    assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["Content-Length"] == str(len(expected))


def test_an_ignored_range_answers_200_with_the_whole_file(server: OneFile) -> None:
    server.plan.add(FaultRule(fault=IgnoreRange(), first=1))
    assert fetch(server).status_code == 200
    answer = fetch(server, Range="bytes=5-9")
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert server.plan.injected == {"ignore-range": 1}


def test_an_error_reply_carries_retry_after(server: OneFile) -> None:
    server.plan.add(FaultRule(fault=Reply(status=429, retry_after_s=7), first=1))
    answer = fetch(server)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
    assert fetch(server).status_code == 200


def test_a_redirect_names_the_same_path_on_the_other_origin(server: OneFile) -> None:
    server.plan.add(FaultRule(fault=Redirect(origin="http://127.0.0.1:9")))
    answer = fetch(server)
    assert (answer.status_code, answer.headers["Location"]) == (307, "http://127.0.0.1:9/file")


@pytest.mark.parametrize("at", [0.0, 0.5])
def test_a_stall_sends_nothing_until_the_client_gives_up(server: OneFile, at: float) -> None:
    server.plan.add(FaultRule(fault=Stall(seconds=600, at=at)))
    with pytest.raises((requests.ReadTimeout, requests.ConnectionError)):
        _ = requests.get(f"{server.url}/file", timeout=0.5).content
    assert server.plan.injected == {"stall": 1}


def test_an_upload_dropped_in_the_request_never_reaches_the_handler(server: OneFile) -> None:
    server.plan.add(FaultRule(fault=Drop(during="request"), method="PUT", first=1))
    with pytest.raises(requests.ConnectionError):
        requests.put(f"{server.url}/file", data=CONTENT, timeout=60)
    assert server.uploaded == []


def test_an_upload_dropped_in_the_response_was_done_all_the_same(server: OneFile) -> None:
    server.plan.add(FaultRule(fault=Drop(at=0.0), method="PUT", first=1))
    with pytest.raises(requests.ConnectionError):
        requests.put(f"{server.url}/file", data=CONTENT, timeout=60)
    assert server.uploaded == [len(CONTENT)]


def test_head_is_answered_without_a_body(server: OneFile) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(2):  # The second request proves that the first left nothing on the connection.
        connection.request("HEAD", "/file")
        answer = connection.getresponse()
        assert (answer.headers["Content-Length"], answer.read()) == (str(len(CONTENT)), b"")
    connection.close()


def drawn(plan: FaultPlan, paths: list[str]) -> dict[str, bool]:
    with ThreadPoolExecutor(8) as pool:
        return dict(
            zip(paths, (f is not None for f in pool.map(lambda p: plan.draw("GET", p, {}), paths)), strict=True)
        )


def test_a_plan_hits_the_same_requests_whatever_the_order_of_threads() -> None:
    rule = FaultRule(fault=Drop(), probability=0.25)
    paths = [f"/part/{n}" for n in range(2000)]
    once = drawn(FaultPlan([rule], seed=1), paths)
    again = drawn(FaultPlan([rule], seed=1), paths[::-1])
    assert once == again
    assert 400 < sum(once.values()) < 600
    assert once != drawn(FaultPlan([rule], seed=2), paths)


def test_a_repeated_request_gets_a_new_chance_and_signatures_do_not_matter() -> None:
    rule = FaultRule(fault=Drop(), probability=0.5)
    outcomes = [
        [plan.draw("GET", f"/x?Signature={signature}", {}) is not None for _ in range(64)]
        for plan, signature in ((FaultPlan([rule]), "a"), (FaultPlan([rule]), "b"))
    ]
    assert outcomes[0] == outcomes[1]
    assert {True, False} == set(outcomes[0])


def test_a_plan_is_read_from_json_and_refuses_what_it_does_not_know() -> None:
    text = '{"seed": 3, "rules": [{"fault": {"kind": "reply", "status": 500}, "path": "^/x", "method": "GET"}]}'
    plan = FaultPlan.from_json(text)
    assert plan.draw("GET", "/x", {}) == Reply(status=500)
    assert plan.draw("PUT", "/x", {}) is None
    with pytest.raises(ValidationError):
        FaultPlan.from_json('{"rules": [{"fault": {"kind": "explode"}}]}')


def test_a_bucket_makes_up_for_late_wakeups_and_keeps_its_rate() -> None:
    now = 0.0
    bucket = TokenBucket(100.0, clock=lambda: now)
    assert [bucket.reserve(50), bucket.reserve(50)] == [0.5, 1.0]
    now = 1.25
    assert bucket.reserve(100, late_s=0.25) == 0.75
    now = 2.25
    assert bucket.reserve(100) == 1.0
    now = 100.0
    assert bucket.reserve(100) == 1.0  # Idle time is not saved up.


def test_a_shape_is_read_from_text() -> None:
    shape = Shape.parse("per-connection=50MB/s,total=1GiB/s,latency=20ms")
    assert shape == Shape(bytes_per_s_per_connection=50e6, bytes_per_s_total=2.0**30, latency_s=0.02)
    assert Shape.parse("") == Shape()
    for wrong in ("upload=5MB/s", "total=fast", "latency=20"):
        with pytest.raises(ValueError, match=r"unknown limit|is not a"):
            Shape.parse(wrong)
