"""What a child process of the stage route runs (`python -m rollout.clients.fetching`): one file, by a fast tool.

A process of its own, because both tools work in native code: hf_transfer keeps the interpreter's lock, and neither can
be stopped from outside when no byte comes any more. The order comes through stdin, for the signed address and the token
could be read by others in the arguments. What went wrong goes to stdout as JSON, without the tool's message, which may
name that address.
"""

from __future__ import annotations

import ctypes
import errno
import json
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> int:
    _die_with_parent()
    order = json.load(sys.stdin)
    try:
        _TOOLS[order["tool"]](order["arguments"])
    except Exception as error:  # noqa: BLE001  # hf_transfer raises nothing narrower; the parent makes our errors of it
        json.dump(_description(error), sys.stdout)
        return 1
    return 0


def _hf_transfer(arguments: dict[str, Any]) -> None:
    import hf_transfer

    hf_transfer.download(**arguments)


def _huggingface_hub(arguments: dict[str, Any]) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(**arguments)


_TOOLS = {"hf_transfer": _hf_transfer, "huggingface_hub": _huggingface_hub}


def _description(error: Exception) -> dict[str, Any]:
    """Kind, the hub's status and code, the system's error number: what can be told without the message."""
    found: dict[str, Any] = {"kind": type(error).__name__}
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if response is not None:
            found |= {"status": response.status_code, "code": response.headers.get("X-Error-Code")}
            found |= {"retry_after": response.headers.get("Retry-After")}
        elif isinstance(cause, OSError) and cause.errno is not None:
            found["errno"] = cause.errno
        elif "No space left on device" in str(cause):
            found["errno"] = errno.ENOSPC  # hf_transfer and hf_xet put the system's error into a text
        cause = cause.__cause__
    return found


def _die_with_parent() -> None:
    """A killed transfer leaves no child that goes on writing to a file that the next run writes as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
