# SPDX-License-Identifier: Apache-2.0
"""Every tensor gets the type that `llama_model_quantize` gives it, as tools/quantise_reference.py recorded it."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from lrconvert.errors import UsageError
from lrconvert.targets.gguf.schemes import SCHEMES, MixFacts, Scheme, get_scheme, needs_matrix, tensor_type

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "quantise_reference.py")))


@dataclass(frozen=True)
class Recorded:
    """One file that llama.cpp made or refused, with the types that lrconvert gives the same tensors."""

    run: Any
    ours: dict[str, str]

    @property
    def name(self) -> tuple[str, str, str]:
        return self.run.model.name, self.run.scheme, "weighted" if self.run.weighted else "plain"


def types_of(scheme: Scheme, run: Any) -> dict[str, str]:
    model = run.model
    facts = MixFacts(
        model.architecture, model.layers, model.heads, model.kv_heads, model.tied, run.weighted, model.experts
    )
    return {name: tensor_type(scheme, name, shape, facts).name for name, shape in model.shapes().items()}


@pytest.fixture(scope="module")
def record() -> list[Recorded]:
    """Every model of the record under every scheme, with and without an importance matrix."""
    return [Recorded(run, types_of(SCHEMES[run.scheme], run)) for run in REFERENCE.read_record()]


def test_types_are_those_of_llama_cpp(record: list[Recorded]) -> None:
    """Tensor by tensor, in every file of the record."""
    assert len(record) == 2 * len(REFERENCE.MODELS) * len(REFERENCE.FILE_TYPES)
    for one in record:
        if one.run.types is not None:
            assert one.ours == one.run.types, one.name


def test_schemes_need_a_matrix_where_llama_cpp_refuses(record: list[Recorded]) -> None:
    """llama.cpp refuses a file of the record where a tensor needs an importance matrix that isn't there, and only
    there."""
    for one in record:
        scheme = SCHEMES[one.run.scheme]
        needing = [name for name, kind in one.ours.items() if needs_matrix(scheme, name, Type[kind])]
        assert (one.run.types is None) == (bool(needing) and not one.run.weighted), one.name


def variants(scheme: Scheme, runs: list[Any]) -> Iterator[Scheme]:
    """The scheme with one part of it missing or changed."""
    for rule in scheme.rules:
        yield replace(scheme, rules=tuple(other for other in scheme.rules if other is not rule))
    if scheme.quantised:
        yield replace(scheme, output=Type.Q4_1)
    unlifted = replace(scheme, lifts_70b=False)
    kinds = {kind for run in runs for name, kind in types_of(unlifted, run).items() if "attn_v" in name}
    if kinds & {"Q3_K", "Q4_K"}:  # others are not lifted
        yield replace(scheme, lifts_70b=not scheme.lifts_70b)


def test_every_part_of_a_scheme_shows_in_the_record(record: list[Recorded]) -> None:
    """Without a rule, with another type of outputs or another lift, some recorded type would be wrong."""
    for name in REFERENCE.FILE_TYPES:
        runs = [one.run for one in record if one.run.scheme == name and one.run.types is not None]
        for variant in variants(SCHEMES[name], runs):
            assert any(types_of(variant, run) != run.types for run in runs), (name, variant)


def test_the_record_has_every_scheme() -> None:
    """Under the names of gguf-py's file types, with their numbers; aliases are llama-quantize's."""
    assert {scheme.name: scheme.file_type for scheme in SCHEMES.values()} == REFERENCE.FILE_TYPES
    aliases = {name: scheme.name for name, scheme in SCHEMES.items() if name != scheme.name}
    assert aliases == {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


def test_names_of_schemes() -> None:
    """In any case, and by alias; a name that there isn't gets the list."""
    assert get_scheme("Q4_K_M") is get_scheme("q4_k") is SCHEMES["q4_k_m"]
    with pytest.raises(UsageError, match=r"no scheme is named 'q4_k_xl'; there are f32, f16, .*iq1_m"):
        get_scheme("q4_k_xl")


def test_vectors_stay_f32() -> None:
    """Norms, biases, factors and matrices of one row, under every scheme."""
    vectors: dict[str, tuple[int, ...]] = {
        "rope_factors_long.weight": (48,),
        "rope_freqs.weight": (64,),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.attn_q.bias": (256,),
        "blk.3.attn_k.weight": (1, 256),  # a vector in ggml, which counts no dimension of one
    }
    for scheme in SCHEMES:
        for name, shape in vectors.items():
            kind = tensor_type(SCHEMES[scheme], name, shape, MixFacts("llama", 8, 8, 2, False))
            assert kind.name == "F32", (scheme, name)
