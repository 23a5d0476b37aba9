# SPDX-License-Identifier: Apache-2.0
"""Safetensors folders: all that people have on disk is read, all that is damaged is refused in one line."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Result, recipe_for
from safetensors.numpy import load_file, save_file
from support.cases import case
from support.pico import FAMILIES, pico_tensors, write_pico

from lrconvert.checkpoint import locate, open_model
from lrconvert.checkpoint.base import MAX_JSON_BYTES, MAX_JSON_DEPTH
from lrconvert.errors import EnvironmentFailure, InputError
from lrconvert.recipe import write_recipe

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file; `...` removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_weights(path: Path, *drop: str, **added: np.ndarray) -> None:
    """Write the weights again, without `drop` and with `added`, whose names use __ for a dot."""
    tensors = {name: array for name, array in load_file(path).items() if name not in drop}
    tensors |= {name.replace("__", "."): array for name, array in added.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file from a header that nobody has checked."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# --- what people have on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_bit_for_bit(tmp_path: Path, family: str, shards: int) -> None:
    """One file or several: each tensor of the family by role, with the bytes that were stored."""
    model = open_model(write_pico(tmp_path, family, shards=shards))
    stored = pico_tensors(model.checkpoint.config)
    assert {tensor.name for tensor in model.roles.values()} == set(stored) == set(model.checkpoint.tensors)
    for tensor in model.roles.values():
        read = model.tensor(tensor.role, tensor.layer, tensor.expert)
        assert read is not None
        np.testing.assert_array_equal(read, stored[tensor.name])
    assert [path.name for path in model.checkpoint.weight_files()] == (
        [WEIGHTS] if shards == 1 else [INDEX, *(f"model-{i:05d}-of-{shards:05d}.safetensors" for i in (1, 2, 3))]
    )


def hub_cache(root: Path, *, repository: str = "some-org/some-model", **layout: Any) -> tuple[Path, Path]:
    """A Hub cache as huggingface_hub leaves it: (its root, the snapshot), whose files are links to blobs."""
    plain = write_pico(root / "plain", **layout)
    base = root / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = base / "snapshots" / commit
    for folder in (base / "blobs", base / "refs", snapshot):
        folder.mkdir(parents=True)
    for name in ("main", "v1.0"):
        (base / "refs" / name).write_text(commit)
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(base / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return root / "hub", snapshot


def test_a_hub_snapshot_of_links_to_blobs_is_read_and_baked(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Every file is a link into ../../blobs; the artifact holds real files."""
    _, snapshot = hub_cache(tmp_path, shards=2)
    model = open_model(snapshot)
    recipe = write_recipe(recipe_for(model), tmp_path / "recipe")
    result = cli("hf", snapshot, "--recipe", recipe, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    assert set(open_model(tmp_path / "out").checkpoint.tensors) == set(model.checkpoint.tensors)


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path: Path) -> None:
    """By name, by revision; a revision or a model that isn't there is one line and exit code 6."""
    cache, snapshot = hub_cache(tmp_path, shards=2)
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    code = (
        "import sys, json; from lrconvert.checkpoint import locate; from lrconvert.cli import run\n"
        "print(locate('some-org/some-model')); print(locate('some-org/some-model', revision='v1.0'))\n"
        "codes = [run(['inspect', 'some-org/some-model', '--json', *more]) for more in "
        "([], ['--revision', 'v1.0'], ['--revision', 'gone'])] + [run(['inspect', 'some-org/other'])]\n"
        "print(codes)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == lines[1] == str(snapshot), done.stderr
    assert lines[-1] == "[0, 0, 6, 6]"
    errors = [line for line in done.stderr.splitlines() if line.startswith("lrconvert:")]
    assert len(errors) == 2
    assert "some-org/other: no such folder, and the Hub did not answer" in errors[1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["a--b/c", "a/b..c", "a/" + "b" * 100])
def test_a_name_that_the_hub_does_not_allow_is_bad_input(name: str) -> None:
    """It is taken for a folder, which there is not."""
    with pytest.raises(InputError, match="no such folder"):
        locate(name)


def test_no_network_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the connection, whatever its text, is exit code 6."""
    import huggingface_hub

    def fail(*arguments: object, **options: object) -> str:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(EnvironmentFailure, match="ConnectionError"):
        locate("some-org/some-model")


def test_leftover_pickles_and_other_files_do_not_matter(tmp_path: Path) -> None:
    """`.bin` beside safetensors is ignored, unknown files stay behind, side files come along."""
    folder = write_pico(tmp_path)
    unknown = ["pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "notes.txt", "onnx/model.onnx"]
    sides = ["tokenizer.json", "tokenizer.model", "tekken.json", "License.md", "LICENSE", "chat_template.jinja",
             "additional_chat_templates/tool.jinja", "special_tokens_map.json"]  # fmt: skip
    for name in unknown + sides:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    model = open_model(folder)
    assert set(model.checkpoint.side_files()) == {*sides, "generation_config.json"}
    assert [path.name for path in model.checkpoint.weight_files()] == [WEIGHTS]


def test_one_whole_file_wins_over_an_index_beside_it(tmp_path: Path) -> None:
    """As in transformers: leftover shards and their index are not looked at."""
    folder = write_pico(tmp_path, shards=2)
    write_pico(folder, seed=8)
    assert [path.name for path in open_model(folder).checkpoint.weight_files()] == [WEIGHTS]
    (folder / INDEX).write_text("damaged")
    assert open_model(folder).checkpoint.read("model.norm.weight").shape == (64,)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.fp16.safetensors"])
def test_a_lone_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    """One safetensors file without an index holds the weights."""
    folder = write_pico(tmp_path)
    (folder / WEIGHTS).rename(folder / name)
    assert [path.name for path in open_model(folder).checkpoint.weight_files()] == [name]


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(("name", "dtype"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32)])
def test_every_float_dtype_under_either_key(tmp_path: Path, key: str, name: str, dtype: Any) -> None:
    """Both spellings of the config's dtype are fine; arrays come in the dtype that is stored."""
    folder = write_pico(tmp_path, **{"torch_dtype": None, key: "bfloat16"})
    tensors = {name: array.astype(dtype) for name, array in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    model = open_model(folder)
    assert model.dtype == name
    read = model.checkpoint.read("model.embed_tokens.weight")
    assert read.dtype == dtype
    assert read.tobytes() == tensors["model.embed_tokens.weight"].tobytes()


def test_a_tied_head_may_be_stored_or_not(tmp_path: Path) -> None:
    """Where it is, it is read, in the shape of the embedding."""
    folder = write_pico(tmp_path, tie_word_embeddings=True)
    assert open_model(folder).tensor("lm_head") is None
    edit_weights(folder / WEIGHTS, lm_head__weight=np.ones((101, 64), np.float32))
    assert open_model(folder).tensor("lm_head") is not None
    edit_weights(folder / WEIGHTS, lm_head__weight=np.ones((5, 64), np.float32))
    with pytest.raises(InputError, match=r"lm_head\.weight has shape \[5, 64\]; the config needs \[101, 64\]"):
        open_model(folder)


def test_stored_rotary_tables_are_ignored_by_name(tmp_path: Path) -> None:
    """What old transformers stored, whatever its dtype; a name that only looks like it is unknown."""
    folder = write_pico(tmp_path)
    table = np.ones(8, np.float64)
    edit_weights(folder / WEIGHTS, **{f"model__layers__{i}__self_attn__rotary_emb__inv_freq": table for i in (0, 1)})
    assert len(open_model(folder).checkpoint.tensors) == len(open_model(folder).roles) + 2
    edit_weights(folder / WEIGHTS, model__layers__2__self_attn__rotary_emb__inv_freq=table)
    with pytest.raises(InputError, match=r"llama does not have: model\.layers\.2\.self_attn\.rotary_emb\.inv_freq"):
        open_model(folder)


# --- what is damaged -------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def sharded(change: Callable[[Path, dict[str, str]], object]) -> Damage:
    """Damage to a folder with two shards: `change` edits the weight map, which is then written."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        write_pico(folder, shards=2)
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change(folder, weight_map)
        edit_json(folder / INDEX, weight_map=weight_map)

    return damage


def point_norm_at(target: Any) -> Damage:
    return sharded(lambda folder, weight_map: weight_map.update({"model.norm.weight": target}))


def duplicate(folder: Path, weight_map: dict[str, str]) -> None:
    first, second = sorted(set(weight_map.values()))
    edit_weights(folder / first, model__norm__weight=np.ones(64, np.float32))
    edit_weights(folder / second, model__norm__weight=np.ones(64, np.float32))


def config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", **changes)


def config_text(text: str | bytes) -> Damage:
    return lambda folder: (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def weights(**changes: np.ndarray) -> Damage:
    return lambda folder: edit_weights(folder / WEIGHTS, **changes)


def header(value: Any, data: bytes = b"", length: int | None = None) -> Damage:
    return lambda folder: raw_safetensors(folder / WEIGHTS, value, data, length)


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / min(weight_map.values())).unlink()


def not_in_index(folder: Path, weight_map: dict[str, str]) -> None:
    del weight_map["model.norm.weight"]


def swapped(folder: Path, weight_map: dict[str, str]) -> None:
    first, second = sorted(set(weight_map.values()))
    weight_map.update({"model.norm.weight": first if weight_map["model.norm.weight"] == second else second})


def deep(depth: int) -> str:
    return '{"model_type": "llama", "x": ' + "[" * depth + "]" * depth + "}"


HUGE = 10**400
NORM = "model.norm.weight"
Damages = dict[str, tuple[Damage, list[str]]]  # by name: what is done, and what the message says of it
WEIGHT_FILES: Damages = {
    "an empty file": (lambda folder: (folder / WEIGHTS).write_bytes(b""), [WEIGHTS]),
    "half a length": (lambda folder: cut(folder / WEIGHTS, 5), [WEIGHTS]),
    "half a header": (lambda folder: cut(folder / WEIGHTS, 100), [WEIGHTS]),
    "half the data": (lambda folder: cut(folder / WEIGHTS, 20000), [WEIGHTS]),
    "one byte short": (lambda folder: cut(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1), [WEIGHTS]),
    "a header of 2^63 bytes": (header({}, length=2**63), [WEIGHTS]),
    "a header of 2^64 - 1 bytes": (header({}, length=2**64 - 1), [WEIGHTS]),
    "a header longer than the file": (header({}, length=10**6), [WEIGHTS]),
    "a header that is not JSON": (header(b"\x80garbage"), [WEIGHTS]),
    "a header that is a list": (header([1, 2]), [WEIGHTS]),
    "a deeply nested header": (header(b'{"a":' * 100000), [WEIGHTS]),
    "overlapping tensors": (header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), [WEIGHTS]),
    "a hole between tensors": (header({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)), [WEIGHTS]),
    "an offset past the end": (header({"a": entry(0, 10**12, shape=(25 * 10**10,))}, bytes(8)), [WEIGHTS]),
    "offsets backwards": (header({"a": entry(8, 0)}, bytes(8)), [WEIGHTS]),
    "a shape that overflows": (header({"a": entry(0, 8, shape=(2**62, 2**62))}, bytes(8)), [WEIGHTS]),
    "a dtype that nobody has": (header({"a": entry(0, 8, dtype="F7")}, bytes(8)), [WEIGHTS]),
    "bytes after the data": (header({"a": entry(0, 8)}, bytes(9)), [WEIGHTS]),
    "an integer tensor": (weights(model__norm__weight=np.ones(64, np.int64)), [NORM, "I64", "BF16"]),
    "a boolean tensor": (weights(model__norm__weight=np.ones(64, np.bool_)), [NORM, "BOOL", "BF16"]),
    "another shape": (weights(model__norm__weight=np.ones(63, np.float32)), [NORM, "[63]", "[64]"]),
    "another rank": (weights(model__norm__weight=np.ones((1, 64), np.float32)), [NORM, "[1, 64]", "[64]"]),
    "a scalar": (weights(model__norm__weight=np.ones((), np.float32)), [NORM, "[]", "[64]"]),
    "an empty tensor": (weights(model__norm__weight=np.ones(0, np.float32)), [NORM, "[0]", "[64]"]),
    "only pickles": (only_pickles, ["pickles", "pytorch_model.bin", "safetensors"]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ["no weights", WEIGHTS, INDEX]),
    "shards without an index": (
        lambda folder: (
            (folder / "second.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
            and (folder / WEIGHTS).rename(folder / "first.safetensors")
        ),
        ["several weight files", INDEX, "first.safetensors, second.safetensors"],
    ),
    "weights that are a folder": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
        [WEIGHTS],
    ),
}
INDICES: Damages = {
    "an index out of the folder": (point_norm_at("../x.safetensors"), [INDEX, "'../x.safetensors'", "plain name"]),
    "an absolute index": (point_norm_at("/etc/x.safetensors"), [INDEX, "'/etc/x.safetensors'", "plain name"]),
    "an index into a folder": (point_norm_at("a/x.safetensors"), [INDEX, "'a/x.safetensors'", "plain name"]),
    "an index with a backslash": (point_norm_at("..\\x.safetensors"), [INDEX, "plain name"]),
    "an index into another file": (point_norm_at("config.json"), [INDEX, "'config.json'", ".safetensors"]),
    "an index of dots": (point_norm_at(".."), [INDEX, "'..'", "plain name"]),
    "an index of nothing": (point_norm_at(""), [INDEX, "''", "plain name"]),
    "an index of numbers": (point_norm_at(5), [INDEX, "'5'", "plain name"]),
    "an index of objects": (point_norm_at({"file": []}), [INDEX, "plain name"]),
    "a missing shard": (sharded(missing_shard), [INDEX, "model-00001-of-00002.safetensors", "not in the folder"]),
    "a shard nobody has": (point_norm_at("x.safetensors"), [INDEX, "is listed here", "not in the folder"]),
    "a tensor only in the index": (
        sharded(lambda folder, weight_map: weight_map.update({"extra": min(weight_map.values())})),
        ["extra is in the index but not in model-00001-of-00002.safetensors"],
    ),
    "a tensor only in a shard": (sharded(not_in_index), [f"{NORM} is not in the index"]),
    "a tensor in another shard": (sharded(swapped), [NORM, "the index says"]),
    "a tensor twice": (sharded(duplicate), [f"{NORM} is in model-00001", "and in model-00002"]),
    "an index that is not JSON": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / INDEX).write_text("{")),
        [INDEX, "not JSON"],
    ),
    "a deeply nested index": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / INDEX).write_text("[" * 10**6)),
        [INDEX, "nested"],
    ),
    "an index without a map": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / INDEX).write_text("{}")),
        [INDEX, "weight_map"],
    ),
    "an index with a list": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / INDEX).write_text('{"weight_map": ["a"]}')),
        [INDEX, "weight_map"],
    ),
}
CONFIG_FILES: Damages = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "No such file"]),
    "a config that is a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        ["config.json", "not a file"],
    ),
    "a config that is a device": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("/dev/zero")),
        ["config.json", "not a file"],
    ),
    "an empty config": (config_text(""), ["config.json", "not JSON"]),
    "a config of bytes": (config_text(b"\xff\xfe\x00"), ["config.json", "not JSON"]),
    "half a config": (config_text('{"model_type": "lla'), ["config.json", "not JSON"]),
    "a config that is a list": (config_text("[1]"), ["config.json", "holds list", "object"]),
    "a config that is a number": (config_text("7"), ["config.json", "holds int", "object"]),
    "a deep config": (config_text(deep(MAX_JSON_DEPTH)), ["config.json", "nested"]),
    "a deeper config": (config_text(deep(600)), ["config.json", "nested"]),
    "a bottomless config": (config_text("[" * 10**6), ["config.json", "nested"]),
    "a number of 10000 digits": (config_text('{"x": ' + "9" * 10000 + "}"), ["config.json", "not JSON"]),
}
CONFIG_VALUES: Damages = {
    **{
        f"{key} {str(value)[:12]}": (config(**{key: value}), ["config.json", f"{key} is ", "integer"])
        for key in ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "num_hidden_layers",
                    "intermediate_size", "vocab_size", "max_position_embeddings")
        for value in (0, -4, "4", True, 4.0, 2**31, HUGE, [4], {"n": 4})
    },
    **{
        f"{key} is {str(value)[:12]}": (config(**{key: value}), ["config.json", f"{key} is ", "positive number"])
        for key in ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
        for value in (0, -1.0, "1", True, HUGE, float("inf"), float("nan"), [1.0])
    },
    "half the heads' channels": (config(head_dim=3), ["head_dim 3", "even number from 2 to 3"]),
    "more than a head": (config(partial_rotary_factor=1e300), ["partial_rotary_factor 1e+300", "from 2 to 16"]),
    "uneven groups": (config(num_key_value_heads=3), ["num_attention_heads 4", "num_key_value_heads 3"]),
    "no hidden size": (config(hidden_size=...), ["hidden_size is missing"]),
    "a tie that is no flag": (config(tie_word_embeddings="yes"), ["tie_word_embeddings is 'yes'", "true or false"]),
    "another activation": (config(hidden_act="gelu"), ["hidden_act is 'gelu'", "silu"]),
    "scaling that is a word": (config(rope_scaling="yarn"), ["rope_scaling is 'yarn'", "object or null"]),
    "heads that can't be": (config(num_attention_heads=2**30, num_key_value_heads=2**29), ["q_proj", "17179869184"]),
    "layers that can't be": (config(num_hidden_layers=4096), ["missing tensors", "model.layers.4095.mlp.down_proj"]),
    "several at once": (
        config(hidden_size=0, vocab_size="x", rope_theta=-1),
        ["hidden_size is 0", "vocab_size is 'x'", "rope_theta is -1"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pico: Callable[..., Any]) -> Path:
    return write_recipe(recipe_for(pico()), tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize(
    "damages", [WEIGHT_FILES, INDICES, CONFIG_FILES, CONFIG_VALUES], ids=["weights", "index", "config", "values"]
)
def test_damage_is_one_line_and_exit_code_3(
    damages: Damages, tmp_path: Path, cli: Callable[..., Result], recipe: Path
) -> None:
    """`hf` names file and key or tensor, in little memory, and writes nothing."""
    for name, (damage, needles) in damages.items():
        place = tmp_path / re.sub(r"\W", "_", name)
        with case(name):
            damage(write_pico(place / "model"))
            before = sorted(place.iterdir())
            tracemalloc.start()
            try:
                result = cli("hf", place / "model", "--recipe", recipe, "-o", place / "out")
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert result.code == 3, result
            assert result.out == ""
            assert result.err.count("\n") == 1
            assert result.err.startswith("lrconvert: ")
            for needle in needles:
                assert needle in result.err
            assert sorted(place.iterdir()) == before
            assert peak < 64 * 2**20


def test_an_empty_folder_and_a_missing_one_are_bad_input(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """One line that names what was asked for, whatever is wrong with it."""
    for reference in (tmp_path, tmp_path / "gone", "x" * 300, "a/b/c"):
        result = cli("inspect", reference)
        assert (result.code, result.err.count("\n")) == (3, 1)
        assert str(reference) in result.err


def test_an_oversized_config_is_not_read(tmp_path: Path) -> None:
    """A sparse file of more than any index has: refused by its size."""
    folder = write_pico(tmp_path)
    with (folder / "config.json").open("r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match=f"{MAX_JSON_BYTES + 1} bytes; at most {MAX_JSON_BYTES} are read"):
        open_model(folder)


@pytest.mark.parametrize("model_type", ["gpt2", None, "base", "../llama", ["llama"], 3])
def test_an_unknown_family_lists_those_that_exist(tmp_path: Path, cli: Callable[..., Result], model_type: Any) -> None:
    """Exit code 4: the file may be fine, lrconvert can't read its kind."""
    folder = write_pico(tmp_path)
    edit_json(folder / "config.json", model_type=model_type)
    result = cli("inspect", folder)
    assert (result.code, result.err.count("\n")) == (4, 1)
    assert f"{model_type!r}" in result.err
    for family in FAMILIES:
        assert family in result.err


def test_rotations_of_their_own_for_some_layers_are_not_supported(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Exit code 4, with the kinds of layers that the config names."""
    folder = write_pico(tmp_path)
    edit_json(folder / "config.json", rope_parameters={"full_attention": {}, "sliding_attention": {}})
    result = cli("inspect", folder)
    assert result.code == 4
    assert "full_attention, sliding_attention" in result.err


def test_all_missing_and_unknown_tensors_are_listed(tmp_path: Path) -> None:
    """Nothing is dropped in silence, and nothing is reported one at a time."""
    folder = write_pico(tmp_path)
    missing = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight")
    extra = {f"model__layers__0__self_attn__{name}": np.ones(4, np.float32) for name in ("sinks", "q_norm__weight")}
    edit_weights(folder / WEIGHTS, *missing, **extra, model__norm__weight=np.ones(3, np.float32))
    with pytest.raises(InputError) as caught:
        open_model(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: missing tensors: ")
    for name in (*missing, *(name.replace("__", ".") for name in extra), NORM):
        assert message.count(name) == 1


def test_null_means_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """An explicit null is not a missing key: kv heads become the heads, the head size hidden / heads."""
    folder = tmp_path / "mistral"
    write_pico(folder, "mistral", num_key_value_heads=4)
    edit_json(folder / "config.json", num_key_value_heads=None, head_dim=None, tie_word_embeddings=None)
    edit_weights(folder / WEIGHTS, lm_head__weight=np.ones((101, 64), np.float32))
    shape = open_model(folder).shape
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (4, 16, False)


# --- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--copy"], ["--dtype", "bf16"]])
def test_baking_holds_no_more_than_a_few_tensors(
    tmp_path: Path, options: list[str], recipe: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linked, copied or converted: the peak is a few tensors and the buffers, which are made small here."""
    buffer = 2**18
    monkeypatch.setattr("lrconvert.artifact.staging.COPY_BYTES", buffer)
    monkeypatch.setattr("lrconvert.artifact.prefetch.AHEAD_BYTES", buffer)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 20, "vocab_size": 500}
    folder = write_pico(tmp_path / "model", shards=3, **shape)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    largest = max(math.prod(info.shape) * 4 for info in open_model(folder).checkpoint.tensors.values())
    arguments = ("hf", folder, "--recipe", recipe, "-o", tmp_path / "out", *options)
    assert cli(*arguments, "--dry-run").code == 0  # imports are no part of it
    tracemalloc.start()
    try:
        code = cli(*arguments).code
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert code == 0
    assert peak < 6 * largest + 4 * buffer < total / 4


def test_an_unsupported_dtype_of_the_config_is_no_obstacle(tmp_path: Path) -> None:
    """The config's dtype is what to compute in; what is stored is said by the headers alone."""
    folder = write_pico(tmp_path, torch_dtype="float8_e4m3fn")
    assert open_model(folder).dtype == "F32"


def test_half_of_a_pair_is_no_character(tmp_path: Path) -> None:
    """JSON can spell it, and nothing can write it again; whole pairs are characters."""
    folder = write_pico(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "\U0001f680"}))
    assert open_model(folder).checkpoint.config["note"] == "\U0001f680"
    (folder / "config.json").write_text(json.dumps({**config, "note": "\ud83d"}))
    with pytest.raises(InputError, match=r"config\.json: not usable JSON .*half a surrogate pair"):
        open_model(folder)
