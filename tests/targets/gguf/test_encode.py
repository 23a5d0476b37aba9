# SPDX-License-Identifier: Apache-2.0
"""The bytes of every type: those of `llama_model_quantize`, with what is installed and without."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from lrconvert.errors import EnvironmentFailure, InputError, UnsupportedError
from lrconvert.runtimes.llama_library import LlamaLibrary
from lrconvert.targets.gguf import encode as module
from lrconvert.targets.gguf.encode import IN_NUMPY, Encoder, check
from lrconvert.targets.gguf.imatrix import Imatrix
from lrconvert.targets.gguf.schemes import FLOATS, SCHEMES, MixFacts, tensor_type

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "quantise_reference.py"
REFERENCE = SimpleNamespace(**runpy.run_path(str(TOOL)))
LIVE = "LRCONVERT_LLAMA_QUANTISE_LIBRARY"

GGML_TYPES = sorted({kind for scheme in SCHEMES.values() for kind in [scheme.base, *(r.kind for r in scheme.rules)]})
QUANTISED = [kind for kind in GGML_TYPES if kind not in FLOATS]
# ggml makes their tables when they are first used, once a process: several seconds each.
SLOW = frozenset({Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S})
WITHOUT_LIBRARY = sorted(FLOATS | IN_NUMPY)

# GCC and Clang fuse products with sums in builds for ARM: seen as fmadd and fmla in quantize_row_q4_K_ref of
# xllamacpp's wheels for it. Values next to a rounding boundary then go the other way.
only_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the record was made on x86-64, and ggml fuses here"
)


@cache
def stand_in(model: Any) -> Imatrix:
    return Imatrix(Path("matrix.gguf"), "", (), 1, 512, REFERENCE.matrix(model))


# --- against llama.cpp -----------------------------------------------------------------------------------


class Digests:
    """Digests of our bytes, each made once."""

    def __init__(self, library: LlamaLibrary | None) -> None:
        self.library = library
        self.made: dict[tuple[str, str, str, bool], str] = {}

    def of(self, model: Any, name: str, kind: str, weighted: bool) -> str:
        key = (model.name, name, kind, weighted)
        if key not in self.made:
            rows = REFERENCE.values(model, name, model.shapes()[name])
            encoder = Encoder(self.library, stand_in(model) if weighted else None)
            parts = rows if rows.ndim == 3 else [rows]  # of experts
            data = b"".join(encoder.encode(part, Type[kind], name, i, len(parts)) for i, part in enumerate(parts))
            self.made[key] = REFERENCE.digest(data)
        return self.made[key]

    def of_file(self, run: Any) -> str:
        return REFERENCE.digest_of_file(
            {name: self.of(run.model, name, kind, run.weighted) for name, kind in run.types.items()}
        )


def runs_of(names: set[str], record: Path = REFERENCE.RECORD) -> Iterator[Any]:
    return (run for run in REFERENCE.read_record(record) if run.model.name in names and run.types is not None)


SMALL = {"llama-shallow", "llama-288-tied", "llama-100", "llama-ffn-1000", "llama-one-row"}
quick_or_slow = pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])


@only_x86
@quick_or_slow
def test_files_are_those_of_llama_cpp(slow: bool, library: LlamaLibrary) -> None:
    """All tensors of the files in the record: K and IQ types through ggml, the others as everywhere. Not the slow
    part: small models, and no types that take tables."""
    digests, different = Digests(library), []
    for run in runs_of({model.name for model in REFERENCE.MODELS}):
        of_slow = run.model.name not in SMALL or any(Type[kind] in SLOW for kind in run.types.values())
        if slow == of_slow and digests.of_file(run) != run.digest:
            different.append((run.model.name, run.scheme, run.weighted))
    assert different == []


@only_x86
@quick_or_slow
def test_tensors_are_those_of_llama_cpp(slow: bool, library: LlamaLibrary) -> None:
    """One by one, in every type, with an importance matrix and without."""
    digests, seen = Digests(library), set()
    for model, weighted, kind, name, digest in REFERENCE.read_digests():
        if slow == (Type[kind] in SLOW):
            seen.add(Type[kind])
            assert digests.of(model, name, kind, weighted) == digest, (model.name, name, kind, weighted)
    assert seen == (SLOW if slow else set(GGML_TYPES) - SLOW - {Type.F32})


def test_bytes_without_a_library_are_those_of_llama_cpp() -> None:
    """On every machine: floats, and the types that gguf-py quantises."""
    digests = Digests(None)
    seen = set()
    for model, weighted, kind, name, digest in REFERENCE.read_digests():
        if Type[kind] in WITHOUT_LIBRARY and not weighted:
            seen.add(Type[kind])
            assert digests.of(model, name, kind, weighted) == digest, (model.name, name, kind)
    assert sorted({*seen, Type.F32}) == WITHOUT_LIBRARY


@only_x86
@pytest.mark.slow
@pytest.mark.skipif(LIVE not in os.environ, reason=f"{LIVE} names no folder with llama_model_quantize")
def test_llama_model_quantize_agrees(library: LlamaLibrary, tmp_path: Path) -> None:
    """The library that the variable names, run now, in a process of its own: types and bytes of every file."""
    record = tmp_path / "record.json"
    command = [sys.executable, str(TOOL), os.environ[LIVE], "--version", "live", "--output", str(record)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    digests = Digests(library)
    for run in runs_of({model.name for model in REFERENCE.MODELS}, record):
        model = run.model
        facts = MixFacts(
            model.architecture, model.layers, model.heads, model.kv_heads, model.tied, run.weighted, model.experts
        )
        scheme = SCHEMES[run.scheme]
        types = {name: tensor_type(scheme, name, shape, facts).name for name, shape in model.shapes().items()}
        assert types == run.types, (model.name, run.scheme)
        assert digests.of_file(run) == run.digest, (model.name, run.scheme)


# --- gguf-py against ggml --------------------------------------------------------------------------------


def awkward() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Rows on which two ways to quantise could part."""
    random = np.random.default_rng(7)
    normal = random.standard_normal((64, 512))
    yield "normal", 0.02 * normal
    yield "zeros", 0 * normal
    yield "negative zeros", np.full_like(normal, -0.0)
    yield "one value", np.full_like(normal, 0.37)
    yield "ties", random.choice([-1.0, 1.0, 0.5, -0.5], normal.shape)
    yield "integers", random.integers(-16, 17, normal.shape).astype(float)
    yield "mostly zeros of both signs", normal * (random.random(normal.shape) < 0.03)
    yield "bfloat16", (0.02 * normal).astype(ml_dtypes.bfloat16)
    for power in (-44, -40, -38, -36, -30, -20, -8, 4):
        yield f"1e{power}", normal * 10.0**power


@only_x86
@pytest.mark.parametrize(("what", "rows"), list(awkward()), ids=[what for what, _ in awkward()])
def test_ggml_and_gguf_py_agree(what: str, rows: np.ndarray[Any, Any], library: LlamaLibrary) -> None:
    """All types that both know, on the same numbers. Only gguf-py's zeros have another sign here and there, so that
    `Encoder` gives neither a negative one."""
    ggml = module._Ggml(library)
    single = module._as_float32(rows, what)
    for kind in sorted(IN_NUMPY):
        expected = ggml.quantise(single, kind, None).tobytes()
        assert quantize(single, kind).tobytes() == expected, kind.name
        assert bytes(Encoder(None).encode(rows, kind, what)) == expected, kind.name
        assert bytes(Encoder(library).encode(rows, kind, what)) == expected, kind.name


def test_q8_0_is_the_same_with_and_without_a_library(library: LlamaLibrary) -> None:
    """On every machine: it is the one type for which the library matters and need not be there."""
    for what, rows in awkward():
        with_library = Encoder(library).encode(rows, Type.Q8_0, what)
        assert bytes(with_library) == bytes(Encoder(None).encode(rows, Type.Q8_0, what)), what


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_types_with_sums_are_not_left_to_the_library(kind: Type, library: LlamaLibrary, monkeypatch: Any) -> None:
    """Where ggml fuses products with sums it gives other bytes than gguf-py."""
    encoder = Encoder(library)
    monkeypatch.setattr(module._Ggml, "quantise", lambda *_: pytest.fail("asked ggml"))
    encoder.encode(np.ones((2, 64), np.float32), kind, "x")


# --- floats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", WITHOUT_LIBRARY)
def test_rows_of_any_float(source: Any, kind: Type) -> None:
    """The bytes are those of the same numbers as float32."""
    rows = np.random.default_rng(1).standard_normal((4, 64)).astype(source)
    made = Encoder(None).encode(rows, kind, "x")
    assert made.format == "B" and made.nbytes == 4 * 64 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1]
    assert bytes(made) == bytes(Encoder(None).encode(rows.astype(np.float32), kind, "x"))


def test_casts_go_to_the_nearest_even() -> None:
    """Halfway between two neighbours, the one whose last bit is 0; negative zeros stay."""
    halves = np.array([1 + 2**-11, 1 + 3 * 2**-11, -0.0], np.float32)
    assert bytes(Encoder(None).encode(halves, Type.F16, "x")) == np.array([1, 1 + 2**-9, -0.0], np.float16).tobytes()
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    expected = np.array([1, 1 + 2**-6], ml_dtypes.bfloat16).tobytes()
    assert bytes(Encoder(None).encode(halves, Type.BF16, "x")) == expected


def test_rows_are_not_changed() -> None:
    rows = np.full((1, 32), -0.0, np.float32)
    Encoder(None).encode(rows, Type.Q4_0, "x")
    assert np.signbit(rows).all()


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITHOUT_LIBRARY)
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(kind: Type, source: Any, value: float) -> None:
    rows = np.ones((2, 32), source)
    rows[1, 5] = value
    with pytest.raises(InputError, match=r"^blk\.0\.attn_q\.weight holds values that are not finite$"):
        Encoder(None).encode(rows, kind, "blk.0.attn_q.weight")


def test_values_beyond_the_range() -> None:
    """Each with the type that holds them."""
    for value, kind, remedy in ((65520.0, Type.F16, "bf16"), (3.4e38, Type.BF16, "f32")):
        with pytest.raises(UnsupportedError, match=rf"output.weight holds .* of {kind.name}\. Use --type {remedy}"):
            Encoder(None).encode(np.full((1, 32), value, np.float32), kind, "output.weight")
    with pytest.raises(UnsupportedError, match="beyond the range of F32"):
        Encoder(None).encode(np.full((1, 32), 1e39), Type.F32, "x")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else []) for kind in QUANTISED]
)
def test_scales_beyond_the_range(kind: Type, library: LlamaLibrary) -> None:
    """A float16 scale that is infinite is found, wherever the type keeps it; llama.cpp refuses such files too."""
    rows = np.random.default_rng(2).standard_normal((2, 512)).astype(np.float32)
    ones = Imatrix(Path("m"), "", (), 1, 1, {"x": np.ones((1, 512), np.float32)})
    encoder = Encoder(library, ones)
    assert np.isfinite(dequantize(np.frombuffer(encoder.encode(rows, kind, "x"), np.uint8), kind)).all()
    with pytest.raises(UnsupportedError, match=rf"x holds values beyond the range of {kind.name}, whose scales"):
        encoder.encode(rows * np.float32(1e9), kind, "x")


def test_a_type_that_needs_a_matrix(library: LlamaLibrary) -> None:
    """ggml would end the process."""
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight: IQ2_XS needs an importance matrix.*--imatrix FILE"):
        Encoder(library).encode(np.ones((1, 256), np.float32), Type.IQ2_XS, "blk.1.ffn_up.weight")


def test_check_without_a_library() -> None:
    """Before anything is written, with the extra that helps; what needs no library passes."""
    check(WITHOUT_LIBRARY, None)
    check([Type.Q8_0], None, weighted=True)
    with pytest.raises(EnvironmentFailure, match=r"to IQ4_XS, Q4_K needs llama.cpp's library.*lrconvert\[llama\]"):
        check([Type.F32, Type.Q4_K, Type.IQ4_XS, Type.Q8_0], None)
    with pytest.raises(EnvironmentFailure, match="to Q4_0 with an importance matrix needs"):
        check([Type.Q4_0], None, weighted=True)
    with pytest.raises(UnsupportedError, match="TQ1_0: types that lrconvert does not write"):
        check([Type.TQ1_0], None)
    with pytest.raises(EnvironmentFailure, match="to Q6_K needs"):
        Encoder(None).encode(np.ones((1, 256), np.float32), Type.Q6_K, "x")


@pytest.mark.parametrize("weighted", [False, True])
def test_a_library_can_encode_every_type_of_ggml(library: LlamaLibrary, weighted: bool) -> None:
    """Those that NumPy can't do are refused without it."""
    check(GGML_TYPES, library, weighted=weighted)
    with pytest.raises(EnvironmentFailure, match=r"needs llama\.cpp's library"):
        check(GGML_TYPES, None, weighted=weighted)


def test_a_library_without_the_functions() -> None:
    """Another library than ggml is named, not a crash."""
    other = LlamaLibrary("the C library", (Path("libc.so.6"),))
    if platform.system() != "Linux":
        pytest.skip("libc.so.6 is Linux's")
    with pytest.raises(EnvironmentFailure, match="the C library has no ggml_quantize_chunk"):
        Encoder(other)


def test_threads_do_not_disturb_each_other(library: LlamaLibrary) -> None:
    """The same bytes from four threads, the first use of a type's tables included."""
    rows = np.random.default_rng(3).standard_normal((8, 512)).astype(np.float32)
    encoder = Encoder(library)
    jobs = [kind for kind in (Type.IQ3_S, Type.Q4_K, Type.Q8_0, Type.IQ3_XXS, Type.Q4_0) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda kind: bytes(encoder.encode(rows, kind, "x")), jobs))
    for kind, data in zip(jobs, made, strict=True):
        assert data == bytes(encoder.encode(rows, kind, "x")), kind.name
