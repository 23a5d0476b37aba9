# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: the reference honours them; targets keep them, or lift them by name and verify measures it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, recipe_for
from support.pico import pico_config, write_pico
from support.verifying import options_by_target, verify

import lrconvert
from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import open_model
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.evals.texts import Text
from lrconvert.extending.api import extend as lrconvert_extend
from lrconvert.extending.plan import parse_plan
from lrconvert.families import get_family, read_shape
from lrconvert.parity import Options
from lrconvert.parity.cases import Budget
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.searching.plan import plan_search
from lrconvert.searching.request import SearchRequest

pytestmark = pytest.mark.usefixtures("remembered")

WINDOW = 256
# Family: what its configs say, and how many tokens each of two layers attends to.
LIMITED: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "mistral": ("mistral", {"sliding_window": 40}, (40, 40)),
    "phi3": ("phi3", {"sliding_window": 100, "original_max_position_embeddings": WINDOW}, (100, 100)),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}, (0, 40)),
    "qwen3": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 33, "layer_types": ["sliding_attention", "full_attention"]},
        (33, 0),
    ),
}
UNLIMITED: dict[str, tuple[str, dict[str, Any]]] = {
    "no window": ("mistral", {"sliding_window": ...}),
    "switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 40, "max_window_layers": 0}),
    "no layer of the first 28": ("qwen2", {"use_sliding_window": True, "sliding_window": 40}),
    "not in this family": ("llama", {"sliding_window": 40}),
    "full attention by name": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["full_attention"] * 2},
    ),
}


def config_of(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    config = pico_config(family, **{key: value for key, value in changes.items() if value is not ...})
    return {**config, **{key: None for key, value in changes.items() if value is ...}}


@pytest.fixture(params=LIMITED)
def limited(request: pytest.FixtureRequest, pico_folder: Callable[..., Path]) -> Path:
    family, changes, _ = LIMITED[request.param]
    return pico_folder(family, max_position_embeddings=WINDOW, **changes)


@pytest.fixture(scope="module")
def options_for() -> Iterator[Callable[[str], Options]]:
    """One interpreter for all artifacts of a target."""
    with options_by_target() as get:
        yield get


@pytest.mark.parametrize("name", LIMITED)
def test_a_config_says_which_layers_have_one(name: str) -> None:
    family, changes, widths = LIMITED[name]
    assert read_shape(config_of(family, changes), get_family(family)).sliding == widths


@pytest.mark.parametrize("name", UNLIMITED)
def test_a_config_without_one_has_none(name: str) -> None:
    family, changes = UNLIMITED[name]
    assert read_shape(config_of(family, changes), get_family(family)).sliding == ()


def test_mistral_has_one_by_default() -> None:
    """As its class in transformers has."""
    config = pico_config("mistral")
    del config["sliding_window"]
    assert read_shape(config, get_family("mistral")).sliding == (4096, 4096)


@pytest.mark.parametrize("kinds", [["sliding_attention"], ["sliding_attention", "chunked_attention"], "full_attention"])
def test_layers_of_another_kind_are_refused(kinds: Any) -> None:
    with pytest.raises(InputError, match="layer_types is"):
        read_shape(pico_config("qwen2", use_sliding_window=True, layer_types=kinds), get_family("qwen2"))


def test_the_reference_attends_as_transformers_does(limited: Path) -> None:
    """Within the window and beyond; a model that attends to everything is far off."""
    torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    model = open_model(limited)
    recipe = lrconvert_own(limited)
    native = transformers.AutoModelForCausalLM.from_pretrained(limited, dtype=torch.float32)
    tokens = np.random.default_rng(5).integers(0, 101, 200)
    with torch.inference_mode():
        theirs = native(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy()
    spec = model.resolve(recipe)
    ours, wrong = (
        ReferenceRunner(each, device="cpu").answer(spec, tokens, 200, np.arange(200))
        for each in (model, model.lifted())
    )
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(wrong - theirs).max() > 0.1


def lrconvert_own(folder: Path) -> Any:
    from lrconvert.recipe.models import own_recipe

    return own_recipe(open_model(folder))[0]


@pytest.mark.parametrize(
    ("target", "name", "program", "options"),
    [
        ("hf", "out", "transformers", {}),
        ("onnx", "onnx", "onnxruntime", {}),
        ("onnx", "onnx", "onnxruntime", {"attention": "standard"}),
    ],
    ids=["hf", "gqa", "standard"],
)
def test_targets_that_can_keep_it(
    target: str,
    name: str,
    program: str,
    options: dict[str, Any],
    limited: Path,
    tmp_path: Path,
    options_for: Callable[[str], Options],
) -> None:
    """Under an extension too, in a note; verified; and an artifact that lost it fails, however little is asked."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    pytest.importorskip(program)
    recipe = recipe_for(open_model(limited), even=True)
    artifact = getattr(lrconvert, target)(limited, recipe, tmp_path / name, **options)
    how = options_for(target)
    report = verify(artifact.path, options=how)
    assert report.passed, [row for row in report.rows if row.verdict == "fail"]
    assert artifact.manifest.bake.lifted is False
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["sliding_window"] == json.loads((limited / "config.json").read_text())["sliding_window"]
    lost = getattr(lrconvert, target)(limited, recipe, tmp_path / "lost", lift=True, **options).path
    edited = Manifest.read(lost)
    manifest = json.loads(edited.to_json())
    manifest["bake"]["lifted"] = False
    (lost / "lrconvert.json").write_text(json.dumps(manifest))
    assert not verify(lost, options=replace(how, profile="quick")).passed


def test_what_cannot_keep_it_asks_for_the_flag(
    tmp_path: Path, cli: Callable[..., Result], pico_folder: Callable[..., Path]
) -> None:
    """llama.cpp attends to everything. With the flag the loss has a name, in the manifest, and verify measures it."""
    folder = pico_folder("mistral", max_position_embeddings=WINDOW, sliding_window=40)
    refused = cli("gguf", folder, "-o", tmp_path / "m.gguf")
    assert refused.code == 4
    assert "sliding window of 40 tokens in 2 of 2 layers" in refused.err and "--lift-sliding-window" in refused.err
    baked = cli("gguf", folder, "-o", tmp_path / "m.gguf", "--lift-sliding-window")
    assert baked.code == 0 and "dropped: the sliding window of 40 tokens" in baked.err
    manifest = Manifest.read(tmp_path / "m.gguf")
    assert manifest.bake.lifted and any("sliding window" in loss for loss in manifest.losses)
    pytest.importorskip("xllamacpp")
    report = verify(tmp_path / "m.gguf")
    (row,) = [row for row in report.rows if row.code == "lifted"]
    assert report.passed and row.verdict == "known" and row.length == WINDOW and (row.kl_mean or 0) > 1e-2


@pytest.mark.parametrize(("target", "name"), [("hf", "out"), ("onnx", "onnx")])
def test_lifting_is_measured_in_every_format(target: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    folder = write_pico(tmp_path / "m", "mistral", max_position_embeddings=WINDOW, sliding_window=40)
    artifact = getattr(lrconvert, target)(folder, None, tmp_path / name, lift=True)
    report = verify(artifact.path)
    assert report.passed and [row.verdict for row in report.rows if row.code == "lifted"] == ["known"]
    assert json.loads((artifact.path / "config.json").read_text())["sliding_window"] == WINDOW


@dataclass(frozen=True)
class Short(Options):
    """Of a device that holds fewer tokens than the model's window."""

    @property
    def budget(self) -> Budget:
        return Budget(dense=1500, decode=1500)


def test_a_cost_that_a_short_prompt_can_t_show_is_not_called_none(tmp_path: Path) -> None:
    """A window counts tokens: of 1024, spread over 2048 positions, 512 tokens show nothing. The quick profile says so;
    a whole verification reads consecutive tokens."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    folder = write_pico(tmp_path / "m", "mistral", max_position_embeddings=2048, sliding_window=1024)
    artifact = lrconvert.hf(folder, None, tmp_path / "out", lift=True)
    (quick,) = [row for row in verify(artifact.path, options=Options(profile="quick")).rows if row.code == "lifted"]
    assert quick.verdict == "skipped" and "1024 consecutive tokens" in quick.reason
    (cut,) = [row for row in verify(artifact.path, options=Short(backends=("custom",))).rows if row.code == "lifted"]
    assert cut.verdict == "known" and (cut.kl_mean or 0) > 1e-2 and cut.length == 2048


@pytest.mark.parametrize("width", [WINDOW, 300, 511])
def test_a_window_that_never_acts_is_lifted_with_a_note(width: int, tmp_path: Path) -> None:
    """It is as long as what the model serves, and shorter than what the artifact serves."""
    folder = write_pico(tmp_path / "m", "mistral", max_position_embeddings=WINDOW, sliding_window=width)
    recipe = recipe_for(open_model(folder), even=True)
    artifact = lrconvert.gguf(folder, recipe, tmp_path / "m.gguf")
    assert artifact.manifest.bake.lifted and not artifact.manifest.losses
    assert open_model(artifact.path).shape.sliding == ()
    folded = lrconvert.hf(folder, recipe, tmp_path / "out")
    assert json.loads((folded.path / "config.json").read_text())["sliding_window"] == 2 * WINDOW


def test_a_window_beyond_the_artifact_stays_in_its_config(tmp_path: Path) -> None:
    """Phi-3.5's 262144 says nothing within 131072 tokens."""
    folder = write_pico(tmp_path / "m", "phi3", max_position_embeddings=WINDOW, sliding_window=4 * WINDOW)
    artifact = lrconvert.hf(folder, recipe_for(open_model(folder)), tmp_path / "out")
    assert not artifact.manifest.bake.lifted
    assert json.loads((artifact.path / "config.json").read_text())["sliding_window"] == 4 * WINDOW


def test_a_gguf_that_says_it_has_one_is_asked_about_too(tmp_path: Path) -> None:
    """llama.cpp ignores the key of phi3 files; a bake that drops it says so."""
    import gguf

    folder = write_pico(tmp_path / "m", "phi3", max_position_embeddings=WINDOW, partial_rotary_factor=1.0)
    made = lrconvert.gguf(folder, None, tmp_path / "plain.gguf").path
    reader, path = gguf.GGUFReader(made), tmp_path / "limited.gguf"
    writer = gguf.GGUFWriter(path, "phi3")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[-1] if len(field.types) == 1 else field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    writer.add_sliding_window(100)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_model(path).shape.sliding == (100, 100)
    with pytest.raises(UnsupportedError, match="sliding window of 100 tokens"):
        lrconvert.gguf(path, None, tmp_path / "again.gguf")
    lrconvert.gguf(path, None, tmp_path / "again.gguf", lift=True)
    assert open_model(tmp_path / "again.gguf").shape.sliding == ()


def test_a_search_says_that_it_lifts_them(pico_folder: Callable[..., Path]) -> None:
    """Where they act on the model; not where none does."""
    text = Text("book.txt", "ab" * 32, np.arange(8 * WINDOW) % 101)
    for width, said in ((40, True), (4 * WINDOW, False)):
        folder = pico_folder("mistral", max_position_embeddings=WINDOW, sliding_window=width)
        plan = plan_search(SearchRequest(folder, 4 * WINDOW, [text]))
        words = [note for note in plan.notes if note.startswith("a search attends to every token")]
        assert bool(words) is said, width
        assert all("of 40 tokens in 2 of 2 layers" in note and "--lift-sliding-window" in note for note in words)


def test_an_extension_says_it_too(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    np.save(tmp_path / "text.npy", np.arange(8 * WINDOW) % 101)
    plan = parse_plan(f'[[stage]]\nkind = "derive"\nwindow = {4 * WINDOW}\n', "plan.toml")
    for width, said in ((40, True), (4 * WINDOW, False)):
        folder = pico_folder("mistral", max_position_embeddings=WINDOW, sliding_window=width)
        found = lrconvert_extend(folder, texts=[tmp_path / "text.npy"], output=tmp_path / f"r{width}", plan=plan)
        assert [note.startswith("an extension attends to every token") for note in found.notes] == [True] * said
