# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime runtime: an ONNX folder on a CPU or a GPU, and the driver that makes a cache exact.

A graph chooses the factor set by the last position of a call, so keys that were cached before a boundary were rotated
with another set than those after it. Only reading the sequence anew at the boundary is exact, since the cached values
of all layers but the first depend on those keys too. `policy` says which of the two is measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.engines.capability import ONNX
from lrconvert.errors import UnsupportedError
from lrconvert.runtimes.backend import Accepts, Backend, OpenOptions, Runtime
from lrconvert.runtimes.base import Interpreter, Scores, WorkerSession, score_in_groups
from lrconvert.runtimes.tolerances import ANY, Tolerance

WORKER = Path(__file__).with_name("onnxruntime_worker.py")

Policy = Literal["exact", "cached"]
ANSWERS = frozenset({"cached", "rotary", "graph", "behind"})


class OnnxSession(WorkerSession):
    """A folder, loaded. `boundaries`: the lengths after which its tier changes."""

    def __init__(
        self,
        options: dict[str, Any],
        *,
        boundaries: Sequence[int],
        python: str | None = None,
        interpreter: Interpreter | None = None,
    ) -> None:
        self.boundaries = tuple(boundaries)
        self.answers = ANSWERS | ({"placements"} if options["placements"] else set())
        super().__init__(WORKER, options, python=python, interpreter=interpreter)

    def __enter__(self) -> OnnxSession:
        return self

    def generate(
        self, prompt: Sequence[int], new_tokens: int, *, policy: Policy = "exact", start: int = 0
    ) -> tuple[list[int], np.ndarray]:
        """Greedy tokens and the logits that chose them, [new_tokens, vocabulary]. "exact": the sequence is recomputed
        where it grows past a boundary; "cached": its cache goes on, as in other programs. `start` is the position of
        the prompt's first token."""
        request = {"do": "generate", "prompt": [int(t) for t in prompt], "new_tokens": new_tokens, "start": start}
        request["boundaries"] = list(self.boundaries) if policy == "exact" else []
        answer = self._interpreter.ask(request)
        return answer["tokens"], self._interpreter.array(answer["logits"])

    def score_behind(self, prompt: Sequence[int], rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        """As `score` of the prompt with each row behind it. The prompt is read once for every tier that it has together
        with a row, in that tier also where it would have another one alone."""

        def tier(length: int) -> int:
            return bisect_left(self.boundaries, length)

        def logits(group: int, members: list[list[int]], counts: list[int]) -> np.ndarray:
            # Said only where the graph can't see it: what is told how long it gets is a second session on the weights.
            length = None if tier(len(prompt)) == group else len(prompt) + max(map(len, members))
            plain = [int(token) for token in prompt]
            request = {"do": "behind", "prompt": plain, "rows": members, "judged": counts, "length": length}
            return self._interpreter.array(self._interpreter.ask(request)["logits"])

        return score_in_groups(prompt, rows, judged, tier, logits)

    def cos_sin(self, positions: Sequence[int], *, evaluator: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What the rotary function alone makes of positions [n]: [n, d/2] each; by ONNX Runtime, or by
        onnx.reference's `evaluator`."""
        request = {"do": "function", "positions": [int(position) for position in positions], "evaluator": evaluator}
        answer = self._interpreter.ask(request)
        return self._interpreter.array(answer["cos"]), self._interpreter.array(answer["sin"])

    def evaluated(self, tokens: Sequence[int], keep: Sequence[int]) -> np.ndarray:
        """Logits of the whole graph by onnx.reference's evaluator (standard operators only)."""
        request = {"do": "evaluated", "rows": [[int(token) for token in tokens]], "keep": [int(i) for i in keep]}
        return self._interpreter.array(self._interpreter.ask(request)["logits"])[0]

    def on_cpu(self) -> list[str]:
        """Operators on floats that ran on the CPU although a GPU was asked for; of all calls so far."""
        return self._interpreter.ask({"do": "placements"})["operators"]


def open_session(
    artifact: Path,
    *,
    boundaries: Sequence[int],
    heads: int,
    fused: bool,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    python: str | None = None,
    interpreter: Interpreter | None = None,
) -> OnnxSession:
    """Load a folder. `heads` and `fused` (attention that keeps no scores) decide which prompts fit one call; `dtype`
    is what a report calls it."""
    options = {
        "artifact": str(artifact.resolve()),
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "heads": heads,
        "fused": fused,
        "placements": device != "cpu",
    }
    return OnnxSession(options, boundaries=boundaries, python=python, interpreter=interpreter)


# --- the registry's row ----------------------------------------------------------------------------------


def _open(artifact: Path, options: OpenOptions) -> OnnxSession:
    stored = OnnxCheckpoint(artifact)
    return open_session(
        artifact,
        boundaries=[tier.max_length for tier in stored.tiers[:-1]],
        heads=stored.heads,
        fused=stored.attention == "gqa",
        device=options.device,
        dtype=", ".join(sorted(stored.kinds)),
        threads=options.threads,
        python=options.python,
        interpreter=options.interpreter,
    )


def _check(artifact: Path, options: OpenOptions) -> None:
    """`UnsupportedError` for what a device has no kernels for."""
    stored, device = OnnxCheckpoint(artifact), options.device
    computing, attention = stored.computing, stored.attention
    if device == "cpu" and computing == "BF16":
        raise UnsupportedError("ONNX Runtime has no bfloat16 products on a CPU", remedy="Verify it with --device cuda")
    if device != "cpu" and attention == "gqa" and computing not in ("F16", "BF16"):
        raise UnsupportedError(
            "GroupQueryAttention has no float32 kernel on CUDA: it would run on the CPU",
            remedy="Convert with --attention standard, or with --dtype f16",
        )


def _activations(artifact: Path, options: OpenOptions) -> int:
    """CPU kernels alone multiply integers."""
    return OnnxCheckpoint(artifact).activation_block if options.device == "cpu" else 0


_EXACT = "cos and sin are rounded once, to float32: 2e-12 on the embedded model, at any position"
_HALF = "float16 products and caches, cos and sin rounded to float16 (2.4e-4): {}"
_HALF_FAR = (
    "6.9e-4 on SmolLM2-135M after 65,536 tokens, where rounding the weights to float16 is 5.8e-4 by itself "
    "(without factors), and 3.1e-5 on a pico model at 2M; a forgotten attention factor is 4.7e-2"
)
_QUANTISED = (
    "activations are rounded to 8 bits in all products: 2.5e-4 on the embedded model, 5.5e-3 on SmolLM2-135M, "
    "5.7e-3 on a widened pico model, where attention to one key too few is more than 2e-2"
)
# On the weights of the folder, angles in float64 or from tables: no float32 row depends on the length.
TOLERANCES = (
    Tolerance("F32", ANY, 1e-9, 1e-7, _EXACT),
    Tolerance("F16", 16384, 1e-4, 1e-2, _HALF.format("2.4e-6 on the embedded model, 7.6e-5 on SmolLM2")),
    Tolerance("F16", ANY, 2e-3, 1e-1, _HALF.format(_HALF_FAR)),
    Tolerance("BF16", ANY, 2e-2, 5e-1, "bfloat16 products: 2.1e-3 on a pico model (CUDA)"),
    Tolerance("INT8", ANY, 2e-2, 1.0, _QUANTISED),
    Tolerance("INT4", ANY, 2e-2, 1.0, _QUANTISED),
)


def _memory(artifact: Path, options: OpenOptions) -> int:
    """Of the weight files: ONNX Runtime packs matrices anew for its products."""
    return sum(path.stat().st_size for path in (artifact / "onnx").glob("model.onnx_data*"))


RUNTIME = Runtime(
    name="onnxruntime",
    runs=("onnx",),
    fixed=True,
    backends=(
        Backend(
            name="onnxruntime",
            capability=lambda model: ONNX,
            open=_open,
            check=_check,
            accepts=Accepts(cached_keys=True, decodes_anywhere=True),
            exact_types=("F32", "F16", "BF16"),
            tolerances=TOLERANCES,
            activations=_activations,
            narrow=True,
            memory=_memory,
        ),
    ),
    needs=(("onnx", "onnx"), ("onnxruntime", "onnx")),
)
