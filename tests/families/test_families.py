# SPDX-License-Identifier: Apache-2.0
"""The families' tables are what transformers builds, and a new family is one file."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors import safe_open
from safetensors.numpy import save_file
from support.float64 import EXACT, by_reference, natively
from support.pico import BASE, EXTRA, FAMILIES, pico_config, v5_rope
from support.snippets import blocks_of

import lrconvert.families
from lrconvert.checkpoint import open_model
from lrconvert.engines.families_page import page
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import Family, ModelShape, expected_tensors, family_names, get_family, read_shape
from lrconvert.families.base import NOT_READ
from lrconvert.recipe import write_recipe

transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": True}) for family in FAMILIES),
    *((family, {"head_dim": 24, "num_key_value_heads": 4}) for family in FAMILIES),
    *((family, {"num_key_value_heads": 1, "num_hidden_layers": 3}) for family in FAMILIES),
    *((family, {"head_dim": None, "num_key_value_heads": 4}) for family in FAMILIES if family != "qwen3"),
    ("phimoe", {"attention_bias": False, "lm_head_bias": False, "num_local_experts": 3}),
    ("qwen3_moe", {"attention_bias": True, "num_experts": 2, "num_experts_per_tok": 1}),
    *((family, v5_rope(family, 5e5)) for family in FAMILIES if family != "phi3"),
    ("glm4", {"partial_rotary_factor": None}),  # half, by default
    ("glm4", {"attention_bias": False, "partial_rotary_factor": 1.0}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"attention_bias": True}),  # no such switch: ignored there and here
    ("qwen2", {"attention_bias": False}),  # likewise
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"head_dim": None, "hidden_size": 512}),  # its own default, not hidden / heads
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("phi3", {"partial_rotary_factor": 0.75, "head_dim": None}),
    ("phi3", {"partial_rotary_factor": None, "num_key_value_heads": 4}),
    ("phi3", {"attention_bias": True}),
]


def native(config: dict[str, Any]) -> Any:
    """The real class, built from a config without memory for its weights."""
    parsed = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(parsed)


def stored(built: Any, config: dict[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what it stores. Experts that are joined in memory are tensors of their own in files."""
    if get_family(config["model_type"]).experts is None:
        return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    transformers.AutoModelForCausalLM.from_config(built.config).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda value: json.dumps(value).replace(" ", ""))
def test_the_table_is_what_transformers_builds(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Names and shapes of all tensors, both ways; the rotary width; the class's name."""
    config = pico_config(family, **changes)
    built = native(config)
    shape = read_shape(config, get_family(family))
    tensors = {t.name: t.shape for t in expected_tensors(get_family(family), shape) if t.required}
    tied = {"lm_head.weight"} if shape.tied else set()
    assert tensors == {name: size for name, size in stored(built, config, tmp_path).items() if name not in tied}
    assert type(built).__name__ == get_family(family).hf_class
    assert shape.window == built.config.max_position_embeddings
    with torch.device("cpu"):
        rotary = type(built.model.rotary_emb)(built.config)
    kind = "" if shape.plain_theta is None else "full_attention_"  # one table for each kind of layer
    frequencies = getattr(rotary, f"{kind}inv_freq")
    assert frequencies.numel() * 2 == shape.rotary_dim
    if "rope_parameters" in changes and transformers.__version__.startswith("4."):
        return  # 4.57 does not read v5's spelling: what the artifact's own spelling is for
    theta = float(frequencies[1]) ** (-shape.rotary_dim / 2)
    assert theta == pytest.approx(shape.theta, rel=1e-3)
    if shape.plain_theta is not None:
        theta = float(rotary.sliding_attention_inv_freq[1]) ** (-shape.rotary_dim / 2)
        assert theta == pytest.approx(shape.plain_theta, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_may_leave_out_what_transformers_knows(family: str, tmp_path: Path) -> None:
    """The defaults of a family are those of its config class."""
    wanted = get_family(family).defaults
    sliding = {"use_sliding_window": True} if family.startswith("qwen") else {}
    defaults = transformers.AutoConfig.for_model(family, **sliding)
    rotation = wanted.get("rope_parameters", {})
    theta = rotation.get("rope_theta", defaults.default_theta)
    theta = theta if isinstance(theta, dict) else {"global": theta}
    elsewhere = {
        "rope_theta": theta["global"],
        "rope_local_base_freq": theta.get("local"),
        "sliding_window_pattern": 6,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {
            "rope_type" if key == "type" else key: value
            for key, value in (defaults.to_dict().get("rope_parameters") or {}).items()
            if key not in ("max_position_embeddings", "rope_type")
        },
    }
    assert wanted == {key: elsewhere[key] if key in elsewhere else getattr(defaults, key) for key in wanted}
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sparse = {"model_type": family, **{key: BASE[key] for key in needed}, "num_attention_heads": 32}
    shape = read_shape(sparse, get_family(family))
    built = native({**sparse, "pad_token_id": 0, "eos_token_id": 2})
    tensors = {t.name: t.shape for t in expected_tensors(get_family(family), shape) if t.required or shape.tied}
    assert tensors == stored(built, sparse, tmp_path)
    assert (shape.window, shape.norm_eps) == (defaults.max_position_embeddings, defaults.rms_norm_eps)
    assert (shape.theta, shape.plain_theta or theta["global"]) == (theta["global"], theta.get("local", theta["global"]))


def test_a_family_is_data() -> None:
    """A family file defines FAMILY and nothing else that runs: no function, no class, no branch."""
    for name in family_names():
        source = Path(lrconvert.families.__path__[0], f"{name}.py").read_text()
        kinds = {type(node) for node in ast.walk(ast.parse(source))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.Lambda}, name


@pytest.mark.parametrize("name", family_names())
def test_rows_are_unambiguous_and_use_known_symbols(name: str) -> None:
    """No role, Hugging Face name or GGUF name twice; every shape symbol and flag exists."""
    family = get_family(name)
    assert family.name == name
    for key in ("role", "hf", "gguf"):
        values = [getattr(row, key) for row in family.rows]
        assert len(values) == len(set(values)), key
    shape = read_shape(pico_config(name), family)
    for row in family.rows:
        assert set(row.shape) <= set(shape.symbols)
        assert row.when is None or isinstance(getattr(shape, row.when), bool)
        assert ("{layer}" in row.hf) == ("{layer}" in row.gguf)
        assert "{expert}" not in row.gguf


def test_names_that_are_no_family() -> None:
    for name in ("base", "__init__", "", None, "gpt2", ["llama"]):
        with pytest.raises(UnsupportedError, match=", ".join(family_names())):
            get_family(name)


def test_every_problem_of_a_config_is_listed() -> None:
    config = {**pico_config("llama"), "hidden_size": 0, "vocab_size": None, "mlp_bias": 1, "rope_theta": "x"}
    with pytest.raises(InputError) as caught:
        read_shape(config, get_family("llama"))
    for key in ("hidden_size is 0", "vocab_size is missing", "mlp_bias is 1", "rope_theta is 'x'"):
        assert str(caught.value).count(key) == 1


def test_the_page_of_families_is_the_tables() -> None:
    """And every family has a row in it."""
    path = ROOT / "docs" / "families.md"
    text = path.read_text(encoding="utf-8")
    assert text == page(), "python -m lrconvert.engines.families_page > docs/families.md"
    assert all(f"\n| {name} | " in text for name in family_names())


# --- one more family, by one file -------------------------------------------------------------------------

PYTHON = [text for language, text in blocks_of(ROOT / "CONTRIBUTING.md") if language == "python"]
SIXTH, SMALL = PYTHON  # its file, and its pico entry


@pytest.fixture
def sixth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """A family that lrconvert has never heard of, by one file in a folder of its own."""
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "seed_oss.py").write_text(SIXTH)
    monkeypatch.setattr(lrconvert.families, "__path__", [*lrconvert.families.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "lrconvert.families.seed_oss", raising=False)
    yield get_family("seed_oss")
    sys.modules.pop("lrconvert.families.seed_oss", None)


def write_model(folder: Path, family: Family) -> Path:
    """Its pico model, q and k widened."""
    more = ast.literal_eval(SMALL)[family.name]
    config = {**BASE, "model_type": family.name, "architectures": [family.hf_class], **more}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(7)
    tensors = {}
    for tensor in expected_tensors(family, read_shape(config, family)):
        scale = 3.0 if tensor.role in ("q", "k") else 1.0
        values = rng.standard_normal(tensor.shape) * scale / np.sqrt(tensor.shape[-1])
        tensors[tensor.name] = (1 + 0.1 * values if "norm" in tensor.role else values).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_new_family_is_one_file(sixth: Family, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """By the steps of CONTRIBUTING.md: its table and logits are transformers', it is inspected, baked and verified,
    native and custom code, on both sides of the boundary."""
    folder = write_model(tmp_path / "model", sixth)
    config = json.loads((folder / "config.json").read_text())
    built, shape = native(config), read_shape(config, sixth)
    tensors = {t.name: t.shape for t in expected_tensors(sixth, shape) if t.required}
    assert tensors == {name: tuple(t.shape) for name, t in built.state_dict().items()}
    assert np.abs(by_reference(open_model(folder)) - natively(folder)).max() <= EXACT
    assert "seed_oss" in family_names()
    inspected = cli("inspect", folder, "--json")
    assert json.loads(inspected.out)["family"] == "seed_oss", inspected.err
    recipe = write_recipe(recipe_for(open_model(folder), even=True), tmp_path / "recipe")
    baked = cli("hf", folder, "--recipe", recipe, "-o", tmp_path / "out")
    assert baked.code == 0, baked.err
    code = (tmp_path / "out" / "modeling_longrope.py").read_text()
    assert "from transformers import SeedOssForCausalLM as NativeForCausalLM" in code

    from support.verifying import verify

    from lrconvert.parity import Options

    # Code of a class that is not among the known digests runs on trust alone, until `known_code` adds it.
    report = verify(tmp_path / "out", options=Options(threads=1, trust_code=True))
    rows = [(row.code, row.case, row.verdict, row.reason) for row in report.rows]
    assert report.passed, rows
    for name in ("native", "custom"):
        assert [case for code, case, verdict, _ in rows if code == name and verdict == "pass"], rows


def test_the_check_sees_a_wrong_family_file(sixth: Family, tmp_path: Path) -> None:
    """Without its biases the same model has tensors that match nothing, and all are named."""
    folder = write_model(tmp_path / "model", sixth)
    file = Path(lrconvert.families.__path__[-1]) / "seed_oss.py"
    file.write_text(SIXTH.replace("        *base.QKV_BIASES,\n", ""))
    sys.modules.pop("lrconvert.families.seed_oss")
    for cached in (file.parent / "__pycache__").glob("*"):
        cached.unlink()
    with pytest.raises(InputError) as caught:
        open_model(folder)
    for layer in (0, 1):
        for name in "qkv":
            assert f"model.layers.{layer}.self_attn.{name}_proj.bias" in str(caught.value)


def test_without_the_file_there_is_no_sixth_family() -> None:
    """The test above leaves nothing behind, and an installed lrconvert has its own families only."""
    code = "from lrconvert.families import family_names; print(*family_names())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == family_names() == sorted(EXTRA)


def test_shapes_are_plain_numbers() -> None:
    """Symbols of a shape follow from its counts alone."""
    shape = read_shape(pico_config("phi3"), get_family("phi3"))
    assert isinstance(shape, ModelShape)
    assert shape.symbols == {"hidden": 64, "head_dim": 16, "q": 64, "kv": 32, "qkv": 128, "ffn": 96, "2ffn": 192,
                             "vocab": 101}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READ)
def test_a_decoder_that_the_description_can_not_say_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(NOT_READ[name])):
        get_family(name)
