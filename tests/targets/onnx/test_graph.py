# SPDX-License-Identifier: Apache-2.0
"""The exported graph: well formed, inferable, laid out as other programs expect it, and nothing in it but what is
needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import recipe_for
from onnx import TensorProto
from support.onnx_files import DATA, GRAPH, export, graph_of, recipe_with, tensors_of
from support.pico import FAMILIES, write_pico
from support.verifying import verify

from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import UsageError
from lrconvert.parity import Options
from lrconvert.recipe import Recipe
from lrconvert.targets import onnx as target
from lrconvert.targets.onnx import tensors as layout

Pico = Callable[..., Model]
ATTENTIONS = ("gqa", "standard")


def three(model: Model) -> Recipe:
    return recipe_for(model, tiers=3, start_tokens=12)


@pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_checker_and_strict_inference_pass(
    pico: Pico, tmp_path: Path, attention: str, dtype: str, double: bool
) -> None:
    """Full check on the file, strict shape inference with data; what the graph promises of its outputs is what follows
    from its operators, where onnx knows them."""
    for family in ("llama", "phi3", "qwen3"):
        model = pico(family)
        folder = tmp_path / family
        export(model, three(model), folder, attention=attention, dtype=dtype, double=double)
        onnx.checker.check_model(str(folder / GRAPH), full_check=True)
        made = onnx.shape_inference.infer_shapes(graph_of(folder), check_type=True, strict_mode=True, data_prop=True)
        kinds = {each.name: each.type.tensor_type for each in (*made.graph.value_info, *made.graph.output)}
        assert kinds["logits"].elem_type == TensorProto.FLOAT
        computing = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}.get(dtype, TensorProto.FLOAT)
        # Nothing is said of the results of Microsoft's operators, but of those that attention makes.
        reached = {"gqa": ["layers.1.mixed"], "standard": ["layers.1.after_ffn"]}[attention]
        if dtype in ("int8", "int4") and attention == "standard":
            reached = []
        for name in ("cos", "sin", "present.1.key", *reached):
            assert kinds[name].elem_type == computing, name
        assert kinds["cos"].shape.dim[2].dim_value == model.shape.rotary_dim // 2


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_that_programs_look_for(
    pico: Pico, tmp_path: Path, family: str, attention: str
) -> None:
    """Inputs, outputs, files and the keys of genai_config.json that say their names."""
    model = pico(family)
    folder = export(model, three(model), tmp_path / "a", attention=attention)
    graph = graph_of(folder).graph
    found = {
        each.name: [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]
        for each in (*graph.input, *graph.output)
    }
    shape = model.shape
    caches = {
        f"{prefix}.{layer}.{part}": ["batch_size", shape.kv_heads, length, shape.head_dim]
        for prefix, length in (("past_key_values", "past"), ("present", "total"))
        for layer in range(shape.layers)
        for part in ("key", "value")
    }
    assert found == {
        "input_ids": ["batch_size", "length"],
        "attention_mask": ["batch_size", "total"],
        "position_ids": ["batch_size", "length"],
        "logits": ["batch_size", "kept", shape.vocab],
        **caches,
    }
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {GRAPH, DATA, "config.json", "generation_config.json", "genai_config.json", "README.md",
                     "lrconvert.json"}  # fmt: skip
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["filename"] == GRAPH
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert decoder["inputs"][key] in found
    for name in ("past_key_names", "past_value_names"):
        assert decoder["inputs"][name] % 1 in found
    for name in ("present_key_names", "present_value_names"):
        assert decoder["outputs"][name] % 1 in found
    own = json.loads((folder / "config.json").read_text())
    assert own["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": 1}
    assert "auto_map" not in own and own["model_type"] == family


@pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_only_gqa_and_quantised_products_are_not_standard(
    pico: Pico, tmp_path: Path, attention: str, double: bool
) -> None:
    """The rotation is called once, whatever the number of layers, and no node of float64 is outside the function."""
    model = pico("llama")
    graph = graph_of(export(model, three(model), tmp_path / "a", attention=attention, double=double))
    foreign = {node.op_type for node in graph.graph.node if node.domain == "com.microsoft"}
    assert foreign == ({"GroupQueryAttention"} if attention == "gqa" else set())
    assert [node.op_type for node in graph.graph.node if node.domain == "lrconvert"] == ["LongRopeCosSin"]
    names = {opset.domain for opset in graph.opset_import}
    assert names == ({"", "lrconvert", "com.microsoft"} if attention == "gqa" else {"", "lrconvert"})
    assert TensorProto.DOUBLE not in {tensor.data_type for tensor in graph.graph.initializer}
    assert len({node.name for node in graph.graph.node}) == len(graph.graph.node)
    made = [name for node in graph.graph.node for name in node.output]
    used = {name for node in graph.graph.node for name in node.input}
    assert not set(made) - used - {output.name for output in graph.graph.output}, "results that nobody reads"
    assert not {tensor.name for tensor in graph.graph.initializer} - used, "weights that nobody reads"


def test_weights_keep_their_names_their_order_and_their_layout(pico: Pico, tmp_path: Path) -> None:
    """An initializer is the checkpoint's tensor, [out, in], a tied head the embedding itself; every tensor begins on a
    page of 4096 bytes, and padding is zeros."""
    for family in ("llama", "mistral"):
        model = pico(family)
        folder = export(model, three(model), tmp_path / family)
        data = (folder / DATA).read_bytes()
        used = bytearray(len(data))
        wanted = tensors_of(model)
        for tensor in graph_of(folder).graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(entries["offset"]), int(entries["length"])
            assert entries["location"] == "model.onnx_data" and offset % 4096 == 0
            values = wanted.pop(tensor.name)
            assert data[offset : offset + length] == values.tobytes() and tuple(tensor.dims) == values.shape
            used[offset : offset + length] = b"\1" * length
        assert not wanted and len(data) % 4096 == 0
        assert not any(byte for byte, taken in zip(data, used, strict=True) if not taken)


def test_large_weights_go_into_several_files(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model.onnx_data, model.onnx_data_1 …, as transformers.js fetches them, none above the limit; config.json says how
    many, ONNX Runtime runs them, and the folder reads back."""
    monkeypatch.setattr(layout, "MAX_FILE_BYTES", 60_000)
    for family, dtype in (("llama", "f32"), ("mistral", "int8")):
        model = pico(family)
        folder = export(model, three(model), tmp_path / family, dtype=dtype)
        files = sorted(path.name for path in (folder / "onnx").iterdir())
        count = len(files) - 1
        assert count > 2 and files == [
            "model.onnx",
            "model.onnx_data",
            *(f"model.onnx_data_{n}" for n in range(1, count)),
        ]
        assert all((folder / "onnx" / name).stat().st_size <= 60_000 for name in files[1:])
        config = json.loads((folder / "config.json").read_text())
        assert config["transformers.js_config"]["use_external_data_format"] == count
        report = verify(folder, options=Options(threads=1))
        assert report.passed, report.summary
        again = tensors_of(open_model(folder))
        if dtype == "f32":
            for name, values in tensors_of(model).items():
                np.testing.assert_array_equal(again[name], values)


def test_one_tensor_above_the_limit_has_a_file_of_its_own(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_FILE_BYTES", 5000)
    stored = layout.lay_out(pico("llama"), "F32", None)
    large = [tensor for tensor in stored if tensor.nbytes > 5000]
    for tensor in large:
        assert [other for other in stored if other.file == tensor.file] == [tensor]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_caches_have_the_dtype_of_activations(pico: Pico, tmp_path: Path, dtype: str) -> None:
    """And transformers.js is told of float16 ones."""
    model = pico("llama")
    folder = export(model, three(model), tmp_path / "a", dtype=dtype)
    kinds = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
    graph = graph_of(folder).graph
    for each in (*graph.input, *graph.output):
        if "key" in each.name:
            assert each.type.tensor_type.elem_type == kinds[dtype]
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"].get("kv_cache_dtype") == ("float16" if dtype == "f16" else None)


def genai(model: Model, recipe: Recipe, output: Path, **options: Any) -> dict[str, Any]:
    planned = target.plan(model, recipe, output, target.Options(**options))
    return json.loads(planned.texts["genai_config.json"])


def test_genai_reads_anew_where_it_can(tmp_path: Path) -> None:
    """--genai-rewind: the type whose boundary is the recipe's, 4096 or 8192; refused for any other, with its boundaries
    in the message; without the option it is a llama."""
    for window, kind in ((4096, "phi3"), (8192, "phi3small")):
        model = open_model(write_pico(tmp_path / kind, max_position_embeddings=window))
        two = recipe_with(model, (window, 4 * window))
        assert genai(model, two, tmp_path / "o", genai_rewind=True)["model"]["type"] == kind
        assert genai(model, two, tmp_path / "o")["model"]["type"] == "llama"
        planned = target.plan(model, two, tmp_path / "o", target.Options(genai_rewind=True))
        assert any(f"the {window + 1}th" in note for note in planned.notes)
        for lengths in ((window,), (window, 2 * window, 4 * window)):
            with pytest.raises(UsageError, match=r"4096 or 8192 tokens only; the recipe's boundaries: (none|.*, )"):
                genai(model, recipe_with(model, lengths), tmp_path / "o", genai_rewind=True)
    model = open_model(write_pico(tmp_path / "m"))
    with pytest.raises(UsageError, match="boundaries: 64"):
        genai(model, recipe_for(model), tmp_path / "o", genai_rewind=True)


def test_genai_shares_a_buffer_where_that_is_right_and_small(pico: Pico, tmp_path: Path) -> None:
    """The standard operator fails with a shared buffer; caches of a window that is too long had better grow."""
    model = pico("llama")
    assert genai(model, three(model), tmp_path / "o")["search"]["past_present_share_buffer"] is True
    assert not genai(model, three(model), tmp_path / "o", attention="standard")["search"]["past_present_share_buffer"]
    long = recipe_with(model, (64, 2**23))
    assert not genai(model, long, tmp_path / "o")["search"]["past_present_share_buffer"]
    assert genai(model, long, tmp_path / "o")["search"]["max_length"] == 2**23


@pytest.mark.parametrize("ids", [{}, {"eos_token_id": [2, 7]}, {"bos_token_id": None, "pad_token_id": None}])
def test_genai_knows_the_tokens_that_end_a_text(tmp_path: Path, ids: dict[str, Any]) -> None:
    """As generation_config.json has them, several too; a token that is missing is one that ends."""
    folder = write_pico(tmp_path / "m")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, **ids}))
    model = open_model(folder)
    found = genai(model, recipe_for(model), tmp_path / "o")["model"]
    assert found["eos_token_id"] == ids.get("eos_token_id", 2)
    assert isinstance(found["bos_token_id"], int) and isinstance(found["pad_token_id"], int)


def test_the_graph_grows_with_the_layers_only(tmp_path: Path) -> None:
    """No table of the window's length in it: two million tokens cost not one byte more than a thousand."""
    model = open_model(write_pico(tmp_path / "m"))
    sizes = {}
    for window in (1024, 2**21):
        planned = target.plan(model, recipe_with(model, (64, window)), tmp_path / "o", target.Options())
        sizes[window] = len(planned.texts[GRAPH])
    assert abs(sizes[1024] - sizes[2**21]) < 64
    assert max(sizes.values()) < 50_000
    tables = target.plan(model, recipe_with(model, (64, 2**21)), tmp_path / "o", target.Options(double=False))
    assert len(tables.texts[GRAPH]) < 50_000 + 2 * 2 * (2**11 + 2**10 + 1) * 8 * 4
