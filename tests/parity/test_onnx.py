# SPDX-License-Identifier: Apache-2.0
"""Whole ONNX folders in ONNX Runtime: healthy ones pass with room, every mistake is caught."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Result, recipe_for
from gguf import GGMLQuantizationType
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from support.cases import case
from support.gguf_files import converter_gguf
from support.onnx_files import (
    DATA,
    GRAPH,
    attribute,
    call_of,
    changed,
    export,
    float32_angles,
    nodes_named,
    recipe_with,
    set_attribute,
    tensors_of,
    with_weights_of,
    write_adapter,
)
from support.pico import FAMILIES, write_pico
from support.verifying import verify

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.manifest import MANIFEST
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.errors import InputError, UnsupportedError, UsageError
from lrconvert.parity import Options, Report, Row
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.recipe import Recipe, write_recipe
from lrconvert.rope import Tier
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.onnxruntime import WORKER
from lrconvert.targets import onnx as target

ROOM = 10  # a healthy float32 folder is this far inside its tolerance; a mutant is `FAR` outside
FAR = 100
Pico = Callable[..., Model]
Healthy = Callable[..., Path]


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    """One interpreter for all folders here."""
    interpreter = Interpreter(WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


@pytest.fixture(scope="module")
def healthy(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """A folder with three tiers and start tokens; exported once for each set of arguments."""
    made: dict[object, Path] = {}

    def get(family: str = "llama", changes: dict[str, Any] | None = None, **options: Any) -> Path:
        key = (family, repr(changes), tuple(sorted(options.items())))
        if key not in made:
            model = pico(family, **(changes or {}))
            made[key] = export(model, three(model), tmp_path_factory.mktemp("onnx") / "a", **options)
        return made[key]

    return get


def three(model: Model) -> Recipe:
    """64, 128, 256 tokens, n̂ = 12, an attention factor for each."""
    return recipe_for(model, tiers=3, start_tokens=12)


def rows_of(report: Report, code: str = "onnxruntime", verdict: str | None = None) -> dict[str, Row]:
    return {row.case: row for row in report.rows if row.code == code and verdict in (None, row.verdict)}


def worst(report: Report) -> float:
    """Largest KL of what has a bound."""
    return max(row.kl_mean or 0.0 for row in report.rows if row.bound is not None)


def margins(report: Report) -> list[float]:
    return [row.margin for row in report.rows if row.margin is not None]


EXPECTED = {"one past 12 start tokens", "far end", "batch across the boundary", "batch, left-padded"} | {
    name.format(edge)
    for edge in (64, 128)
    for name in ("below {}", "at {}", "one past {}", "decode across {}, read anew", "decode across {}, cached keys")
}

# --- healthy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
@pytest.mark.parametrize("attention", ["gqa", "standard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_folder_passes_with_room(
    pico: Pico, tmp_path: Path, family: str, attention: str, double: bool, options: Options
) -> None:
    """Three tiers, start tokens and an attention factor for each: every case exact in float32, nothing lost, and the
    folder read back is the model, bit for bit."""
    model = pico(family)
    artifact = export(model, three(model), tmp_path / "a", attention=attention, double=double)
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    assert report.losses == [] and report.notes == []
    passed = rows_of(report, verdict="pass")
    batches = {"batch, left-padded", "batch across the boundary"}
    assert (EXPECTED if attention == "standard" else EXPECTED - batches | {"batch"}) <= set(passed)
    assert min(margins(report)) > ROOM and worst(report) <= 1e-9
    alone = "left-padded batch is refused" if attention == "gqa" else "the whole graph by onnx.reference"
    graph = rows_of(report, "graph", "pass")
    assert {"onnx.checker, full check", "tiers are the recipe's", "cos and sin at 256", alone} <= set(graph)
    assert ("cos and sin at 2097152, by onnx.reference" in graph) == double
    stored = json.loads((artifact / MANIFEST).read_text())
    assert stored["parity"]["passed"] is True and stored["target"] == "onnx"
    again, source = tensors_of(open_model(artifact)), tensors_of(model)
    assert again.keys() == source.keys()
    for name, values in source.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"shards": 3}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("mistral", {"tie_word_embeddings": False, "shards": 2}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("phi3", {"partial_rotary_factor": None, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize("dtype", ["f32", "int8"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=[f"{f}-{'-'.join(c)}" for f, c in VARIANTS])
def test_every_layout_of_weights_passes(
    pico: Pico, tmp_path: Path, family: str, changes: dict[str, Any], dtype: str, options: Options
) -> None:
    """Biases, tied and untied heads, several shards, partial rotation, plain and quantised."""
    model = pico(family, **changes)
    for attention in ("gqa", "standard"):
        artifact = export(model, three(model), tmp_path / attention, attention=attention, dtype=dtype)
        report = verify(artifact, options=options)
        assert report.passed, report.summary
        if dtype == "f32":
            assert worst(report) <= 1e-9


# What is stored does not depend on how a layer attends, and every family attends in both ways in
# test_a_healthy_folder_passes_with_room: here one family has every pair, the others each type once.
NARROW = [
    (family, dtype, attention)
    for family in FAMILIES
    for dtype, own in (("f16", "gqa"), ("int8", "standard"), ("int4", "gqa"))
    for attention in (("gqa", "standard") if family == "llama" else (own,))
]


@pytest.mark.parametrize(("family", "dtype", "attention"), NARROW)
def test_narrow_weights_pass_and_say_what_they_cost(
    pico: Pico, tmp_path: Path, family: str, dtype: str, attention: str, options: Options
) -> None:
    """ONNX Runtime is compared on the weights in the folder; beside it stands what the types cost by themselves, with
    the factors and without any. float16 stays within 1e-4."""
    model = pico(family)
    artifact = export(model, three(model), tmp_path / "a", dtype=dtype, attention=attention)
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    if dtype == "f16":
        assert worst(report) <= 1e-4
    known = rows_of(report, verdict="known")
    for end in (64, 128, 256):
        for what in ("", ", without factors"):
            assert (known[f"quantisation alone{what}, at {end}"].kl_mean or 0) > 0
    kinds = {row.case.partition(",")[0] for row in report.rows if row.code == "weights"}
    assert kinds == {"f16": {"F16"}, "int8": {"F32", "INT8"}, "int4": {"F32", "INT4", "INT8"}}[dtype]


def test_every_opset_passes(pico: Pico, tmp_path: Path, options: Options) -> None:
    """The versions that --opset takes are versions that ONNX Runtime runs."""
    model = pico("llama")
    for opset, attention in itertools.product(target.OPSETS, ("gqa", "standard")):
        artifact = export(model, three(model), tmp_path / f"{opset}{attention}", opset=opset, attention=attention)
        report = verify(artifact, options=options)
        assert report.passed, report.summary


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_gguf_is_a_source(pico: Pico, tmp_path: Path, family: str, options: Options) -> None:
    """Weights of a GGUF, q and k in Hugging Face order again, dequantised where they have to be."""
    model = pico(family)
    for name, kind in (("f32", GGMLQuantizationType.F32), ("q8", GGMLQuantizationType.Q8_0)):
        source = open_model(converter_gguf(tmp_path / f"{name}.gguf", model, kind=kind))
        artifact = export(source, three(source), tmp_path / name)
        report = verify(artifact, options=options)
        assert report.passed and worst(report) <= 1e-9, report.summary
        again = tensors_of(open_model(artifact))
        for key, values in tensors_of(source if name == "q8" else model).items():
            np.testing.assert_array_equal(again[key], values.astype(np.float32), err_msg=key)


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_adapter_is_merged(pico: Pico, tmp_path: Path, family: str, dtype: str, options: Options) -> None:
    """The folder holds base + adapter, rounded once; verify merges them by itself, also into a base that is named, and
    the bare base is told apart."""
    model = pico(family)
    module = "model.layers.0.self_attn.q_proj" if family == "llama" else "model.layers.0.self_attn.qkv_proj"
    rows, columns = model.checkpoint.tensors[f"{module}.weight"].shape
    adapter = open_adapter(write_adapter(tmp_path / "lora", {module: (rows, columns)}))
    planned = target.plan(model, three(model), tmp_path / "a", target.Options(dtype=dtype), adapter=adapter)
    bake_plan(planned)
    report = verify(tmp_path / "a", options=options)
    assert report.passed, report.summary
    if dtype == "f32":
        assert worst(report) <= 1e-9
        wanted = merged(model, adapter, rounded=False).checkpoint.read(f"{module}.weight")
        found = open_model(tmp_path / "a").checkpoint.read(f"{module}.weight")
        np.testing.assert_array_equal(found, wanted)
    named = verify(tmp_path / "a", against=model.reference, options=options)
    assert named.passed, named.summary
    assert named.notes == [f"the adapter that the manifest names, {adapter.reference}, is merged into the given model"]
    own = verify(tmp_path / "a", against=str(tmp_path / "a"), options=options)
    assert own.passed and not own.notes  # it has the adapter in its weights
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    manifest["source"]["adapter"] = None
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    bare = verify(tmp_path / "a", against=model.reference, options=options)
    assert "weights" in {row.code for row in bare.failed}


@pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
def test_a_recipe_with_one_tier(pico: Pico, tmp_path: Path, double: bool, options: Options) -> None:
    """No boundary, nothing to read anew: plain decoding is exact."""
    model = pico("llama")
    for attention in ("gqa", "standard"):
        artifact = export(model, recipe_for(model, tiers=1), tmp_path / attention, attention=attention, double=double)
        report = verify(artifact, options=options)
        assert report.passed and worst(report) <= 1e-9, report.summary
        cases = rows_of(report, verdict="pass")
        assert "decode" in cases and not [case for case in cases if "cached" in case]


def test_a_window_stops_at_the_tier_that_holds_it(pico: Pico, tmp_path: Path, options: Options) -> None:
    """--window 100: two tiers, the second cut short, in the graph, in the configs and in what is verified."""
    model = pico("llama")
    for window, lengths in ((100, [64, 100]), (128, [64, 128]), (64, [64])):
        for double in (True, False):
            folder = tmp_path / f"{window}{double}"
            report = verify(export(model, three(model), folder, window=window, double=double), options=options)
            assert report.passed and worst(report) <= 1e-9, report.summary
            graph = onnx.load(str(folder / GRAPH), load_external_data=False)
            assert attribute(graph, "tier_lengths").tolist() == lengths
            config = json.loads((folder / "config.json").read_text())
            genai = json.loads((folder / "genai_config.json").read_text())
            assert config["max_position_embeddings"] == genai["model"]["context_length"] == window


@pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
def test_one_start_token(pico: Pico, tmp_path: Path, double: bool, options: Options) -> None:
    """n̂ = 1 is none, whatever the tiers' attention factors are."""
    model = pico("llama")
    recipe = recipe_with(model, (64, 128, 256), starts=(0, 1, 1))
    report = verify(export(model, recipe, tmp_path / "a", double=double, attention="standard"), options=options)
    assert report.passed and worst(report) <= 1e-9, report.summary


def long_recipe(model: Model) -> Recipe:
    return recipe_with(model, (64, 512, 524288), starts=(0, 4, 4))


@pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
def test_half_a_million_tokens_are_as_exact_as_a_hundred(
    pico: Pico, tmp_path: Path, double: bool, options: Options
) -> None:
    """KL ≤ 1e-9 at the far end too, where float32 angles are off by 1e-2."""
    model = pico("llama")
    report = verify(export(model, long_recipe(model), tmp_path / "a", double=double), options=options)
    assert report.passed and worst(report) <= 1e-9, report.summary
    assert rows_of(report)["far end"].length == 524288


# --- recipes with a mistake ------------------------------------------------------------------------------

MUTANTS = [*RECIPE_MUTANTS, "unpermuted q/k"]
KINDS: dict[str, dict[str, Any]] = {
    "F32 gqa": {"attention": "gqa"},
    "F32 standard": {"attention": "standard"},
    "F32 tables": {"attention": "gqa", "double": False},
    "F16 gqa": {"attention": "gqa", "dtype": "f16"},
    "F16 standard": {"attention": "standard", "dtype": "f16"},
    "INT8": {"dtype": "int8"},
    "INT4": {"dtype": "int4"},
}
CHOSEN = [
    *(("llama", kind, mutant) for kind in KINDS for mutant in MUTANTS),
    *(("phi3", "F32 gqa", mutant) for mutant in MUTANTS),
]
MORE = [
    *((family, "F32 gqa", mutant) for family in FAMILIES if family not in ("llama", "phi3") for mutant in MUTANTS),
    *(("phi3", kind, mutant) for kind in ("F32 standard", "F16 gqa", "INT8", "INT4") for mutant in MUTANTS),
]
MUTATED = [
    *(pytest.param(*each, id="-".join(each)) for each in CHOSEN),
    *(pytest.param(*each, id="-".join(each), marks=pytest.mark.slow) for each in MORE),
]


@pytest.mark.parametrize(("family", "kind", "mutant"), MUTATED)
def test_every_mutant_is_caught(
    pico: Pico, tmp_path: Path, family: str, kind: str, mutant: str, options: Options
) -> None:
    """Each mistake fails by what ONNX Runtime answers, not only by what the graph says of itself."""
    model = pico(family)
    right = three(model)
    if mutant == "unpermuted q/k":
        artifact = export(unpermuted_qk(model), right, tmp_path / "a", **KINDS[kind])
    else:
        wrong = RECIPE_MUTANTS[mutant](right)
        assert wrong is not None and wrong != right
        artifact = export(model, wrong, tmp_path / "a", **KINDS[kind])
    report = verify(artifact, against=model.reference, recipe=right, options=options)
    assert not report.passed
    if mutant == "unpermuted q/k":  # the folder's weights are the reference's: rows in another order show there
        assert [row.code for row in report.failed] == ["weights"]
        return
    assert rows_of(report, "graph", "fail"), "the graph's own tiers tell"
    caught = rows_of(report, verdict="fail")
    assert caught, f"{mutant} passed in {kind}"
    if "INT8" not in kind:  # whose noise leaves it to `hypotheses`
        assert max((row.kl_mean or 0) / (row.bound or 1) for row in caught.values()) > (FAR if "F32" in kind else 1)


# --- graphs with a mistake -------------------------------------------------------------------------------


def _function(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    (node,) = [node for node in model.functions[0].node if node.op_type == op_type]
    return node


def _switch_early(model: onnx.ModelProto) -> None:
    """A tier that is as long as the sequence is taken for too short."""
    (node,) = [n for n in model.functions[0].node if n.op_type == "Less" and "tier_lengths" in n.input]
    node.op_type = "LessOrEqual"


def _switch_late(model: onnx.ModelProto) -> None:
    """The largest position is taken for the length."""
    last = _function(model, "ReduceMax").output[0]
    plus = next(node for node in model.functions[0].node if node.op_type == "Add" and last in node.input)
    (longest,) = [node for node in model.functions[0].node if node.op_type == "Max"]
    longest.input[list(longest.input).index(plus.output[0])] = last


def _one_tier_for_all_rows(model: onnx.ModelProto) -> None:
    """The longest row chooses for the whole batch."""
    del _function(model, "ReduceMax").input[1:]


def _frozen(index: int) -> Callable[[onnx.ModelProto], None]:
    """What tracing leaves: one tier, whatever the length."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = [node for node in model.functions[0].node if "tier" in node.output]
        value = numpy_helper.from_array(np.array(index, np.int64).reshape(1, 1), "value")
        made = onnx.helper.make_node("Constant", [], ["tier"], value=value)
        node.CopyFrom(made)

    return change


def _rolled(name: str) -> Callable[[onnx.ModelProto], None]:
    """A table whose tiers have moved by one."""
    return lambda model: set_attribute(model, name, np.roll(attribute(model, name), 1, axis=0))


def _rolled_blocks(model: onnx.ModelProto) -> None:
    """Tables of the other tier; what the graph says of its tiers is still the recipe's."""
    set_attribute(model, "scaled_block", np.roll(attribute(model, "scaled_block"), 1))


def _scaled_start(model: onnx.ModelProto) -> None:
    set_attribute(model, "start_block", attribute(model, "scaled_block"))


def _no_attention_factor(model: onnx.ModelProto) -> None:
    """The function forgets it; the attribute is there."""
    for node in model.functions[0].node:
        if node.op_type == "Gather" and node.input[0] == "attention_factors":
            node.input[0] = "ones"
            ones = numpy_helper.from_array(np.ones(3), "value")
            model.functions[0].node.insert(0, onnx.helper.make_node("Constant", [], ["ones"], value=ones))
            return


def _seqlens(by: int) -> Callable[[onnx.ModelProto], None]:
    """GroupQueryAttention is told another number of keys than there are."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = nodes_named(model, "last_seen")
        model.graph.initializer.append(numpy_helper.from_array(np.array([1 - by], np.int64), "wrong"))
        node.input[1] = "wrong"

    return change


def _interleaved(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "RotaryEmbedding":
            node.attribute.append(onnx.helper.make_attribute("interleaved", 1))


def _last_layer_unrotated(model: onnx.ModelProto) -> None:
    (attention,) = nodes_named(model, "layers.1.attention")
    attention.input[0], attention.input[1] = "layers.1.q.wide", "layers.1.k.wide"


def _no_causal_mask(model: onnx.ModelProto) -> None:
    (before,) = nodes_named(model, "mask.before")
    before.op_type = "GreaterOrEqual"


def _heads_swapped(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "RotaryEmbedding" and ".k." in node.name:
            (heads,) = [a for a in node.attribute if a.name == "num_heads"]
            heads.i *= 2


GQA, STANDARD, TABLES = {"attention": "gqa"}, {"attention": "standard"}, {"attention": "gqa", "double": False}
Change = Callable[[onnx.ModelProto], None]
# Name: how the healthy folder is exported, what is changed, and whether the graph's attributes tell too.
GRAPH_MUTANTS: dict[str, tuple[dict[str, Any], Change]] = {
    "switch one early": (GQA, _switch_early),
    "switch one late": (GQA, _switch_late),
    "switch one early, tables": (TABLES, _switch_early),
    "switch one late, tables": (TABLES, _switch_late),
    "one tier for all rows": (STANDARD, _one_tier_for_all_rows),
    "frozen at the first tier": (GQA, _frozen(0)),
    "frozen at the last tier": (STANDARD, _frozen(2)),
    "frequencies of the other tier": (GQA, _rolled("scaled_inverse_frequencies")),
    "frequencies of the other tier, standard": (STANDARD, _rolled("scaled_inverse_frequencies")),
    "blocks of the other tier": (TABLES, _rolled_blocks),
    "factors in start tokens": (TABLES, _scaled_start),
    "attention factor forgotten": (GQA, _no_attention_factor),
    "a key too few": (GQA, _seqlens(-1)),
    "a key too many": (GQA, _seqlens(1)),
    "interleaved pairs": (GQA, _interleaved),
    "a layer that does not rotate": (STANDARD, _last_layer_unrotated),
    "a mask that shows the future": (STANDARD, _no_causal_mask),
    "heads of half the size": (GQA, _heads_swapped),
}
REFUSED = {"a key too many", "heads of half the size"}  # by ONNX Runtime itself


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_does_not_run_is_a_failure_of_the_folder(
    pico: Pico, healthy: Healthy, tmp_path: Path, kind: str, options: Options
) -> None:
    """What ONNX Runtime loads and refuses to run: a report with rows that fail, in every dtype, not an error."""
    model = pico("llama")

    def narrow(made: onnx.ModelProto) -> None:
        for table in ("inverse_frequencies", "scaled_inverse_frequencies"):
            if KINDS[kind].get("double", True):
                set_attribute(made, table, attribute(made, table)[..., :5])
        for node in made.graph.node:
            if node.op_type == "RotaryEmbedding":
                node.attribute.append(onnx.helper.make_attribute("rotary_embedding_dim", 14))

    broken = changed(healthy("llama", **KINDS[kind]), tmp_path / "broken", narrow)
    report = verify(broken, against=model.reference, recipe=three(model), options=options)
    assert len(rows_of(report, verdict="fail")) > 8


@pytest.mark.parametrize("mutant", GRAPH_MUTANTS)
def test_every_broken_graph_is_caught_in_onnx_runtime(
    pico: Pico, healthy: Healthy, tmp_path: Path, mutant: str, options: Options
) -> None:
    """Graphs whose weights are right and whose attributes may be: ONNX Runtime's answers tell by far, or it refuses."""
    model = pico("llama")
    export_options, change = GRAPH_MUTANTS[mutant]
    broken = changed(healthy("llama", **export_options), tmp_path / "broken", change)
    report = verify(broken, against=model.reference, recipe=three(model), options=options)
    caught = rows_of(report, verdict="fail")
    assert caught, f"{mutant} passed"
    refused = any(row.kl_mean is None for row in caught.values())
    assert refused == (mutant in REFUSED)
    assert refused or max((row.kl_mean or 0) / (row.bound or 1) for row in caught.values()) > FAR


@pytest.mark.parametrize(("dtype", "layers"), [("f16", 2), ("int8", 2), ("int4", 2), ("int4", 4)])
@pytest.mark.parametrize(
    "mutant", ["switch one early", "switch one late", "frequencies of the other tier", "attention factor forgotten",
               "frozen at the last tier", "a key too few"]
)  # fmt: skip
def test_a_broken_graph_does_not_hide_behind_narrow_weights(
    pico: Pico, healthy: Healthy, tmp_path: Path, mutant: str, dtype: str, layers: int, options: Options
) -> None:
    """The same mistakes beside the noise of float16 and of quantised products, also where bounds follow that noise."""
    model = pico("llama", num_hidden_layers=layers)
    export_options, change = GRAPH_MUTANTS[mutant]
    folder = healthy("llama", {"num_hidden_layers": layers}, dtype=dtype, **export_options)
    broken = changed(folder, tmp_path / "broken", change)
    report = verify(broken, against=model.reference, recipe=three(model), options=options)
    assert rows_of(report, verdict="fail"), f"{mutant} passed in {dtype}"


def test_float32_angles_are_caught_far_out(pico: Pico, tmp_path: Path, options: Options) -> None:
    """By the function alone at 4k, 256k and 2M in both evaluators; by the logits at half a million tokens, though not
    at 64, where they are as good."""
    model = pico("llama")
    whole = export(model, long_recipe(model), tmp_path / "whole")
    broken = changed(whole, tmp_path / "broken", float32_angles)
    report = verify(broken, against=model.reference, recipe=long_recipe(model), options=options)
    caught = rows_of(report, "graph", "fail")
    for length in (4096, 262144, 524288, 2097152):
        assert {f"cos and sin at {length}", f"cos and sin at {length}, by onnx.reference"} <= set(caught)
    assert {"below 64", "at 64"} <= set(rows_of(report, verdict="pass"))
    assert (rows_of(report)["far end"].kl_mean or 0) > FAR * 1e-9


# --- data with a mistake ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["gqa", "standard"])
def test_an_embedding_without_whole_blocks_stays_float16(tmp_path: Path, attention: str, options: Options) -> None:
    """Rows of 80 values: a tied head is a copy of its own then, in 8 bits."""
    model = open_model(write_pico(tmp_path / "m", "llama", hidden_size=80, tie_word_embeddings=True))
    artifact = export(model, three(model), tmp_path / "a", dtype="int4", attention=attention)
    report = verify(artifact, options=options)
    assert report.passed, report.summary
    kinds = {row.case.partition(",")[0] for row in report.rows if row.code == "weights"}
    assert kinds == {"F16", "F32", "INT4", "INT8"}
    broken = changed(artifact, tmp_path / "broken", _shifted("lm_head.weight.packed", 128))
    report = verify(broken, against=model.reference, recipe=three(model), options=options)
    assert "weights" in {row.code for row in report.failed}


def _shifted(name: str, by: int) -> Change:
    """One tensor that begins some bytes later than it does."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        (offset,) = [entry for entry in tensor.external_data if entry.key == "offset"]
        offset.value = str(int(offset.value) + by)

    return change


SHIFTED = [
    ("llama", "f32", "model.layers.0.self_attn.q_proj.weight", 4),
    ("llama", "f32", "model.layers.1.input_layernorm.weight", 4),
    ("llama", "f16", "model.layers.1.mlp.up_proj.weight", 2),
    ("llama", "int8", "model.layers.1.mlp.up_proj.weight.packed", 1),
    ("llama", "int4", "model.layers.0.self_attn.k_proj.weight.scales", 4),
    ("llama", "int8", "lm_head.weight.packed", 101),
    ("mistral", "int8", "model.embed_tokens.weight.packed", 128),
    ("mistral", "int8", "model.embed_tokens.weight.scales", 8),
]  # fmt: skip


@pytest.mark.parametrize(("family", "dtype", "name", "by"), SHIFTED)
def test_a_shifted_offset_is_caught(
    pico: Pico, healthy: Healthy, tmp_path: Path, family: str, dtype: str, name: str, by: int, options: Options
) -> None:
    """Other bytes than the tensor's are other weights than the model's, also of an embedding that is quantised."""
    broken = changed(healthy(family, dtype=dtype), tmp_path / "broken", _shifted(name, by))
    model = pico(family)
    report = verify(broken, against=model.reference, recipe=three(model), options=options)
    assert "weights" in {row.code for row in report.failed}


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
def test_weights_that_are_no_numbers_are_caught(
    pico: Pico, healthy: Healthy, tmp_path: Path, dtype: str, options: Options
) -> None:
    """NaN in the folder, or NaN in the source that became a number in it: a difference, though no norm says so."""
    model = pico("llama")
    broken = changed(healthy("llama", dtype=dtype), tmp_path / "broken", None)
    place = OnnxCheckpoint(broken)._external["model.layers.1.post_attention_layernorm.weight"]
    data = bytearray((broken / DATA).read_bytes())
    data[place.offset : place.offset + 4] = b"\xff" * 4
    (broken / DATA).write_bytes(data)
    report = verify(broken, against=model.reference, recipe=three(model), options=options)
    assert "weights" in {row.code for row in report.failed}
    source = tmp_path / "source"
    shutil.copytree(Path(model.reference), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, source / "model.safetensors")
    folder = healthy("llama", dtype=dtype)
    report = verify(folder, against=str(source), recipe=three(model), options=options)
    assert "weights" in {row.code for row in report.failed}


def test_weights_of_another_model_are_caught(pico: Pico, healthy: Healthy, tmp_path: Path, options: Options) -> None:
    """A data file that fits, from somewhere else: by the checksum, and by the weights where there is none."""
    model = pico("llama")
    other = export(pico("llama", seed=8), three(model), tmp_path / "other")
    swapped = with_weights_of(healthy("llama"), other, tmp_path / "swapped")
    report = verify(swapped, against=model.reference, recipe=three(model), options=options)
    assert "weights" in {row.code for row in report.failed}
    shutil.copy(healthy("llama") / MANIFEST, swapped)
    report = verify(swapped, options=options)
    assert {"files", "weights"} <= {row.code for row in report.failed}


@pytest.mark.parametrize("left", [0, 4096, -1])
def test_a_truncated_data_file_is_bad_input(healthy: Healthy, tmp_path: Path, left: int, options: Options) -> None:
    """Said before anything is computed, with the tensors that are cut."""
    broken = tmp_path / "broken"
    shutil.copytree(healthy("llama"), broken)
    data = (broken / DATA).read_bytes()
    # The last tensor's padding is nobody's: a byte less is noticed by the checksum alone.
    (broken / DATA).write_bytes(data[: len(data) - 4096] if left < 0 else data[:left])
    with pytest.raises(InputError, match=r"does not fit into model\.onnx_data"):
        verify(broken, options=options)
    (broken / DATA).write_bytes(data[:-1])
    report = verify(broken, options=options)
    assert [row.case for row in report.failed] == ["onnx/model.onnx_data"]


def test_another_byte_fails_the_checksum(healthy: Healthy, tmp_path: Path, options: Options) -> None:
    """In the data, and in a config that no bound would see."""
    broken = tmp_path / "broken"
    shutil.copytree(healthy("llama"), broken)
    data = bytearray((broken / DATA).read_bytes())
    data[0] ^= 1
    (broken / DATA).write_bytes(data)
    (broken / "genai_config.json").write_text("{}")
    report = verify(broken, options=options)
    assert {"genai_config.json", "onnx/model.onnx_data"} <= {row.case for row in report.failed if row.code == "files"}


# --- what a graph says of itself -------------------------------------------------------------------------


def _other_count(model: onnx.ModelProto) -> None:
    """Frequencies of another width than the recipe's."""
    for name in ("inverse_frequencies", "scaled_inverse_frequencies"):
        set_attribute(model, name, attribute(model, name)[..., :4])


def _no_tiers(model: onnx.ModelProto) -> None:
    call = call_of(model)
    kept = [a for a in call.attribute if a.name != "start_tokens"]
    del call.attribute[:]
    call.attribute.extend(kept)


def _endless(model: onnx.ModelProto) -> None:
    set_attribute(model, "tier_lengths", np.array([64, 128, np.inf]))


def _two_dimensions(model: onnx.ModelProto) -> None:
    set_attribute(model, "attention_factors", np.ones((3, 3)))


@pytest.mark.parametrize("attention", ["gqa", "standard"])
def test_frequencies_of_another_width_fail_in_every_tier(
    pico: Pico, healthy: Healthy, tmp_path: Path, attention: str, options: Options
) -> None:
    """The graph can be read: each of its tiers has other factors than the recipe's."""
    model = pico("llama")
    broken = changed(healthy("llama", attention=attention), tmp_path / "broken", _other_count)
    report = verify(broken, against=model.reference, recipe=three(model), options=options)
    failed = [row.reason for row in report.failed if row.code == "graph"]
    for end in (64, 128, 256):
        assert f"tier up to {end}: other factors than the recipe's" in failed


@pytest.mark.parametrize("attention", ["gqa", "standard"])
def test_tiers_that_can_not_be_read_are_bad_input(
    pico: Pico, healthy: Healthy, tmp_path: Path, attention: str, options: Options
) -> None:
    """An attribute that is missing, holds no number, or has a dimension too many: exit code 3, never a bug of ours."""
    model = pico("llama")
    for number, (change, said) in enumerate(
        (
            (_no_tiers, "'start_tokens'"),
            (_endless, "tier_lengths holds something other than numbers"),
            (_two_dimensions, "0-dimensional"),
        )
    ):
        broken = changed(healthy("llama", attention=attention), tmp_path / f"broken{number}", change)
        with case(said), pytest.raises(InputError, match=rf"LongRopeCosSin has no readable tiers \(.*{said}"):
            verify(broken, against=model.reference, recipe=three(model), options=options)


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", None), ("num_attention_heads", "four"), ("vocab_size", 7)]
)
def test_an_odd_config_fails_by_its_checksum_and_by_what_it_says(
    healthy: Healthy, tmp_path: Path, key: str, value: Any, options: Options
) -> None:
    """config.json of a folder is other programs' to read: verify compares it, and takes its word for nothing else."""
    broken = tmp_path / "broken"
    shutil.copytree(healthy("llama"), broken)
    config = json.loads((broken / "config.json").read_text())
    config[key] = value
    if value is None:
        del config[key]
    (broken / "config.json").write_text(json.dumps(config))
    report = verify(broken, options=options)
    failed = [(row.code, row.case) for row in report.failed]
    assert failed == [("files", "config.json"), ("config", f"config.json: {key}")]


# --- the reference's other side ----------------------------------------------------------------------------------


def test_a_graph_of_another_shape_is_reported(pico: Pico, healthy: Healthy, options: Options) -> None:
    """Against a model with other tensors: metadata, not a crash."""
    other = pico("llama", intermediate_size=64)
    report = verify(healthy("llama"), against=other.reference, recipe=three(other), options=options)
    assert [row.code for row in report.failed if row.code == "metadata"]


def test_tiers_that_the_recipe_does_not_have_are_named(pico: Pico, healthy: Healthy, options: Options) -> None:
    """Each of a tier's numbers has a sentence of its own."""
    model = pico("llama")
    recipe = three(model)
    first, second, third = recipe.tiers
    for wrong, words in (
        (replace(recipe, tiers=(first, third)), "the graph has 3 tiers; the recipe has 2"),
        (replace(recipe, tiers=(first, replace(second, max_length=100), third)), "the graph's ends at 128"),
        (replace(recipe, tiers=(first, second, replace(third, start_tokens=3))), "12 start tokens; the recipe has 3"),
        (replace(recipe, tiers=(first, second, replace(third, attention_factor=2.0))), "attention factor"),
        (replace(recipe, tiers=(first, second, replace(third, factors=second.factors))), "other factors"),
    ):
        report = verify(healthy("llama"), against=model.reference, recipe=wrong, options=options)
        assert any(words in row.reason for row in report.failed if row.code == "graph"), words


def test_a_folder_outlives_its_source(pico_folder: Callable[..., Path], tmp_path: Path, options: Options) -> None:
    """Where the source is gone, the reference has the folder's own weights, quantised ones too; the report says so."""
    for dtype in ("f32", "f16", "int8"):
        source = tmp_path / f"source-{dtype}"
        shutil.copytree(pico_folder("mistral"), source)
        model = open_model(source)
        artifact = export(model, three(model), tmp_path / dtype, dtype=dtype)
        shutil.rmtree(source)
        report = verify(artifact, options=options)
        assert report.passed, (dtype, report.summary)
        assert any("own weights" in note for note in report.notes)


def test_bfloat16_is_refused_on_a_cpu_by_name(pico: Pico, tmp_path: Path, options: Options, cli: Any) -> None:
    """Exported with a warning; verify says which products are missing and where they are; exit code 4."""
    model = pico("llama")
    planned = target.plan(model, three(model), tmp_path / "a", target.Options(dtype="bf16"))
    assert any("no bfloat16 products on a CPU" in note for note in planned.notes)
    bake_plan(planned)
    with pytest.raises(UnsupportedError, match="no bfloat16 products on a CPU"):
        verify(tmp_path / "a", options=options)
    result = cli("verify", tmp_path / "a")
    assert result.code == 4 and "--device cuda" in result.err
    values = open_model(tmp_path / "a").checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    assert values.dtype.name == "bfloat16"


def test_fused_attention_in_float32_is_refused_on_a_gpu_by_name(pico: Pico, tmp_path: Path, healthy: Healthy) -> None:
    """It would run on the CPU without a word."""
    for dtype in ("f32", "int8"):
        with pytest.raises(UnsupportedError, match=r"no float32 kernel on CUDA.*--attention standard"):
            verify(healthy("llama", dtype=dtype), options=Options(device="cuda"))


def test_the_command_exits_5_and_writes_junit(
    pico: Pico, healthy: Healthy, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """0 with the true recipe, 5 with another; other runtimes and codes are refused."""
    artifact = tmp_path / "a"
    shutil.copytree(healthy("llama"), artifact)
    good = cli("verify", artifact, "--threads", 1, "--json", "--junit", tmp_path / "good.xml")
    assert good.code == 0 and json.loads(good.out)["passed"] is True
    assert 'failures="0"' in (tmp_path / "good.xml").read_text()
    wrong = RECIPE_MUTANTS["swapped sets"](three(pico("llama")))
    assert wrong is not None
    bad = cli("verify", artifact, "--threads", 1, "--recipe", write_recipe(wrong, tmp_path / "r"))
    assert bad.code == 5 and "FAILED" in bad.out
    assert cli("verify", artifact, "--runtime", "vllm").code == 2
    assert cli("verify", artifact, "--code", "native").code == 2
    with pytest.raises(UsageError, match="does not run"):
        verify(artifact, options=Options(runtime="llama.cpp"))


def test_a_cache_that_is_kept_is_shown_for_what_it_costs(healthy: Healthy, options: Options) -> None:
    """Both policies are rows, each compared with its own reference, and the difference between them is large."""
    for attention in ("gqa", "standard"):
        report = verify(healthy("qwen2", attention=attention), options=options)
        for edge in (64, 128):
            known = rows_of(report, verdict="known")[f"decode across {edge}, cached keys, against exact"]
            assert (known.kl_mean or 0) > 1e-3


def test_no_other_graph_is_verified(healthy: Healthy, tmp_path: Path, options: Options) -> None:
    """A graph of another exporter has no function of ours."""
    broken = tmp_path / "broken"
    shutil.copytree(healthy("llama"), broken)
    model = onnx.load(str(broken / GRAPH), load_external_data=False)
    model.graph.node.remove(call_of(model))
    (broken / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="not written by lrconvert"):
        verify(broken, options=options)


def test_tier_is_what_the_graph_holds(healthy: Healthy, pico: Pico) -> None:
    """The tiers read back from the graph are the recipe's, to the last bits of a division."""
    for found, wanted in zip(OnnxCheckpoint(healthy("phi3")).tiers, three(pico("phi3")).tiers, strict=True):
        assert isinstance(found, Tier)
        assert replace(found, factors=()) == replace(wanted, factors=())
        np.testing.assert_allclose(found.factors, wanted.factors, rtol=1e-14)
