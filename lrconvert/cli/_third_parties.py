# SPDX-License-Identifier: Apache-2.0
"""What other libraries say to a user of the command line: once."""

from __future__ import annotations

import logging

# Every try of a request that fails is a warning there, and a second one says when the next will be.
RETRYING = ("huggingface_hub.utils._http",)


class FirstOnly(logging.Filter):
    """Lets the first warning of a logger through. What came of it is an error of ours, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        first, self._warned = not self._warned, True
        return first


def hush() -> None:
    """A filter for each of these loggers; nothing is imported. A second call begins again."""
    for name in RETRYING:
        logger = logging.getLogger(name)
        for found in [found for found in logger.filters if isinstance(found, FirstOnly)]:
            logger.removeFilter(found)
        logger.addFilter(FirstOnly())
