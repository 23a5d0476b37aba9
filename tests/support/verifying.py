# SPDX-License-Identifier: Apache-2.0
"""`parity.verify` for tests, which have options that the command line doesn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrconvert import parity
from lrconvert.parity import Report
from lrconvert.targets import target_of


def verify(artifact: Path, **keywords: Any) -> Report:
    """As `parity.verify`, with the target that the artifact has."""
    return parity.verify(artifact, target_of(artifact), **keywords)
