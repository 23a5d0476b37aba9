# SPDX-License-Identifier: Apache-2.0
"""The llama.cpp runtime: a GGUF file in a compiled llama.cpp that is on the machine, on its CPU or a GPU.

llama.cpp chooses the factor set once per context, by the tokens that a sequence's context can hold (padded to 256),
not by the tokens that it holds: `context` asks for one side of the original window or the other.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.engines.capability import LLAMA_CPP
from lrconvert.errors import EnvironmentFailure
from lrconvert.machine import usable_cores
from lrconvert.runtimes.backend import Accepts, Backend, OpenOptions, Runtime
from lrconvert.runtimes.base import Interpreter, Scores, WorkerSession, score_in_groups
from lrconvert.runtimes.llama_library import REMEDY, LlamaLibrary, find_library
from lrconvert.runtimes.tolerances import ANY, Tolerance

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
MOST_THREADS = 8
ALL_LAYERS = 999
GPU_BATCH = 33000  # tokens of a call on a GPU, where the length of prompts is unknown


class LlamaSession(WorkerSession):
    """A GGUF file, loaded. `context` is the size of a sequence's context in tokens, by default what the request needs.

    `n_ctx_seq` is the size that llama.cpp made of it in the last answer: the number that chose the factor set.
    """

    answers = frozenset({"contexts", "shift", "tokens", "behind"})
    n_ctx_seq: int | None = None

    def __init__(
        self,
        options: dict[str, Any],
        *,
        python: str | None = None,
        interpreter: Interpreter | None = None,
    ) -> None:
        super().__init__(WORKER, options, python=python, interpreter=interpreter)
        if reason := self.info.get("unusable"):
            self.close()
            raise EnvironmentFailure(reason, remedy=REMEDY)

    def __enter__(self) -> LlamaSession:
        return self

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        *,
        positions: Sequence[int] | None = None,
        keep: Sequence[int],
        context: int | None = None,
    ) -> list[np.ndarray]:
        """One forward pass, every row a sequence of its own. `positions` are consecutive and may start anywhere."""
        request = {
            "rows": [_integers(row) for row in rows],
            "positions": None if positions is None else _integers(positions),
            "keep": _integers(keep),
        }
        return list(self._array("logits", request, context)["logits"])

    def generate(
        self, prompt: Sequence[int], new_tokens: int, *, context: int | None = None, start: int = 0
    ) -> tuple[list[int], np.ndarray]:
        """Greedy decoding; `start` is the position of the prompt's first token."""
        request = {"prompt": _integers(prompt), "new_tokens": new_tokens, "start": start}
        answer = self._array("generate", request, context)
        return answer["tokens"], answer["logits"]

    def score_behind(self, prompt: Sequence[int], rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        """As `score` of the prompt with each row behind it. The prompt is read once for every size of context that the
        rows alone would get, because the size chooses the set."""
        step = LLAMA_CPP.context_step

        def logits(context: int, group: Sequence[Sequence[int]], counts: Sequence[int]) -> np.ndarray:
            request = {"prompt": _integers(prompt), "rows": group, "judged": counts}
            return self._array("behind", request, context * step)["logits"]

        return score_in_groups(prompt, rows, judged, lambda length: -(-length // step), logits)

    def shifted(
        self,
        tokens: Sequence[int],
        drop: int,
        more: Sequence[int],
        *,
        context: int | None = None,
        move: bool = True,
    ) -> np.ndarray:
        """Logits after each token of `more`, [len(more), vocabulary], once `tokens` were read, the first `drop` of
        them forgotten and the others moved to the start, as a context shift does.

        Without `move` they stay where they are. Distances are the same, so the logits are, unless moving is wrong.
        """
        request = {"tokens": _integers(tokens), "drop": drop, "more": _integers(more), "move": move}
        return self._array("shifted", request, context)["logits"]

    def tokenise(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """The tokens of texts by the file's own tokenizer in llama.cpp; special tokens in them are read as such."""
        request = {"do": "tokenise", "texts": list(texts), "add_special": add_special}
        return self._interpreter.ask(request)["tokens"]

    def _array(self, what: str, request: dict[str, Any], context: int | None) -> dict[str, Any]:
        answer = self._interpreter.ask({"do": what, **request, "context": context})
        self.n_ctx_seq = answer["n_ctx_seq"]
        return answer | {"logits": self._interpreter.array(answer["logits"])}


def open_session(
    artifact: Path,
    *,
    library: LlamaLibrary | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    kv: str = "f32",
    dtype: str = "float32",
    n_batch: int | None = None,
    python: str | None = None,
    interpreter: Interpreter | None = None,
) -> LlamaSession:
    """Load a GGUF file (of a split one, the first part).

    `gpu_layers`: 0 computes on the CPU whatever else there is, 999 has all on a GPU or is an error. `kv` is the
    type of the cache, "f32" or "f16". `n_batch` tokens go in one call, by default 512; on a GPU a prompt in one
    call is computed more exactly than one in several. `dtype` is what a report calls the weights.
    """
    library = library or find_library()
    options = {
        "artifact": str(artifact.resolve()),
        "library": Path(library.name).name,  # reports are published: no path of this machine
        "files": [str(file.absolute()) for file in library.files],
        "threads": usable_threads(threads),
        "gpu_layers": gpu_layers,
        "kv": kv,
        "dtype": dtype,
        "n_batch": n_batch,
    }
    return LlamaSession(options, python=python, interpreter=interpreter)


def usable_threads(wanted: int | None = None) -> int:
    """As many as were asked for, never more than this process has cores: ggml's threads wait for each other by
    spinning, and eight on two cores are thousands of times slower than two."""
    cores = usable_cores()
    return max(1, min(wanted or MOST_THREADS, cores))


def _integers(values: Sequence[int]) -> list[int]:
    return [int(value) for value in values]


# --- the registry's row ----------------------------------------------------------------------------------


def _open(artifact: Path, options: OpenOptions) -> LlamaSession:
    on_gpu = options.device != "cpu"
    return open_session(
        artifact,
        library=find_library(options.library),
        threads=options.threads,
        gpu_layers=ALL_LAYERS if on_gpu else 0,
        kv=options.kv,
        n_batch=options.longest or GPU_BATCH if on_gpu else None,
        python=options.python,
        interpreter=options.interpreter,
    )


def _tolerances() -> tuple[Tolerance, ...]:
    """llama.cpp on the weights of the file, a float32 cache and no flash attention."""
    rounded = "activations are {} in products with {} weights: {}"
    outliers = "{} on SmolLM2-135M, whose activations have outliers, 2.2e-4 on the embedded model"
    measured = "float32 throughout: 7e-7 at 4k, 2e-2 at 1M on widened pico models, as predicted of float32 angles"
    # Whether a small mistake hides in the noise of a coarse type is for `parity.hypotheses` to say, by far; these
    # bounds see gross ones.
    types = (
        ("F32", 1e-6, 1e-4, measured),
        ("F16", 5e-4, 5e-2, rounded.format("rounded to float16", "F16", "7.0e-5 on a pico model")),
        ("BF16", 1e-2, 0.5, rounded.format("rounded to bfloat16", "BF16", "5.3e-4 on a pico model")),
        ("Q8_0", 5e-2, 2.0, rounded.format("quantised to 8 bits", "Q8_0", outliers.format("2.1e-2"))),
        (
            "quantised",
            3e-1,
            5.0,
            rounded.format("quantised to 8 bits", "quantised", outliers.format("1.4e-1 in Q4_1")),
        ),
    )
    return tuple(Tolerance(dtype, ANY, kl_mean, kl_max, reason) for dtype, kl_mean, kl_max, reason in types)


def _memory(artifact: Path, options: OpenOptions) -> int:
    """Of the file, with all its parts, on a GPU; a CPU maps it."""
    if not options.device.startswith("cuda"):
        return 0
    parts = re.sub(r"-\d{5}-of-", "-?????-of-", glob.escape(artifact.name))
    return sum(path.stat().st_size for path in artifact.parent.glob(parts))


RUNTIME = Runtime(
    name="llama.cpp",
    runs=("gguf",),
    fixed=True,
    backends=(
        Backend(
            name="llama.cpp",
            capability=lambda model: LLAMA_CPP,
            open=_open,
            accepts=Accepts("consecutive", decodes_anywhere=True),
            exact_types=("F32",),
            tolerances=_tolerances(),
            angles="powers",
            cached=True,
            memory=_memory,
        ),
    ),
)
