# SPDX-License-Identifier: Apache-2.0
"""`--portable`: the attention factor in q and k, so that engines that compute their own do what the recipe asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Result, own_name, recipe_for
from safetensors.numpy import save_file
from support.pico import FAMILIES, pico_config, pico_tensors, write_pico
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.artifact.record import BakeRecord
from lrconvert.checkpoint import Model, fold, open_model
from lrconvert.checkpoint.adapter import Adapter, merged, open_adapter
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import UnsupportedError
from lrconvert.parity import Options, Report
from lrconvert.recipe import Recipe, write_recipe
from lrconvert.rope import longrope_attention_factor
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.transformers import WORKER
from lrconvert.targets import hf

pytestmark = pytest.mark.usefixtures("remembered")

FORMULA = longrope_attention_factor(2.0, 64)
ATTENTION = 1.35


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    interpreter = Interpreter(WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


def uneven(model: Model, attention: float = ATTENTION, **changes: Any) -> Recipe:
    """A recipe whose one attention factor is not the formula's."""
    recipe = recipe_for(model, **changes)
    return replace(recipe, tiers=tuple(replace(tier, attention_factor=attention) for tier in recipe.tiers))


def bake(model: Model, recipe: Recipe, output: Path, *, adapter: Adapter | None = None, **changes: Any) -> Path:
    output = own_name(output)
    bake_plan(hf.plan(model, recipe, output, hf.Options(portable=True, **changes), adapter=adapter))
    return output


def folded_rows(report: Report, what: str = "folded attention factor") -> dict[int, float]:
    """Mean KL by length."""
    rows = [row for row in report.rows if row.code == "portable" and row.case.startswith(what)]
    return {row.length or 0: row.kl_mean or 0.0 for row in rows}


# Native code of phimoe never uses the long set.
PORTABLE = [family for family in FAMILIES if family != "phimoe"]


@pytest.mark.parametrize("family", PORTABLE)
def test_it_does_what_the_recipe_asks(
    pico: Callable[..., Model], tmp_path: Path, family: str, options: Options
) -> None:
    """In float32 exactly: native and custom code agree with the folded model, and that with the original one."""
    model = pico(family)
    artifact = bake(model, uneven(model), tmp_path / "a")
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    assert report.losses == []
    assert {row.code for row in report.rows if row.verdict == "pass"} >= {"portable", "native", "custom"}
    assert set(folded_rows(report)) == {64, 128}
    assert max(folded_rows(report).values()) < 1e-14
    assert max(folded_rows(report, "rounding").values()) < 1e-9
    config = json.loads((artifact / "config.json").read_text())
    written = [tier["attention_factor"] for tier in config["longrope"]["tiers"]]
    written += [config["rope_scaling"]["attention_factor"]] if family != "phi3" else []
    assert written == pytest.approx([FORMULA] * len(written), rel=1e-12)
    manifest = Manifest.read(artifact)
    assert manifest.bake.attention_scale == pytest.approx(ATTENTION / FORMULA)
    assert any("attention factor folded" in note and "1.2498" in note for note in manifest.notes)
    assert {tier["attention_factor"] for tier in manifest.recipe["tiers"]} == {ATTENTION}


@pytest.mark.parametrize("family", PORTABLE)
def test_only_rotated_channels_of_q_and_k_change(pico: Callable[..., Model], tmp_path: Path, family: str) -> None:
    """Row by row: a head's rotated channels by a/f, of the norms where there are some, nothing else at all; and nothing
    in layers that the recipe doesn't rotate."""
    model = pico(family)
    made = open_model(bake(model, uneven(model), tmp_path / "a"))
    shape, scale = model.shape, ATTENTION / FORMULA
    changed = "norms" if ("q_norm", 0) in model.roles else "qk+bias" if ("q_bias", 0) in model.roles else "qk"
    changed = "qkv" if family == "phi3" else changed
    roles = {"qk": {"q", "k"}, "qk+bias": {"q", "k", "q_bias", "k_bias"}, "norms": {"q_norm", "k_norm"}}
    expected = roles.get(changed, {"qkv"})
    assert model.family.layers is None or any(shape.turn(layer) is not None for layer in range(shape.layers))
    for tensor in model.roles.values():
        role = tensor.role
        old, new = (each.tensor(role, tensor.layer, tensor.expert) for each in (model, made))
        assert old is not None and new is not None and old.dtype == new.dtype
        if role not in expected or (tensor.layer is not None and shape.turn(tensor.layer) is not None):
            np.testing.assert_array_equal(new, old)
            continue
        one = {} if model.family.whole_qk_norms else {"q_norm": 1, "k_norm": 1}
        heads = {**one, "qkv": shape.heads + shape.kv_heads}.get(
            role, shape.heads if role.startswith("q") else shape.kv_heads
        )
        for channel in range(len(old)):
            head, inside = divmod(channel, shape.head_dim)
            rotated = head < heads and inside < shape.rotary_dim
            offset, factor = shape.norm_offset if "norm" in role else 0.0, scale if rotated else 1.0
            np.testing.assert_allclose(
                new[channel], (old[channel] + offset) * factor - offset, rtol=1.2e-7, atol=1.2e-7 * offset
            )


def squared(model: Model, scale: float) -> dict[str, Any]:
    return fold.row_scales(model, scale**2)


def everywhere(model: Model, scale: float) -> dict[str, Any]:
    return {name: np.full_like(rows, scale) for name, rows in fold.row_scales(model, scale).items()}


def keys_alone(model: Model, scale: float) -> dict[str, Any]:
    return {name: rows for name, rows in fold.row_scales(model, scale).items() if ".q_" not in name}


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize(
    ("family", "mutant"),
    [("llama", squared), ("qwen3", squared), ("phi3", squared), ("phi3", everywhere), ("qwen2", keys_alone)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_fold_is_caught_twice(
    monkeypatch: pytest.MonkeyPatch,
    pico: Callable[..., Model],
    tmp_path: Path,
    options: Options,
    family: str,
    mutant: Callable[..., dict[str, Any]],
    dtype: str | None,
) -> None:
    """By the codes, which compute something else than the reference's fold; and where the reference makes the same
    mistake, by the check of that fold against the original weights. In bfloat16 too."""
    model, right = pico(family), fold.row_scales

    def wrong(model: Model, scale: float) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(fold, "row_scales", right)
            return mutant(model, scale)

    with monkeypatch.context() as patched:
        patched.setattr(fold, "row_scales", wrong)
        artifact = bake(model, uneven(model), tmp_path / "a", dtype=dtype)
        same_mistake = verify(artifact, options=replace(options, backends=()))
    assert [row.verdict for row in same_mistake.rows if row.code == "portable"] == ["fail", "fail", "known", "known"]
    report = verify(artifact, options=options)
    for code in ("native", "custom"):
        assert any(row.code == code for row in report.failed), code
    assert not any(row.code == "portable" for row in report.failed)  # the recipe's own fold is right


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("family", PORTABLE)
def test_rounding_is_measured_not_hidden(
    pico: Callable[..., Model], tmp_path: Path, options: Options, family: str, dtype: str
) -> None:
    """The codes agree to float32 with weights rounded once; what that rounding costs is a row of its own."""
    model = pico(family)
    report = verify(bake(model, uneven(model), tmp_path / "a", dtype=dtype), options=options)
    assert report.passed, report.summary
    assert all((row.kl_mean or 0) < 1e-8 for row in report.rows if row.code == "custom")
    assert max(folded_rows(report).values()) < 1e-14
    cost = max(folded_rows(report, "rounding").values())
    assert cost > 1e-10  # float16 rounds a few norms of Gemma 3 alone
    assert cost < {"bf16": 1e-2, "f16": 1e-3}[dtype] or model.shape.experts is not None  # rounding decides near ties


def test_shards_without_q_and_k_stay_as_they_are(tmp_path: Path) -> None:
    """Only files that hold a scaled tensor are written again, under their names, with the index as it was."""
    folder = write_pico(tmp_path / "model", "phi3", shards=8)
    model = open_model(folder)
    plan = hf.plan(model, uneven(model), tmp_path / "out", hf.Options(portable=True))
    bake_plan(plan)
    written = {stream.name for stream in plan.streams}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert written == {file for name, file in index.items() if "qkv" in name}
    assert 0 < len(written) < 8
    for file in {*index.values(), "model.safetensors.index.json"}:
        same = sha256_of(folder / file) == sha256_of(tmp_path / "out" / file)
        assert same == (file not in written), file


def test_a_merged_adapter_and_the_fold_are_rounded_once(tmp_path: Path, options: Options) -> None:
    """q is merged and scaled, o is merged, k is scaled: each rounded to bfloat16 once, as the reference has them."""
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in pico_tensors(pico_config("llama")).items()}
    folder = write_pico(tmp_path / "model", torch_dtype="bfloat16")
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    rng, tensors = np.random.default_rng(3), {}
    for name in ("q", "o"):
        for part, shape in (("A", (4, 64)), ("B", (64, 4))):
            key = f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_{part}.weight"
            tensors[key] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    model = open_model(folder)
    artifact = bake(model, uneven(model), tmp_path / "a", adapter=open_adapter(adapter))
    wide = merged(model, open_adapter(adapter), rounded=False)
    made, scale = open_model(artifact), ATTENTION / FORMULA
    for role, factor in (("q", scale), ("k", scale), ("o", 1.0), ("v", 1.0)):
        exact, found = wide.tensor(role, 0), made.tensor(role, 0)
        assert exact is not None and found is not None
        np.testing.assert_array_equal(found, (exact.astype(np.float64) * factor).astype(ml_dtypes.bfloat16))
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    assert all((row.kl_mean or 0) < 1e-8 for row in report.rows if row.code == "custom")


def test_where_native_code_never_uses_the_long_set_nothing_is_portable(
    pico: Callable[..., Model], tmp_path: Path
) -> None:
    model = pico("phimoe")
    with pytest.raises(UnsupportedError, match=r"Phi-3\.5-MoE code never uses the long set"):
        hf.plan(model, uneven(model), tmp_path / "a", hf.Options(portable=True, lossy=True))


def test_the_formula_needs_no_fold(pico: Callable[..., Model], tmp_path: Path, options: Options) -> None:
    """A recipe that is portable already: weights are linked, byte for byte."""
    model = pico("llama")
    plan = hf.plan(model, recipe_for(model, even=True), tmp_path / "a", hf.Options(portable=True))
    assert plan.streams == [] and plan.record == BakeRecord(plan.spec.window, capability="portable")
    assert not any("folded" in note for note in plan.notes)
    bake_plan(plan)
    assert verify(tmp_path / "a", options=replace(options, backends=("native",))).passed


def test_an_artifact_outlives_its_source(pico_folder: Callable[..., Path], tmp_path: Path, options: Options) -> None:
    """Its own weights are folded already, and are not folded twice."""
    source = write_pico(tmp_path / "source")
    model = open_model(source)
    artifact = bake(model, uneven(model), tmp_path / "a")
    (source / "config.json").unlink()
    report = verify(artifact, options=replace(options, backends=("native",)))
    assert report.passed, report.summary
    assert any("own weights" in note for note in report.notes)
    assert folded_rows(report) == {}
    assert verify(artifact, against=str(artifact), options=replace(options, backends=("native",))).passed


REFUSED = {
    "start tokens": ({"start_tokens": 8}, "knows no start tokens: the first 8"),
    "three tiers": ({"tiers": 3}, "knows 2 tiers: sequences of 65 to 128"),
    "factors of each tier": ({}, "knows one attention factor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_engines_can_not_do_is_refused_or_dropped(
    pico: Callable[..., Model], tmp_path: Path, options: Options, cli: Callable[..., Result], name: str
) -> None:
    """Exit code 4 names it; --allow-lossy bakes the rest, says it, records it and measures it."""
    changes, needle = REFUSED[name]
    model = pico("llama")
    recipe = recipe_for(model, **changes) if name == "factors of each tier" else uneven(model, **changes)
    path = write_recipe(recipe, tmp_path / "recipe")
    arguments = ("hf", model.reference, "--recipe", path, "-o", tmp_path / "out", "--portable")
    refused = cli(*arguments)
    assert refused.code == UnsupportedError.exit_code
    assert needle in refused.err and "--allow-lossy" in refused.err
    assert not (tmp_path / "out").exists()
    baked = cli(*arguments, "--allow-lossy")
    assert baked.code == 0, baked.err
    assert f"dropped: a portable artifact {needle}" in baked.err
    assert any(needle in loss for loss in json.loads((tmp_path / "out" / MANIFEST).read_text())["losses"])
    report = verify(tmp_path / "out", options=options)
    assert report.passed, report.summary
    assert any(needle in loss for loss in report.losses)
    lost = [row for row in report.rows if row.code == "portable" and row.case.startswith("lost")]
    assert lost and all(row.verdict == "known" for row in lost)
    assert max(row.kl_mean or 0.0 for row in lost) > 1e-5


def test_all_that_is_wrong_is_named_at_once(pico: Callable[..., Model], tmp_path: Path) -> None:
    model = pico("llama")
    recipe = recipe_for(model, tiers=3, start_tokens=8)
    with pytest.raises(UnsupportedError) as error:
        hf.plan(model, recipe, tmp_path / "out", hf.Options(portable=True))
    for needle in ("2 tiers", "start tokens", "one attention factor"):
        assert needle in str(error.value)


def test_lossy_alone_is_usage(cli: Callable[..., Result], pico: Callable[..., Model], tmp_path: Path) -> None:
    model = pico("llama")
    path = write_recipe(recipe_for(model), tmp_path / "recipe")
    result = cli("hf", model.reference, "--recipe", path, "-o", tmp_path / "out", "--allow-lossy")
    assert result.code == 2 and "--portable" in result.err
