# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face artifact holds: the spelling that every version reads, weights as they were, the rest along."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf-modules-"))

import ml_dtypes
import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.pico import FAMILIES, WINDOW, pico_tensors, query_scale, v5_rope, write_pico

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.artifact.record import BakeRecord
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import InputError, UnsupportedError, UsageError
from lrconvert.families import get_family
from lrconvert.recipe import Recipe, write_recipe
from lrconvert.rope import longrope_attention_factor
from lrconvert.targets import hf
from lrconvert.targets.hf.plan import modeling_code
from lrconvert.targets.hf.shards import PlannedTensor, header_of, plan_shards

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_V5 = {"torch_dtype": None, "dtype": "float32"}
V5 = {**v5_rope("mistral"), **DTYPE_V5}


def bake(folder: Path, output: Path, recipe: Recipe | None = None, **options: Any) -> dict[str, Any]:
    """An artifact; its config. Two tiers unless `recipe` says otherwise."""
    link = options.pop("link", None)
    model = open_model(folder)
    bake_plan(hf.plan(model, recipe or recipe_for(model), output, hf.Options(**options)), link=link)
    return json.loads((output / "config.json").read_text())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- config.json -----------------------------------------------------------------------------------------


def check_spelling(config: dict[str, Any], model: Model, recipe: Recipe, window: int, boundary: int) -> None:
    """What transformers 4.57 and 5.x both read right, and other engines too."""
    short, long = recipe.tiers[0], recipe.tiers[-1]
    scaling = config["rope_scaling"]
    if model.family.name == "olmo3":  # which has no other key for θ of the layers that slide
        kinds = {"full_attention": {**scaling, "rope_theta": model.shape.theta}}
        kinds["sliding_attention"] = {"rope_type": "default", "rope_theta": model.shape.plain_theta}
        assert config["rope_parameters"] == kinds
    else:
        assert "rope_parameters" not in config
    assert config["max_position_embeddings"] == window
    assert config["original_max_position_embeddings"] == boundary
    assert config["rope_theta"] == model.shape.theta and isinstance(config["rope_theta"], float)
    for key, factors in (("short_factor", short.factors), ("long_factor", long.factors)):
        assert scaling[key] == list(factors)
        assert len(scaling[key]) == model.shape.rotary_dim // 2
        assert all(isinstance(factor, float) for factor in scaling[key])
    if model.family.name == "phi3":
        assert set(scaling) == {"type", "short_factor", "long_factor"}
        assert scaling["type"] == "longrope"
    else:
        assert scaling["rope_type"] == scaling["type"] == "longrope"
        assert scaling["original_max_position_embeddings"] == boundary
        assert scaling["factor"] == window / boundary and isinstance(scaling["factor"], float)
        stated = {"attention_factor": long.attention_factor}
        if model.family.name == "phimoe":
            stated = {"short_mscale": short.attention_factor, "long_mscale": long.attention_factor}
        assert {key: scaling[key] for key in stated} == stated
        assert all(isinstance(scaling[key], float) for key in stated)
        if model.family.query_scale is not None:
            assert scaling | query_scale(model.family.name, boundary) == scaling
            stated |= {model.family.query_scale: None}
        assert len(scaling) == 6 + len(stated)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["v4", "v5", "yarn"])
def test_the_spelling_is_the_measured_one(
    family: str, source: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """From the spelling of either version, plain or scaled before: top-level θ and original window, floats."""
    changes: dict[str, Any] = {} if source == "v4" else {**v5_rope(family), **DTYPE_V5}
    if source == "yarn":
        changes = {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": WINDOW}}
        changes["rope_scaling"] |= query_scale(family)
    folder = pico_folder(family, **changes)
    model = open_model(folder)
    assert model.shape.rotary_dim == open_model(pico_folder(family)).shape.rotary_dim
    recipe = recipe_for(model)
    config = bake(folder, tmp_path / "out", recipe)
    check_spelling(config, model, recipe, 2 * WINDOW, WINDOW)
    partial = config.get("partial_rotary_factor", 1.0)
    assert int(model.shape.head_dim * partial) == model.shape.rotary_dim


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_the_config_stays_as_it_was(family: str, tmp_path: Path) -> None:
    """model_type and architectures native, foreign keys kept in their order, one auto_map of ours."""
    foreign = {
        "_name_or_path": "a/b",
        "use_cache": True,
        "vendor": {"deep": [1, 2.5, None, "é"]},
        "initializer_range": 0.02,
    }
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    folder = write_pico(tmp_path / "model", family, auto_map=auto_map, **foreign)
    source = json.loads((folder / "config.json").read_text())
    config = bake(folder, tmp_path / "out")
    assert config["model_type"] == family
    assert config["architectures"] == [get_family(family).hf_class]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_longrope.LongRopeForCausalLM"}
    edited = {"max_position_embeddings", "original_max_position_embeddings", "auto_map", "sliding_window"}
    source.pop("rope_parameters", None)  # which rope_scaling says
    assert {key: config[key] for key in source if key not in edited} == {
        key: value for key, value in source.items() if key not in edited
    }
    assert [key for key in config if key in source] == list(source)
    added = {"rope_scaling", "longrope", "original_max_position_embeddings"} - set(source)
    added |= {"rope_parameters"} if family == "olmo3" else set()  # which says θ of the layers that slide
    assert set(config) - set(source) == added


@pytest.mark.parametrize(
    ("family", "sliding", "window"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": 64}, 128),  # it never acts within the model's own 64 tokens
        ("mistral", {"sliding_window": 127}, 128),
        ("mistral", {"sliding_window": 128}, 128),
        ("mistral", {"sliding_window": 4096}, 4096),
        ("mistral", {"sliding_window": None}, ...),  # the key is absent: 4096 by the family's default, enough here
        ("phi3", {"sliding_window": 20}, 20),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, 32),
        ("llama", {"sliding_window": False}, False),
    ],
)
def test_a_sliding_window_is_kept_where_it_acts_and_widened_where_it_never_did(
    family: str, sliding: dict[str, Any], window: Any, tmp_path: Path
) -> None:
    folder = write_pico(tmp_path / "model", family, **sliding)
    assert bake(folder, tmp_path / "out").get("sliding_window", ...) == window


def test_a_default_sliding_window_is_widened_too(tmp_path: Path) -> None:
    """Mistral's config class has 4096 where the key is absent; an explicit null has none."""
    folder = write_pico(tmp_path / "model", "mistral", sliding_window=None, max_position_embeddings=4096)
    assert bake(folder, tmp_path / "out")["sliding_window"] == 8192
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    assert bake(folder, tmp_path / "other")["sliding_window"] is None


def test_every_edit_is_reported(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Old and new value of what changed, in the plan and on the terminal."""
    folder = write_pico(tmp_path / "model", "mistral", **V5, sliding_window=64)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    model = open_model(folder)
    edits = {edit.key: (edit.old, edit.new) for edit in hf.plan(model, recipe_for(model), tmp_path / "out").edits}
    assert edits["max_position_embeddings"] == (64, 128)
    assert edits["sliding_window"] == (64, 128)
    assert edits["rope_parameters"][1] is None
    assert edits["model_max_length"] == (64, 128)
    assert "hidden_size" not in edits
    recipe = write_recipe(recipe_for(model), tmp_path / "r")
    result = cli("hf", folder, "--recipe", recipe, "-o", tmp_path / "out", "--verbose")
    for line in ("config.json: sliding_window 64 → 128", "tokenizer_config.json: model_max_length 64 → 128"):
        assert line in result.out


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", '"\\ud800"'])
def test_what_json_can_not_say_is_refused(text: str, tmp_path: Path) -> None:
    """Python reads NaN and half a surrogate pair; a config that holds one can't be written again."""
    folder = write_pico(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"bos_token_id": 1', f'"bos_token_id": {text}'))
    with pytest.raises(InputError, match=r"config\.json: (holds what JSON can't express|.*half a surrogate pair)"):
        bake(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- tiers, windows, losses ------------------------------------------------------------------------------


def test_more_tiers_than_native_code_knows(tmp_path: Path, pico: Callable[..., Model]) -> None:
    """The native keys are the best projection, ours hold all, and the manifest says what is lost."""
    model = pico()
    recipe = recipe_for(model, tiers=4, start_tokens=4)
    plan = hf.plan(model, recipe, tmp_path / "out")
    bake_plan(plan)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    check_spelling(config, model, recipe, 8 * WINDOW, WINDOW)
    own = config["longrope"]
    assert [tier["max_length"] for tier in own["tiers"]] == [64, 128, 256, 512]
    for made, tier in zip(own["tiers"], recipe.tiers, strict=True):
        assert made["factors"] == list(tier.factors)
        assert made["attention_factor"] == tier.attention_factor
        assert made["start_tokens"] == 4
    losses = Manifest.read(tmp_path / "out").losses
    assert losses == plan.losses
    for needle in ("knows 2 tiers: sequences of 65 to 256 tokens", "knows no start tokens", "one attention factor"):
        assert [loss for loss in losses if needle in loss], losses


def test_nothing_is_lost_where_two_tiers_suffice(tmp_path: Path, pico: Callable[..., Model]) -> None:
    """One attention factor, no start tokens: native code computes the recipe, phi3 too by its formula."""
    for family in FAMILIES:
        if family == "phimoe":  # its native code has one set
            continue
        model = pico(family)
        recipe = recipe_for(model, even=True)
        assert recipe.tiers[0].attention_factor == longrope_attention_factor(2.0, WINDOW)
        assert hf.plan(model, recipe, tmp_path / family).losses == []


def test_an_attention_factor_that_phi3_can_not_say_is_a_loss(tmp_path: Path, pico: Callable[..., Model]) -> None:
    model = pico("phi3")
    recipe = recipe_for(model, even=True)
    odd = replace(recipe, tiers=tuple(replace(tier, attention_factor=1.5) for tier in recipe.tiers))
    plan = hf.plan(model, odd, tmp_path / "out")
    assert [loss for loss in plan.losses if "1.5" in loss]
    bake_plan(plan)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [tier["attention_factor"] for tier in config["longrope"]["tiers"]] == [1.5, 1.5]


@pytest.mark.parametrize(
    ("window", "tiers"), [(None, [64, 128, 256]), (200, [64, 128, 200]), (128, [64, 128]), (64, [64])]
)
def test_a_window_cuts_the_artifact_short(
    window: int | None, tiers: list[int], tmp_path: Path, pico_folder: Callable[..., Path], pico: Callable[..., Model]
) -> None:
    """Everything that speaks of a window speaks of this one; the manifest keeps the whole recipe."""
    recipe = recipe_for(pico(), tiers=3)
    config = bake(pico_folder(), tmp_path / "out", recipe, window=window)
    assert [tier["max_length"] for tier in config["longrope"]["tiers"]] == tiers
    assert config["max_position_embeddings"] == tiers[-1]
    assert config["rope_scaling"]["factor"] == tiers[-1] / 64
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.bake == BakeRecord(tiers[-1]) and manifest.options == {}
    assert len(manifest.recipe["tiers"]) == 3


@pytest.mark.parametrize("window", [63, 257, 10**9])
def test_a_window_that_the_recipe_does_not_serve(window: int, tmp_path: Path, pico: Callable[..., Model]) -> None:
    with pytest.raises(UsageError, match=str(window)):
        hf.plan(pico(), recipe_for(pico(), tiers=3), tmp_path / "out", hf.Options(window=window))


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"family": "qwen2"}, ["family qwen2 in the recipe, llama in the model"]),
        ({"rope_theta": 500000.0}, ["rope_theta 500000.0 in the recipe, 10000.0 in the model"]),
        ({"rotary_dim": 8}, ["rotary dimension 8 in the recipe, 16 in the model"]),
        ({"family": "phi3", "rope_theta": 1e6}, ["family phi3", "rope_theta 1000000.0"]),
    ],
)
def test_a_recipe_for_another_model_is_refused(
    changes: dict[str, Any], needles: list[str], tmp_path: Path, pico: Callable[..., Model]
) -> None:
    with pytest.raises(InputError) as caught:
        hf.plan(pico(), replace(recipe_for(pico()), **changes), tmp_path / "out")
    for needle in needles:
        assert needle in str(caught.value)


# --- files -----------------------------------------------------------------------------------------------

SIDES = {
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"model_max_length": 64, "chat_template": "{{ x }}", "added_tokens_decoder": {"0": {}}}',
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "LICENSE": b"Apache",
    "License.txt": b"also",
    "NOTICE": b"notice",
    "vocab.json": b"{}",
    "merges.txt": b"#version",
}


def with_sides(folder: Path, **options: Any) -> Path:
    write_pico(folder, **options)
    (folder / "additional_chat_templates").mkdir()
    for name, data in {**SIDES, "README.md": b"theirs", "pytorch_model.bin": b"pickle"}.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_are_linked_and_the_rest_comes_along(shards: int, tmp_path: Path) -> None:
    """The same inodes for weights, the same bytes elsewhere, in files of their own; one edited tokenizer config."""
    folder = with_sides(tmp_path / "model", shards=shards)
    bake(folder, tmp_path / "out")
    made = files_of(tmp_path / "out")
    weights = {path.name for path in folder.glob("model*")}
    ours = {"config.json", "generation_config.json", "modeling_longrope.py", "README.md", MANIFEST}
    assert set(made) == {*SIDES, *weights, *ours}
    assert len(weights) == (1 if shards == 1 else 3)
    for name in weights | set(SIDES):
        shared = (tmp_path / "out" / name).samefile(folder / name)
        assert shared == name.endswith(".safetensors"), name
    for name in SIDES:
        if name != "tokenizer_config.json":
            assert made[name] == SIDES[name]
    edited = json.loads(SIDES["tokenizer_config.json"]) | {"model_max_length": 128}
    assert json.loads(made["tokenizer_config.json"]) == edited
    files = Manifest.read(tmp_path / "out").files
    assert set(files) == set(made) - {MANIFEST}
    for name, record in files.items():
        assert record.size == len(made[name])
        assert record.linked == name.endswith(".safetensors")
        assert record.sha256 == (None if record.linked else sha256_of(tmp_path / "out" / name))


def test_copies_share_nothing_with_the_source(tmp_path: Path) -> None:
    """--copy: every file is its own, and every digest is in the manifest."""
    folder = with_sides(tmp_path / "model")
    bake(folder, tmp_path / "out", link=False)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert all(record.sha256 for record in Manifest.read(tmp_path / "out").files.values())


@pytest.mark.parametrize("options", [{}, {"link": False}, {"dtype": "bf16"}])
def test_two_bakes_are_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    """Every file, the manifest included."""
    folder = with_sides(tmp_path / "model", shards=2)
    for name in ("one", "two"):
        bake(folder, tmp_path / name, **options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_lone_file_gets_the_name_that_transformers_looks_for(tmp_path: Path) -> None:
    folder = write_pico(tmp_path / "model")
    (folder / WEIGHTS).rename(folder / "model.fp32.safetensors")
    bake(folder, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).samefile(folder / "model.fp32.safetensors")
    assert set(open_model(tmp_path / "out").roles) == set(open_model(folder).roles)


def test_an_artifact_can_be_baked_again(tmp_path: Path, pico: Callable[..., Model]) -> None:
    """With the same recipe the same config comes out, with another one the other's."""
    first = bake(write_pico(tmp_path / "model"), tmp_path / "one", recipe_for(pico(), tiers=3))
    assert bake(tmp_path / "one", tmp_path / "two", recipe_for(pico(), tiers=3)) == first
    assert len(bake(tmp_path / "one", tmp_path / "three", recipe_for(pico()))["longrope"]["tiers"]) == 2


def test_the_manifest_names_source_and_recipe(tmp_path: Path) -> None:
    """Enough to know the inputs again: name, family, digests of config and of every weight file's header."""
    folder = write_pico(tmp_path / "model", shards=2)
    bake(folder, tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.target, manifest.parity) == ("hf", None)
    assert (manifest.source["model"], manifest.source["family"]) == (str(folder), "llama")
    assert set(manifest.source["weights"]) == {path.name for path in folder.glob("model*")}
    before = manifest.source
    write_pico(folder, shards=2, seed=8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    bake(folder, tmp_path / "other")
    assert Manifest.read(tmp_path / "other").source["config_sha256"] != before["config_sha256"]


def test_a_dry_run_writes_nothing_and_says_what_would_be(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Not even where the output exists; sizes are those that a real run gives."""
    folder = with_sides(tmp_path / "model", shards=2)
    recipe = write_recipe(recipe_for(open_model(folder)), tmp_path / "recipe")
    before = files_of(tmp_path)
    for options in ([], ["--dtype", "f16"]):
        result = cli("hf", folder, "--recipe", recipe, "-o", tmp_path / "new" / "out", "--dry-run", *options)
        assert (result.code, files_of(tmp_path)) == (0, before), result.err
        assert "nothing was written" in result.err
        assert "config.json: max_position_embeddings 64 → 128" in result.out
        assert not (tmp_path / "new").exists()
    for dtype in (None, "bf16"):
        model = open_model(folder)
        plan = hf.plan(model, recipe_for(model), tmp_path / f"out-{dtype}", hf.Options(dtype=dtype))
        bake_plan(plan)
        written = {name: len(data) for name, data in files_of(plan.output).items() if name not in (MANIFEST, INDEX)}
        assert {name: size for name, size in plan.sizes.items() if name != INDEX} == written


@pytest.mark.parametrize("text", ["[]", "{", "7", "[" * 10000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_damaged_side_file_is_named(name: str, text: str, tmp_path: Path) -> None:
    folder = write_pico(tmp_path / "model")
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=name):
        bake(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_generation_limit_is_reported(tmp_path: Path) -> None:
    """max_length of the generation config caps generate(): kept, and said."""
    folder = write_pico(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"max_length": 100}')
    model = open_model(folder)
    assert [note for note in hf.plan(model, recipe_for(model), tmp_path / "o").notes if "max_length 100 caps" in note]
    (folder / "generation_config.json").write_text('{"max_length": 128}')
    assert not hf.plan(open_model(folder), recipe_for(model), tmp_path / "o").notes


def test_the_modeling_file_differs_between_families_by_one_import() -> None:
    """Self-contained, at most 400 lines, nothing of lrconvert in it."""
    codes = {family: modeling_code(get_family(family).hf_class).decode() for family in FAMILIES}
    for family, code in codes.items():
        assert code.count(f"from transformers import {get_family(family).hf_class} as NativeForCausalLM") == 1
        assert len(code.splitlines()) <= 400
        assert not re.search(r"^\s*(import|from) +lrconvert", code, re.MULTILINE)
        compile(code, family, "exec")
    assert len({re.sub(r"from transformers import \w+ as", "", code) for code in codes.values()}) == 1


# --- dtypes ----------------------------------------------------------------------------------------------


def to_dtype(folder: Path, dtype: Any) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({k: v.astype(dtype) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32")])
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_conversion_rounds_as_torch_does(shards: int, dtype: str, name: str, source: Any, tmp_path: Path) -> None:
    """Every tensor, bit for bit; weights that have the dtype already are linked."""
    torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
    folder = write_pico(tmp_path / "model", shards=shards)
    to_dtype(folder, source)
    config = bake(folder, tmp_path / "out", dtype=dtype)
    assert config["torch_dtype"] == name
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    found = open_model(tmp_path / "out").checkpoint
    original = open_model(folder).checkpoint
    assert set(found.tensors) == set(original.tensors)
    wanted = getattr(torch, name)
    for key, info in found.tensors.items():
        with safe_open(original.tensors[key].file, "pt") as old, safe_open(info.file, "pt") as new:
            assert torch.equal(new.get_tensor(key), old.get_tensor(key).to(wanted)), key
            assert new.get_tensor(key).dtype == wanted
    same = {np.float32: "f32", ml_dtypes.bfloat16: "bf16", np.float16: "f16"}[source] == dtype
    assert Manifest.read(tmp_path / "out").bake.stored == (
        None if same else {"bf16": "BF16", "f16": "F16"}.get(dtype, "F32")
    )
    inodes = [{path.stat().st_ino for path in place.glob("*.safetensors")} for place in (folder, tmp_path / "out")]
    assert (inodes[0] == inodes[1]) == same == bool(inodes[0] & inodes[1])


def test_rounding_at_the_edges_is_torchs(tmp_path: Path) -> None:
    """Ties to even, subnormals, signed zeros, the largest numbers."""
    torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
    folder = write_pico(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    bits = np.arange(64, dtype=np.uint32) * 0x4000 + 0x3F800000
    odd = np.array(
        [0.0, -0.0, 1e-40, -1e-40, 1e-45, 65504.0, 65519.0, 2**-24, 2**-25, 1 + 2**-8, 1 + 3 * 2**-9], np.float32
    )
    values = np.concatenate([bits.view(np.float32)[: 64 - len(odd)], odd])
    tensors["model.norm.weight"] = values
    save_file(tensors, folder / WEIGHTS)
    for dtype, wanted in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        bake(folder, tmp_path / dtype, dtype=dtype)
        with safe_open(tmp_path / dtype / WEIGHTS, "pt") as file:
            made = file.get_tensor("model.norm.weight")
        assert torch.equal(made.view(torch.int16), torch.from_numpy(values).to(wanted).view(torch.int16))


@pytest.mark.parametrize(
    ("value", "error", "needle"),
    [(65520.0, UnsupportedError, "beyond float16's range"), (-1e30, UnsupportedError, "--dtype bf16"),
     (np.nan, InputError, "not finite"), (np.inf, InputError, "not finite")],
)  # fmt: skip
def test_what_float16_can_not_hold_is_refused(
    value: float, error: type[Exception], needle: str, tmp_path: Path
) -> None:
    """The tensor is named, nothing is left, bf16 still works."""
    folder = write_pico(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(error, match=needle) as caught:
        bake(folder, tmp_path / "out", dtype="f16")
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    bake(folder, tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize("keys", [["torch_dtype"], ["dtype"], ["torch_dtype", "dtype"], []])
def test_the_configs_dtype_follows_in_its_own_spelling(keys: list[str], tmp_path: Path) -> None:
    """Every key that is there; also where the weights had the dtype and only the config said otherwise."""
    folder = write_pico(tmp_path / "model", **{"torch_dtype": None, **dict.fromkeys(keys, "float32")})
    config = bake(folder, tmp_path / "out", dtype="bf16")
    assert {key: config.get(key) for key in ("torch_dtype", "dtype") if key in config} == dict.fromkeys(
        keys or ["torch_dtype"], "bfloat16"
    )
    to_dtype(folder, ml_dtypes.bfloat16)
    config = bake(folder, tmp_path / "linked", dtype="bf16")
    assert [config[key] for key in keys or ["torch_dtype"]] == ["bfloat16"] * max(1, len(keys))
    assert (tmp_path / "linked" / WEIGHTS).samefile(folder / WEIGHTS)


def test_ignored_tables_do_not_make_a_conversion(tmp_path: Path) -> None:
    """A stored inv_freq of another dtype is nobody's weight: linked as it is, or left out when converting."""
    folder = write_pico(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float16)}
    save_file(tensors, folder / WEIGHTS)
    bake(folder, tmp_path / "same", dtype="f32")
    assert (tmp_path / "same" / WEIGHTS).samefile(folder / WEIGHTS)
    bake(folder, tmp_path / "other", dtype="bf16")
    assert set(load_names(tmp_path / "other" / WEIGHTS)) == set(tensors) - {
        "model.layers.0.self_attn.rotary_emb.inv_freq"
    }


def load_names(path: Path) -> list[str]:
    with safe_open(path, "numpy") as file:
        return list(file.keys())


def test_a_stored_tied_head_is_converted_too(tmp_path: Path) -> None:
    folder = write_pico(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / WEIGHTS)
    bake(folder, tmp_path / "out", dtype="bf16")
    assert "lm_head.weight" in load_names(tmp_path / "out" / WEIGHTS)


# --- shards ----------------------------------------------------------------------------------------------


def test_shards_close_before_the_limit_and_the_index_names_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion into several files: no file above the limit, an index that transformers reads."""
    limit = 40000
    write_module = import_module("lrconvert.targets.hf.plan")  # the package's name `plan` is the function
    monkeypatch.setattr(write_module, "plan_shards", lambda tensors: plan_shards(tensors, limit))
    folder = write_pico(tmp_path / "model")
    bake(folder, tmp_path / "out", dtype="bf16")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    names = {name: shard for shard in shards for name in load_names(tmp_path / "out" / shard)}
    assert index["weight_map"] == names
    assert index["metadata"]["total_size"] == sum(2 * array.size for array in load_file(folder / WEIGHTS).values())
    for shard in shards:
        assert sum(a.nbytes for a in load_file(tmp_path / "out" / shard).values()) <= limit
    assert set(open_model(tmp_path / "out").checkpoint.tensors) == set(names)


def test_one_tensor_above_the_limit_gets_a_shard_of_its_own() -> None:
    tensors = [PlannedTensor(name, "F32", (size,)) for name, size in (("a", 1), ("b", 100), ("c", 1), ("d", 1))]
    planned = plan_shards(tensors, limit=8)
    assert [[tensor.name for tensor in group] for _, group in planned] == [["a"], ["b"], ["c", "d"]]
    assert [name for name, _ in plan_shards(tensors, limit=10**6)] == [WEIGHTS]


def test_the_header_is_what_safetensors_writes(tmp_path: Path) -> None:
    """The library reads our header and its data byte for byte, empty shapes and one letter names included."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "ü": np.ones(1, np.float16),
        "s": np.array(3, np.float32),
    }
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
    planned = [PlannedTensor(key, names[array.dtype], array.shape) for key, array in arrays.items()]
    path = tmp_path / WEIGHTS
    path.write_bytes(header_of(planned) + b"".join(array.tobytes() for array in arrays.values()))
    read = load_file(path)
    assert set(read) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(read[key], array)
    assert len(header_of(planned)) % 8 == 0


# --- transformers ----------------------------------------------------------------------------------------


@contextmanager
def warnings_of(transformers: Any) -> Iterator[list[str]]:
    """What transformers says while the block runs."""
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["v4", "v5"])
@pytest.mark.filterwarnings("default")
def test_transformers_loads_native_and_custom_code_without_a_complaint(
    family: str, source: str, tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    """Every weight is found, the rotation read is the recipe's, and nothing is said about rope."""
    transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    folder = pico_folder(family, **({} if source == "v4" else {**v5_rope(family), **DTYPE_V5}))
    model = open_model(folder)
    recipe = recipe_for(model, even=True)
    bake_plan(hf.plan(model, recipe, tmp_path / "out"))
    for custom in (False, True):
        with warnings_of(transformers) as said:
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "out", trust_remote_code=custom, output_loading_info=True
            )
        name = type(loaded).__name__
        assert name == ("LongRopeForCausalLM" if custom else get_family(family).hf_class)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        complaints = [
            text for text in said if re.search(r"rope|rotary|unrecognized|factor|not (initialized|used)", text, re.I)
        ]
        if family == "phi3":  # v5 recommends a `factor`, which 4.57 refuses beside the three keys
            complaints = [text for text in complaints if "we recommend the use of this field" not in text]
        if family == "phimoe":  # 5.x reads these keys, and does not know them
            complaints = [text for text in complaints if "_mscale" not in text]
        assert complaints == []
        assert loaded.config.max_position_embeddings == 2 * WINDOW
        if not custom:
            rotary, kind = loaded.model.rotary_emb, "" if model.shape.plain_theta is None else "full_attention_"
            plain = model.shape.theta ** -(np.arange(0, model.shape.rotary_dim, 2) / model.shape.rotary_dim)
            frequencies = getattr(rotary, f"{kind}original_inv_freq")
            np.testing.assert_allclose(frequencies, plain / recipe.tiers[0].factors, rtol=1e-5)
            assert float(getattr(rotary, f"{kind}attention_scaling")) == pytest.approx(
                math.sqrt(1 + math.log(2) / math.log(WINDOW))
            )
        stored = pico_tensors(model.checkpoint.config)
        for key, tensor in loaded.state_dict().items():
            if key in stored:
                np.testing.assert_array_equal(tensor.float().numpy(), stored[key])
