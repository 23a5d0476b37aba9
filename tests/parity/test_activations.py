# SPDX-License-Identifier: Apache-2.0
"""Bounds that follow the rounding of activations to 8 bits: predicted as ONNX Runtime rounds, and no mistake hides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import own_name, recipe_for
from support.onnx_files import changed, export
from support.verifying import verify

from lrconvert.checkpoint import Model
from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.parity import Options, Report, Row
from lrconvert.parity.cases import Case, kept, stream
from lrconvert.parity.judging import with_noise
from lrconvert.parity.measures import Measures, compare
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.parity.stored import on_stored_weights
from lrconvert.parity.tolerances import NOISE, NOISE_OF_8_BITS
from lrconvert.runtimes import onnxruntime
from lrconvert.runtimes.backend import OpenOptions, Rounding
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.tolerances import Tolerance

Pico = Callable[..., Model]
DEEP = {"num_hidden_layers": 4}  # so that rounding moves a right folder's answers beyond the table


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    """One interpreter for all folders here."""
    interpreter = Interpreter(onnxruntime.WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


def rows_of(report: Report, verdict: str | None = None) -> dict[str, Row]:
    return {row.case: row for row in report.rows if row.code == "onnxruntime" and verdict in (None, row.verdict)}


def rounding_of(artifact: Path, device: str = "cpu") -> Rounding:
    return onnxruntime.RUNTIME.backends[0].rounding(artifact, OpenOptions(device=device), "INT8")


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("hidden", [64, 80], ids=["whole blocks", "a broken block"])
def test_activations_are_rounded_as_onnx_runtime_rounds_them(
    pico: Pico, tmp_path: Path, dtype: str, hidden: int, options: Options
) -> None:
    """On a model of one layer, where hardly a value tips over, the reference that rounds answers what ONNX Runtime
    answers; the exact one is a hundred times as far off."""
    model = pico("llama", hidden_size=hidden, num_hidden_layers=1)
    recipe = recipe_for(model)
    artifact = export(model, recipe, own_name(tmp_path / "a"), dtype=dtype)
    spec, case = model.resolve(recipe), Case("at 64", "forward", (64,))
    exact = ReferenceRunner(on_stored_weights(model, OnnxCheckpoint(artifact)))
    with onnxruntime.RUNTIME.backends[0].open(artifact, options) as session:  # type: ignore[attr-defined]
        (answer,) = session.logits([stream(model.shape.vocab, 64).tolist()], keep=kept(64).tolist())
    off, rounded = (
        compare(reference.forward(spec, case), answer).kl_mean
        for reference in (exact, exact.rounded(rounding_of(artifact)))
    )
    assert off > 1e-5 and rounded < 1e-2 * off


def test_a_right_folder_passes_by_the_rounding_of_its_case(pico: Pico, tmp_path: Path, options: Options) -> None:
    """Four layers are enough to move the answers beyond the table's row. The rows and a note say what was done."""
    model = pico("llama", **DEEP)
    for dtype in ("int4", "int8"):
        report = verify(export(model, recipe_for(model), own_name(tmp_path / dtype), dtype=dtype), options=options)
        assert report.passed, report.summary
        beyond = [row for row in rows_of(report, "pass").values() if row.noise is not None]
        assert len(beyond) > 1
        for row in beyond:
            assert row.kl_mean is not None and row.noise is not None and row.kl_mean > 2e-2
            assert row.bound == pytest.approx(2e-2 + NOISE_OF_8_BITS * row.noise)
            assert row.kl_mean == pytest.approx(row.noise, rel=0.3)
            assert "activations of 8 bits in blocks of 32" in row.basis
        (note,) = [note for note in report.notes if "rounds activations" in note]
        assert f"In {len(beyond)} cases" in note and "32 with one scale" in note


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("mutant", [*RECIPE_MUTANTS, "unpermuted q/k"])
def test_no_mistake_hides_in_the_rounding(
    pico: Pico, tmp_path: Path, mutant: str, dtype: str, options: Options
) -> None:
    """By what ONNX Runtime answers, not only by what the graph says of itself: a bound that follows the noise, or a
    forgotten attention factor of 1.08 that explains the answers better than the recipe."""
    model = pico("llama", **DEEP)
    right = recipe_for(model, start_tokens=12)
    if mutant == "unpermuted q/k":
        artifact = export(unpermuted_qk(model), right, tmp_path / "a", dtype=dtype)
        report = verify(artifact, against=model.reference, recipe=right, options=options)
        assert "weights" in {row.code for row in report.failed}
        return
    wrong = RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    artifact = export(model, wrong, tmp_path / "a", dtype=dtype)
    report = verify(artifact, against=model.reference, recipe=right, options=options)
    caught = rows_of(report, "fail")
    by_bound = {case for case, row in caught.items() if row.noise is not None}
    assert by_bound or (mutant == "no attention factor" and set(caught) == {"closest hypothesis at 65"})


def test_only_products_of_integers_on_a_cpu_are_expected_to_round(pico: Pico, tmp_path: Path) -> None:
    """Not those of plain weights, of a graph that asks for float32 products, or of CUDA: their bounds follow no noise
    that isn't there."""
    model = pico("llama")

    def exactly(graph: onnx.ModelProto) -> None:
        for node in graph.graph.node:
            for each in node.attribute:
                if each.name == "accuracy_level":
                    each.i = 1

    artifact = export(model, recipe_for(model), tmp_path / "int4", dtype="int4")
    assert rounding_of(artifact).activations == 32
    assert rounding_of(artifact, "cuda").activations == 0
    assert rounding_of(changed(artifact, tmp_path / "exact", exactly)).activations == 0
    assert rounding_of(export(model, recipe_for(model), tmp_path / "f32")).activations == 0


def test_what_is_allowed_on_top_is_said() -> None:
    """Twice the mean, where the prediction is close; more of the largest KL, which one token decides."""
    row = Tolerance("INT4", 1, 2e-2, 1.0, "a reason")
    found = with_noise(row, Measures(3e-2, 0.5, 0.0, 1.0), Rounding("float64", activations=32))
    assert (found.kl_mean, found.kl_max) == pytest.approx((2e-2 + NOISE_OF_8_BITS * 3e-2, 1.0 + NOISE * 0.5))
    what = "float32 and activations of 8 bits in blocks of 32"
    assert found.reason == f"2e-02 and 2 x the 3.0e-02 that {what} cost the reference here"
    assert str(Rounding("powers", "f16", 32)) == (
        "float32 angles and a cache of f16 and activations of 8 bits in blocks of 32"
    )


def test_zeros_and_large_values_are_rounded_too(pico: Pico) -> None:
    """A block of zeros stays zeros, the largest value of a block what it is, and others are within half a step."""
    import torch

    from lrconvert.reference import Reference, Rotation

    model = pico("llama")
    reference = Reference(model, Rotation(1e4, 16, ()), activation_block=32)
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((5, 80)))
    x[0, :32], x[1, 70] = 0.0, 1e6
    seen = reference._multiplied(x)
    assert (seen[0, :32] == 0).all() and seen[1, 70].item() == pytest.approx(1e6)
    assert (seen[1, 64:70] == 0).all()
    assert ((seen - x).abs()[2:] <= x.abs()[2:].max() / 254 * (1 + 1e-12)).all() and (seen != x).any()
