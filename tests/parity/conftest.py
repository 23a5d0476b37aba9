# SPDX-License-Identifier: Apache-2.0
"""What all verifications here share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _remembered(remembered: None) -> None:
    """Hundreds of files of a few models."""
