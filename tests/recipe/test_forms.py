# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe has a form that goes into all formats unchanged, and a refusal names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recipe_forms
from conftest import Result
from support.verifying import verify

from lrconvert.engines.capability import LLAMA_CPP, PORTABLE, SEARCHABLE
from lrconvert.engines.ways_out import ways_out
from lrconvert.parity import Options
from lrconvert.recipe import (
    Provenance,
    Recipe,
    derive_recipe,
    form_of,
    load_recipe,
    recipe_folder,
    shipped_recipes,
    write_recipe,
)
from lrconvert.recipe.forms import FORM
from lrconvert.rope import RopeSpec, Tier, longrope_attention_factor

Cli = Callable[..., Result]
PUBLISHED = "its sets fit fine-tuned weights that are not published, each with an attention factor of its own"
# Shipped recipes that neither go into every format nor have a form that does, and why.
EXEMPT = {
    "llama2-7b-2048k": PUBLISHED,
    "llama2-7b-2048k-ft128k": PUBLISHED,
    "mistral-7b-2048k": PUBLISHED,
    "mistral-7b-2048k-ft128k": PUBLISHED,
}
FORMS = [name for name in shipped_recipes() if name.endswith(FORM)]


def spec_of(recipe: Recipe) -> RopeSpec:
    last = recipe.tiers[-1].max_length
    return RopeSpec(recipe.family, recipe.rotary_dim, recipe.rope_theta, recipe.original_window, last, recipe.tiers)


def dropped(recipe: Recipe) -> list[str]:
    """What runtimes would drop of it. Some use the long set for all lengths, whatever a recipe is: that is no part of
    a form."""
    found = [words for able in SEARCHABLE.values() for words in able.fit(spec_of(recipe))[1]]
    return [words for words in found if "chooses one factor set" not in words]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_it_goes_everywhere_or_has_a_form_that_does(name: str) -> None:
    """The form is of the same model and reaches as far."""
    recipe = load_recipe(name)
    form = form_of(recipe)
    assert (form is None) == (name in EXEMPT or not dropped(recipe))
    if form is None:
        return
    assert form == name + FORM
    other = load_recipe(form)
    assert dropped(other) == []
    same = ("family", "original_window", "rope_theta", "rotary_dim", "base_model")
    assert [getattr(other, key) for key in same] == [getattr(recipe, key) for key in same]
    assert other.tiers[-1].max_length == recipe.tiers[-1].max_length


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_of_a_shipped_recipe(name: str) -> None:
    assert form_of(load_recipe(name.removesuffix(FORM))) == name


@pytest.mark.parametrize("name", EXEMPT)
def test_an_exempt_recipe_needs_its_exemption(name: str) -> None:
    assert dropped(load_recipe(name)) and name + FORM not in shipped_recipes()


def test_a_recipe_is_the_shipped_one_by_name_and_sets(tmp_path: Path) -> None:
    """A copy has the form too; another recipe of that name, or those sets under another name, has none."""
    shipped = load_recipe("demo-8x")
    assert form_of(load_recipe(write_recipe(shipped, tmp_path / "copy"))) == "demo-8x-any"
    changed = replace(shipped.tiers[1], start_tokens=4)
    assert form_of(replace(shipped, tiers=(shipped.tiers[0], changed))) is None
    assert form_of(replace(shipped, name="mine")) is None


@pytest.mark.parametrize("name", recipe_forms.FITTED)
def test_the_tool_makes_the_fitted_forms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shipped is what it writes, and would not be from other sets."""
    monkeypatch.setattr(recipe_forms, "RECIPES", tmp_path)
    recipe, form = load_recipe(name), load_recipe(name + FORM)
    assert load_recipe(recipe_forms.write(name)) == form
    assert recipe_forms.fitted(replace(recipe, tiers=(form.tiers[0], recipe.tiers[0]))) != form


def test_the_form_of_yarn_is_what_derive_makes() -> None:
    factor = longrope_attention_factor(8.0, 4096)
    made = derive_recipe(
        "yarn", 8.0, family="llama", rotary_dim=64, theta=10000.0, original_window=4096, base_model="demo",
        name="demo-yarn-8x-any", attention_factor=factor, uniform=True,
    )  # fmt: skip
    assert load_recipe("demo-yarn-8x-any") == made


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name.removesuffix(FORM) for name in FORMS])
def test_the_form_is_the_first_way_out(name: str) -> None:
    recipe = load_recipe(name)
    for able in (LLAMA_CPP, PORTABLE):
        assert able.fit(spec_of(recipe))[1]
        assert ways_out(able, recipe, spec_of(recipe)) == [f"use `--recipe {name}-any`, its form for every runtime"]


@pytest.mark.parametrize("command", [("gguf",), ("hf", "--portable")])
@pytest.mark.parametrize("name", ["demo-2048k", "demo-8x", "demo-yarn-8x"])
def test_a_refusal_names_the_form(name: str, command: tuple[str, ...], tmp_path: Path, cli: Cli) -> None:
    """Given by name, and as a copy that the user keeps; what it names is baked, and nothing of it is dropped."""
    output = tmp_path / ("m.gguf" if command == ("gguf",) else "m")
    copy = shutil.copytree(recipe_folder(name), tmp_path / "copy")
    for given in (name, copy):
        done = cli(command[0], "demo", "--recipe", given, *command[1:], "-o", output)
        assert done.code == 4 and not output.exists()
        assert f". Use `--recipe {name}-any`, its form for every runtime; or bake" in done.err
        assert done.err.rstrip().endswith("; or drop this with --allow-lossy") and "derive" not in done.err
    done = cli(command[0], "demo", "--recipe", f"{name}-any", *command[1:], "-o", output, "--dry-run")
    assert done.code == 0 and "dropped" not in done.err


@pytest.mark.parametrize("name", ["demo-2048k", "demo-8x", "demo-yarn-8x"])
def test_a_warning_of_native_code_names_the_form(name: str, tmp_path: Path, cli: Cli) -> None:
    """Once, and of the form there is nothing to warn of."""
    told = f"without trust_remote_code, use `--recipe {name}-any`, its form for every runtime\n"
    done = cli("hf", "demo", "--recipe", name, "-o", tmp_path / "m", "--dry-run")
    assert done.code == 0 and "warning: without trust_remote_code" in done.err
    assert done.err.count(told) == done.err.count("--recipe") == 1
    done = cli("hf", "demo", "--recipe", f"{name}-any", "-o", tmp_path / "m", "--dry-run")
    assert done.code == 0 and "without trust_remote_code" not in done.err


@pytest.mark.parametrize("command", [("gguf",), ("hf", "--portable")])
def test_a_refusal_names_the_longest_window_that_works(command: tuple[str, ...], tmp_path: Path, cli: Cli) -> None:
    """Of a recipe with several sets and no form. It is no advice within the original window, where there is nothing to
    gain, and where no window works."""
    ones = (1.0,) * 32
    tiers = tuple(Tier(length, ones, attention_factor=1.1) for length in (4096, 8192, 16384, 32768))
    recipe = Recipe(1, "mine", "llama", 4096, 10000.0, 64, tiers, load_recipe("demo-8x").provenance)
    output = tmp_path / ("m.gguf" if command == ("gguf",) else "m")
    arguments = (command[0], "demo", *command[1:], "-o", output, "--dry-run", "--recipe")
    done = cli(*arguments, write_recipe(recipe, tmp_path / "even"))
    assert done.code == 4 and ". Stop at `--window 8192`, up to which nothing is dropped; or bake" in done.err
    assert "dropped" not in cli(*arguments, tmp_path / "even", "--window", 8192).err
    uneven = replace(recipe, tiers=(Tier(4096, ones), *tiers[1:]))
    done = cli(*arguments, write_recipe(uneven, tmp_path / "uneven"))
    assert done.code == 4 and "--window" not in done.err


@pytest.mark.parametrize(
    ("kind", "changes", "way"),
    [
        ("derived", {}, ["make one attention factor for both sets with `recipe derive --uniform`"]),
        ("derived", {"start_tokens": 4}, []),  # which --uniform leaves as they are
        ("searched", {}, ["search with `--for any`"]),
        ("extended", {}, ["make a form of it with `extend --on` and `--for any`"]),
        ("published", {}, []),
    ],
)
def test_what_made_a_recipe_makes_one_that_works(kind: Any, changes: dict[str, int], way: list[str]) -> None:
    """Where nothing is shipped and no window works."""
    recipe = derive_recipe("yarn", 8, family="llama", rotary_dim=64, theta=10000.0, original_window=4096)
    tiers = (recipe.tiers[0], replace(recipe.tiers[1], **changes))
    recipe = replace(recipe, tiers=tiers, provenance=Provenance(kind))
    assert ways_out(LLAMA_CPP, recipe, spec_of(recipe)) == ways_out(PORTABLE, recipe, spec_of(recipe)) == way


@pytest.mark.parametrize("name", ["demo-8x-any", "demo-yarn-8x-any"])
def test_a_demo_form_goes_into_every_format(name: str, tmp_path: Path, cli: Cli) -> None:
    """No option, no warning of anything dropped."""
    for command, output in (("hf", "folder"), ("gguf", "file.gguf"), ("onnx", "onnx")):
        options = ["--portable"] if command == "hf" else []
        done = cli(command, "demo", "--recipe", name, *options, "-o", tmp_path / output)
        assert done.code == 0 and "drop" not in done.err, done.err
    assert verify(tmp_path / "file.gguf", options=Options(profile="quick")).passed
