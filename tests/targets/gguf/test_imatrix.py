# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: read as llama-quantize reads them, refused with a reason otherwise."""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

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


def tensors_for(name: str, sums: Any, count: float) -> Tensors:
    """As llama-imatrix stores them: [1, columns] and [1, 1]."""
    sums = np.asarray(sums, np.float32).reshape(1, -1)
    return {f"{name}.in_sum2": sums, f"{name}.counts": np.full((1, 1), count, np.float32)}


def write(path: Path, tensors: Tensors, *, kind: str = "imatrix", without: str = "") -> Path:
    writer = GGUFWriter(path, "llama")
    writer.kv_data[0].clear()  # llama-imatrix writes no architecture
    values: dict[str, Callable[[str], None]] = {
        "general.type": lambda key: writer.add_string(key, kind),
        "imatrix.datasets": lambda key: writer.add_array(key, ["wiki.txt", "code.txt"]),
        "imatrix.chunk_count": lambda key: writer.add_uint32(key, 125),
        "imatrix.chunk_size": lambda key: writer.add_uint32(key, 512),
    }
    for key, add in values.items():
        if key != without:
            add(key)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_means_and_facts(tmp_path: Path) -> None:
    """Sums over counts in float32, the count rounded; its origin for the manifest."""
    sums = np.random.default_rng(0).random(64, np.float32) * 1000
    path = write(tmp_path / "m.gguf", tensors_for(Q, sums, 64000.4) | tensors_for("output.weight", sums[:32], 1))
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


def test_a_file_gives_the_bytes_that_llama_cpp_made(tmp_path: Path, library: LlamaLibrary) -> None:
    """From the file to the quants: an entry of the record, with sums that divide without rounding."""
    model = REFERENCE.MODELS[0]
    tensors: Tensors = {}
    for name, row in REFERENCE.matrix(model).items():
        tensors |= tensors_for(name, row * np.float32(512), 512)
    encoder = Encoder(library, Imatrix.load(write(tmp_path / "m.gguf", tensors)))
    (expected,) = (
        digest
        for m, weighted, kind, name, digest in REFERENCE.read_digests()
        if (m, weighted, kind, name) == (model, True, "Q6_K", "output.weight")
    )
    rows = REFERENCE.values(model, "output.weight", model.shapes()["output.weight"])
    assert REFERENCE.digest(encoder.encode(rows, Type.Q6_K, "output.weight")) == expected


def test_other_columns(tmp_path: Path) -> None:
    """An error, but for the embedding, of which llama.cpp does not use it then either."""
    path = write(tmp_path / "m.gguf", tensors_for(Q, np.ones(64), 1) | tensors_for("token_embd.weight", np.ones(64), 1))
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
        (tensors_for(Q, [1, 2], -3), f"{Q} was never measured"),
        ({f"{Q}.in_sum2": np.ones((1, 4), np.float32)}, f"{Q} has no counts"),
        ({f"{Q}.counts": np.ones((1, 1), np.float32)}, f"{Q} has no in_sum2"),
        (tensors_for(Q, [1, 2], 1) | {f"{Q}.counts": np.ones((8, 1), np.float32)}, f"{Q} is for 8 experts"),
        (tensors_for(Q, [1, 2], 1) | {f"{Q}.in_sum2": np.ones((1, 2), np.float16)}, f"{Q} is stored as F16 and F32"),
        ({"blk.0.attn_q.weight": np.ones((1, 2), np.float32)}, "no tensor ends in .in_sum2"),
    ],
)
def test_what_is_wrong_with_a_matrix(tensors: Tensors, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        Imatrix.load(write(tmp_path / "m.gguf", tensors))
    assert str(error.value).startswith(f"{tmp_path / 'm.gguf'}: {problem}" if "no tensor" not in problem else "")
    assert problem in str(error.value)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer in range(20):
        tensors |= tensors_for(f"blk.{layer}.attn_q.weight", [1, 2], 0)
    with pytest.raises(InputError, match=r"blk\.7\.attn_q.*; and 12 more$"):
        Imatrix.load(write(tmp_path / "m.gguf", tensors))


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older form, a model, a file without its facts, none at all, one that is far too large."""
    legacy = tmp_path / "imatrix.dat"
    legacy.write_bytes(b"\x02\0\0\0\x13\0\0\0blk.0.attn_q.weight")
    with pytest.raises(InputError, match=r"older \.dat format is not read\. `llama-imatrix --in-file imatrix\.dat -o "):
        Imatrix.load(legacy)
    tensors = tensors_for(Q, [1, 2], 1)
    with pytest.raises(InputError, match=r"not an importance matrix: general\.type is 'model'"):
        Imatrix.load(write(tmp_path / "model.gguf", tensors, kind="model"))
    with pytest.raises(InputError, match=r"not an importance matrix: general\.type is missing"):
        Imatrix.load(write(tmp_path / "untyped.gguf", tensors, without="general.type"))
    with pytest.raises(InputError, match=r"imatrix\.chunk_count is missing; a count is needed"):
        Imatrix.load(write(tmp_path / "uncounted.gguf", tensors, without="imatrix.chunk_count"))
    assert Imatrix.load(write(tmp_path / "m.gguf", tensors, without="imatrix.datasets")).datasets == ()
    with pytest.raises(InputError, match=r"nothing\.gguf: can't be read"):
        Imatrix.load(tmp_path / "nothing.gguf")
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="an importance matrix of at most 100 is read"):
        Imatrix.load(tmp_path / "m.gguf")


# --- with a scheme -----------------------------------------------------------------------------------------

SHAPE = (4, 256)
TENSORS = {Q: (Type.IQ2_XXS, SHAPE), "output.weight": (Type.Q5_K, SHAPE), "token_embd.weight": (Type.Q2_K, SHAPE)}


def matrix_of(*names: str, columns: int = 256) -> Imatrix:
    means = {name: np.ones(columns, np.float32) for name in names}
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
