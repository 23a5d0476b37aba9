# SPDX-License-Identifier: Apache-2.0
"""Values compared as values."""

from __future__ import annotations

from typing import Any

import pytest

from lrconvert.artifact.statements import same

PAIRS: list[tuple[Any, Any, bool]] = [
    (1, 1.0, True),
    (1.0, 1.0 + 1e-13, True),
    (1.0, 1.0 + 1e-9, False),
    (True, 1, False),
    ([1, 2.0], [1.0, 2], True),
    (10**400, 1.0, False),
    (10**400, 10**400, True),
    (10**400, 10**400 + 1, False),
    ("1", 1, False),
]


@pytest.mark.parametrize(("found", "wanted", "expected"), PAIRS)
def test_same(found: Any, wanted: Any, expected: bool) -> None:
    """Integers of any size too: files may hold them."""
    assert same(found, wanted) is expected
