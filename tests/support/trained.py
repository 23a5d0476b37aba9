# SPDX-License-Identifier: Apache-2.0
"""What a training left, and whether it is what another one left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

ADAPTER = "adapter"
# Of trainings in float32 whose sums are added up in another order. A step differs by 1e-7 of itself. Adam divides by
# the size of a gradient: where that is almost nothing, its rounding is a whole step, and later losses differ by 1e-5.
REORDERED, WHOLE_STEP = 1e-4, 2e-2


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Without the time that steps took."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_training(found: Path, wanted: Path, tolerance: float = REORDERED) -> None:
    """Every number of the logs, relatively, and the adapters; 0: exactly."""
    for one, other in zip(log_of(found), log_of(wanted), strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=tolerance, abs=0), found.name
    tensors, others = (load_file(folder / ADAPTER / "adapter_model.safetensors") for folder in (found, wanted))
    assert tensors.keys() == others.keys()
    for name, values in others.items():
        off = np.abs(tensors[name] - values)
        assert off.max() <= (WHOLE_STEP if tolerance else 0) and np.median(off) <= tolerance, (found.name, name)
