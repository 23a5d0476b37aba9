# SPDX-License-Identifier: Apache-2.0
"""Every tensor gets the type that `llama_model_quantize` gives it, as tools/quantise_reference.py recorded it."""

from __future__ import annotations

import runpy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from lrconvert.errors import UsageError
from lrconvert.targets.gguf.schemes import SCHEMES, MixFacts, Scheme, get_scheme, needs_matrix, tensor_type

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "quantise_reference.py")))
RUNS: dict[str, list[Any]] = defaultdict(list)
for _run in REFERENCE.read_record():
    RUNS[_run.model.name].append(_run)


def facts_of(run: Any) -> MixFacts:
    model = run.model
    return MixFacts(model.architecture, model.layers, model.heads, model.kv_heads, model.tied, run.weighted)


def types_of(scheme: Scheme, run: Any) -> dict[str, str]:
    facts = facts_of(run)
    return {name: tensor_type(scheme, name, shape, facts).name for name, shape in run.model.shapes().items()}


@pytest.mark.parametrize("model", RUNS)
def test_types_are_those_of_llama_cpp(model: str) -> None:
    """Tensor by tensor, under every scheme, with and without an importance matrix."""
    for run in RUNS[model]:
        types = types_of(SCHEMES[run.scheme], run)
        if run.types is not None:
            assert types == run.types, (run.scheme, run.weighted)


@pytest.mark.parametrize("model", RUNS)
def test_schemes_need_a_matrix_where_llama_cpp_refuses(model: str) -> None:
    """It refuses nothing but that in the record."""
    for run in RUNS[model]:
        scheme = SCHEMES[run.scheme]
        kinds = {name: Type[kind] for name, kind in types_of(scheme, run).items()}
        needing = [name for name, kind in kinds.items() if needs_matrix(scheme, name, kind)]
        assert (run.types is None) == (bool(needing) and not run.weighted), run.scheme


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


@pytest.mark.parametrize("name", REFERENCE.FILE_TYPES)
def test_every_part_of_a_scheme_shows_in_the_record(name: str) -> None:
    """Without a rule, with another type of outputs or another lift, some recorded type would be wrong."""
    runs = [run for model in RUNS.values() for run in model if run.scheme == name and run.types is not None]
    for variant in variants(SCHEMES[name], runs):
        assert any(types_of(variant, run) != run.types for run in runs), variant


def test_the_record_has_every_scheme() -> None:
    """Under the names of gguf-py's file types, with their numbers; aliases are llama-quantize's."""
    assert {scheme.name: scheme.file_type for scheme in SCHEMES.values()} == REFERENCE.FILE_TYPES
    aliases = {name: scheme.name for name, scheme in SCHEMES.items() if name != scheme.name}
    assert aliases == {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


def test_names_of_schemes() -> None:
    assert get_scheme("Q4_K_M") is get_scheme("q4_k") is SCHEMES["q4_k_m"]
    with pytest.raises(UsageError, match=r"no scheme is called 'q4_k_xl'; there are f32, f16, .*iq1_m"):
        get_scheme("q4_k_xl")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rope_factors_long.weight", (48,)),
        ("rope_freqs.weight", (64,)),
        ("blk.0.attn_norm.weight", (256,)),
        ("blk.0.attn_q.bias", (256,)),
        ("blk.3.attn_k.weight", (1, 256)),  # a vector in ggml, which counts no dimension of one
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_vectors_stay_f32(name: str, shape: tuple[int, ...], scheme: str) -> None:
    assert tensor_type(SCHEMES[scheme], name, shape, MixFacts("llama", 8, 8, 2, False)).name == "F32"
