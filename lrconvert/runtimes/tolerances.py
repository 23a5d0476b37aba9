# SPDX-License-Identifier: Apache-2.0
"""How far from the reference a backend may be. Every row has its reason.

Bounds are on the mean KL of a case and on its largest KL, and are chosen against the mistakes they have to catch: every
mutant of `parity.mutants` moves at least one case beyond them, which the tests show on pico models (float32) and, on a
GPU, on the embedded model (bfloat16 too). Measured values: benchmarks/results/.

A row is in the file of its runtime. This file has what several runtimes share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ANY = 2**62  # tokens: a row for every length
F16 = "float16 arithmetic, 11 bits of mantissa: about 1/64 of bfloat16's KL"


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the KL (nats) of a case, for a compute type, up to a length in tokens."""

    dtype: str
    up_to: int
    kl_mean: float
    kl_max: float
    reason: str

    def holds(self, kl_mean: float, kl_max: float) -> bool:
        """Whether both are within their bounds; NaN is not."""
        return kl_mean <= self.kl_mean and kl_max <= self.kl_max


def tolerance_for(rows: Iterable[Tolerance], dtype: str, length: int, *, name: str) -> Tolerance:
    """The first row that covers this compute type and length. `KeyError` names what has none."""
    for row in rows:
        if row.dtype == dtype and length <= row.up_to:
            return row
    raise KeyError(f"no tolerance for {name} in {dtype}")


def engine_tolerances(measured: str, bfloat16: str) -> tuple[Tolerance, ...]:
    """Of engines that make angles in float32, as transformers' native code does: its bounds fit. `measured`: what was
    measured of the engine in float32; `bfloat16`: the reason of its bfloat16 bound."""
    return (
        *float32_angles(measured),
        Tolerance("bfloat16", ANY, 3e-2, 3e-1, bfloat16),
        Tolerance("float16", ANY, 1e-3, 5e-2, f"{F16} (not measured)"),
    )


def float32_angles(measured: str) -> tuple[Tolerance, Tolerance]:
    """Of code that computes in float32 and makes angles in it. These bounds see every mutant, and models that attend
    evenly stay within them; what the angles of a case cost beyond that, `parity.judging` finds out."""
    return (
        Tolerance("float32", 1024, 1e-8, 1e-6, f"float32 arithmetic, angles exact enough here: {measured}"),
        Tolerance("float32", ANY, 1e-6, 1e-4, f"float32 arithmetic and angles: {measured}"),
    )


BF16_ENGINE = (
    "bfloat16 arithmetic, in vLLM a bfloat16 table of cos and sin too: 2.5e-3 (largest 2.5e-2) on pico models, where "
    "the wrong set is 0.4"
)
