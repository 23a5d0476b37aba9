# SPDX-License-Identifier: Apache-2.0
"""Recipe files: exact, strict, and errors that list all that is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrconvert.errors import InputError, UsageError
from lrconvert.recipe import (
    Provenance,
    Recipe,
    derive_recipe,
    json_schema,
    load_recipe,
    parse_recipe,
    resolve,
    shipped_recipes,
    write_recipe,
)
from lrconvert.rope import ATTENTION, FACTORS, Tier

ROOT = Path(__file__).resolve().parents[2]


def recipe(**changes: object) -> Recipe:
    values = {
        "schema_version": 1,
        "name": "r",
        "family": "llama",
        "original_window": 64,
        "rope_theta": 10000.0,
        "rotary_dim": 4,
        "tiers": (Tier(64, (1.0, 1.0)), Tier(256, (1.0, 3.9), 4, 1.1)),
        "provenance": Provenance("derived", "yarn"),
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def broken(**changes: object) -> str:
    """The recipe's JSON with top-level keys replaced; None removes one."""
    values = {**json.loads(recipe().to_json()), **changes}
    return json.dumps({key: value for key, value in values.items() if value is not None})


positive = st.floats(min_value=FACTORS[0], max_value=FACTORS[1])
attention_factors = st.floats(min_value=ATTENTION[0], max_value=ATTENTION[1])


@given(
    st.lists(st.lists(positive, min_size=3, max_size=3), min_size=1, max_size=4),
    positive,
    st.integers(0, 300),
    attention_factors,
)
def test_every_float_survives_the_file(sets: list[list[float]], theta: float, start: int, attention: float) -> None:
    """Write and read gives back the same bits, whatever the numbers are."""
    tiers = tuple(Tier(64 * 2**i, tuple(factors), start, attention) for i, factors in enumerate(sets))
    made = recipe(rotary_dim=6, tiers=tiers, rope_theta=theta + 1.5)
    assert parse_recipe(made.to_json()) == made


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        (broken(family=None), ["family is missing"]),
        (broken(rope_theta="10000"), ["rope_theta is '10000'", "number"]),
        (broken(colour="red"), ["unknown key colour"]),
        (broken(schema_version=2), ["schema_version is 2"]),
        (broken(rotary_dim=3), ["rotary_dim is 3", "multiple of 2"]),
        (broken(base_model="a\0b"), ["base_model is 'a\\x00b'"]),
        (broken(name="\x1b[2J"), ["name is '\\x1b[2J'"]),
        (broken(tiers=[]), ["tiers is []"]),
        (broken(tiers=[{"max_length": 64, "factors": [1.0, 0.0]}]), ["tiers[0].factors[1] is 0.0", "equal to 0.001"]),
        (broken(tiers=[{"max_length": 64, "factors": [1.0, math.nan]}]), ["tiers[0].factors[1] is nan", "finite"]),
        (broken(tiers=[{"max_length": 64, "factors": [1.0, math.inf]}]), ["tiers[0].factors[1] is inf", "finite"]),
        (broken(tiers=[{"max_length": 64, "factors": [1.0]}]), ["tiers[0].factors has 1 values", "needs 2"]),
        (
            broken(tiers=[{"max_length": 32, "factors": [1.0, 1.0]}]),
            ["tiers[0].max_length is 32", "original window, 64"],
        ),
        (
            broken(tiers=[{"max_length": n, "factors": [1.0, 1.0]} for n in (128, 64)]),
            ["tiers[1].max_length is 64", "more than 128"],
        ),
        ("{", ["not JSON"]),
        ("[]", ["the file is []"]),
        ("[" * 100000, ["not JSON", "recursion"]),
        (broken(family=None, colour=1, rotary_dim=3), ["family is missing", "unknown key colour", "rotary_dim is 3"]),
    ],
)
def test_an_error_says_file_key_found_and_needed(text: str, needles: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "some/recipe.json")
    message = str(caught.value)
    assert message.startswith("some/recipe.json: ")
    for needle in needles:
        assert needle in message


def test_what_published_models_do_is_a_warning_not_an_error() -> None:
    """Sets that fall, and λ slightly below 1, occur in published models."""
    odd = recipe(tiers=(Tier(64, (0.99, 1.0)), Tier(128, (2.0, 1.5))))
    assert parse_recipe(odd.to_json()) == odd
    assert odd.warnings() == [
        "tiers[0].factors: below 1 at index 0",
        "tiers[1].factors: not monotone, drops at index 1",
    ]


def test_the_shipped_schema_is_generated_from_the_definition() -> None:
    """`python -m lrconvert.recipe.schema` writes it; valid recipes pass it, broken ones don't."""
    path = ROOT / "lrconvert" / "data" / "recipe.schema.json"
    if tuple(map(int, pydantic.VERSION.split(".")[:2])) >= (2, 14):  # older ones word the same schema otherwise
        assert json.loads(path.read_text()) == json_schema()
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(json.loads(recipe().to_json()))
    for changes in ({"family": None}, {"colour": 1}, {"rotary_dim": 3}, {"tiers": []}, {"rope_theta": "x"}):
        assert not validator.is_valid(json.loads(broken(**changes)))


def test_a_recipe_for_another_model_names_both_values() -> None:
    with pytest.raises(InputError) as caught:
        resolve(recipe(), family="qwen2", rotary_dim=8, theta=500000.0)
    for needle in ("llama", "qwen2", " 4 ", " 8 ", "10000.0", "500000.0"):
        assert needle in str(caught.value)


def test_a_window_cuts_the_recipe_short() -> None:
    """--window keeps the tiers up to the one that serves it; beyond the last one is a usage error."""
    fit = {"family": "llama", "rotary_dim": 4, "theta": 10000.0}
    assert [t.max_length for t in resolve(recipe(), **fit).tiers] == [64, 256]
    cut = resolve(recipe(), **fit, window=100)
    assert [t.max_length for t in cut.tiers] == [64, 100]
    assert cut.tiers[1].factors == (1.0, 3.9)
    assert [t.max_length for t in resolve(recipe(), **fit, window=64).tiers] == [64]
    for window in (257, 63):
        with pytest.raises(UsageError, match=str(window)):
            resolve(recipe(), **fit, window=window)


def test_deriving_keeps_the_short_window_unmodified() -> None:
    made = derive_recipe("ntk", 4, family="llama", rotary_dim=8, theta=1e4, original_window=64)
    assert made.tiers[0] == Tier(64, (1.0,) * 4)
    assert made.tiers[1].max_length == 256
    assert made.tiers[1].factors[-1] == pytest.approx(4.0)
    even = derive_recipe("yarn", 4, family="llama", rotary_dim=8, theta=1e4, original_window=64, uniform=True)
    assert len({tier.attention_factor for tier in even.tiers}) == 1 and even.tiers[0].attention_factor > 1
    with pytest.raises(UsageError, match="above 1"):
        derive_recipe("pi", 1.0, family="llama", rotary_dim=8, theta=1e4, original_window=64)


def test_writing_never_replaces_what_is_not_a_recipe(tmp_path: Path) -> None:
    path = write_recipe(recipe(), tmp_path / "r")
    assert load_recipe(tmp_path / "r") == load_recipe(path) == recipe()
    with pytest.raises(UsageError, match="--force"):
        write_recipe(recipe(), tmp_path / "r")
    write_recipe(recipe(name="other"), tmp_path / "r", force=True)
    assert load_recipe(path).name == "other"
    notes = tmp_path / "notes.json"
    notes.write_text("[1]")
    with pytest.raises(InputError):
        write_recipe(recipe(), notes, force=True)
    assert notes.read_text() == "[1]"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.name == name
    odd = [text for text in loaded.warnings() if not ("not monotone" in text and name.startswith("mistral"))]
    assert odd == []  # the second search on a fine-tuned Mistral lost its order, as published


def test_the_shipped_demo_recipe_is_what_derive_makes() -> None:
    made = derive_recipe(
        "yarn", 8.0, family="llama", rotary_dim=64, theta=10000.0, original_window=4096, base_model="demo"
    )
    assert load_recipe("demo-yarn-8x") == made
