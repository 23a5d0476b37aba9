# SPDX-License-Identifier: Apache-2.0
"""Queries that grow with the position in whole artifacts: right in every format on both sides of every step, with the
model's own rotation and with others, and wrong ones are caught or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_for
from support.gguf_files import Tensors, changed
from support.pico import EXTRA
from support.verifying import CODES, WORKERS, baked, options_by_target, verify

from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UnsupportedError
from lrconvert.families.query_scale import QueryScale
from lrconvert.parity import Options
from lrconvert.parity.mutants import query_scale_as
from lrconvert.recipe import Recipe
from lrconvert.recipe.models import derive_for, own_recipe
from lrconvert.rope import Tier

BEGIN, WINDOW = 256, 1024  # llama.cpp's contexts count in steps of the first
FAR = 100
KEY, ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
GROWTH = EXTRA["ministral3"]["rope_parameters"][KEY]
Pico = Callable[..., Model]


@pytest.fixture(scope="module")
def options() -> Iterator[Callable[[str], Options]]:
    with options_by_target() as get:
        yield get


def published(pico: Pico, begin: int = BEGIN, **more: Any) -> Model:
    """As published models say it: a YaRN whose attention factor is one, and queries that grow from its window on."""
    settings = {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 1e4,
        "factor": WINDOW / begin,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        KEY: GROWTH,
        ORIGINAL: begin,
    }
    return pico("ministral3", **{"max_position_embeddings": WINDOW, "rope_parameters": settings, **more})


def elsewhere(model: Model) -> Recipe:
    """Two sets that change where queries don't begin to grow."""
    recipe = recipe_for(model, even=True)
    short, long = recipe.tiers
    tiers = (replace(short, max_length=WINDOW // 2), replace(long, max_length=WINDOW))
    return replace(recipe, original_window=WINDOW // 2, tiers=tiers)


# --- right ones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", WORKERS)
def test_its_own_rotation_is_right_in_every_format(
    pico: Pico, tmp_path: Path, target: str, options: Callable[[str], Options]
) -> None:
    """One set for every length, and three steps of the scale within the window; what is baked is a source again."""
    model = published(pico)
    recipe, _ = own_recipe(model)
    assert [tier.attention_factor for tier in recipe.tiers] == [1.0]
    artifact = baked(target, model, recipe, tmp_path)
    report = verify(artifact, options=options(target))
    assert report.passed, report.summary
    again = open_model(artifact)
    assert (again.family.name, again.shape.query_scale) == ("ministral3", QueryScale(GROWTH, BEGIN))
    other = {"hf": "onnx", "onnx": "gguf", "gguf": "hf"}[target]
    report = verify(baked(other, again, recipe, tmp_path), options=options(other))
    assert report.passed, report.summary


@pytest.mark.parametrize("target", WORKERS)
def test_two_sets_are_right_that_change_where_queries_grow(
    pico: Pico, tmp_path: Path, target: str, options: Callable[[str], Options]
) -> None:
    model = pico("ministral3", max_position_embeddings=BEGIN)
    artifact = baked(target, model, recipe_for(model, even=True), tmp_path)
    report = verify(artifact, options=options(target))
    assert report.passed and not report.losses, report.summary
    for code in CODES[target]:
        passed = {row.case for row in report.rows if row.code == code and row.verdict == "pass"}
        assert {f"at {BEGIN}", f"one past {BEGIN}", "far end"} <= passed
    assert open_model(artifact).shape.query_scale == QueryScale(GROWTH, BEGIN)


@pytest.mark.parametrize("target", ["hf", "onnx"])
def test_the_scale_stays_where_a_recipe_changes_sets_elsewhere(
    pico: Pico, tmp_path: Path, target: str, options: Callable[[str], Options]
) -> None:
    """It is the model's. Native code reads one window for both, and has the long set at every length then."""
    model = pico("ministral3", max_position_embeddings=BEGIN)
    artifact = baked(target, model, elsewhere(model), tmp_path)
    report = verify(artifact, options=options(target))
    assert report.passed, report.summary
    lost = "changes sets after 256 tokens alone, from where on the model's queries grow: sequences of up to 512 tokens"
    assert any(lost in loss for loss in report.losses) == (target == "hf")
    assert open_model(artifact).shape.query_scale == QueryScale(GROWTH, BEGIN)


@pytest.mark.parametrize("target", WORKERS)
def test_a_window_in_which_queries_do_not_grow(
    pico: Pico, tmp_path: Path, target: str, options: Callable[[str], Options]
) -> None:
    """Of a recipe that serves less, the artifact still says from where on they would."""
    model = published(pico, begin=WINDOW // 2)
    recipe, _ = own_recipe(model)
    tiers = (replace(recipe.tiers[0], max_length=BEGIN),)
    artifact = baked(target, model, replace(recipe, original_window=BEGIN, tiers=tiers), tmp_path)
    report = verify(artifact, options=options(target))
    assert report.passed, report.summary
    assert open_model(artifact).shape.query_scale == QueryScale(GROWTH, WINDOW // 2)


def test_llama_cpp_takes_one_set_elsewhere_and_refuses_two(
    pico: Pico, tmp_path: Path, options: Callable[[str], Options]
) -> None:
    model = pico("ministral3", max_position_embeddings=BEGIN)
    with pytest.raises(UnsupportedError, match=r"llama.cpp changes sets after 256 tokens alone.*up to 512") as refused:
        baked("gguf", model, elsewhere(model), tmp_path)
    assert "--static-long" in (refused.value.remedy or "")
    with pytest.raises(UnsupportedError):  # nothing that --allow-lossy is for
        baked("gguf", model, elsewhere(model), tmp_path, lossy=True)
    report = verify(baked("gguf", model, elsewhere(model), tmp_path, static=True), options=options("gguf"))
    assert report.passed, report.summary


@pytest.mark.parametrize("target", ["hf", "onnx"])
def test_an_extension_stands_on_its_own_rotation(
    pico: Pico, tmp_path: Path, target: str, options: Callable[[str], Options]
) -> None:
    """Up to the model's window nothing changes, beyond it sets are multiplied, and queries go on growing."""
    model = published(pico, begin=64, max_position_embeddings=256)
    settings = model.checkpoint.config["rope_parameters"]
    model = published(pico, max_position_embeddings=256, rope_parameters={**settings, "factor": 4.0})
    recipe, _ = derive_for(model.reference, "yarn", factor=2)
    assert [tier.max_length for tier in recipe.tiers] == [256, 512]
    report = verify(baked(target, model, recipe, tmp_path), options=options(target))
    assert report.passed, report.summary
    assert model.shape.query_scale == QueryScale(GROWTH, 64)


TYPES: list[tuple[str, dict[str, Any]]] = [
    ("onnx", {"dtype": "f16"}),
    ("onnx", {"dtype": "int8", "attention": "standard"}),
    ("onnx", {"dtype": "int8"}),
    ("onnx", {"double": False}),
    ("hf", {"dtype": "bf16"}),
    ("hf", {"portable": True}),
    ("gguf", {"type": "f16"}),
    ("gguf", {"type": "q8_0", "static": True}),
    ("gguf", {"fold": True}),
]


@pytest.mark.parametrize(("target", "more"), TYPES, ids=str)
def test_other_types_are_right_too(
    pico: Pico, tmp_path: Path, target: str, more: dict[str, Any], options: Callable[[str], Options]
) -> None:
    model = pico("ministral3", max_position_embeddings=BEGIN)
    report = verify(baked(target, model, recipe_for(model, even=True), tmp_path, **more), options=options(target))
    assert report.passed, report.summary


def test_a_portable_folder_has_its_sets_where_queries_grow(
    pico: Pico, tmp_path: Path, options: Callable[[str], Options]
) -> None:
    """Of one set, with the formula for the window that the config says; two elsewhere are refused."""
    model = published(pico)
    report = verify(baked("hf", model, own_recipe(model)[0], tmp_path, portable=True), options=options("hf"))
    assert report.passed, report.summary
    with pytest.raises(UnsupportedError, match="--portable: a portable artifact changes sets after 256 tokens alone"):
        baked("hf", model, elsewhere(pico("ministral3", max_position_embeddings=BEGIN)), tmp_path, portable=True)


# --- wrong ones -------------------------------------------------------------------------------------------

WRONG = {
    "forgotten": None,
    "another growth": QueryScale(0.8 * GROWTH, BEGIN),
    "from elsewhere": QueryScale(GROWTH, BEGIN // 2),
}


@pytest.mark.parametrize("target", WORKERS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_scale_is_caught(
    pico: Pico, tmp_path: Path, name: str, target: str, options: Callable[[str], Options]
) -> None:
    """By every code of every format, far outside of its tolerance."""
    model = published(pico)
    recipe, _ = own_recipe(model)
    wrong = query_scale_as(model, WRONG[name])
    assert wrong is not None
    artifact = baked(target, wrong, recipe, tmp_path)
    report = verify(artifact, against=model.reference, recipe=recipe, options=options(target))
    for code in CODES[target]:
        caught = [row for row in report.failed if row.code == code]
        assert caught, f"passed in {code}"
        assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR
    if target != "onnx":
        assert [row for row in report.failed if row.code in ("config", "metadata")]


def test_a_graph_without_steps_is_caught(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Callable[[str], Options]
) -> None:
    """The logarithm of a quotient that isn't rounded down."""
    from onnx import TensorProto

    from lrconvert.targets.onnx import graph

    def smooth(self: Any, scale: QueryScale) -> str:
        x = self.op("Cast", "position_ids", name="grown.float", to=TensorProto.FLOAT)
        x = self.op("Div", x, self.constant(float(scale.window), np.float32), name="grown.windows")
        one = self.constant(1.0, np.float32)
        x = self.op("Log", self.op("Add", x, one, name="grown.counted"), name="grown.log")
        x = self.op("Mul", x, self.constant(scale.growth, np.float32), name="grown.times")
        return self.op("Unsqueeze", self.op("Add", x, one, name="grown.wide"), self.constant([2]), name="grown")

    model = published(pico)
    recipe, _ = own_recipe(model)
    monkeypatch.setattr(graph._Decoder, "_grown", smooth)
    artifact = baked("onnx", model, recipe, tmp_path)
    report = verify(artifact, against=model.reference, recipe=recipe, options=options("onnx"))
    caught = [row for row in report.failed if row.code == "onnxruntime"]
    assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


def test_other_models_have_none_to_forget(pico: Pico) -> None:
    assert query_scale_as(pico("llama"), None) is None
    model = published(pico)
    assert query_scale_as(model, model.shape.query_scale) is None


def _set(key: str, value: Any) -> Callable[[dict[str, Any], Tensors], None]:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        assert metadata[f"mistral3.{key}"] != value
        metadata[f"mistral3.{key}"] = value

    return change


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.temperature_scale", 0.0), ("rope.scaling.original_context_length", WINDOW)],
)
def test_a_wrong_key_is_caught(
    pico: Pico, tmp_path: Path, key: str, value: Any, options: Callable[[str], Options]
) -> None:
    """In the metadata, and in llama.cpp's answers."""
    model = published(pico)
    recipe, _ = own_recipe(model)
    broken = changed(baked("gguf", model, recipe, tmp_path), tmp_path / "broken.gguf", _set(key, value))
    report = verify(broken, against=model.reference, recipe=recipe, options=options("gguf"))
    assert [row for row in report.failed if row.code == "metadata"]
    caught = [row for row in report.failed if row.code == "llama.cpp"]
    assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


# --- files of others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [1.0, 0.5, None])
def test_a_file_of_llama_cpps_converter_is_read_as_it_runs(
    pico: Pico, tmp_path: Path, multiplier: float | None, options: Callable[[str], Options]
) -> None:
    """YaRN's own keys in the place of factors, and the logarithm by whose multiple its attention factor is divided."""
    model = published(pico)
    ours = baked("gguf", model, own_recipe(model)[0], tmp_path)

    def converted(metadata: dict[str, Any], tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("rope_factors")]:
            del tensors[name]
        for key in [key for key in metadata if key.startswith("lrconvert.")]:
            del metadata[key]
        del metadata["mistral3.rope.scaling.attn_factor"]
        scaling = {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
        scaling |= {} if multiplier is None else {"yarn_log_multiplier": multiplier}
        metadata |= {f"mistral3.rope.scaling.{key}": value for key, value in scaling.items()}

    theirs = changed(ours, tmp_path / "theirs.gguf", converted)
    again = open_model(theirs)
    assert (again.shape.query_scale, again.rotation.kind) == (QueryScale(GROWTH, BEGIN), "yarn")
    wanted = {1.0: 1.0, 0.5: (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1), None: 0.1 * np.log(4) + 1}[multiplier]
    assert again.rotation.tiers[-1].attention_factor == pytest.approx(wanted, rel=1e-9)
    recipe, _ = own_recipe(again)
    report = verify(theirs, against=model.reference, recipe=recipe, options=options("gguf"))
    judged = [row for row in report.rows if row.code == "llama.cpp" and row.verdict != "skipped"]
    assert judged and all(row.verdict == "pass" for row in judged), report.summary
    report = verify(baked("hf", again, recipe, tmp_path), options=options("hf"))
    assert report.passed, report.summary


def test_a_file_without_the_scale_is_a_model_without_it(pico: Pico, tmp_path: Path) -> None:
    model = pico("ministral3", max_position_embeddings=BEGIN)
    recipe = replace(recipe_for(model, even=True), tiers=(Tier(BEGIN, (1.0,) * 8),))

    def gone(metadata: dict[str, Any], tensors: Tensors) -> None:
        del metadata["mistral3.attention.temperature_scale"]

    again = open_model(changed(baked("gguf", model, recipe, tmp_path), tmp_path / "without.gguf", gone))
    assert again.shape.query_scale is None
    folder = baked("hf", again, recipe, tmp_path)
    assert open_model(folder).checkpoint.config["rope_scaling"][KEY] == 0.0
