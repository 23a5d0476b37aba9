# SPDX-License-Identifier: Apache-2.0
"""Loops over cases inside one test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def case(*what: object) -> Iterator[None]:
    """Whatever fails inside fails with the name of the case in front: `case 'q4_k_m', True: AssertionError: …`."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as failure:
        named = ", ".join(repr(part) for part in what)
        raise AssertionError(f"case {named}: {type(failure).__name__}: {failure}") from failure
