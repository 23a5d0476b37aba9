# SPDX-License-Identifier: Apache-2.0
"""Which rotation a config means, held against what transformers computes from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.pico import pico_config

from lrconvert.checkpoint.rope_config import FoundRope, read_rope
from lrconvert.errors import InputError, UnsupportedError, UsageError
from lrconvert.families import get_family, read_shape
from lrconvert.rope import serving

SHORT, LONG = [1.0 + i / 20 for i in range(8)], [1.0 + i**2 for i in range(8)]
LISTS = {"short_factor": SHORT, "long_factor": LONG}


def read(config: dict[str, Any], **options: Any) -> FoundRope:
    return read_rope(config, read_shape(config, get_family(config["model_type"])), **options)


def longrope(**changes: Any) -> dict[str, Any]:
    return {"rope_type": "longrope", **LISTS, **changes}


# What configs say, whether transformers of any version writes it so or people do; every one loads in transformers 5.
# With it, the lengths of the tiers.
CONFIGS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "factor, window not raised": (
        pico_config("llama", rope_scaling=longrope(factor=8.0, original_max_position_embeddings=64)),
        [64, 512],
    ),
    "factor alone: the window is L0": (pico_config("qwen2", rope_scaling=longrope(factor=4.0)), [64, 256]),
    "factor beside a window of another ratio": (
        pico_config("mistral", max_position_embeddings=256, sliding_window=None,
                    rope_scaling=longrope(factor=8.0, original_max_position_embeddings=64)),
        [64, 256],
    ),
    "factor and its own attention factor": (
        pico_config("llama", rope_scaling=longrope(factor=8.0, attention_factor=1.25)),
        [64, 512],
    ),
    "the original window at the top level": (
        pico_config("llama", max_position_embeddings=512, original_max_position_embeddings=64,
                    rope_scaling=longrope(original_max_position_embeddings=32)),
        [64, 512],
    ),
    "rope_parameters": (
        pico_config("llama", rope_theta=None, max_position_embeddings=256,
                    rope_parameters=longrope(factor=4.0, original_max_position_embeddings=64, rope_theta=5e4)),
        [64, 256],
    ),
    "one factor beyond nothing": (pico_config("llama", rope_scaling=longrope(factor=1.0, long_factor=SHORT)), [64]),
    "phi3": (pico_config("phi3", partial_rotary_factor=1.0, max_position_embeddings=256,
                         rope_scaling={"type": "longrope", **LISTS}), [64, 256]),
    "phi3, yarn beside lists": (pico_config("phi3", partial_rotary_factor=1.0, max_position_embeddings=256,
                                            rope_scaling={"type": "yarn", **LISTS}), [64, 256]),
    "phi3 without an original window: its class has 4096": (
        pico_config("phi3", partial_rotary_factor=1.0, original_max_position_embeddings=None,
                    max_position_embeddings=8192, rope_scaling={"type": "longrope", **LISTS}),
        [4096, 8192],
    ),
    "linear": (pico_config("llama", rope_scaling={"type": "linear", "factor": 4.0}), [256]),
    "dynamic": (pico_config("llama", rope_scaling={"type": "dynamic", "factor": 4.0}), [64, 128, 256]),
    "dynamic with an original window: transformers doesn't look at it": (
        pico_config("llama", rope_scaling={"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}),
        [64, 128],
    ),
    "yarn": (pico_config("llama", rope_scaling={"rope_type": "yarn", "factor": 4.0,
                                                "original_max_position_embeddings": 64}), [256]),
    "yarn with a window that is raised": (
        pico_config("qwen3", head_dim=16, max_position_embeddings=256,
                    rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        [256],
    ),
    "yarn with DeepSeek's scales": (
        pico_config("llama", rope_scaling={"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0,
                                           "original_max_position_embeddings": 64, "beta_fast": 16, "truncate": False}),
        [256],
    ),
    "llama3": (
        pico_config("llama", max_position_embeddings=512,
                    rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 64}),
        [512],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_means_what_transformers_computes(name: str) -> None:
    """cos and sin of its own rotary module, at both sides of every boundary and at the end: the attention factor and
    all sets. A tier that serves other lengths too (dynamic) is right where it ends."""
    torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    config, lengths = CONFIGS[name]
    found = read(config)
    assert [tier.max_length for tier in found.tiers] == lengths and not found.question
    built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    theta = read_shape(config, get_family(config["model_type"])).theta
    past = [length + 1 for length in lengths[:-1]] if found.kind == "longrope" else []
    for length in [*lengths, *past]:
        positions = torch.arange(length)[None]
        cos, sin = built.model.rotary_emb(torch.zeros(1), positions)
        wanted = serving(found.tiers, length).cos_sin(np.arange(length), theta)
        for theirs, ours in zip((cos, sin), wanted, strict=True):
            np.testing.assert_allclose(theirs[0, :, :8].numpy(), ours, atol=2e-3 if length > 1024 else 1e-4)


def test_a_long_set_without_a_length_is_a_question() -> None:
    """Nothing says how far it reaches: what is certain is read, and who needs more gets the way out."""
    config = pico_config("llama", rope_scaling=longrope(original_max_position_embeddings=64))
    found = read(config)
    assert [tier.max_length for tier in found.tiers] == [64] and "no factor says how far" in found.question
    with pytest.raises(InputError, match=r"m: config.json has two factor sets.*--window N"):
        found.settled("m")
    settled = read(config, window=512).settled("m")
    assert [tier.max_length for tier in settled.tiers] == [64, 512]
    assert (
        settled.tiers[1].attention_factor == read({**config, "max_position_embeddings": 512}).tiers[1].attention_factor
    )
    equal = pico_config("llama", rope_scaling=longrope(long_factor=SHORT))
    assert read(equal).settled("m").window == 64


@pytest.mark.parametrize("name", [name for name in CONFIGS if "nothing" not in name])
def test_the_window_can_be_stated(name: str) -> None:
    """Whatever the config says: the last set reaches there, and nothing else changes. Below the original window it is
    refused."""
    config, lengths = CONFIGS[name]
    usual, stated = read(config), read(config, window=lengths[-1] * 2)
    assert stated.window == 2 * lengths[-1] and stated.original_window == usual.original_window
    if usual.kind != "dynamic":
        assert stated.tiers[-1].factors == usual.tiers[-1].factors
        with pytest.raises(UsageError, match="below the original window"):
            read(config, window=usual.original_window - 1)


def test_an_ambiguous_window_is_said() -> None:
    """linear and dynamic configs have one window, of which nobody says whether it is the one before or after."""
    for kind in ("linear", "dynamic"):
        config = pico_config("llama", rope_scaling={"type": kind, "factor": 4.0})
        assert any("--window 64" in note for note in read(config).notes)
        assert not any("--window" in note for note in read(config, window=64).notes)
        assert read(config, window=64).window == 64
    scaling = {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}
    config = pico_config("llama", max_position_embeddings=256, rope_scaling=scaling)
    assert (read(config).window, read(config).notes) == (256, ())


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}}, "'default' and type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **LISTS}}, "'yarn' and carries short_factor and"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "long_factor": LONG}}, "'linear' and carries long"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "proportional"}}, "'proportional' is not known"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "is 10000.0 at",
        ),
    ],
)
def test_what_versions_read_differently_is_refused(changes: dict[str, Any], needle: str) -> None:
    with pytest.raises(InputError, match=needle.replace("(", r"\(")):
        read(pico_config("llama", **changes))


def test_two_names_of_one_kind_are_no_contradiction() -> None:
    config = pico_config("phi3", partial_rotary_factor=1.0, max_position_embeddings=256)
    for scaling in ({"type": "su", "rope_type": "longrope"}, {"type": "longrope", "rope_type": "longrope"}):
        assert read({**config, "rope_scaling": {**scaling, **LISTS}}).kind == "longrope"


def test_settings_for_each_kind_of_layer_count_where_they_are_the_same() -> None:
    one = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    config = pico_config("llama", rope_theta=None, rope_parameters={"full_attention": one, "sliding_attention": one})
    assert read(config).kind == "linear" and read_shape(config, get_family("llama")).theta == 5e5
    config["rope_parameters"]["sliding_attention"] = {**one, "factor": 2.0}
    with pytest.raises(UnsupportedError, match="separate rotary settings for full_attention, sliding_attention"):
        read(config)
