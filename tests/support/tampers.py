# SPDX-License-Identifier: Apache-2.0
"""What careless exporters and people with an editor do to the files of an artifact: mutants of a second kind.

Those of the first kind (`parity.mutants`) are wrong recipes and weights, which show in what code computes. These
compute the same, or look as if they did. Each is a row: a name, the formats where it exists, an edit. `alone`: caught
without the source too, by what the recipe and the artifact itself say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from safetensors.numpy import load_file, save_file
from support import gguf_files
from support.gguf_files import Tensors, f32

from lrconvert.artifact.manifest import manifest_path
from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.targets.gguf.layout import Scalar

Json = dict[str, Any]
Edit = Callable[[Path], None]
HF, GGUF, ONNX = "hf", "gguf", "onnx"
FOLDERS = (HF, ONNX)
SAVED = "model.safetensors"


@dataclass(frozen=True)
class Tamper:
    name: str
    formats: Sequence[str]
    edit: Edit
    alone: bool = False


def rewrite_digests(artifact: Path) -> None:
    """What somebody does who knows that there is a manifest: its digests are those of the files as they are now, and
    what is gone is not in it."""
    path = manifest_path(artifact)
    manifest = json.loads(path.read_text())
    for name in list(manifest["files"]):
        if (file := path.parent / name).is_file():
            data = file.read_bytes()
            manifest["files"][name] |= {"size": len(data), "sha256": sha256(data).hexdigest()}
        else:
            del manifest["files"][name]
    path.write_text(json.dumps(manifest))


# --- folders ---------------------------------------------------------------------------------------------


def in_json(file: str, change: Callable[[Json], object]) -> Edit:
    def edit(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return edit


def put(file: str, **values: Any) -> Edit:
    return in_json(file, lambda value: value.update(values))


def drop(file: str, *keys: str) -> Edit:
    return in_json(file, lambda value: [value.pop(key, None) for key in keys])


def inside(value: Json, dotted: str) -> tuple[Json, str]:
    *outer, last = dotted.split(".")
    for key in outer:
        value = value[key]
    return value, last


def set_inside(file: str, dotted: str, wanted: Any) -> Edit:
    def change(value: Json) -> None:
        where, key = inside(value, dotted)
        where[key] = wanted

    return in_json(file, change)


def swap_ids(value: Json) -> None:
    vocabulary = value["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def swap_added(value: Json) -> None:
    first, second = value["added_tokens"][:2]
    first["content"], second["content"] = second["content"], first["content"]


def twice(value: Json) -> None:
    vocabulary = value["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one] = vocabulary[other]


def merges(change: Callable[[list[Any]], None]) -> Callable[[Json], None]:
    return lambda value: change(value["model"]["merges"])


def reorder(items: list[Any]) -> None:
    items[10], items[20] = items[20], items[10]


def remove(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def write(file: str, text: str = "{}") -> Edit:
    def edit(folder: Path) -> None:
        (folder / file).write_text(text)

    return edit


def in_weights(change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / SAVED)
        change(tensors)
        (folder / SAVED).unlink()
        save_file(tensors, folder / SAVED, metadata={"format": "pt"})

    return edit


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def swap_rows(tensors: dict[str, np.ndarray]) -> None:
    tensors[EMBEDDING][[800, 801]] = tensors[EMBEDDING][[801, 800]]


def one_value(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] *= 1.0001


def untie(tensors: dict[str, np.ndarray]) -> None:
    tensors[HEAD] = tensors[HEAD] + np.float32(1e-3)


def narrowed(tensors: dict[str, np.ndarray]) -> None:
    for name, values in tensors.items():
        tensors[name] = values.astype(np.float16)


def reversed_factors(value: Json) -> None:
    value["longrope"]["tiers"][0]["factors"].reverse()


def rope_parameters(value: Json) -> None:
    value["rope_parameters"] = {**value["rope_scaling"], "factor": 2.0, "rope_theta": 500000.0}


def data_row(folder: Path) -> None:
    """One row of the embedding, which no case asks for, in the data file of a graph."""
    from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint

    stored = OnnxCheckpoint(folder)
    place = stored._external[EMBEDDING]
    data = bytearray(place.file.read_bytes())
    row = place.nbytes // place.shape[0]
    start = place.offset + 800 * row
    data[start : start + row] = data[start + row : start + 2 * row]
    place.file.write_bytes(data)


def in_bytes(file: str, change: Callable[[bytes], bytes]) -> Edit:
    """Of a folder's file, or of one beside a GGUF."""

    def edit(artifact: Path) -> None:
        path = artifact / file if artifact.is_dir() else artifact.with_name(file)
        path.write_bytes(change(path.read_bytes()))

    return edit


def said_twice(file: str, key: str, value: Any) -> Edit:
    """The key once more, in front: some programs take the first, some the last."""
    return in_bytes(file, lambda data: data.replace(b"{", f'{{"{key}": {json.dumps(value)}, '.encode(), 1))


def marked(data: bytes) -> bytes:
    return b"\xef\xbb\xbf" + data


def in_utf16(data: bytes) -> bytes:
    return data.decode().encode("utf-16")


def other_framework(folder: Path) -> None:
    tensors = load_file(folder / SAVED)
    (folder / SAVED).unlink()
    save_file(tensors, folder / SAVED, metadata={"format": "tf"})


def template_beside(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")


def inside_folder(file: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / file).parent.mkdir()
        (folder / file).write_text("x")

    return edit


def in_operators(kind: str, **attributes: float) -> Edit:
    """Every operator of that kind in the graph, with attributes that it had not, or others."""

    def edit(folder: Path) -> None:
        import onnx

        path = folder / "onnx" / "model.onnx"
        graph = onnx.load(str(path), load_external_data=False)
        for node in (node for node in graph.graph.node if node.op_type == kind):
            kept = [each for each in node.attribute if each.name not in attributes]
            del node.attribute[:]
            node.attribute.extend(kept + [onnx.helper.make_attribute(*each) for each in attributes.items()])
        path.write_bytes(graph.SerializeToString())

    return edit


TABLE = "model.layers.0.self_attn.rotary_emb.inv_freq"
CONFIG, TOKENS, SETTINGS = "config.json", "tokenizer.json", "tokenizer_config.json"
GENERATION, GENAI = "generation_config.json", "genai_config.json"

OF_FOLDERS = (
    Tamper("two ids swapped", FOLDERS, in_json(TOKENS, swap_ids)),
    Tamper("two added tokens swapped", FOLDERS, in_json(TOKENS, swap_added)),
    Tamper("an id twice", FOLDERS, in_json(TOKENS, twice), alone=True),
    Tamper("a merge dropped", FOLDERS, in_json(TOKENS, merges(lambda items: items.pop(10)))),
    Tamper("all merges dropped", FOLDERS, in_json(TOKENS, merges(lambda items: items.clear())), alone=True),
    Tamper("merges reordered", FOLDERS, in_json(TOKENS, merges(reorder))),
    Tamper("a merge of no pieces", FOLDERS, in_json(TOKENS, merges(lambda m: m.append(["zz#", "#zz"]))), alone=True),
    Tamper("another pre-tokenizer", FOLDERS, set_inside(TOKENS, "pre_tokenizer", {"type": "Whitespace"})),
    Tamper("another normalizer", FOLDERS, set_inside(TOKENS, "normalizer", {"type": "Lowercase"})),
    Tamper("a post-processor", FOLDERS, set_inside(TOKENS, "post_processor", {"type": "ByteLevel"})),
    Tamper("truncation", FOLDERS, set_inside(TOKENS, "truncation", {"max_length": 512, "stride": 0})),
    Tamper("ignore_merges", FOLDERS, set_inside(TOKENS, "model.ignore_merges", True)),
    Tamper("tokenizer.json missing", FOLDERS, remove(TOKENS), alone=True),
    Tamper("tokenizer_config.json missing", FOLDERS, remove(SETTINGS)),
    Tamper("added_tokens.json added", FOLDERS, write("added_tokens.json", '{"<more>": 5}')),
    Tamper("tokenizer.model added", FOLDERS, write("tokenizer.model", "x")),
    Tamper("special_tokens_map.json added", FOLDERS, write("special_tokens_map.json", '{"eos_token": "<tool>"}')),
    Tamper("chat template", FOLDERS, put(SETTINGS, chat_template="{{ messages }}")),
    Tamper("chat template lost", FOLDERS, drop(SETTINGS, "chat_template")),
    Tamper("chat_template.jinja added", FOLDERS, write("chat_template.jinja", "{{ messages }}")),
    Tamper("another tokenizer_class", FOLDERS, put(SETTINGS, tokenizer_class="LlamaTokenizer")),
    Tamper("eos_token", FOLDERS, put(SETTINGS, eos_token="<|endoftext|>")),
    Tamper("bos is added", FOLDERS, put(SETTINGS, add_bos_token=True)),
    Tamper("model_max_length", FOLDERS, put(SETTINGS, model_max_length=64), alone=True),
    Tamper("model_max_length lost", FOLDERS, drop(SETTINGS, "model_max_length"), alone=True),
    Tamper("bos of config.json", FOLDERS, put(CONFIG, bos_token_id=7)),
    Tamper("eos of config.json", FOLDERS, put(CONFIG, eos_token_id=7)),
    Tamper("an eos without a row", FOLDERS, put(CONFIG, eos_token_id=70000), alone=True),
    Tamper("eos of generation_config.json", FOLDERS, put(GENERATION, eos_token_id=[2, 7])),
    Tamper("temperature", FOLDERS, put(GENERATION, temperature=0.1, do_sample=True)),
    Tamper("max_new_tokens", FOLDERS, put(GENERATION, max_new_tokens=20)),
    Tamper("generation_config.json missing", FOLDERS, remove(GENERATION)),
    Tamper("max_position_embeddings", FOLDERS, put(CONFIG, max_position_embeddings=256), alone=True),
    Tamper("original window", FOLDERS, put(CONFIG, original_max_position_embeddings=255), alone=True),
    Tamper("rope_parameters beside rope_scaling", FOLDERS, in_json(CONFIG, rope_parameters), alone=True),
    Tamper("factor of rope_scaling", FOLDERS, set_inside(CONFIG, "rope_scaling.factor", 4.0), alone=True),
    Tamper("mscale in rope_scaling", FOLDERS, set_inside(CONFIG, "rope_scaling.short_mscale", 1.2), alone=True),
    Tamper("rope_theta", FOLDERS, put(CONFIG, rope_theta=500000.0), alone=True),
    Tamper("a factor of the longrope key", FOLDERS, in_json(CONFIG, reversed_factors), alone=True),
    Tamper("the longrope key lost", FOLDERS, drop(CONFIG, "longrope"), alone=True),
    Tamper("tied", FOLDERS, put(CONFIG, tie_word_embeddings=True), alone=True),
    Tamper("quantization_config", FOLDERS, put(CONFIG, quantization_config={"quant_method": "junk"}), alone=True),
    Tamper("auto_map lost", [HF], drop(CONFIG, "auto_map"), alone=True),
    Tamper("auto_map of another class", [HF], put(CONFIG, auto_map={"AutoModel": "x.Y"}), alone=True),
    Tamper("torch_dtype", FOLDERS, put(CONFIG, torch_dtype="bfloat16")),
    Tamper("a list for a dtype", FOLDERS, put(CONFIG, torch_dtype=["float32"])),
    Tamper("code under a name that no file has", [HF], put(CONFIG, auto_map={"AutoModel": "a" * 5000}), alone=True),
    Tamper("a second dtype", FOLDERS, put(CONFIG, dtype="float16")),
    Tamper("architectures", FOLDERS, put(CONFIG, architectures=["MistralForCausalLM"]), alone=True),
    Tamper("rms_norm_eps", FOLDERS, put(CONFIG, rms_norm_eps=1e-3)),
    Tamper("attention_bias", FOLDERS, put(CONFIG, attention_dropout=0.5)),
    Tamper("sliding_window", FOLDERS, put(CONFIG, sliding_window=128)),
    Tamper("num_hidden_layers", FOLDERS, put(CONFIG, num_hidden_layers=1)),
    Tamper("an unknown key", FOLDERS, put(CONFIG, final_logit_softcapping=30.0)),
    Tamper("pad_token_id lost", FOLDERS, drop(CONFIG, "pad_token_id")),
    Tamper("adapter_config.json", FOLDERS, write("adapter_config.json"), alone=True),
    Tamper("quantize_config.json", FOLDERS, write("quantize_config.json"), alone=True),
    Tamper("a pickle beside the weights", FOLDERS, write("pytorch_model.bin", "x"), alone=True),
    Tamper("a stray shard", [HF], write("model-00002-of-00002.safetensors", "x"), alone=True),
    Tamper("a second graph", [ONNX], write("onnx/model_q4.onnx", "x"), alone=True),
    Tamper("two rows of the embedding swapped", [HF], in_weights(swap_rows)),
    Tamper("one value of a weight", [HF], in_weights(one_value)),
    Tamper("another head", [HF], in_weights(untie)),
    Tamper("a bias added", [HF], in_weights(lambda tensors: tensors.update({BIAS: np.ones(64, np.float32)}))),
    Tamper("a norm lost", [HF], in_weights(lambda t: t.pop("model.norm.weight")), alone=True),
    Tamper("weights in float16", [HF], in_weights(narrowed)),
    Tamper("a row of the embedding", [ONNX], data_row),
    Tamper("a key twice", FOLDERS, said_twice(CONFIG, "rope_theta", 5e5), alone=True),
    Tamper("a key twice in generation settings", FOLDERS, said_twice(GENERATION, "eos_token_id", 7), alone=True),
    Tamper("a byte order mark", FOLDERS, in_bytes(CONFIG, marked), alone=True),
    Tamper("a byte order mark in generation settings", FOLDERS, in_bytes(GENERATION, marked), alone=True),
    Tamper("a config in UTF-16", FOLDERS, in_bytes(CONFIG, in_utf16), alone=True),
    Tamper("a tokenizer in UTF-16", FOLDERS, in_bytes(TOKENS, in_utf16), alone=True),
    Tamper("true for 1 in a list", FOLDERS, put(GENERATION, eos_token_id=[True])),
    Tamper("a tokenizer's code", FOLDERS, put(SETTINGS, auto_map={"AutoTokenizer": ["a/b--t.T", None]}), alone=True),
    Tamper("mlx-lm's quantization", FOLDERS, put(CONFIG, quantization={"group_size": 64, "bits": 4}), alone=True),
    Tamper("a model inside of the model", FOLDERS, put(CONFIG, text_config={"rope_theta": 5e5}), alone=True),
    Tamper(
        "another attention of vLLM", FOLDERS, put(CONFIG, dual_chunk_attention_config={"chunk_size": 64}), alone=True
    ),
    Tamper("a chat template in its folder", FOLDERS, template_beside),
    Tamper("TensorFlow's weights", FOLDERS, write("tf_model.h5", "x"), alone=True),
    Tamper("Flax's weights", FOLDERS, write("flax_model.msgpack", "x"), alone=True),
    Tamper("code that servers run", FOLDERS, write("handler.py", "import os"), alone=True),
    Tamper("packages that servers install", FOLDERS, write("requirements.txt", "x"), alone=True),
    Tamper("code of a config", FOLDERS, write("configuration_x.py", "import os"), alone=True),
    Tamper("weights of another framework", [HF], other_framework, alone=True),
    Tamper("a table of frequencies", [HF], in_weights(lambda t: t.update({TABLE: np.ones(8, np.float32)}))),
    Tamper("no number among the weights", [HF], in_weights(lambda t: t[EMBEDDING].__setitem__((800, 0), np.nan))),
    Tamper("a second config", [ONNX], write("onnx/config.json"), alone=True),
    Tamper("a second tokenizer", [ONNX], write("onnx/tokenizer.json"), alone=True),
    Tamper("a graph for phones", [ONNX], write("onnx/model.ort", "x"), alone=True),
    Tamper("genai: a key twice", [ONNX], said_twice(GENAI, "model", {"context_length": 1}), alone=True),
    Tamper("genai: a byte order mark", [ONNX], in_bytes(GENAI, marked), alone=True),
    Tamper("a graph beside the weights", [HF], inside_folder("onnx/model.onnx"), alone=True),
    Tamper("a graph at the top", [ONNX], write("model.onnx", "x"), alone=True),
    Tamper("OpenVINO's graph", FOLDERS, write("openvino_model.xml", "x"), alone=True),
    Tamper("weights as they were before", FOLDERS, inside_folder("original/consolidated.00.pth"), alone=True),
    Tamper("another pickle", FOLDERS, write("model.pkl", "x"), alone=True),
    Tamper("code in the folder that servers run", FOLDERS, inside_folder("code/inference.py"), alone=True),
    Tamper("another tokenizer's file", FOLDERS, write("tiktoken.model", "x"), alone=True),
    Tamper("2.0 layers", FOLDERS, put(CONFIG, num_hidden_layers=2.0)),
    Tamper("a window of 512.0", FOLDERS, put(CONFIG, max_position_embeddings=512.0)),
    Tamper("an eos of 1.0", FOLDERS, put(CONFIG, eos_token_id=1.0)),
    Tamper("a window in the graph", [ONNX], in_operators("GroupQueryAttention", local_window_size=400), alone=True),
    Tamper("a cap in the graph", [ONNX], in_operators("GroupQueryAttention", softcap=30.0), alone=True),
    Tamper("a scale in the graph", [ONNX], in_operators("GroupQueryAttention", scale=0.26), alone=True),
    Tamper("a smooth softmax", [ONNX], in_operators("GroupQueryAttention", smooth_softmax=1), alone=True),
    Tamper("another rotation", [ONNX], in_operators("RotaryEmbedding", interleaved=1), alone=True),
    Tamper("transformers.js_config lost", [ONNX], drop(CONFIG, "transformers.js_config"), alone=True),
    Tamper("auto_map in an ONNX folder", [ONNX], put(CONFIG, auto_map={"AutoModelForCausalLM": "m.M"}), alone=True),
    Tamper("genai_config.json missing", [ONNX], remove(GENAI), alone=True),
    *(
        Tamper(f"genai: {key}", [ONNX], set_inside(GENAI, key, value), alone)
        for key, value, alone in (
            ("model.decoder.filename", "onnx/other.onnx", True),
            ("model.decoder.head_size", 32, True),
            ("model.decoder.num_key_value_heads", 4, True),
            ("model.decoder.num_hidden_layers", 3, True),
            ("model.decoder.hidden_size", 128, True),
            ("model.decoder.inputs.past_key_names", "past.%d", True),
            ("model.decoder.session_options.provider_options", [{"cuda": {}}], True),
            ("model.context_length", 256, True),
            ("model.type", "phi3", True),
            ("model.vocab_size", 5, True),
            ("model.eos_token_id", 7, False),
            ("model.bos_token_id", 7, False),
            ("search.max_length", 4096, True),
            ("search.do_sample", True, True),
            ("search.temperature", 0.3, True),
        )
    ),
)

# --- GGUF ------------------------------------------------------------------------------------------------


def in_gguf(change: Callable[[Json, Tensors], object]) -> Edit:
    def edit(path: Path) -> None:
        metadata, tensors = gguf_files.contents(path)
        change(metadata, tensors)
        gguf_files.write_gguf(path, metadata, tensors)

    return edit


def key(name: str, value: Any) -> Edit:
    return in_gguf(lambda metadata, tensors: metadata.update({name: value}))


def without(*names: str) -> Edit:
    return in_gguf(lambda metadata, tensors: [metadata.pop(name) for name in names])


def in_array(name: str, change: Callable[[list[Any]], object]) -> Edit:
    def edit(path: Path) -> None:
        items = read_header(path).array(name)
        assert items is not None
        change(items)
        key(name, items)(path)

    return edit


def swap_two(items: list[Any]) -> None:
    items[300], items[301] = items[301], items[300]


def text_rows(metadata: Json, tensors: Tensors) -> None:
    kind, shape, data = tensors["token_embd.weight"]
    row = len(data) // shape[0]
    rows = [data[index * row : (index + 1) * row] for index in range(shape[0])]
    rows[800] = rows[801]
    tensors["token_embd.weight"] = kind, shape, b"".join(rows)


def half_norm(metadata: Json, tensors: Tensors) -> None:
    _, shape, data = tensors["output_norm.weight"]
    halves = np.frombuffer(data, np.float32).astype(np.float16)
    tensors["output_norm.weight"] = GGMLQuantizationType.F16, shape, halves.tobytes()


def in_modelfile(old: str, new: str) -> Edit:
    def edit(path: Path) -> None:
        modelfile = path.with_suffix(".Modelfile")
        text = modelfile.read_text()
        assert old in text
        modelfile.write_text(text.replace(old, new))

    return edit


T = "tokenizer.ggml."
OF_FILES = (
    Tamper("two ids swapped", [GGUF], in_array(f"{T}tokens", swap_two)),
    Tamper("a text twice", [GGUF], in_array(f"{T}tokens", lambda t: t.__setitem__(300, t[301])), alone=True),
    Tamper("a merge dropped", [GGUF], in_array(f"{T}merges", lambda items: items.pop(10))),
    Tamper("all merges dropped", [GGUF], without(f"{T}merges"), alone=True),
    Tamper("merges reordered", [GGUF], in_array(f"{T}merges", reorder)),
    Tamper("token types", [GGUF], in_array(f"{T}token_type", lambda items: items.__setitem__(0, 1))),
    Tamper("token types cut", [GGUF], in_array(f"{T}token_type", lambda items: items.pop()), alone=True),
    Tamper("the tokenizer missing", [GGUF], without(f"{T}tokens", f"{T}merges", f"{T}token_type"), alone=True),
    Tamper("no tokenizer at all", [GGUF], key(f"{T}model", "none")),
    Tamper("another pre-tokenizer", [GGUF], key(f"{T}pre", "llama-bpe")),
    Tamper("pre lost", [GGUF], without(f"{T}pre")),
    Tamper("chat template", [GGUF], key("tokenizer.chat_template", "{{ messages }}")),
    Tamper("chat template lost", [GGUF], without("tokenizer.chat_template")),
    Tamper("a named chat template", [GGUF], key("tokenizer.chat_template.tool_use", "x")),
    Tamper("eos", [GGUF], key(f"{T}eos_token_id", 7)),
    Tamper("an eos without a row", [GGUF], key(f"{T}eos_token_id", 70000), alone=True),
    Tamper("eos lost", [GGUF], without(f"{T}eos_token_id")),
    Tamper("eot added", [GGUF], key(f"{T}eot_token_id", 9)),
    Tamper("bos is added", [GGUF], key(f"{T}add_bos_token", True)),
    Tamper("a space is put in front", [GGUF], key(f"{T}add_space_prefix", True)),
    Tamper("spaces are removed", [GGUF], key(f"{T}remove_extra_whitespaces", True)),
    Tamper("context_length", [GGUF], key("llama.context_length", 4096), alone=True),
    Tamper("the original window", [GGUF], key("llama.rope.scaling.original_context_length", 255), alone=True),
    Tamper("a factor beside the factors", [GGUF], key("llama.rope.scaling.factor", 2.0), alone=True),
    Tamper("scale_linear", [GGUF], key("llama.rope.scale_linear", 2.0), alone=True),
    Tamper("yarn beside the factors", [GGUF], key("llama.rope.scaling.yarn_ext_factor", 1.0)),
    Tamper("freq_base", [GGUF], key("llama.rope.freq_base", 500000.0), alone=True),
    Tamper("a sliding window", [GGUF], key("llama.attention.sliding_window", 64)),
    Tamper("a cap", [GGUF], key("llama.attn_logit_softcapping", 30.0)),
    Tamper("experts", [GGUF], key("llama.expert_used_count", 2)),
    Tamper("sampling", [GGUF], key("general.sampling.temp", 0.1)),
    Tamper("file_type", [GGUF], key("general.file_type", 7)),
    Tamper("quantization_version", [GGUF], key("general.quantization_version", 1)),
    Tamper("vocab_size", [GGUF], key("llama.vocab_size", 1000), alone=True),
    Tamper("epsilon", [GGUF], key("llama.attention.layer_norm_rms_epsilon", 1e-3)),
    Tamper("a number of another type", [GGUF], key("llama.block_count", Scalar(GGUFValueType.INT32, 2))),
    Tamper("a name that llama.cpp acts on", [GGUF], key("general.name", "phi-3-mini")),
    Tamper("another recipe", [GGUF], key("lrconvert.recipe", "{}"), alone=True),
    Tamper("general.type", [GGUF], key("general.type", "adapter"), alone=True),
    Tamper("an unknown key", [GGUF], key("llama.unknown", 1)),
    Tamper("one row of the embedding", [GGUF], in_gguf(text_rows)),
    Tamper("a bias added", [GGUF], in_gguf(lambda m, t: t.update({"blk.0.attn_q.bias": f32(np.ones(64))})), alone=True),
    Tamper("a number of tensors", [GGUF], key("split.tensors.count", Scalar(GGUFValueType.INT32, 50))),
    Tamper("an unknown key of parts", [GGUF], key("split.first", "other.gguf")),
    Tamper(
        "a static set too", [GGUF], in_gguf(lambda m, t: t.update({"rope_freqs.weight": f32(np.ones(8))})), alone=True
    ),
    Tamper("a norm in float16", [GGUF], in_gguf(half_norm), alone=True),
    Tamper("pooling", [GGUF], key("llama.pooling_type", 1)),
    Tamper("eos is added", [GGUF], key(f"{T}add_eos_token", True)),
    Tamper("FROM with a line in it", [GGUF], in_modelfile("FROM ./m.gguf", "FROM ./m.gguf\u2028# x"), alone=True),
    Tamper("FROM twice", [GGUF], in_modelfile("FROM ./m.gguf", "FROM ./m.gguf\nFROM ./m.gguf"), alone=True),
    Tamper("a system prompt", [GGUF], in_bytes("m.Modelfile", lambda data: data + b'SYSTEM "x"\n'), alone=True),
    Tamper("a hidden line", [GGUF], in_bytes("m.Modelfile", lambda data: data + b"# x\rSYSTEM x\n"), alone=True),
    Tamper("num_ctx", [GGUF], in_modelfile("num_ctx 512", "num_ctx 4096"), alone=True),
    Tamper("FROM", [GGUF], in_modelfile("FROM ./", "FROM ./other-"), alone=True),
    Tamper("a parameter", [GGUF], in_modelfile("PARAMETER", "PARAMETER temperature 0\nPARAMETER"), alone=True),
)
TAMPERS = (*OF_FOLDERS, *OF_FILES)
