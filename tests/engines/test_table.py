# SPDX-License-Identifier: Apache-2.0
"""The table of engines: every row has its source, and a recipe's verdict follows from the facts."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, recipe_for
from support.pico import FAMILIES

from lrconvert.artifact.recording import _recorded
from lrconvert.checkpoint import Model
from lrconvert.engines.engine import Verdict
from lrconvert.engines.page import page
from lrconvert.engines.table import ENGINES, assess
from lrconvert.families import get_family
from lrconvert.recipe import write_recipe
from lrconvert.rope import RopeSpec, Tier, longrope_attention_factor, yarn_factors
from lrconvert.targets.hf.config import edited_config

FORMULA = longrope_attention_factor(2.0, 64)
# Read the config, and rotate what it says: right for the portable subset in every family.
NATIVE = ("transformers 4.57, native", "transformers 5, native")
READERS = (*NATIVE, "transformers, trust_remote_code", "vLLM", "SGLang", "mlx-lm", "ExLlamaV3")
NAMES = {*READERS, "TGI", "llama.cpp, its own converter", "llama.cpp, a file with the factors",
         "ONNX, genai builder", "ONNX, optimum", "ONNX, transformers' exporter", "ONNX, mobius"}  # fmt: skip
BY_FORMULA = {"smollm3", "olmo2", "olmo3", "gemma3_text", "glm4"}  # llama.cpp's own YaRN
# nobody has asked other programs
LATER = {"granite", "minicpm", "ministral3", "mixtral", "qwen2_moe", "qwen3_moe", "phimoe", *BY_FORMULA}
OURS = (*NATIVE, "transformers, trust_remote_code")  # asked by tests, of every family


def spec(family: str = "llama", *, attention: float = FORMULA, start: int = 0, ends: tuple[int, ...] = (64, 128)):
    tiers = tuple(Tier(end, (1.0 + index,) * 8, start, attention) for index, end in enumerate(ends))
    return RopeSpec(family, 16, 10000.0, 64, ends[-1], tiers)


def verdicts(*arguments: Any) -> dict[str, Verdict]:
    found = assess(*arguments)
    assert len({verdict.engine for verdict in found}) == len(found)
    return {verdict.engine: verdict for verdict in found}


def test_every_row_says_where_it_is_from() -> None:
    """Version, source and when it was seen; families that exist, each at most once an engine."""
    for row in ENGINES:
        assert row.version and row.source and row.rule.chooses, row
        assert row.known == "tested" or re.fullmatch(r"(measured|read) \d{4}-\d\d-\d\d", row.known), row
        assert row.families is None or row.families <= {*FAMILIES, *LATER}, row
        assert all(get_family(name) for name in row.families or set())
    for name in {row.name for row in ENGINES}:
        rows = [row for row in ENGINES if row.name == name]
        listed = [family for row in rows for family in row.families or FAMILIES]
        assert len(listed) == len(set(listed)), name
    assert {row.name for row in ENGINES} == NAMES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_portable_subset_is_right_in_engines_that_read_it(family: str) -> None:
    """Two tiers, no start tokens, the formula's factor; the limits of each engine's own rule are named."""
    found = verdicts(spec(family), family)
    assert set(found) == NAMES
    asked = family not in LATER
    for name in READERS:
        if name == NATIVE[0] and get_family(family).hf_oldest is not None:
            assert found[name].outcome == "refuses", found[name]
            continue
        if (family, name) == ("phimoe", NATIVE[1]):
            assert found[name].outcome == "differs" and found[name].why == ("the long set is never used",)
            continue
        assert found[name].outcome == ("right" if asked or name in OURS else "unknown"), found[name]
        assert found[name].outcome == "unknown" or found[name].why == ()
    assert found["transformers, trust_remote_code"].limits == ()
    if not asked:
        return
    assert found["TGI"].outcome == "differs" and "in one sequence" in found["TGI"].why[0]
    assert any("--max-model-len 128" in text for text in found["vLLM"].limits)
    assert any("up to 64 tokens use the long set" in text for text in found["mlx-lm"].limits)
    asked = family in ("llama", "mistral", "phi3")
    assert found["ONNX, mobius"].outcome == ("right" if asked else "unknown")
    assert found["ONNX, transformers' exporter"].outcome == ("right" if asked else "unknown")


def test_one_set_for_all_lengths_leaves_no_rule_to_get_wrong() -> None:
    """Equal sets: no limits, and even TGI is right; who drops the scaling still does."""
    found = verdicts(spec(ends=(128,)), "llama")
    for name in (*READERS, "TGI"):
        assert (found[name].outcome, found[name].limits) == ("right", ())
    assert found["llama.cpp, its own converter"].outcome == "differs"


@pytest.mark.parametrize(
    ("changed", "needle", "still_right"),
    [
        (
            {"attention": 1.3},
            "1.3 (up to 128)",
            {*NATIVE, "llama.cpp, a file with the factors", "ONNX, transformers' exporter"},
        ),
        ({"start": 4}, "knows no start tokens: the first 4", set()),
        ({"ends": (64, 96, 128)}, "knows 2 tiers: sequences of 65 to 96", set()),
    ],
)
def test_what_an_engine_can_not_do_is_its_reason(changed: dict[str, Any], needle: str, still_right: set[str]) -> None:
    """Each departure from the subset is named by every engine that it concerns, and by no other."""
    found = verdicts(spec(**changed), "llama")
    readers = NAMES - {"llama.cpp, its own converter", "ONNX, genai builder", "ONNX, optimum"}
    for name in readers - still_right - {"transformers, trust_remote_code"}:
        assert found[name].outcome == "differs"
        assert any(needle in reason for reason in found[name].why), (name, found[name].why)
    for name in {*still_right, "transformers, trust_remote_code"}:
        assert found[name].outcome == "right", found[name]


def test_families_have_their_own_facts() -> None:
    """What is a matter of the family, and what nobody has looked at."""
    by_family = {family: verdicts(spec(family), family) for family in FAMILIES}
    assert verdicts(spec("minicpm"), "minicpm")["llama.cpp, a file with the factors"].outcome == "right"
    baked = {family: found["llama.cpp, a file with the factors"].outcome for family, found in by_family.items()}
    assert {family: baked[family] for family in LATER & set(baked)} == {
        **dict.fromkeys(("granite", "ministral3", "mixtral"), "right"),
        "qwen2_moe": "refuses", "qwen3_moe": "refuses", "phimoe": "refuses",
        **dict.fromkeys(BY_FORMULA, "refuses"),
    }  # fmt: skip
    by_family = {family: found for family, found in by_family.items() if family not in LATER}
    genai = {family: found["ONNX, genai builder"].outcome for family, found in by_family.items()}
    assert genai == {"llama": "differs", "mistral": "refuses", "phi3": "right", "qwen2": "unknown", "qwen3": "unknown"}
    baked = {family: found["llama.cpp, a file with the factors"].outcome for family, found in by_family.items()}
    assert baked == {"llama": "right", "mistral": "right", "phi3": "right", "qwen2": "right", "qwen3": "refuses"}
    yarn = Tier(256, tuple(yarn_factors(16, 10000.0, 4.0, 64).tolist()), 0, 1.2)
    one = RopeSpec("qwen3", 16, 10000.0, 64, 256, (yarn,))
    assert verdicts(one, "qwen3")["llama.cpp, a file with the factors"].outcome == "right"
    for name in NATIVE:  # `lrconvert hf` states no factor there: 4.57 would not load it
        assert verdicts(spec("phi3", attention=1.3), "phi3")[name].outcome == "differs"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_that_is_written_has_every_key(family: str, pico: Callable[..., Model]) -> None:
    """And one without any of them is found out."""
    model = pico(family)
    made = model.resolve(recipe_for(model, even=True))
    config, _ = edited_config(model, made, made, None)
    assert [verdict.outcome for verdict in assess(made, family, config)] == [
        verdict.outcome for verdict in assess(made, family)
    ]
    config = {key: value for key, value in config.items() if key != "original_max_position_embeddings"}
    config["rope_scaling"] = {k: v for k, v in config["rope_scaling"].items() if not k.startswith("original")}
    config.pop("rope_parameters", None)  # which says it again
    found = verdicts(made, family, config)
    refused = {NATIVE[0]} if get_family(family).hf_oldest is not None else set(NATIVE) if family == "phimoe" else set()
    assert {name: found[name].outcome for name in NATIVE} == {
        name: "refuses" if name in refused else "differs" for name in NATIVE
    }
    if family in LATER:
        return
    assert found["vLLM"].outcome == "refuses" and "original_max_position_embeddings" in found["vLLM"].why[0]
    assert found["mlx-lm"].outcome == ("differs" if family == "phi3" else "refuses")
    assert found["TGI"].outcome == "differs"
    config["rope_scaling"].pop("factor", None)  # what 4.57 takes in place of the window
    old = verdicts(made, family, config)["transformers 4.57, native"]
    assert old.outcome == ("differs" if family == "phi3" else "refuses")


def test_the_spelling_of_transformers_5_alone_is_not_enough() -> None:
    """What `save_pretrained` of transformers 5 writes: 4.57 and mlx-lm read no scaling in it."""
    made = spec()
    section = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    found = verdicts(made, "llama", {"rope_parameters": section})
    assert found["transformers 4.57, native"].outcome == "differs"
    assert found["transformers 5, native"].outcome == "right"
    assert found["mlx-lm"].outcome == "refuses"
    assert found["vLLM"].outcome == "right"


def test_the_page_is_the_table() -> None:
    path = Path(__file__).parents[2] / "docs" / "engines.md"
    assert path.read_text(encoding="utf-8") == page(), "python -m lrconvert.engines.page > docs/engines.md"


def test_hf_and_inspect_print_it(cli: Callable[..., Result], pico: Callable[..., Model], tmp_path: Path) -> None:
    """A line an engine; in JSON too; nothing for a model that isn't scaled."""
    model = pico("llama")
    recipe = write_recipe(recipe_for(model, even=True), tmp_path / "recipe")
    baked = cli("hf", model.reference, "--recipe", recipe, "-o", tmp_path / "out")
    assert baked.code == 0, baked.err
    for text in (baked.out, cli("inspect", tmp_path / "out").out):
        rows = [re.split(r"  +", line.strip()) for line in text.splitlines() if line.startswith("  ")]
        verdicts = {row[0]: row[1].split()[0] for row in rows if len(row) > 1}
        assert verdicts["vLLM"] == "right" and verdicts.keys() >= set(NAMES)
    assert "  vLLM 0.32.0: right" in cli("inspect", tmp_path / "out", "--verbose").out
    facts = json.loads(cli("inspect", tmp_path / "out", "--json").out)
    assert {row["engine"]: row["outcome"] for row in facts["engines"]}["mlx-lm"] == "right"
    assert json.loads(cli("inspect", model.reference, "--json").out)["engines"] == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in ("longrope", "auto_map"):
        del config[name]
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert "engines, once baked as longrope:" in cli("inspect", tmp_path / "out").out


def test_an_engine_that_computes_its_factor_follows_the_window() -> None:
    """The formula is that of the window that is baked, not of the recipe's last tier."""
    short = replace(spec(), window=100, tiers=(spec().tiers[0], replace(spec().tiers[1], max_length=100)))
    assert verdicts(short, "llama")["vLLM"].outcome == "differs"


def test_an_engines_report_is_kept_beside_the_artifacts_own() -> None:
    """In either order, and each run replaces its own part alone."""
    own, mlx, vllm = {"summary": "own"}, {"summary": "mlx"}, {"summary": "vllm"}
    first = _recorded(None, own, None)
    assert first == own
    both = _recorded(_recorded(first, mlx, "mlx"), vllm, "vllm")
    assert both == {"summary": "own", "engines": {"mlx": mlx, "vllm": vllm}}
    assert _recorded(both, {"summary": "again"}, None) == {**both, "summary": "again"}
    assert _recorded(None, mlx, "mlx") == {"summary": "mlx", "engines": {"mlx": mlx}}


def test_a_runtime_has_its_own_code(cli: Callable[..., Result], pico: Callable[..., Model], tmp_path: Path) -> None:
    """--code is about transformers; an interpreter without the engine is the environment's fault, and says so."""
    model = pico("llama")
    recipe = write_recipe(recipe_for(model, even=True), tmp_path / "recipe")
    assert cli("hf", model.reference, "--recipe", recipe, "-o", tmp_path / "out").code == 0
    result = cli("verify", tmp_path / "out", "--runtime", "mlx", "--code", "native")
    assert result.code == 2 and "--runtime mlx has only one" in result.err
    for runtime in ("mlx", "vllm"):
        if importlib.util.find_spec(runtime) is None:
            result = cli("verify", tmp_path / "out", "--runtime", runtime)
            assert result.code == 6 and "--python" in result.err
