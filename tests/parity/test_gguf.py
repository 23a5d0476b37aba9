# SPDX-License-Identifier: Apache-2.0
"""Whole GGUF artifacts in real llama.cpp: healthy ones pass with room, every mistake is caught."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, recipe_for
from support.gguf_files import WINDOW, Tensors, changed
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UnsupportedError
from lrconvert.parity import Options, Report, Row, hypotheses
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.recipe import Recipe, write_recipe
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.llama_cpp import WORKER
from lrconvert.targets import gguf

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "granite")
ROOM = 10  # a healthy artifact is this far inside its tolerance; a mutant is `FAR` outside
FAR = 100
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # K-quants make blocks of 256
Pico = Callable[..., Model]


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    """One interpreter for all files here."""
    interpreter = Interpreter(WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


def model_of(pico: Pico, family: str, **more: Any) -> Model:
    extra = {"original_max_position_embeddings": WINDOW} if family == "phi3" else {}
    return pico(family, max_position_embeddings=WINDOW, **extra, **more)


def bake(model: Model, recipe: Recipe, output: Path, **options: Any) -> Path:
    """The file to open: the first part of a split one."""
    planned = gguf.plan(model, recipe, output, gguf.Options(**{"type": "f32", **options}))
    bake_plan(planned)
    return output.parent / planned.names[0]


def rows_of(report: Report, code: str = "llama.cpp", verdict: str | None = None) -> dict[str, Row]:
    return {row.case: row for row in report.rows if row.code == code and verdict in (None, row.verdict)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_file_passes_with_room(pico: Pico, tmp_path: Path, family: str, options: Options) -> None:
    """Both sets, decoding in either, several sequences, the far end: KL far below 1e-6 in float32."""
    model = model_of(pico, family)
    report = verify(bake(model, recipe_for(model, even=True), tmp_path / "m.gguf"), options=options)
    assert report.passed, report.summary
    assert report.losses == []
    passed = rows_of(report, verdict="pass")
    assert {"at 256", "one past 256", "far end", "several sequences", "batch across the boundary"} <= set(passed)
    assert {"short prompt, long context", "decode, short context", "decode across 256"} <= set(passed)
    assert min(row.margin or 0 for row in passed.values()) > ROOM
    assert {row.code for row in report.rows if row.verdict == "pass"} == {"files", "metadata", "weights", "llama.cpp"}
    stored = json.loads((tmp_path / "m.lrconvert.json").read_text())
    assert stored["parity"]["passed"] is True and stored["target"] == "gguf"


MUTANTS = [name for name in RECIPE_MUTANTS if name not in ("no start tokens", "boundary one late")]
CHOSEN = [(family, mutant) for family in ("llama", "phi3") for mutant in MUTANTS]  # the two layouts


@pytest.mark.parametrize(("family", "mutant"), CHOSEN, ids=[f"{f}-{m}" for f, m in CHOSEN])
def test_every_mutant_is_caught_in_llama_cpp(
    pico: Pico, tmp_path: Path, family: str, mutant: str, options: Options
) -> None:
    """Each mistake fails a case of llama.cpp, by far more than its tolerance."""
    model = model_of(pico, family)
    right = recipe_for(model, even=True)
    wrong = RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    report = verify(bake(model, wrong, tmp_path / "m.gguf"), against=model.reference, recipe=right, options=options)
    caught = [row for row in report.failed if row.code == "llama.cpp"]
    assert caught, f"{mutant} passed"
    assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


def test_a_boundary_one_late_shows_in_the_metadata(pico: Pico, tmp_path: Path, options: Options) -> None:
    """llama.cpp makes contexts of 256 and 512 tokens: a boundary of 257 behaves like 256, and is still said."""
    model = model_of(pico, "llama")
    right = recipe_for(model, even=True)
    wrong = RECIPE_MUTANTS["boundary one late"](right)
    assert wrong is not None
    report = verify(bake(model, wrong, tmp_path / "m.gguf"), against=model.reference, recipe=right, options=options)
    assert [row.code for row in report.failed] == ["metadata"]
    assert "original_context_length is 257; the recipe needs 256" in report.failed[0].reason


@pytest.mark.parametrize("kind", ["f32", "q4_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpermuted_q_and_k_are_caught_in_every_type(
    pico: Pico, tmp_path: Path, family: str, kind: str, options: Options
) -> None:
    """The file's weights are held against the model's: rows in another order differ by more than any rounding."""
    model = model_of(pico, family, hidden_size=128, intermediate_size=128, head_dim=32)
    recipe = recipe_for(model, even=True)
    artifact = bake(unpermuted_qk(model), recipe, tmp_path / "m.gguf", type=kind)
    report = verify(artifact, against=model.reference, recipe=recipe, options=options)
    caught = [row for row in report.failed if row.code == "weights"]
    assert len(caught) == 1
    assert any(name in caught[0].reason for name in ("q_proj", "k_proj", "qkv"))


def _without(key: str) -> Callable[[dict[str, Any], Tensors], None]:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        dropped = metadata.pop(key, None) or tensors.pop(key)
        assert dropped

    return change


def _stacked(metadata: dict[str, Any], tensors: Tensors) -> None:
    metadata["llama.rope.scaling.factor"] = 2.0


def _plain(metadata: dict[str, Any], tensors: Tensors) -> None:
    """What llama.cpp's converter writes for Llama: no trace of the scaling."""
    for key in [key for key in metadata if ".rope.scaling." in key]:
        del metadata[key]
    for name in [name for name in tensors if name.startswith("rope_")]:
        del tensors[name]


FILE_MUTANTS: dict[str, Callable[[dict[str, Any], Tensors], None]] = {
    "no attn_factor": _without("llama.rope.scaling.attn_factor"),
    "no original context": _without("llama.rope.scaling.original_context_length"),
    "no long tensor": _without("rope_factors_long.weight"),
    "no short tensor": _without("rope_factors_short.weight"),
    "no type": _without("llama.rope.scaling.type"),
    "stacked factor": _stacked,
    "no scaling at all": _plain,
}


@pytest.mark.parametrize("mutant", FILE_MUTANTS)
def test_every_broken_file_is_caught_by_its_metadata_and_in_llama_cpp(
    pico: Pico, tmp_path: Path, mutant: str, options: Options
) -> None:
    """What no library reports and what llama.cpp runs without a word: seen in the file, and in the logits or by
    llama.cpp's refusal."""
    model = model_of(pico, "llama")
    recipe = recipe_for(model, even=True)
    healthy = bake(model, recipe, tmp_path / "healthy.gguf")
    broken = changed(healthy, tmp_path / "broken.gguf", FILE_MUTANTS[mutant])
    report = verify(broken, against=model.reference, recipe=recipe, options=options)
    assert [row for row in report.failed if row.code == "metadata"], mutant
    caught = [row for row in report.failed if row.code == "llama.cpp"]
    assert caught, f"{mutant} runs as if nothing were wrong"
    refused = any(row.case == "loads" for row in caught)
    assert refused == (mutant == "no type")
    assert refused or max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q4_k_m"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_quantised_files_pass_and_say_what_the_types_cost(
    pico: Pico, tmp_path: Path, family: str, kind: str, options: Options
) -> None:
    """llama.cpp is compared on the weights of the file; beside it stands the cost of the types alone, with the
    factors and without any."""
    model = model_of(pico, family, **WIDE)
    report = verify(bake(model, recipe_for(model, even=True), tmp_path / "m.gguf", type=kind), options=options)
    assert report.passed, report.summary
    known = rows_of(report, verdict="known")
    for end in ("at 256", "at 512"):
        for what in ("", ", without factors"):
            assert (known[f"quantisation alone{what}, {end}"].kl_mean or 0) > 0


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_a_wrong_rope_does_not_hide_behind_quantisation(
    pico: Pico, tmp_path: Path, kind: str, options: Options
) -> None:
    model = model_of(pico, "llama", **WIDE)
    right = recipe_for(model, even=True)
    for name in MUTANTS:
        wrong = RECIPE_MUTANTS[name](right)
        assert wrong is not None
        artifact = bake(model, wrong, tmp_path / f"{name}.gguf", type=kind)
        report = verify(artifact, against=model.reference, recipe=right, options=options)
        assert [row for row in report.failed if row.code == "llama.cpp"], f"{name} in {kind}"


def test_half_a_prompt_decides_where_it_is_clear_and_changes_no_verdict(
    pico: Pico, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a right file and of wrong ones the rows are those of whole prompts, and the reference reads fewer tokens."""
    model = model_of(pico, "llama", **WIDE)
    right, read = recipe_for(model, even=True), []
    answer = ReferenceRunner.answer

    def counted(self: ReferenceRunner, spec: Any, tokens: Any, *more: Any, **how: Any) -> np.ndarray:
        read.append(len(tokens))
        return answer(self, spec, tokens, *more, **how)

    monkeypatch.setattr(ReferenceRunner, "answer", counted)

    def verdicts(wrong: Recipe, clear: float) -> tuple[dict[str, str], int]:
        monkeypatch.setattr(hypotheses, "CLEARLY_FARTHER", clear)
        artifact = bake(model, wrong, tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", type="q8_0")
        read.clear()
        report = verify(artifact, against=model.reference, recipe=right, options=options)
        return {c: row.verdict for c, row in rows_of(report).items() if c.startswith("closest")}, sum(read)

    for name in (None, *MUTANTS):
        wrong = right if name is None else RECIPE_MUTANTS[name](right)
        assert wrong is not None
        halves, fewer = verdicts(wrong, hypotheses.CLEARLY_FARTHER)
        wholes, more = verdicts(wrong, np.inf)
        assert halves == wholes, name
        assert len(halves) == 2
        if name is None:
            assert fewer < more


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_attention_factor_survives_a_context_shift(
    pico: Pico, tmp_path: Path, family: str, options: Options
) -> None:
    """Folded: exact before a shift and after it. Not folded, llama.cpp applies the factor again at every shift."""
    model = model_of(pico, family)
    recipe = recipe_for(model, even=True)
    folded = verify(bake(model, recipe, tmp_path / "folded.gguf", fold=True), options=options)
    assert folded.passed, folded.summary
    assert "after a context shift" in rows_of(folded, verdict="pass")
    exact = {"folded attention factor at 256", "folded attention factor at 512"}
    assert exact <= set(rows_of(folded, "portable", "pass"))
    plain = verify(bake(model, recipe, tmp_path / "plain.gguf"), options=options)
    assert "after a context shift" not in rows_of(plain)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_static_file_uses_the_long_set_for_every_length(
    pico: Pico, tmp_path: Path, family: str, options: Options
) -> None:
    """One tensor, always used; what the short set would have been better at is a loss, and measured."""
    model = model_of(pico, family)
    report = verify(bake(model, recipe_for(model, even=True), tmp_path / "m.gguf", static=True), options=options)
    assert report.passed, report.summary
    assert any("one factor set for all lengths" in loss for loss in report.losses)
    assert (rows_of(report, verdict="known")["lost at 256"].kl_mean or 0) > 1e-2


def test_what_llama_cpp_can_not_do_is_refused_or_recorded(
    pico: Pico, tmp_path: Path, options: Options, cli: Callable[..., Result]
) -> None:
    """Start tokens, a third tier and a factor of its own in each: refused with all of that; with --allow-lossy the
    manifest, the metadata and the report name each, and the report measures what it costs."""
    model = model_of(pico, "llama")
    recipe = recipe_for(model, tiers=3, start_tokens=12)
    with pytest.raises(UnsupportedError) as refused:
        bake(model, recipe, tmp_path / "m.gguf")
    assert all(word in str(refused.value) for word in ("2 tiers", "no start tokens", "one attention factor"))
    assert "--allow-lossy" in str(refused.value)
    artifact = bake(model, recipe, tmp_path / "m.gguf", lossy=True)
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    assert len(report.losses) == 3
    assert json.loads((tmp_path / "m.lrconvert.json").read_text())["losses"] == report.losses
    assert max(row.kl_mean or 0 for case, row in rows_of(report).items() if case.startswith("lost at")) > 1e-3
    shown = cli("inspect", artifact)
    assert shown.out.count("dropped: ") == 3


def test_verify_writes_junit_and_exits_5(pico: Pico, tmp_path: Path, cli: Callable[..., Result]) -> None:
    model = model_of(pico, "llama")
    recipe = recipe_for(model, even=True)
    artifact = bake(model, recipe, tmp_path / "m.gguf")
    assert cli("verify", artifact, "--threads", 1).code == 0
    wrong = RECIPE_MUTANTS["swapped sets"](recipe)
    assert wrong is not None
    bad = cli("verify", artifact, "--threads", 1, "--recipe", write_recipe(wrong, tmp_path / "r"))
    assert bad.code == 5 and "FAILED" in bad.out
    assert cli("verify", artifact, "--runtime", "vllm").code == 2


def test_a_split_file_is_verified_as_one(pico: Pico, tmp_path: Path, options: Options) -> None:
    model = model_of(pico, "llama")
    first = bake(model, recipe_for(model, even=True), tmp_path / "m.gguf", split=200_000)
    assert first.name.startswith("m-00001-of-0000")
    assert verify(first, options=options).passed
    assert open_model(first).family.name == "llama"


def test_a_changed_weight_fails_the_checksum(pico: Pico, tmp_path: Path, options: Options) -> None:
    model = model_of(pico, "llama")
    artifact = bake(model, recipe_for(model, even=True), tmp_path / "m.gguf")
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    report = verify(artifact, options=options)
    assert "files" in {row.code for row in report.failed}
    assert np.isfinite([row.kl_mean or 0.0 for row in report.rows]).all()
