# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: read as llama-quantize reads them, refused with a reason otherwise."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from support.gguf_files import write_matrix

from lrconvert.errors import InputError, UsageError
from lrconvert.runtimes.llama_library import LlamaLibrary
from lrconvert.targets.gguf import imatrix as module
from lrconvert.targets.gguf.encode import Encoder
from lrconvert.targets.gguf.imatrix import Imatrix, check_matrix
from lrconvert.targets.gguf.schemes import SCHEMES

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "quantise_reference.py")))

Tensors = dict[str, np.ndarray[Any, Any]]
Q = "blk.0.attn_q.weight"
E = "blk.0.ffn_down_exps.weight"


def tensors_for(name: str, sums: Any, count: float) -> Tensors:
    """As llama-imatrix stores them: [1, columns] and [1, 1]."""
    sums = np.asarray(sums, np.float32).reshape(1, -1)
    return {f"{name}.in_sum2": sums, f"{name}.counts": np.full((1, 1), count, np.float32)}


def test_means_and_facts(tmp_path: Path) -> None:
    """Sums over counts in float32, the count rounded; its origin for the manifest."""
    sums = np.random.default_rng(0).random(64, np.float32) * 1000
    path = write_matrix(tmp_path / "m.gguf", tensors_for(Q, sums, 64000.4) | tensors_for("output.weight", sums[:32], 1))
    matrix = Imatrix.load(path)
    weights = matrix.weights(Q, 64)
    assert weights is not None and weights.dtype == np.float32
    np.testing.assert_array_equal(weights, sums / np.float32(64000))
    assert matrix.weights("blk.1.attn_q.weight", 64) is None
    assert matrix.facts == {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "datasets": ["wiki.txt", "code.txt"],
        "chunks": 125,
        "chunk_tokens": 512,
        "weights": 2,
    }


def test_every_expert_has_a_row_and_a_count(tmp_path: Path) -> None:
    """One that no text reached gets ones, as from llama-quantize, and is counted."""
    sums = np.random.default_rng(1).random((3, 64)).astype(np.float32)
    counts = np.array([[10], [0], [4.4]], np.float32)
    matrix = Imatrix.load(write_matrix(tmp_path / "m.gguf", {f"{E}.in_sum2": sums, f"{E}.counts": counts}))
    for expert, expected in enumerate((sums[0] / np.float32(10), np.ones(64, np.float32), sums[2] / np.float32(4))):
        weights = matrix.weights(E, 64, expert, 3)
        assert weights is not None and weights.dtype == np.float32
        np.testing.assert_array_equal(weights, expected)
    assert matrix.facts["unused_experts"] == 1 and matrix.facts["weights"] == 1


@pytest.mark.parametrize(("of", "kind", "tensor"), [("llama", "Q6_K", "output.weight"), ("llama-4-experts", "Q4_K", E)])
def test_a_file_gives_the_bytes_that_llama_cpp_made(
    tmp_path: Path, library: LlamaLibrary, of: str, kind: str, tensor: str
) -> None:
    """From the file to the quants: an entry of the record, with sums that divide without rounding. Of a layer's experts
    every one with its own row."""
    model = next(model for model in REFERENCE.MODELS if model.name == of)
    tensors: Tensors = {}
    for name, rows in REFERENCE.matrix(model).items():
        counts = np.full((len(rows), 1), 512, np.float32)
        tensors |= {f"{name}.in_sum2": rows * np.float32(512), f"{name}.counts": counts}
    encoder = Encoder(library, Imatrix.load(write_matrix(tmp_path / "m.gguf", tensors)))
    (expected,) = (
        digest
        for m, weighted, type_, name, digest in REFERENCE.read_digests()
        if (m, weighted, type_, name) == (model, True, kind, tensor)
    )
    values = REFERENCE.values(model, tensor, model.shapes()[tensor])
    parts = values if values.ndim == 3 else [values]
    made = b"".join(encoder.encode(part, Type[kind], tensor, i, len(parts)) for i, part in enumerate(parts))
    assert REFERENCE.digest(made) == expected


def test_other_columns(tmp_path: Path) -> None:
    """An error, but for the embedding, of which llama.cpp does not use it then either."""
    path = write_matrix(
        tmp_path / "m.gguf", tensors_for(Q, np.ones(64), 1) | tensors_for("token_embd.weight", np.ones(64), 1)
    )
    matrix = Imatrix.load(path)
    with pytest.raises(InputError, match=rf"m\.gguf: has 64 columns for {Q}; the model has 128\. Give the matrix that"):
        matrix.weights(Q, 128)
    assert matrix.weights("token_embd.weight", 128) is None
    assert matrix.weights("token_embd.weight", 64) is not None


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (tensors_for(Q, [1, np.nan], 1), f"{Q} holds values that are not finite"),
        (tensors_for(Q, [1, np.inf], 1), f"{Q} holds values that are not finite"),
        (tensors_for(Q, [1, 2], np.nan), f"{Q} holds values that are not finite"),
        (tensors_for(Q, [1, -2], 1), f"{Q} holds negative sums of squares"),
        (tensors_for(Q, [1, 2], 0), f"{Q} was never measured: its count is 0"),
        (tensors_for(Q, [1, 2], -3), f"{Q} holds negative counts"),
        ({f"{Q}.in_sum2": np.ones((1, 4), np.float32)}, f"{Q} has no counts"),
        ({f"{Q}.counts": np.ones((1, 1), np.float32)}, f"{Q} has no in_sum2"),
        (tensors_for(Q, [1, 2], 1) | {f"{Q}.counts": np.ones((8, 1), np.float32)}, f"{Q} has 2 sums for 8 counts"),
        (
            {f"{E}.in_sum2": np.ones((2, 4), np.float32), f"{E}.counts": np.zeros((2, 1), np.float32)},
            f"{E} was never measured",
        ),
        (tensors_for(Q, [1, 2], 1) | {f"{Q}.in_sum2": np.ones((1, 2), np.float16)}, f"{Q} is stored as F16 and F32"),
        ({"blk.0.attn_q.weight": np.ones((1, 2), np.float32)}, "no tensor ends in .in_sum2"),
    ],
)
def test_what_is_wrong_with_a_matrix(tensors: Tensors, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        Imatrix.load(write_matrix(tmp_path / "m.gguf", tensors))
    assert str(error.value).startswith(f"{tmp_path / 'm.gguf'}: {problem}" if "no tensor" not in problem else "")
    assert problem in str(error.value)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer in range(20):
        tensors |= tensors_for(f"blk.{layer}.attn_q.weight", [1, 2], 0)
    with pytest.raises(InputError, match=r"blk\.7\.attn_q.*; and 12 more$"):
        Imatrix.load(write_matrix(tmp_path / "m.gguf", tensors))


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older form, a model, a file without its facts, none at all, one that is far too large."""
    legacy = tmp_path / "imatrix.dat"
    legacy.write_bytes(b"\x02\0\0\0\x13\0\0\0blk.0.attn_q.weight")
    with pytest.raises(InputError, match=r"older \.dat format is not read\. `llama-imatrix --in-file imatrix\.dat -o "):
        Imatrix.load(legacy)
    tensors = tensors_for(Q, [1, 2], 1)
    with pytest.raises(InputError, match=r"not an importance matrix: general\.type is 'model'"):
        Imatrix.load(write_matrix(tmp_path / "model.gguf", tensors, kind="model"))
    with pytest.raises(InputError, match=r"not an importance matrix: general\.type is missing"):
        Imatrix.load(write_matrix(tmp_path / "untyped.gguf", tensors, without="general.type"))
    with pytest.raises(InputError, match=r"imatrix\.chunk_count is missing; a count is needed"):
        Imatrix.load(write_matrix(tmp_path / "uncounted.gguf", tensors, without="imatrix.chunk_count"))
    assert Imatrix.load(write_matrix(tmp_path / "m.gguf", tensors, without="imatrix.datasets")).datasets == ()
    with pytest.raises(InputError, match=r"nothing\.gguf: can't be read"):
        Imatrix.load(tmp_path / "nothing.gguf")
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="an importance matrix of at most 100 is read"):
        Imatrix.load(tmp_path / "m.gguf")


# --- with a scheme -----------------------------------------------------------------------------------------

SHAPE = (4, 256)
TENSORS = {Q: (Type.IQ2_XXS, SHAPE), "output.weight": (Type.Q5_K, SHAPE), "token_embd.weight": (Type.Q2_K, SHAPE)}


def matrix_of(*names: str, columns: int = 256, experts: int = 1) -> Imatrix:
    means = {name: np.ones((experts, columns), np.float32) for name in names}
    return Imatrix(Path("m.gguf"), "", (), 1, 512, means)


def test_a_scheme_without_its_matrix() -> None:
    with pytest.raises(UsageError, match=rf"iq2_xxs needs an importance matrix: {Q} becomes IQ2_XXS.*--imatrix FILE"):
        check_matrix(SCHEMES["iq2_xxs"], TENSORS, None)
    check_matrix(SCHEMES["q4_k_m"], {Q: (Type.Q4_K, SHAPE)}, None)


def test_a_matrix_that_lacks_a_tensor() -> None:
    """Outputs and the embedding can do without, others can't in the low types."""
    check_matrix(SCHEMES["iq2_xxs"], TENSORS, matrix_of(Q))
    with pytest.raises(InputError, match=rf"^m\.gguf: lacks tensors that iq2_xxs needs: {Q}\. Give"):
        check_matrix(SCHEMES["iq2_xxs"], TENSORS, matrix_of("output.weight"))
    check_matrix(SCHEMES["q4_k_m"], dict.fromkeys((Q, "output.weight"), (Type.Q4_K, SHAPE)), matrix_of(Q))


def test_only_q2_k_s_needs_one_for_q2_k() -> None:
    tensors = {Q: (Type.Q2_K, SHAPE), "token_embd.weight": (Type.Q2_K, SHAPE)}
    check_matrix(SCHEMES["q2_k"], tensors, None)
    with pytest.raises(UsageError, match="q2_k_s needs an importance matrix"):
        check_matrix(SCHEMES["q2_k_s"], tensors, None)


def test_a_matrix_of_another_model() -> None:
    with pytest.raises(InputError, match=r"m\.gguf: has none of the model's tensors"):
        check_matrix(SCHEMES["q4_k_m"], TENSORS, matrix_of("model.layers.0.mlp.weight"))
    with pytest.raises(InputError, match="has 64 columns"):
        check_matrix(SCHEMES["q4_k_m"], TENSORS, matrix_of(Q, columns=64))
    stacked = {E: (Type.Q4_K, (4, 4, 256))}
    check_matrix(SCHEMES["q4_k_m"], stacked, matrix_of(E, experts=4))
    for experts, found in ((3, "3 experts of 256"), (1, "256")):
        with pytest.raises(InputError, match=f"has {found} columns for {E}; the model has 4 experts of 256"):
            check_matrix(SCHEMES["q4_k_m"], stacked, matrix_of(E, experts=experts))
