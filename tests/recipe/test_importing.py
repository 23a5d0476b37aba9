# SPDX-License-Identifier: Apache-2.0
"""Recipes from what others published, in every spelling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pico import pico_config

from lrconvert import rope
from lrconvert.errors import InputError, UnsupportedError, UsageError
from lrconvert.recipe import parse_recipe
from lrconvert.recipe.importing import Base, import_recipe

SHORT, LONG = [1.0 + i / 10 for i in range(8)], [1.0 + i for i in range(8)]
LONGROPE = {"short_factor": SHORT, "long_factor": LONG}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(pico_config("llama", **changes)))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        # transformers 4: top-level original window and θ
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", **LONGROPE},
        },
        # the first Phi-3 configs: "su"
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "su", **LONGROPE},
        },
        # original window inside
        {
            "max_position_embeddings": 256,
            "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 64, **LONGROPE},
        },
        # transformers 5: everything in rope_parameters
        {
            "max_position_embeddings": 256,
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
                "factor": 4.0,
                **LONGROPE,
            },
        },
    ],
    ids=["v4 top level", "su", "inner window", "v5"],
)
def test_longrope_in_every_spelling_gives_one_recipe(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe, _ = import_recipe([str(write(tmp_path, **changes))])
    assert (recipe.original_window, recipe.rope_theta, recipe.rotary_dim) == (64, 10000.0, 16)
    assert [tier.max_length for tier in recipe.tiers] == [64, 256]
    assert [list(tier.factors) for tier in recipe.tiers] == [SHORT, LONG]
    formula = rope.longrope_attention_factor(4.0, 64)
    assert [tier.attention_factor for tier in recipe.tiers] == [formula, formula]


def test_explicit_attention_factors_win_over_the_formula(tmp_path: Path) -> None:
    base = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    one = write(tmp_path, **base, rope_scaling={"rope_type": "longrope", "attention_factor": 1.5, **LONGROPE})
    assert [t.attention_factor for t in import_recipe([str(one)])[0].tiers] == [1.5, 1.5]
    two = {"rope_type": "longrope", "short_mscale": 1.1, "long_mscale": 1.3, **LONGROPE}
    assert [t.attention_factor for t in import_recipe([str(write(tmp_path, **base, rope_scaling=two))])[0].tiers] == [
        1.1,
        1.3,
    ]


@pytest.mark.parametrize(
    ("scaling", "lengths", "factors"),
    [
        ({"rope_type": "linear", "factor": 4.0}, [256], rope.pi_factors(16, 4.0)),
        ({"rope_type": "yarn", "factor": 4.0}, [256], rope.yarn_factors(16, 1e4, 4.0, 64)),
        ({"type": "dynamic", "factor": 4.0}, [64, 128, 256], rope.dynamic_ntk_factors(16, 4.0, 64, 256)),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            [64],
            rope.llama3_factors(16, 1e4, 4.0, 32, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
    ],
    ids=["linear", "yarn", "dynamic", "llama3"],
)
def test_other_rules_become_factor_sets(
    tmp_path: Path, scaling: dict[str, Any], lengths: list[int], factors: np.ndarray
) -> None:
    recipe, _ = import_recipe([str(write(tmp_path, rope_scaling=scaling))])
    assert [tier.max_length for tier in recipe.tiers] == lengths
    assert list(recipe.tiers[-1].factors) == factors.tolist()


def test_a_config_of_another_family_imports_with_a_note(tmp_path: Path) -> None:
    changes = {"model_type": "cohere2", "max_position_embeddings": 256, "original_max_position_embeddings": 64}
    path = write(tmp_path, **changes, hidden_act="gelu", rope_scaling={"type": "longrope", **LONGROPE})
    recipe, notes = import_recipe([str(path)])
    assert recipe.family == "cohere2"
    assert any("can't convert" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({}, "carries no scaled RoPE"),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT}}, "long_factor is missing"),
        ({"rope_scaling": {"type": "longrope", **LONGROPE, "long_factor": LONG[:-1]}}, "has 7 values"),
        ({"rope_scaling": {"type": "longrope", **LONGROPE, "long_factor": [*LONG[:-1], -1]}}, "long_factor[7] is -1"),
        ({"rope_scaling": {"type": "mystery"}}, "'mystery' is not known"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]"),
        ({"rope_scaling": {"type": "longrope", **LONGROPE}, "original_max_position_embeddings": "x"}, "'x'"),
    ],
)
def test_bad_configs_say_the_key(tmp_path: Path, changes: dict[str, Any], needle: str) -> None:
    with pytest.raises(InputError) as caught:
        import_recipe([str(write(tmp_path, **{"max_position_embeddings": 256, **changes}))])
    assert needle in str(caught.value)


# --- LongRoPE's tables -----------------------------------------------------------------------------------


def table(path: Path, factors: list[float], layers: int = 32) -> Path:
    path.write_text("\n".join(",".join(repr(value) for value in factors) for _ in range(layers)) + "\n")
    return path


def test_csv_tables_become_tiers(tmp_path: Path) -> None:
    """The window comes from the name or from `=LENGTH`; the attention factor from the formula, tier by tier."""
    files = [table(tmp_path / "4k_la2_128k.csv", SHORT), table(tmp_path / "ft_la2_128k.csv", LONG)]
    other = table(tmp_path / "mine.csv", [v + 0.5 for v in LONG])
    recipe, _ = import_recipe([*map(str, files), f"{other}=8192"], Base("llama", 10000.0, 4096))
    assert [tier.max_length for tier in recipe.tiers] == [4096, 8192, 131072]
    assert list(recipe.tiers[0].factors) == SHORT
    assert [tier.attention_factor for tier in recipe.tiers] == [
        1.0,
        rope.longrope_attention_factor(2, 4096),
        rope.longrope_attention_factor(32, 4096),
    ]


def test_csv_tables_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    given = Base("llama", 10000.0, 4096)
    good = table(tmp_path / "4k_x.csv", SHORT)
    with pytest.raises(UsageError, match="--family and --theta and --original-window"):
        import_recipe([str(good)])
    with pytest.raises(UsageError, match="=LENGTH"):
        import_recipe([str(table(tmp_path / "unnamed.csv", SHORT))], given)
    with pytest.raises(InputError, match="both serve 4096"):
        import_recipe([str(good), f"{table(tmp_path / 'b.csv', LONG)}=4096"], given)
    with pytest.raises(InputError, match="rotate 8 and 16"):
        import_recipe([str(good), f"{table(tmp_path / 'c.csv', LONG[:4])}=8192"], given)
    uneven = table(tmp_path / "8k_y.csv", SHORT)
    uneven.write_text(uneven.read_text() + ",".join(map(repr, LONG)) + "\n")
    with pytest.raises(InputError, match="row 33 differs"):
        import_recipe([str(uneven)], given)
    for text, needle in (("a,b\n", "not a table of numbers"), ("", "empty"), ("1.0,-2.0\n", "-2.0")):
        bad = tmp_path / "16k_bad.csv"
        bad.write_text(text)
        with pytest.raises(InputError, match=needle):
            import_recipe([str(bad)], given)


# --- the published sets ----------------------------------------------------------------------------------

FAMILY_OF = {"longrope-llama2": "llama", "longrope-mistral": "mistral", "phi": "phi3", "minicpm": "minicpm"}


def test_every_published_set_round_trips_bit_exactly(published_factors: Path, tmp_path: Path) -> None:
    """As a factor file, and where it was published as a CSV table, through that layout too."""
    paths = sorted(published_factors.glob("*.json"))
    assert len(paths) >= 37
    for path in paths:
        values = json.loads(path.read_text())
        family = next(name for prefix, name in FAMILY_OF.items() if path.name.startswith(prefix))
        given = Base(family, values["rope_theta"] or 10000.0)
        recipe, _ = import_recipe([str(path)], given)
        assert parse_recipe(recipe.to_json()) == recipe
        published = [values[key] for key in ("short_factor", "long_factor") if values[key] is not None]
        found = [list(tier.factors) for tier in recipe.tiers]
        assert all(factors in published for factors in found), path.name
        assert len(found) == len(published) or published[0] == published[1], path.name
        if str(values["source"]["path"]).endswith(".csv"):
            csv = table(tmp_path / Path(values["source"]["path"]).name, published[0])
            again, _ = import_recipe([f"{csv}={values['target_length']}"], Base(family, 10000.0, 4096))
            assert again.tiers == recipe.tiers, path.name


def test_the_published_tables_of_one_model_become_one_recipe(published_factors: Path) -> None:
    """LLaMA2's sets for its 256k model: seven tiers, from 4k to 2048k."""
    paths = sorted(map(str, published_factors.glob("longrope-llama2-7b-*-256k.json")))
    recipe, _ = import_recipe(paths, Base("llama"))
    assert [tier.max_length // 1024 for tier in recipe.tiers] == [4, 8, 16, 32, 256, 512, 2048]


# --- GGUF ------------------------------------------------------------------------------------------------


def test_a_gguf_that_carries_factors_gives_its_recipe(tmp_path: Path) -> None:
    """Factors as stored (float32), attention factor and windows, through the file's own metadata."""
    import gguf

    factors = {
        "short": np.array([1.0 + i / 7 for i in range(8)], np.float32),
        "long": np.array([1.5 + i for i in range(8)], np.float32),
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(101)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_rope_scaling_attn_factors(1.25)
    for name, values in factors.items():
        writer.add_tensor(f"rope_factors_{name}.weight", values)
    writer.add_tensor("token_embd.weight", np.zeros((101, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    recipe, _ = import_recipe([str(tmp_path / "m.gguf")])
    assert (recipe.family, recipe.original_window, recipe.rotary_dim) == ("llama", 64, 16)
    assert [tier.max_length for tier in recipe.tiers] == [64, 256]
    assert [list(tier.factors) for tier in recipe.tiers] == [factors["short"].tolist(), factors["long"].tolist()]
    assert [tier.attention_factor for tier in recipe.tiers] == [1.25, 1.25]


# --- other families' configs, other layouts --------------------------------------------------------------


def other(folder: Path, **changes: Any) -> Path:
    """A config.json of a family that can't be converted."""
    config = {
        "model_type": "foreign",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "rope_scaling": {"type": "su", **LONGROPE, "original_max_position_embeddings": 64},
        **changes,
    }
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


@pytest.mark.parametrize("key", ["rope_theta", "rope_embedding_base", "rotary_emb_base", "rope_base"])
def test_theta_is_found_under_other_keys(tmp_path: Path, key: str) -> None:
    recipe, notes = import_recipe([str(other(tmp_path, **{key: 1e6}))])
    assert recipe.rope_theta == 1e6
    assert key == "rope_theta" or any(key in note for note in notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "hidden_size": 512},
        {"rotary_dim": 16, "hidden_size": 256},
        {"rotary_pct": 0.25, "hidden_size": 256},
        {"partial_rotary_factor": 0.5, "head_dim": 32},
        {"kv_channels": 16, "hidden_size": 256},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_rotated_width_is_found_under_other_keys(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe, _ = import_recipe([str(other(tmp_path, rope_theta=1e4, **changes))])
    assert recipe.rotary_dim == 16


@pytest.mark.parametrize("key", ["text_config", "language_config"])
def test_nested_settings_are_those_of_the_language_model(tmp_path: Path, key: str) -> None:
    """Whatever the vision tower beside them says."""
    inner = json.loads(other(tmp_path, rope_theta=5e5, vocab_size=7).read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "seeing", key: inner, "vision_config": {"num_attention_heads": 2}}))
    recipe, notes = import_recipe([str(path)])
    assert (recipe.family, recipe.rope_theta) == ("foreign", 5e5) and any(key in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "error", "needle"),
    [
        ({"rope_ratio": 50}, UnsupportedError, "rope_ratio 50"),
        ({"rotary_scale_base": 512}, UnsupportedError, "rotary_scale_base 512"),
        ({"layer_rope_theta": [1e4, 1e6]}, UnsupportedError, "layer_rope_theta"),
        ({"rope_theta": 1e4, "rope_embedding_base": 1e6}, InputError, "they contradict"),
        ({"qk_rope_head_dim": 32}, InputError, "rotates 32 dimensions"),
    ],
)
def test_what_sounds_like_the_rotation_is_understood_or_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], needle: str
) -> None:
    with pytest.raises(error, match=needle):
        import_recipe([str(other(tmp_path, **changes))])


def test_a_theta_that_is_nowhere_is_said(tmp_path: Path) -> None:
    recipe, notes = import_recipe([str(other(tmp_path))])
    assert recipe.rope_theta == 1e4 and any("no rope_theta" in note for note in notes)
    given, _ = import_recipe([str(other(tmp_path))], Base(theta=5e5))
    assert given.rope_theta == 5e5


def test_options_complete_a_config(tmp_path: Path) -> None:
    """θ decides a YaRN's factors, and the original window where the short set ends."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    recipe, _ = import_recipe([str(other(tmp_path, rope_scaling=scaling))], Base(theta=5e5))
    assert list(recipe.tiers[-1].factors) == rope.yarn_factors(16, 5e5, 4.0, 64).tolist()
    block = {"rope_type": "longrope", **LONGROPE}
    recipe, _ = import_recipe([str(other(tmp_path, rope_scaling=block))], Base(original_window=64))
    assert [tier.max_length for tier in recipe.tiers] == [64, 256]
    with pytest.raises(InputError, match="--window N"):
        import_recipe([str(other(tmp_path, rope_scaling=block))])
    recipe, _ = import_recipe([str(other(tmp_path, rope_scaling=block))], Base(window=1024))
    assert [tier.max_length for tier in recipe.tiers] == [256, 1024]


FACTOR_FILE: dict[str, Any] = {
    "short_factor": [1.0] * 8,
    "long_factor": [1.5] * 8,
    "rotary_dim": 16,
    "head_dim": 16,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
    "rope_theta": 1e4,
    "start_tokens": 2,
    "model": "me/model",
    "source": {"repo": "me/model", "licence": "mit"},
}
ODD_FACTOR_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "start tokens in words": ({"start_tokens": "none"}, "start_tokens"),
    "theta in a list": ({"rope_theta": [1e4]}, "rope_theta"),
    "no number for theta": ({"rope_theta": float("inf")}, "rope_theta"),
    "a model that is none": ({"model": True}, "model"),
    "a licence in a list": ({"source": {"licence": ["mit"]}}, "source.licence"),
    "a licence that is a number": ({"source": {"licence": 3}}, "source.licence"),
    "a head of any size": ({"rotary_dim": 10**400}, "rotary_dim"),
    "no length": ({"max_position_embeddings": None}, "max_position_embeddings"),
    "no original window": ({"original_max_position_embeddings": None}, "original_max_position_embeddings"),
    "a name that no file has": ({"model": "a\0b"}, "base_model"),
}


def test_a_factor_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps(FACTOR_FILE))
    recipe, _ = import_recipe([str(tmp_path / "f.json")], Base("llama"))
    assert [(tier.max_length, tier.start_tokens) for tier in recipe.tiers] == [(64, 2), (256, 2)]
    assert (recipe.base_model, recipe.provenance.licence) == ("me/model", "mit")


@pytest.mark.parametrize("name", ODD_FACTOR_FILES)
def test_a_factor_file_of_other_types_is_refused_by_its_key(tmp_path: Path, name: str) -> None:
    changes, key = ODD_FACTOR_FILES[name]
    (tmp_path / "f.json").write_text(json.dumps({**FACTOR_FILE, **changes}))
    with pytest.raises(InputError, match=key):
        import_recipe([str(tmp_path / "f.json")], Base("llama"))


GIVEN = Base("llama", 1e4, 64)


def test_one_value_a_line_is_one_set(tmp_path: Path) -> None:
    """As LongRoPE's own search writes its result; a column of ones too."""
    for values in (LONG, [1.0] * 8, [2.5] * 8):
        np.savetxt(tmp_path / "result.csv", values, delimiter=",")
        recipe, _ = import_recipe([f"{tmp_path / 'result.csv'}=256"], GIVEN)
        assert recipe.rotary_dim == 16 and list(recipe.tiers[0].factors) == values


def test_a_table_of_one_number_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("1.0\n")
    with pytest.raises(InputError, match="holds one number"):
        import_recipe([f"{tmp_path / 'one.csv'}=256"], GIVEN)


def test_a_table_has_to_fit_the_named_model(tmp_path: Path, pico_folder: Callable[..., Path]) -> None:
    """One value a line of another head size."""
    np.savetxt(tmp_path / "result.csv", [1.0] * 64)
    with pytest.raises(InputError, match="they rotate 128 dimensions"):
        import_recipe([f"{tmp_path / 'result.csv'}=256"], Base(model=str(pico_folder())))
