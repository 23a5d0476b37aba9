# SPDX-License-Identifier: Apache-2.0
"""What torchrun does for the processes that it starts."""

from __future__ import annotations

import socket


def ranks(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes that it starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
