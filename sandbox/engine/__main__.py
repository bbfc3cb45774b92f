"""`python -m sandbox.engine serve [--real-vllm-python PATH --] ARGUMENTS OF THE CONTAINER`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from sandbox.engine.args import ExecutableNotFound, UsageError, parse_serve_arguments, strip_entry_point, usage_text
from sandbox.engine.server import serve
from sandbox.engine.startup import Log

USAGE_EXIT_CODE = 2
NOT_FOUND_EXIT_CODE = 127
"""What a shell and container runtimes say for a command that is not there."""


def main(arguments: Sequence[str]) -> int:
    """Serve like the container whose arguments these are; returns its exit code."""
    if not arguments or arguments[0] != "serve":
        print(__doc__, file=sys.stderr)
        return USAGE_EXIT_CODE
    words = list(arguments[1:])
    try:
        settings = parse_serve_arguments(words)
    except ExecutableNotFound as error:
        print(f"exec: {error}: executable file not found in $PATH", file=sys.stderr)
        return NOT_FOUND_EXIT_CODE
    except UsageError as error:
        program, _ = strip_entry_point(words)
        print(f"{usage_text(program)}\n{program}: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    return asyncio.run(serve(settings, os.environ, Log()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
