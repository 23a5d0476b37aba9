# SPDX-License-Identifier: Apache-2.0
"""Recipes for models: the rotation that they carry, and extensions that stand on it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, recipe_for
from support.pico import write_pico

import lrconvert
from lrconvert import rope
from lrconvert.api.baking import plan_bake
from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import InputError, UsageError
from lrconvert.recipe import Recipe, load_recipe, write_recipe
from lrconvert.recipe.importing import open_recipe
from lrconvert.recipe.models import derive_for, ground_of, own_recipe
from lrconvert.rope import Tier, serving

Cli = Callable[..., Result]
ONES = (1.0,) * 8
LISTS = {"short_factor": [1.0 + i / 50 for i in range(8)], "long_factor": [1.5**i for i in range(8)]}
# Models whose own rotation is scaled: the config's keys, the lengths of its tiers.
SCALED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "llama3": (
        {
            "max_position_embeddings": 1024,
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        [1024],
    ),
    "yarn": (
        {
            "max_position_embeddings": 1024,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        },
        [1024],
    ),
    "linear": ({"max_position_embeddings": 256, "rope_scaling": {"type": "linear", "factor": 4.0}}, [1024]),
    "dynamic": ({"max_position_embeddings": 256, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, [256, 512, 1024]),
    "longrope": (
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_scaling": {"type": "longrope", **LISTS},
        },
        [256, 1024],
    ),
}


@pytest.fixture(params=SCALED)
def scaled(request: pytest.FixtureRequest, pico_folder: Callable[..., Path]) -> tuple[Path, list[int]]:
    """The folder of a scaled pico model, and the lengths of its own tiers."""
    changes, lengths = SCALED[request.param]
    return pico_folder("llama", **changes), lengths


def turned(tier: Tier, base: float) -> np.ndarray:
    """cos and sin of some positions under a tier."""
    return np.stack(tier.cos_sin(np.arange(0, 1024, 7), base))


# --- the rotation that a model carries -------------------------------------------------------------------


def test_the_own_recipe_is_what_import_reads(scaled: tuple[Path, list[int]]) -> None:
    """The same tiers and windows; its name is the model's, never a path."""
    folder, lengths = scaled
    own, _ = own_recipe(open_model(folder))
    imported, _, _ = open_recipe(folder)
    assert [tier.max_length for tier in own.tiers] == lengths
    assert (own.tiers, own.original_window, own.rope_theta) == (
        imported.tiers,
        imported.original_window,
        imported.rope_theta,
    )
    assert own.name == f"{folder.name}-own" and str(folder.parent) not in own.to_json() + imported.to_json()


def test_a_model_without_a_recipe_is_baked_as_it_is(scaled: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, _ = scaled
    artifact = lrconvert.hf(folder, None, tmp_path / "out").path
    before, after = open_model(folder).rotation.tiers, open_model(artifact).rotation.tiers
    assert before == after


def test_a_plain_model_without_a_recipe_stays_plain_and_says_so(
    pico_folder: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    result = cli("hf", pico_folder(), "-o", tmp_path / "out")
    assert result.code == 0 and "carries no scaling: the artifact serves 64 tokens" in result.err
    assert open_model(tmp_path / "out").rotation.tiers == (Tier(64, ONES),)


def test_what_an_artifact_carries_is_baked_into_another_format(
    pico: Callable[..., Model], pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Three tiers with start tokens, from the artifact's own config."""
    recipe = recipe_for(pico(), tiers=3, start_tokens=4)
    first = lrconvert.hf(pico_folder(), recipe, tmp_path / "one").path
    second = lrconvert.hf(first, None, tmp_path / "two").path
    assert open_model(second).rotation.tiers == recipe.tiers


def test_a_gguf_whose_scaling_means_nothing_has_no_rotation_to_bake(
    pico: Callable[..., Model], pico_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico()
    broken = replace(model, checkpoint=model.checkpoint)
    monkeypatch.setattr(type(model.checkpoint), "rope_problems", ("incomplete longrope",))
    with pytest.raises(InputError, match=r"means nothing \(incomplete longrope\).*--recipe"):
        own_recipe(broken)


# --- what --recipe takes ---------------------------------------------------------------------------------


def test_a_recipe_is_named_by_config_folder_or_file(
    scaled: tuple[Path, list[int]], pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A config.json alone, under any name, and a folder of a recipe, which counts before a config beside it."""
    folder, lengths = scaled
    alone = tmp_path / "downloaded.json"
    alone.write_bytes((folder / "config.json").read_bytes())
    for named in (folder, folder / "config.json", alone):
        recipe, _, _ = open_recipe(named)
        assert [tier.max_length for tier in recipe.tiers] == lengths
    both = tmp_path / "both"
    written = write_recipe(recipe, both)
    (both / "config.json").write_text("{}")
    assert open_recipe(both)[0] == load_recipe(written)
    assert open_recipe("demo-yarn-8x")[0] == load_recipe("demo-yarn-8x")


def test_a_gguf_is_a_recipe_too(tmp_path: Path, pico_folder: Callable[..., Path]) -> None:
    changes, lengths = SCALED["longrope"]
    lrconvert.gguf(pico_folder("llama", **changes), None, tmp_path / "m.gguf")
    recipe, _, _ = open_recipe(tmp_path / "m.gguf")
    assert [tier.max_length for tier in recipe.tiers] == lengths
    np.testing.assert_allclose(recipe.tiers[1].factors, LISTS["long_factor"], rtol=1e-6)


def test_a_hub_id_brings_its_config_alone(
    tmp_path: Path, pico_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are downloaded for a recipe."""
    import huggingface_hub

    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(pico_folder("llama", **SCALED["longrope"][0]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    recipe, _, _ = open_recipe("org/scaled")
    assert [tier.max_length for tier in recipe.tiers] == [256, 1024]
    assert set(asked) == {("org/scaled", "config.json")}
    assert recipe.provenance.source == "org/scaled (longrope)"


def test_what_is_no_recipe_is_said(tmp_path: Path, pico_folder: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    for named, needle in (
        ("nothing", "no such recipe file, folder, shipped recipe or model"),
        (tmp_path / "empty", "holds neither recipe.json nor config.json"),
        (pico_folder(), "carries no scaled RoPE"),
    ):
        with pytest.raises(InputError, match=needle):
            open_recipe(named)


def test_another_models_rotation_is_refused(
    pico_folder: Callable[..., Path], tmp_path: Path, scaled: tuple[Path, list[int]]
) -> None:
    other = pico_folder("llama", head_dim=8)
    with pytest.raises(InputError, match="rotary dimension 16 in the recipe, 8 in the model"):
        plan_bake("hf", other, scaled[0], tmp_path / "out")


def test_a_recipe_that_replaces_a_models_own_rotation_is_noted(scaled: tuple[Path, list[int]], tmp_path: Path) -> None:
    """One from the plain rotation is; the model's own, and an extension that stands on it, are not."""
    folder, _ = scaled

    def notes(recipe: Recipe) -> str:
        return " ".join(plan_bake("hf", folder, recipe, tmp_path / "out").notes)

    assert "replaces the model's own" in notes(derive_for(folder, "ntk", 2, from_plain=True)[0])
    assert "replaces" not in notes(derive_for(folder, "ntk", 2)[0])
    assert "replaces" not in notes(own_recipe(open_model(folder))[0])


# --- extensions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pi", "ntk", "yarn"])
def test_an_extension_stands_on_the_models_own_rotation(scaled: tuple[Path, list[int]], method: Any) -> None:
    """The model's tiers stay as they are; beyond its window the method's factors multiply its last ones."""
    folder, lengths = scaled
    model = open_model(folder)
    recipe, notes = derive_for(folder, method, 4)
    own = model.rotation.tiers
    assert [tier.max_length for tier in recipe.tiers] == [*lengths, 4096]
    assert recipe.tiers[:-1] == own and recipe.original_window == lengths[0]
    new = np.asarray(recipe.tiers[-1].factors) / np.asarray(own[-1].factors)
    assert new[-1] == pytest.approx(4.0) and (new >= 1 - 1e-12).all()
    if method != "yarn":
        made = rope.pi_factors(16, 4) if method == "pi" else rope.ntk_factors(16, 4)
        np.testing.assert_allclose(new, made, rtol=1e-12)
    scale = rope.yarn_attention_factor(4) if method == "yarn" else 1.0
    assert recipe.tiers[-1].attention_factor == pytest.approx(own[-1].attention_factor * scale)
    assert any("stays as it is" in note for note in notes)
    assert "stands on the model's own" in recipe.provenance.notes[0]


def test_yarn_counts_the_turns_of_the_frequencies_that_the_model_has() -> None:
    """Frequencies that are divided already make fewer turns, so more of them are interpolated; all alike is YaRN of
    another base window."""
    plain = rope.yarn_factors(64, 1e4, 4.0, 4096)
    np.testing.assert_array_equal(rope.yarn_factors(64, 1e4, 4.0, 4096, own=[1.0] * 32), plain)
    np.testing.assert_array_equal(
        rope.yarn_factors(64, 1e4, 4.0, 4096, own=[8.0] * 32), rope.yarn_factors(64, 1e4, 4.0, 512)
    )
    uneven = rope.yarn_factors(64, 1e4, 4.0, 4096, own=[8.0 if i % 2 else 4.0 for i in range(32)])
    assert (uneven >= plain - 1e-12).all() and (np.diff(uneven) >= 0).all()


def test_an_extension_says_its_target(scaled: tuple[Path, list[int]]) -> None:
    """By ratio or by window; what the model reaches already is refused."""
    folder, _ = scaled
    assert derive_for(folder, "ntk", target=4096)[0].tiers == derive_for(folder, "ntk", 4)[0].tiers
    for target in (512, 1024):
        with pytest.raises(UsageError, match=f"--target {target} is within the window of 1024 tokens"):
            derive_for(folder, "ntk", target=target)
    assert derive_for(folder, "ntk", target=1025)[0].tiers[-1].max_length == 1025


def test_from_plain_starts_from_the_plain_rotation_and_says_so(scaled: tuple[Path, list[int]]) -> None:
    folder, _ = scaled
    recipe, notes = derive_for(folder, "pi", 16, from_plain=True)
    original = open_model(folder).rotation.original_window
    assert recipe.tiers == (Tier(original, ONES), Tier(16 * original, (16.0,) * 8))
    assert any("replaced, as --from-plain asks" in note for note in notes)


def test_a_window_that_the_config_says_wrong_is_overridden(scaled: tuple[Path, list[int]]) -> None:
    """The model's own tiers are cut there, or the last one reaches further."""
    folder, _ = scaled
    own = open_model(folder).rotation.tiers
    for window in (600, 2000):
        recipe, _ = derive_for(folder, "pi", 2, original_window=window)
        assert [tier.max_length for tier in recipe.tiers[-2:]] == [window, 2 * window]
        assert recipe.tiers[-2].factors == serving(own, window).factors
    with pytest.raises(UsageError, match="within the window of 2000"):
        derive_for(folder, "pi", target=2000, original_window=2000)


def test_uniform_says_what_it_changes_within_the_window(scaled: tuple[Path, list[int]]) -> None:
    folder, _ = scaled
    recipe, notes = derive_for(folder, "yarn", 4, uniform=True)
    changed = open_model(folder).rotation.tiers[0].attention_factor * rope.yarn_attention_factor(4)
    assert recipe.tiers[0].attention_factor == pytest.approx(changed)
    assert any(note.startswith("--uniform: within 1024 tokens") for note in notes)
    assert not any(note.startswith("--uniform") for note in derive_for(folder, "pi", 4, uniform=True)[1])


def test_start_tokens_of_the_model_stay(
    pico: Callable[..., Model], pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """An artifact with n̂ start tokens is extended with as many."""
    recipe = recipe_for(pico(), tiers=2, start_tokens=4)
    artifact = lrconvert.hf(pico_folder(), recipe, tmp_path / "one").path
    longer, _ = derive_for(artifact, "ntk", 2)
    assert longer.tiers[:2] == recipe.tiers and longer.tiers[2].start_tokens == 4


def test_a_ground_composes_what_was_found_on_it(scaled: tuple[Path, list[int]]) -> None:
    """A search's tiers, on top of the model: total factors, and the unchanged model up to its window."""
    folder, lengths = scaled
    model = open_model(folder)
    ground = ground_of(folder, model.rotation, model.shape)
    found = [Tier(1024, ONES), Tier(8192, tuple(1.0 + i for i in range(8)))]
    tiers = ground.extended(found)
    assert [tier.max_length for tier in tiers] == [*lengths, 8192] and tiers[:-1] == model.rotation.tiers
    np.testing.assert_allclose(np.asarray(tiers[-1].factors) / ground.last.factors, found[1].factors)


# --- proven on what transformers computes ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_within_its_window_the_artifact_is_the_model(kind: str, tmp_path: Path) -> None:
    """transformers over the source and over the extended artifact: the same logits up to the model's window, on a
    Llama 3.2 shape and its neighbours. An extension from the plain rotation, which was the rule once, is far off."""
    torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    folder = write_pico(tmp_path / "m", "llama", **SCALED[kind][0], tie_word_embeddings=True)

    def logits(path: Path, length: int) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokens = torch.from_numpy(np.random.default_rng(3).integers(0, 101, (1, length)))
        with torch.inference_mode():
            return model(input_ids=tokens).logits

    own = lrconvert.hf(folder, derive_for(folder, "ntk", 4)[0], tmp_path / "own").path
    plain = lrconvert.hf(folder, derive_for(folder, "ntk", 16, from_plain=True)[0], tmp_path / "plain").path
    for length in (200, 1024):
        wanted = logits(folder, length)
        assert (logits(own, length) - wanted).abs().max() < 2e-3
        assert (logits(plain, length) - wanted).abs().max() > 0.1


def test_a_scaled_model_goes_into_every_format(tmp_path: Path, cli: Cli) -> None:
    """Its own rotation and an extension of it, verified where the formats' programs are."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    changes = {**SCALED["llama3"][0], "max_position_embeddings": 512}
    folder = write_pico(tmp_path / "m", "llama", **changes)
    cli("recipe", "derive", folder, "--method", "ntk", "--factor", 2, "-o", tmp_path / "r")
    for target, needs, name in (
        ("hf", "transformers", "h"),
        ("gguf", "xllamacpp", "g.gguf"),
        ("onnx", "onnxruntime", "o"),
    ):
        pytest.importorskip(needs)
        for recipe in ([], ["--recipe", tmp_path / "r"]):
            result = cli(target, folder, *recipe, "-o", tmp_path / name, "--force", "--verify")
            assert result.code == 0, result.out + result.err


# --- the next step ---------------------------------------------------------------------------------------


def step(text: str) -> str:
    """The command that a command proposed."""
    return next(line.partition("next: ")[2] for line in text.splitlines() if line.startswith("next: "))


def test_inspect_proposes_the_step_that_fits(pico_folder: Callable[..., Path], cli: Cli) -> None:
    """LongRoPE is baked; other scaling is extended beyond its window; a plain model gets a recipe."""
    for kind, (changes, _) in SCALED.items():
        proposed = step(cli("inspect", pico_folder("llama", **changes)).err)
        if kind == "longrope":
            assert proposed.startswith("lrconvert gguf ") and "--recipe" not in proposed
        else:
            assert "recipe derive" in proposed and "--target 4096" in proposed
    assert "--factor 8" in step(cli("inspect", pico_folder()).err)


@pytest.mark.parametrize("kind", SCALED)
def test_a_proposed_step_works_as_it_is_printed(
    kind: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its output is never the source's own folder: not after inspect, nor after import, wherever one stands."""
    monkeypatch.chdir(tmp_path)
    for name in ("m", "my model"):
        write_pico(tmp_path / name, "llama", **SCALED[kind][0])
        before = sorted(tmp_path.joinpath(name).iterdir())
        for command in (
            ["inspect", name],
            ["recipe", "import", name, "-o", f"{name} r"],
            ["recipe", "import", f"{name}/config.json", "-o", f"{name} s"],
        ):
            arguments = shlex.split(step(cli(*command).err))[1:]
            assert not Path(arguments[-1]).exists()
            assert cli(*arguments, *(["--allow-lossy"] if arguments[0] == "gguf" else [])).code == 0
        assert sorted(tmp_path.joinpath(name).iterdir()) == before


def test_import_of_a_config_alone_names_no_model_that_is_not_there(tmp_path: Path, cli: Cli) -> None:
    from support.pico import pico_config

    config = pico_config("llama", **SCALED["longrope"][0], _name_or_path="/home/somebody/models/big")
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = cli("recipe", "import", tmp_path / "config.json", "-o", tmp_path / "r")
    assert step(result.err).startswith("lrconvert hf big --recipe")
    assert "/home/" not in (tmp_path / "r" / "recipe.json").read_text()
