# SPDX-License-Identifier: Apache-2.0
"""Asks a fork server for a process. With the standard library alone, so that it starts in milliseconds:

    python -I -S fork_client.py SOCKET CODE ARGUMENTS…

is `python -c CODE ARGUMENTS…` with this process's streams, environment, folder and exit status.
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys
from typing import IO, Any

READY = b"ready"


def connect(path: str) -> socket.socket:
    """A connection to the server that listens at `path`. `OSError` where none does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
        if connection.recv(len(READY)) != READY:  # it was about to end
            raise ConnectionRefusedError(path)
    except OSError:
        connection.close()
        raise
    return connection


def start(connection: socket.socket, streams: tuple[int, int, int], **request: Any) -> tuple[int, IO[str]]:
    """The id of a process with these streams, and where its exit status will come."""
    read, report = os.pipe()
    descriptors = array.array("i", [*streams, report])
    message = json.dumps({"folder": os.getcwd(), "arguments": [], **request}).encode()  # noqa: PTH109
    connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    os.close(report)
    status = os.fdopen(read)
    return int(status.readline()), status


def main() -> int:
    path, code, *arguments = sys.argv[1:]
    with connect(path) as connection:
        _, status = start(connection, (0, 1, 2), code=code, arguments=arguments, environment=dict(os.environ))
        with status:
            ended = int(status.readline())
    return ended if ended >= 0 else 128 - ended


if __name__ == "__main__":
    sys.exit(main())
