# SPDX-License-Identifier: Apache-2.0
"""Warnings of other libraries reach a user once: the Hub client tries six times, and says so each time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import Result

from lrconvert.cli._third_parties import RETRYING, FirstOnly


class Busy(BaseHTTPRequestHandler):
    """Answers everything with 503."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[str]:
    """The address of a Hub that is busy."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What the client's logger hands on."""
    heard: list[str] = []

    class Hearing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, handler = logging.getLogger(*RETRYING), Hearing()
    before, level = list(logger.filters), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # `push` silences the client, for the rest of the process
    yield heard
    logger.removeHandler(handler)
    logger.filters[:] = before
    logger.setLevel(level)


@pytest.mark.parametrize("hushed", [True, False])
def test_a_busy_hub_is_one_warning(
    busy: str, warned: list[str], hushed: bool, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any command leaves its filter behind; each begins again. The control shows what the client says without."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import http_backoff

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    logger = logging.getLogger(*RETRYING)
    for expected in (1, 2):
        assert cli("inspect", "demo").code == 0
        if not hushed:
            logger.filters[:] = [found for found in logger.filters if not isinstance(found, FirstOnly)]
        with pytest.raises(HfHubHTTPError):
            http_backoff("GET", busy, max_retries=5, base_wait_time=0, retry_on_status_codes=503)
        assert len(warned) == expected if hushed else len(warned) >= 6 * expected
    assert "503" in warned[0]
