# SPDX-License-Identifier: Apache-2.0
"""How far apart is allowed: one table, every row with its reason.

Bounds are on the mean KL of a case and on its largest KL, and are chosen against the mistakes they have to
catch: every mutant of `mutants.py` moves at least one case beyond them, which the tests show on pico models
(float32) and, on a GPU, on the embedded model (bfloat16 too). Measured values: benchmarks/results/.
"""

from __future__ import annotations

from dataclasses import dataclass

ANY = 2**62


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the KL (nats) of a case, for a code and a compute dtype, up to a length."""

    code: str
    dtype: str
    up_to: int
    kl_mean: float
    kl_max: float
    reason: str


_FP64_ANGLES = "angles in float64: only float32 rounding of the arithmetic, at any position (measured up to 1.4e-10)"
_FP32_ANGLES = "native code makes angles in float32, so the error grows with the position: {}"
_BF16 = (
    "bfloat16 arithmetic, 8 bits of mantissa: 1e-4 on the embedded model, 5e-3 on SmolLM2-135M. It sees every "
    "mutant on the embedded model (a boundary off by one 1.4e-2), dropped start tokens only in the largest KL (0.19)"
)
_BF16_FAR = "bfloat16 arithmetic and float32 angles far out"
_FOLD = "the reference against itself, q and k scaled and the attention factor divided, without rounding: {}"
_BF16_ENGINE = (
    "bfloat16 arithmetic, in vLLM a bfloat16 table of cos and sin too: 2.5e-3 (largest 2.5e-2) on pico models, where "
    "the wrong set is 0.4"
)
_ROUNDED = "activations are {} in products with {} weights: {}; float32 angles come on top"
_OUTLIERS = "{} on SmolLM2-135M, whose activations have outliers, 2.2e-4 on the embedded model"
_F16 = "float16 arithmetic, 11 bits of mantissa: about 1/64 of bfloat16's KL"


def _engine(code: str, measured: str) -> tuple[Tolerance, ...]:
    """Engines make angles in float32 as native code does, so its bounds fit; what was measured of them."""
    reason = f"angles in float32, as in native code: {measured}"
    return (
        Tolerance(code, "float32", 1024, 1e-8, 1e-6, reason),
        Tolerance(code, "float32", 16384, 1e-6, 1e-4, reason),
        Tolerance(code, "float32", 32768, 3e-5, 3e-3, reason + "; beyond that native's bounds"),
        Tolerance(code, "float32", 131072, 5e-4, 5e-2, reason + "; beyond that native's bounds"),
        Tolerance(code, "float32", ANY, 1e-1, 5.0, reason + "; beyond that native's bounds"),
        Tolerance(code, "bfloat16", ANY, 3e-2, 3e-1, _BF16_ENGINE),
        Tolerance(code, "float16", ANY, 1e-3, 5e-2, _F16 + "; float32 angles come on top (not measured)"),
    )


def _llama_cpp() -> tuple[Tolerance, ...]:
    """llama.cpp on the weights of the file, a float32 cache and no flash attention."""
    measured = "float32 throughout, angles too (5.4e-8 below 4k, 1.0e-2 at 2M on pico models, CPU and GPU)"
    rows = ((8192, 1e-6, 1e-4), (32768, 3e-5, 3e-3), (131072, 5e-4, 5e-2), (262144, 2e-3, 0.2), (524288, 7e-3, 0.5),
            (1048576, 3e-2, 2.0), (ANY, 1e-1, 5.0))  # fmt: skip
    coarse = (
        ("F32", 0.0, 0.0, measured),
        ("F16", 5e-4, 5e-2, _ROUNDED.format("rounded to float16", "F16", "7.0e-5 on a pico model")),
        ("BF16", 1e-2, 0.5, _ROUNDED.format("rounded to bfloat16", "BF16", "5.3e-4 on a pico model")),
        # Whether a small mistake hides in such noise is `nearest`'s to say, by far; these bounds see gross ones.
        ("Q8_0", 5e-2, 2.0, _ROUNDED.format("quantised to 8 bits", "Q8_0", _OUTLIERS.format("2.1e-2"))),
        (
            "quantised",
            3e-1,
            5.0,
            _ROUNDED.format("quantised to 8 bits", "quantised", _OUTLIERS.format("1.4e-1 in Q4_1")),
        ),
    )
    return tuple(
        Tolerance("llama.cpp", kind, up_to, base + mean, base_max + largest, reason)
        for kind, base, base_max, reason in coarse
        for up_to, mean, largest in rows
    )


def _onnxruntime() -> tuple[Tolerance, ...]:
    """ONNX Runtime on the weights of the folder, angles in float64 or from tables: no row depends on the length."""
    exact = "cos and sin are rounded once, to float32: 2e-12 on the embedded model, at any position"
    half = "float16 products and caches, cos and sin rounded to float16 (2.4e-4): {}"
    far = (
        "6.9e-4 on SmolLM2-135M after 65,536 tokens, where rounding the weights to float16 is 5.8e-4 by itself "
        "(without factors), and 3.1e-5 on a pico model at 2M; a forgotten attention factor is 4.7e-2"
    )
    quantised = (
        "activations are rounded to 8 bits in all products: 2.5e-4 on the embedded model, 5.5e-3 on SmolLM2-135M, "
        "5.7e-3 on a widened pico model, where attention to one key too few is more than 2e-2"
    )
    return (
        Tolerance("onnxruntime", "F32", ANY, 1e-9, 1e-7, exact),
        Tolerance(
            "onnxruntime", "F16", 16384, 1e-4, 1e-2, half.format("2.4e-6 on the embedded model, 7.6e-5 on SmolLM2")
        ),
        Tolerance("onnxruntime", "F16", ANY, 2e-3, 1e-1, half.format(far)),
        Tolerance("onnxruntime", "BF16", ANY, 2e-2, 5e-1, "bfloat16 products: 2.1e-3 on a pico model (CUDA)"),
        Tolerance("onnxruntime", "INT8", ANY, 2e-2, 1.0, quantised),
        Tolerance("onnxruntime", "INT4", ANY, 2e-2, 1.0, quantised),
    )


# Of the rotary function alone, the largest difference of cos or sin: float32 holds 6e-8 of an attention factor near 1.
# Float32 angles are off by 2.5e-5 at 4k and by 2.5e-3 at 256k.
COS_SIN_ERROR = 1e-6

TOLERANCES = (
    *_llama_cpp(),
    *_onnxruntime(),
    Tolerance("custom", "float32", ANY, 1e-8, 1e-6, _FP64_ANGLES),
    Tolerance("native", "float32", 1024, 1e-8, 1e-6, _FP32_ANGLES.format("still exact enough here")),
    Tolerance("native", "float32", 16384, 1e-6, 1e-4, _FP32_ANGLES.format("cos off by 5.8e-4 at 8k")),
    Tolerance("native", "float32", 32768, 3e-5, 3e-3, _FP32_ANGLES.format("5.0e-6 on a widened pico model")),
    Tolerance("native", "float32", 131072, 5e-4, 5e-2, _FP32_ANGLES.format("8.8e-5 on a widened pico model")),
    Tolerance("native", "float32", 524288, 7e-3, 0.5, _FP32_ANGLES.format("1.4e-3 on a widened pico model")),
    Tolerance("native", "float32", ANY, 1e-1, 5.0, _FP32_ANGLES.format("1.7e-2 to 6e-2 at 2M on pico models")),
    Tolerance("custom", "bfloat16", ANY, 1e-2, 1e-1, _BF16),
    Tolerance("native", "bfloat16", 131072, 1e-2, 5e-1, _BF16 + "; 0.16 at most on a widened pico model"),
    Tolerance("native", "bfloat16", ANY, 1e-1, 5.0, _BF16_FAR),
    *_engine("mlx", "9e-11 on pico models, 1.6e-9 on the embedded model at 4k"),
    *_engine("vllm", "4e-11 on pico models, 1.6e-9 on the embedded model at 4k"),
    Tolerance("portable", "float64", ANY, 1e-12, 1e-10, _FOLD.format("float64")),
    Tolerance("portable", "float32", ANY, 1e-7, 1e-5, _FOLD.format("float32, on a GPU")),
    Tolerance("custom", "float16", ANY, 1e-3, 1e-2, _F16),
    Tolerance("native", "float16", 131072, 1e-3, 5e-2, _F16 + "; float32 angles come on top"),
    Tolerance("native", "float16", ANY, 1e-1, 5.0, _F16 + "; float32 angles far out"),
)


# Error of a tensor by its type: norm of the difference over norm of the tensor. Measured on random and on trained
# weights (tests/parity/test_gguf.py); rows in another order differ by 1.4.
WEIGHT_ERRORS = {
    "F32": 1e-7,
    "BF16": 4e-3,
    "F16": 5e-4,
    "Q8_0": 2e-2,
    "INT8": 2e-2,
    "INT4": 2e-1,
    "Q6_K": 5e-2,
    "Q5_K": 1e-1,
    "Q5_1": 1e-1,
    "Q5_0": 1e-1,
    "Q4_K": 2e-1,
    "Q4_1": 2e-1,
    "Q4_0": 2e-1,
    "IQ4_NL": 2e-1,
    "IQ4_XS": 2e-1,
}
_COARSE = 7e-1  # of three bits and fewer


def weight_error(kind: str) -> float:
    """How far a tensor stored as `kind` may be from the model's, as a part of its norm."""
    return WEIGHT_ERRORS.get(kind, _COARSE)


def tolerance_for(code: str, dtype: str, length: int) -> Tolerance:
    """The first row of the table that covers this code, compute dtype and length."""
    for row in TOLERANCES:
        if row.code == code and row.dtype == dtype and length <= row.up_to:
            return row
    raise KeyError(f"no tolerance for {code} code in {dtype}")
