# SPDX-License-Identifier: Apache-2.0
"""Against each format's own package: it quantises small models, and what it makes of its own files is what is read.

Equal in the dtype that the package computes in, every value. `LRCONVERT_QUANTISERS_PYTHON` names a Python with
compressed-tensors, bitsandbytes, gptqmodel, autoawq and transformers (CONTRIBUTING.md); none of them needs a GPU here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.pico import write_pico

from lrconvert.checkpoint import open_model

WORKER = Path(__file__).parents[2] / "support" / "quantiser_worker.py"
PYTHON = os.environ.get("LRCONVERT_QUANTISERS_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="LRCONVERT_QUANTISERS_PYTHON names no Python with the packages"),
]
# The families that name modules in their own way, and heads of which a row isn't a whole number of groups of 64.
FAMILIES = ("llama", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_package(family: str, tmp_path: Path) -> None:
    """Every layout that the worker makes, in one process: the packages take longer to import than to quantise."""
    write_pico(tmp_path / "model", family)
    worker = [PYTHON, "-W", "ignore", WORKER, tmp_path / "model", "all", tmp_path / "made"]
    result = subprocess.run([str(part) for part in worker], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    folders = [folder for folder in (tmp_path / "made").iterdir() if folder.is_dir()]
    assert len(folders) >= 25
    for folder in folders:
        model, expected = open_model(folder), load_file(folder.with_suffix(".expected"))
        assert model.quantised and expected.keys() == model.checkpoint.tensors.keys()
        for name, values in expected.items():
            assert np.array_equal(model.checkpoint.read(name).astype(values.dtype), values), (folder.name, name)
