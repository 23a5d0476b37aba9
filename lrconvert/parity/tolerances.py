# SPDX-License-Identifier: Apache-2.0
"""The bounds where the reference is compared with itself; those of a backend are in its runtime's file."""

from __future__ import annotations

from lrconvert.runtimes.tolerances import ANY, Tolerance

# How many times the noise that the reference predicts for a case (`parity.judging`) the case may be off. Where the
# program makes angles as predicted, it is 1.0 (0.98 to 1.06 in transformers and llama.cpp on a CPU). A compiler or a
# GPU with other last bits of a power makes other noise of the same size, and KL grows with the square of it.
NOISE = 8.0
# The same for the mean KL where the program rounds activations to 8 bits. Each is rounded as predicted until sums in
# another order tip one over; then a deep model answers otherwise, but as far from the exact answer. Mean KL over that
# predicted (benchmarks/results/onnx-quantised.md): 0.9 to 1.1 on the embedded model, 0.2 to 1.6 on SmolLM2-135M, 1.0 in
# the median. One token whose answer tips over makes the largest KL (0.1 to 3.9 times), so that keeps NOISE. Mistakes
# there are 1.1 to 101 times what this allows; dropping two start tokens changes too little, and the graph tells.
NOISE_OF_8_BITS = 2.0

# Of the tokens of a model with experts, in types narrower than float32: the part that is judged. The mean KL of the
# closest half is as large with experts as without: 4e-6 to 6e-6 in float16, 7e-4 to 9e-4 in int8 and 6e-4 to 1.2e-3 in
# int4 on Mixtral's and Phi-3.5-MoE's pico models; 5e-6, 6e-4 to 8e-4 and 6e-4 to 8e-4 on Llama's (257 tokens, two seeds
# each). With the rest it is up to 3e-3, 2e-2 and 3e-2: 2 to 25 % of the tokens are answered by other experts, or attend
# to such ones.
ROUTED = 0.5

# Of the tokens of a case beyond its row, where all results have a type narrower than float32: the part that the largest
# KL leaves out, rounded down, so none of fewer than fifty tokens. In a case that is spread over 2,097,152 tokens some
# tokens stand 100,000 positions from their neighbours, and what they attend to hangs on near ties. Of 128 such rows of
# smollm2-135m-2048k in bfloat16, one was off by 4.9 nats on an H200, two by 4.4 and 2.8 on a CPU, and with eager
# attention one by 5.0 and the next by 0.5. The reference, rounded as they are, had 0.8 and 0.2 for its largest. The
# medians agree: 2.1e-3 and 1.9e-3. In float16 the largest was 0.03, in float32 4e-8.
TIPPED = 0.02

_FOLD = "the reference against itself, q and k scaled and the attention factor divided, without rounding: {}"
PORTABLE = (
    Tolerance("float64", ANY, 1e-12, 1e-10, _FOLD.format("float64")),
    Tolerance("float32", ANY, 1e-7, 1e-5, _FOLD.format("float32, on a GPU")),
)

# Of the rotary function alone, the largest difference of cos or sin: float32 holds 6e-8 of an attention factor near 1.
# Float32 angles are off by 2.5e-5 at 4k and by 2.5e-3 at 256k.
COS_SIN_ERROR = 1e-6

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


# A row by itself may be off by this many times as much: one with an outlier is rounded in the steps of that. The worst
# rows of the embedded model and of SmolLM2-135M were off by 0.3 (Q3_K) to 1.2 (Q5_0) times the bound of the whole, in
# nine GGUF types, int4 and int8. Of types of three bits and fewer a row may lose nearly all of itself; rows in another
# order are off by more than that.
ROW = 4.0
MOST_OF_A_ROW = 0.95


def row_error(kind: str) -> float:
    """How far a row of a tensor stored as `kind` may be from the model's, as a part of the row's norm."""
    return min(ROW * weight_error(kind), MOST_OF_A_ROW)


# How far a locked value may drift (`parity.lock`). Of a case with a bound the value is noise, and other last bits make
# NOISE times as much or as little; below this part of its bound nobody has to care. What code is known to get wrong is
# no noise: it is the same on every machine up to the noise beside it, a few percent of it at most. KL below LOCK_LEAST
# is noise again.
LOCK_FLOOR = 1e-3
LOCK_KNOWN = 1.25
LOCK_LEAST = 1e-7
