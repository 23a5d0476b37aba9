# SPDX-License-Identifier: Apache-2.0
"""Recipes from what others published, in every spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pico import pico_config

from lrconvert import rope
from lrconvert.errors import InputError, UsageError
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
    changes = {"model_type": "phimoe", "max_position_embeddings": 256, "original_max_position_embeddings": 64}
    path = write(tmp_path, **changes, hidden_act="gelu", rope_scaling={"type": "longrope", **LONGROPE})
    recipe, notes = import_recipe([str(path)])
    assert recipe.family == "phimoe"
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
