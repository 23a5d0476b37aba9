# SPDX-License-Identifier: Apache-2.0
"""The reference implementation, the judge of every artifact. Imports nothing of `rope` or `targets`."""

from lrconvert.reference.decoder import FactorSet, Reference, Rotation

__all__ = ["FactorSet", "Reference", "Rotation"]
