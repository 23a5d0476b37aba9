# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of a published model's true shape: random bf16 weights, sharded, with a small tokenizer.

    python tools/make_shape.py llama2-7b -o llama2-7b [--layers N] [--widen W] [--dry-run]

For what size and shape decide, where the real weights can't be had: conversions, parity, memory. q and k are widened,
because freshly initialised weights attend almost uniformly and hide a wrong rotation: three times, where layers are
few. Through many layers that makes noise of every rounding (32 layers in bfloat16: a KL of 0.7 at 3, 9e-3 at 1.5, where
a wrong rotation still is 0.5), so `--widen 1.25` is right for a whole model. Every tensor has a random stream
of its own, so the same command writes the same bytes, and one that was interrupted goes on with the first shard that
is missing. Memory does not grow with the shape. config.json is written last: a folder that has it is whole.

The tokenizer is the embedded model's. Its ids are below every shape's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.checkpoint import DEMO
from lrconvert.checkpoint.base import numpy_dtype
from lrconvert.data import DATA
from lrconvert.errors import EnvironmentFailure, LrconvertError, UsageError
from lrconvert.families import ExpectedTensor, expected_tensors, get_family, read_shape
from lrconvert.machine import check_disk
from lrconvert.targets.hf.shards import PlannedTensor, header_of, plan_shards

SEED = 7
WIDEN = 3.0
BLOCK = 2**23  # values drawn at a time: 16 MiB in bf16
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
MADE = "made.json"  # how the weights were drawn: other ones have the same sizes
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

Shards = Sequence[tuple[str, Sequence[PlannedTensor]]]
Blocks = Callable[[str, int], Iterator[bytes]]  # the bytes of a tensor, by name and size

# What the models' own configs say, without a scaling of the rotation.
SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "mistral-7b": {  # v0.1
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "phi-3-mini": {  # the 128k model's, with its original window
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "mixtral-8x7b": {  # v0.1
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "phi-3.5-moe": {  # with its original window
        "model_type": "phimoe",
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "attention_bias": True,
        "lm_head_bias": True,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "sliding_window": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "llama3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
}


def shape_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape, cut to its first `layers`. Raises `UsageError` for a count it does not have."""
    shape = SHAPES[name]
    most = shape["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= most:
        raise UsageError(f"--layers {layers}: {name} has 1 to {most}")
    return {
        "architectures": [get_family(shape["model_type"]).hf_class],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **shape,
        "num_hidden_layers": layers or most,
    }


def stored_tensors(config: Mapping[str, Any]) -> list[ExpectedTensor]:
    """What a checkpoint of this config has to hold, in file order."""
    family = get_family(config["model_type"])
    return [tensor for tensor in expected_tensors(family, read_shape(config, family)) if tensor.required]


def planned(config: Mapping[str, Any]) -> list[PlannedTensor]:
    """The same tensors, to be written in bf16."""
    return [PlannedTensor(tensor.name, "BF16", tensor.shape) for tensor in stored_tensors(config)]


# --- random weights ----------------------------------------------------------------------------------------------


def spread_of(role: str, shape: tuple[int, ...], widen: float = WIDEN) -> tuple[float, float]:
    """Mean and deviation of a random tensor: norms near 1, products that keep their input's size, q and k widened."""
    if role.endswith("norm"):
        return 1.0, 0.1
    return 0.0, (widen if role in ("q", "k", "qkv") else 1.0) / float(np.sqrt(shape[-1]))


@cache
def _quantiles() -> np.ndarray[Any, Any]:
    """65,536 equally likely values of the standard normal distribution: a random uint16 chooses one."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((index + 0.5) / 2**16) for index in range(2**16)])


def normal_blocks(config: Mapping[str, Any], widen: float = WIDEN) -> Blocks:
    """Normal weights, each tensor from a stream that only its name decides."""
    spreads = {tensor.name: spread_of(tensor.role, tensor.shape, widen) for tensor in stored_tensors(config)}

    def blocks(name: str, nbytes: int) -> Iterator[bytes]:
        mean, deviation = spreads[name]
        table = (mean + deviation * _quantiles()).astype(numpy_dtype("BF16")).view(np.uint16)
        random = np.random.Generator(np.random.SFC64([SEED, zlib.crc32(name.encode())]))
        for start in range(0, nbytes // 2, BLOCK):
            chosen = random.integers(0, 2**16, min(BLOCK, nbytes // 2 - start), dtype=np.uint16)
            yield table[chosen].tobytes()

    return blocks


# --- writing -----------------------------------------------------------------------------------------------------


def shard_bytes(shard: Sequence[PlannedTensor]) -> int:
    """The exact size of a shard's file."""
    return len(header_of(shard)) + sum(tensor.nbytes for tensor in shard)


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], shards: Shards, blocks: Blocks | None, widen: float = WIDEN
) -> list[str]:
    """Write shards, index and config; the names of those that were written now. `blocks` None: holes for weights.

    What a run before this one finished stays. Raises `UsageError` for a folder that holds anything else, or weights
    that were widened otherwise.
    """
    left = _missing(folder, config, shards, widen)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE).write_text(json.dumps(_made(widen)) + "\n")
    for name, shard in left:
        temporary = folder / f"{name}.part"
        with temporary.open("wb") as file:
            file.write(header_of(shard))
            if blocks is None:
                file.truncate(shard_bytes(shard))
            else:
                file.writelines(block for tensor in shard for block in blocks(tensor.name, tensor.nbytes))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in shards for tensor in shard}
        total = sum(tensor.nbytes for _, shard in shards for tensor in shard)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    temporary = folder / f"{CONFIG}.part"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(folder / CONFIG)
    return [name for name, _ in left]


def _made(widen: float) -> dict[str, float]:
    return {"seed": SEED, "widen": widen}


def _missing(folder: Path, config: Mapping[str, Any], shards: Shards, widen: float) -> Shards:
    """The shards that the folder does not hold yet."""
    done, foreign = set(), []
    planned_shards = dict(shards)
    ours = {INDEX, *TOKENIZER, MADE, CONFIG, f"{CONFIG}.part", *(f"{name}.part" for name in planned_shards)}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        shard = planned_shards.get(path.name)
        if shard is not None and path.stat().st_size == shard_bytes(shard) and _starts_with(path, header_of(shard)):
            done.add(path.name)
        elif shard is not None or path.name not in ours:
            foreign.append(path.name)
    if (folder / CONFIG).is_file() and json.loads((folder / CONFIG).read_text()) != config:
        foreign.append(CONFIG)
    if (folder / MADE).is_file() and (made := json.loads((folder / MADE).read_text())) != _made(widen):
        raise UsageError(
            f"{folder} holds weights that were widened {made.get('widen')} times, not {widen}",
            remedy="Choose another folder, or remove it",
        )
    if foreign:
        raise UsageError(
            f"{folder} holds {', '.join(foreign)}, not of this shape", remedy="Choose another folder, or remove it"
        )
    return [(name, shard) for name, shard in shards if name not in done]


def _starts_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def check_space(folder: Path, name: str, needed: int) -> None:
    """Refuse a shape that the disk has no room for, and say how many layers it has room for (exit code 6)."""

    def fits(free: int) -> str:
        most = SHAPES[name]["num_hidden_layers"]
        one, two = (total_bytes(shape_config(name, count)) for count in (1, 2))
        # Headers grow with the digits of their numbers: the count is tried, not only calculated.
        counts = range(min(most, (free - 2 * one + two) // (two - one)), 0, -1)
        fitting = next((count for count in counts if total_bytes(shape_config(name, count)) <= free), 0)
        return f"--layers {fitting} fits" if fitting else "not even one layer fits"

    check_disk(folder, needed, name, fits=fits)


def total_bytes(config: Mapping[str, Any]) -> int:
    """The size of a shape's weight files."""
    return sum(shard_bytes(shard) for _, shard in plan_shards(planned(config)))


# --- the command -------------------------------------------------------------------------------------------------


def make(name: str, output: Path, layers: int | None, *, widen: float = WIDEN, dry_run: bool = False) -> None:
    """Write a shape, or say what would be written. Raises `UsageError` for weights that are no numbers, or all zero."""
    if not 0 < widen < np.inf:
        raise UsageError(f"--widen {widen}: a number above 0 is needed")
    config = {**shape_config(name, layers), **TOKEN_IDS}
    shards = plan_shards(planned(config))
    left = _missing(output, config, shards, widen)
    parameters = sum(int(np.prod(tensor.shape)) for tensor in stored_tensors(config))
    for shard, tensors in shards:
        print(f"{shard}  {shard_bytes(tensors):>14,} bytes  {len(tensors)} tensors")
    size = sum(shard_bytes(tensors) for _, tensors in shards)
    print(f"{name}, {config['num_hidden_layers']} layers: {parameters:,} parameters, {size:,} bytes", flush=True)
    needed = sum(shard_bytes(tensors) for _, tensors in left)
    check_space(output, name, needed)
    if dry_run:
        print(f"{needed:,} bytes would be written" + (f", {size - needed:,} are there" if size > needed else ""))
        return
    output.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER:
        shutil.copyfile(DATA / DEMO / file, output / file)
    written = write_checkpoint(output, config, shards, normal_blocks(config, widen), widen)
    print(f"{output}: {len(written)} of {len(shards)} files written")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of a published model's true shape.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--layers", type=int, help="only the first ones; default: all")
    parser.add_argument("--widen", type=float, default=WIDEN, help="times q and k of usual weights; default: 3")
    parser.add_argument("--dry-run", action="store_true", help="print exact sizes, write nothing")
    chosen = parser.parse_args(arguments)
    try:
        make(chosen.name, chosen.output, chosen.layers, widen=chosen.widen, dry_run=chosen.dry_run)
    except LrconvertError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or chosen.output}: {error.strerror or error}", file=sys.stderr)
        return EnvironmentFailure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
