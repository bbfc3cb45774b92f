"""`python -m sandbox.engine serve [--real-vllm-python PATH --] ARGUMENTS OF THE CONTAINER`.

Without the option the engine is simulated; with it, real vLLM of that python's venv serves on the CPU.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sandbox.engine import real_vllm
from sandbox.engine.args import ExecutableNotFound, UsageError, parse_serve_arguments, strip_entry_point, usage_text
from sandbox.engine.server import serve
from sandbox.engine.startup import Log
from sandbox.engine.weights import WeightsError

USAGE_EXIT_CODE = 2
NOT_FOUND_EXIT_CODE = 127
"""What a shell and container runtimes say for a command that is not there."""


def main(arguments: Sequence[str]) -> int:
    """Serve like the container whose arguments these are; returns its exit code."""
    match list(arguments):
        case ["serve", "--real-vllm-python", python, "--", *words]:
            return _serve(words, Path(python))
        case ["serve", *words]:
            return _serve(words, None)
    print(__doc__, file=sys.stderr)
    return USAGE_EXIT_CODE


def _serve(words: Sequence[str], vllm_python: Path | None) -> int:
    try:
        settings = parse_serve_arguments(words)
    except ExecutableNotFound as error:
        print(f"exec: {error}: executable file not found in $PATH", file=sys.stderr)
        return NOT_FOUND_EXIT_CODE
    except UsageError as error:
        program, _ = strip_entry_point(words)
        print(f"{usage_text(program)}\n{program}: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    if vllm_python is None:
        return asyncio.run(serve(settings, os.environ, Log()))
    try:
        real_vllm.run(settings, vllm_python, os.environ)
    except WeightsError as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
