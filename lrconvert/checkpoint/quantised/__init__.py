# SPDX-License-Identifier: Apache-2.0
"""Quantised folders, read dequantised: `formats` is the table, one decoder module for each kind of layout.

The layouts are those that the formats' own packages write, and each decoder says what its numbers mean. NumPy does it:
a block of rows at a time, in any thread, without the packages, most of which need PyTorch and some a GPU.
"""

from __future__ import annotations

from lrconvert.checkpoint.quantised.view import DequantisedCheckpoint, is_quantised, readable, zero_biases

__all__ = ["DequantisedCheckpoint", "is_quantised", "readable", "zero_biases"]
