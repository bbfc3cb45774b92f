"""How long to wait for a server, and when to stop waiting."""

from __future__ import annotations

import pytest

from rollout.clients.retrying import MAX_RETRY_AFTER_S, transient, wait_before_retry_s, with_retries
from rollout.errors import RolloutError, TransientError


@pytest.mark.parametrize("stated", ["0", "7", str(MAX_RETRY_AFTER_S)])
def test_the_servers_wish_is_followed(stated: str) -> None:
    assert wait_before_retry_s(1, transient("busy.", retry_after=stated)) == float(stated)


def test_a_server_that_wants_to_be_left_alone_for_long_counts_as_down() -> None:
    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        raise transient("status 503.", where="https://hub", retry_after="3600")

    with pytest.raises(RolloutError, match=r"^https://hub: status 503\. It asks to be left alone for 3600 s") as caught:
        with_retries(ask, attempts=5)
    assert calls == [1]
    assert not isinstance(caught.value, TransientError), "nobody above tries it again"
