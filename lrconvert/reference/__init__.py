# SPDX-License-Identifier: Apache-2.0
"""The reference implementation that every artifact is compared with. Imports nothing of `rope` or `targets`."""

from lrconvert.reference.decoder import FactorSet, Reference, Rotation

__all__ = ["FactorSet", "Reference", "Rotation"]
