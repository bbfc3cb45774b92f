"""Plays the endpoint picker of the Gateway API inference extension: it is there and healthy.

    python -m sandbox.endpoint_picker --pool-name=NAME …

Not simulated: everything that makes it a picker. No gateway asks it, it chooses no pod, and its arguments are not read.
What llm-d's routing does to requests is therefore not shown by the embedded cluster; that its objects are accepted, and
that server and picker become available, is.
"""

from __future__ import annotations

import os
import socket


def main() -> None:
    """Take connections, which is all that a probe asks for, until the signal that ends the container."""
    with socket.create_server(("127.0.0.1", int(os.environ["SANDBOX_HOST_PORT"]))) as server:
        while True:
            connection, _ = server.accept()
            connection.close()


if __name__ == "__main__":
    main()
