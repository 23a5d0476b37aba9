# SPDX-License-Identifier: Apache-2.0
"""What all verifications here share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _remembered() -> Iterator[None]:
    """What the reference answered to one test, it need not compute for the next."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    from support.remembered import remember

    with pytest.MonkeyPatch.context() as patch:
        remember(patch)
        yield
