# SPDX-License-Identifier: Apache-2.0
"""How far apart is allowed: one table, every row with its reason.

A bound is on the mean KL of a case and is chosen against the mistakes it has to catch: the mutants of
`mutants.py` move the mean KL of at least one case beyond it, which the tests show on pico models and on the
embedded model.
"""

from __future__ import annotations

from dataclasses import dataclass

ANY = 2**62


@dataclass(frozen=True)
class Tolerance:
    """Bound on the mean KL (nats) of a case, for a code and a compute dtype, up to a length."""

    code: str
    dtype: str
    up_to: int
    kl_mean: float
    reason: str


_FP64_ANGLES = "angles in float64: only float32 rounding of the arithmetic, whatever the position"
_FP32_ANGLES = "native code makes angles in float32: the error grows with the position (cos off by 5.8e-4 at 8k)"
_BF16 = "bfloat16 arithmetic: 8 bits of mantissa in every product; only gross mistakes show"
_F16 = "float16 arithmetic: 11 bits of mantissa"

TOLERANCES = (
    Tolerance("custom", "float32", ANY, 1e-8, _FP64_ANGLES),
    Tolerance("native", "float32", 1024, 1e-8, "float32 angles are still exact enough"),
    Tolerance("native", "float32", 16384, 1e-6, _FP32_ANGLES),
    Tolerance("native", "float32", 131072, 1e-4, _FP32_ANGLES + "; 9.3e-3 at 131k"),
    Tolerance("native", "float32", 524288, 2e-3, _FP32_ANGLES),
    Tolerance("native", "float32", ANY, 1e-1, _FP32_ANGLES + "; 7.4e-2 at 1M, 1.5e-1 at 2M"),
    Tolerance("custom", "bfloat16", ANY, 3e-2, _BF16),
    Tolerance("native", "bfloat16", ANY, 1e-1, _BF16),
    Tolerance("custom", "float16", ANY, 1e-3, _F16),
    Tolerance("native", "float16", 131072, 1e-3, _F16),
    Tolerance("native", "float16", ANY, 1e-1, _F16 + ", and float32 angles"),
)


def tolerance_for(code: str, dtype: str, length: int) -> Tolerance:
    """The first row of the table that covers this code, compute dtype and length."""
    for row in TOLERANCES:
        if row.code == code and row.dtype == dtype and length <= row.up_to:
            return row
    raise KeyError(f"no tolerance for {code} code in {dtype}")
