# SPDX-License-Identifier: Apache-2.0
"""Record what llama.cpp's own quantisation makes of small models: tests/data/quantised.json.

    python tools/quantise_reference.py LIBRARY --version "llama.cpp v0.5.0, @node-llama-cpp/linux-x64 3.22.1"

LIBRARY is a folder that holds libllama and libggml with `llama_model_quantize`, as the npm packages
`@node-llama-cpp/<platform>` have them (on x86-64: builds for ARM round some values the other way). The tests compare
the types and bytes of lrconvert with the record, so they need no such library.

Only columns, names and numbers of the metadata decide how a tensor is quantised: the models here have a few rows a
tensor and would not run.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, LlamaFileType

from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.runtimes.llama_library import find_library, load

RECORD = Path(__file__).resolve().parents[1] / "tests" / "data" / "quantised.json"
# What llama_model_quantize knows and lrconvert does not write: ternary and experimental types.
_LEFT_OUT = ("GUESSED", "TQ", "MXFP4", "NVFP4", "Q1_0")
FILE_TYPES = {
    kind.name.partition("_")[2].lower(): kind
    for kind in LlamaFileType
    if not any(part in kind.name for part in _LEFT_OUT)
}


# --- models ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceModel:
    """A model to quantise. `digests`: the record holds one a tensor, for some layers, besides one for the file."""

    name: str
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    hidden: int = 256
    ffn: int = 512
    rows: int = 3
    digests: bool = False
    experts: int = 0  # in a layer, in one tensor for each of an MLP's products

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in NumPy's order."""
        attention = ("attn_qkv",) if self.architecture == "phi3" else ("attn_q", "attn_k", "attn_v")
        mlp = ("ffn_up",) if self.architecture == "phi3" else ("ffn_gate", "ffn_up")
        wide = dict.fromkeys((*attention, "attn_output", *mlp), (self.rows, self.hidden))
        layer = {f"{role}.weight": shape for role, shape in wide.items()}
        layer |= {"ffn_down.weight": (self.rows, self.ffn), "attn_norm.weight": (self.hidden,)}
        if self.experts:
            of_mlp = [name for name in layer if name.startswith("ffn_")]
            stacked = {name.replace(".", "_exps."): (self.experts, *layer.pop(name)) for name in of_mlp}
            layer |= {"ffn_gate_inp.weight": (self.experts, self.hidden), **stacked}
        if self.architecture == "llama":
            layer["attn_q.bias"] = (self.rows,)
        outer = ("token_embd.weight",) if self.tied else ("token_embd.weight", "output.weight")
        vectors = {"output_norm.weight": (self.hidden,), "rope_factors_long.weight": (8,)}
        vectors |= {"rope_factors_short.weight": (8,)}
        shapes = dict.fromkeys(outer, (self.rows, self.hidden)) | vectors
        return shapes | {f"blk.{n}.{name}": shape for n in range(self.layers) for name, shape in layer.items()}


MODELS = (
    ReferenceModel("llama", "llama", layers=16, heads=8, kv_heads=8, digests=True),
    ReferenceModel("llama-tied", "llama", layers=17, heads=8, kv_heads=2, tied=True, digests=True),
    ReferenceModel("llama-gqa3", "llama", layers=27, heads=24, kv_heads=8),
    ReferenceModel("llama-gqa8", "llama", layers=32, heads=32, kv_heads=4),
    ReferenceModel("llama-shallow", "llama", layers=3, heads=8, kv_heads=2),
    ReferenceModel("llama-288", "llama", layers=16, heads=8, kv_heads=8, hidden=288, digests=True),
    ReferenceModel("llama-288-tied", "llama", layers=8, heads=8, kv_heads=1, hidden=288, ffn=544, tied=True),
    ReferenceModel("llama-100", "llama", layers=2, heads=4, kv_heads=4, hidden=100),
    ReferenceModel("llama-ffn-1000", "llama", layers=2, heads=4, kv_heads=4, ffn=1000),
    ReferenceModel("llama-one-row", "llama", layers=2, heads=4, kv_heads=4, rows=1),
    ReferenceModel("llama-80", "llama", layers=80, heads=64, kv_heads=8, rows=2, ffn=256),
    ReferenceModel("llama-80-gqa2", "llama", layers=80, heads=64, kv_heads=32, rows=2, ffn=256),
    ReferenceModel("llama-80-gqa1", "llama", layers=80, heads=64, kv_heads=64, rows=2, ffn=256),
    ReferenceModel("llama-4-experts", "llama", layers=17, heads=8, kv_heads=4, rows=2, digests=True, experts=4),
    ReferenceModel("llama-8-experts", "llama", layers=32, heads=8, kv_heads=2, rows=2, ffn=256, experts=8),
    ReferenceModel("llama-8-experts-tied", "llama", layers=9, heads=8, kv_heads=8, rows=2, tied=True, experts=8),
    ReferenceModel("phi3", "phi3", layers=32, heads=32, kv_heads=32, digests=True),
    ReferenceModel("phi3-gqa4", "phi3", layers=40, heads=40, kv_heads=10, tied=True),
    ReferenceModel("phi3-80", "phi3", layers=80, heads=64, kv_heads=8, rows=2, ffn=256),
)


def _uniform(count: int, *seed: int) -> np.ndarray[Any, Any]:
    """Numbers in [-1, 1): of raw bits, which are the same in every version of NumPy."""
    bits = np.random.PCG64(seed).random_raw(count)
    return (bits >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1


def values(model: ReferenceModel, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A tensor: float32, most values small, a few ten times as large, as weights are."""
    seed = zlib.crc32(f"{model.name} {name}".encode())
    count = int(np.prod(shape))
    small, large = _uniform(count, seed, 0), _uniform(count, seed, 1)
    return (0.02 * small + 0.2 * large**9).astype(np.float32).reshape(shape)


def importance(model: ReferenceModel, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any] | None:
    """A tensor's row of the importance matrix, or one for each expert: float32 [1 or experts, columns]. As in a real
    one, the embedding has none."""
    if not name.endswith(".weight") or name == "token_embd.weight":
        return None
    experts = shape[0] if len(shape) == 3 else 1
    seed = zlib.crc32(f"{model.name} {name}".encode())
    return (np.abs(_uniform(experts * shape[-1], seed, 2)) ** 3 + 1e-3).astype(np.float32).reshape(experts, -1)


def matrix(model: ReferenceModel) -> dict[str, np.ndarray[Any, Any]]:
    """The importance matrix of a model: what `importance` has for its tensors."""
    rows = {name: importance(model, name, shape) for name, shape in model.shapes().items() if len(shape) > 1}
    return {name: row for name, row in rows.items() if row is not None}


def write_model(model: ReferenceModel, path: Path) -> None:
    """The model as a GGUF file in F32."""
    writer = GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(model.rows)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    for name, shape in model.shapes().items():
        writer.add_tensor(name, values(model, name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- llama_model_quantize --------------------------------------------------------------------------------


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Quantiser:
    """`llama_model_quantize` of a library."""

    def __init__(self, folder: str | Path) -> None:
        self._functions: Any = load(find_library(folder))
        self.messages: list[str] = []
        self._log = _LOG(lambda level, text, _: self.messages.append((text or b"").decode(errors="replace")))
        self._functions.llama_log_set(self._log, None)
        self._functions.llama_model_quantize_default_params.restype = _Parameters
        defaults = self._functions.llama_model_quantize_default_params()
        # The layout moves between versions. Only bytes that a different layout would hardly have by chance:
        if (defaults.nthread, defaults.ftype, defaults.quantize_output_tensor) != (0, 7, True) or defaults.imatrix:
            raise SystemExit(f"{folder}: llama_model_quantize_params has another layout than this script knows")

    def __call__(
        self,
        source: Path,
        target: Path,
        file_type: int,
        matrix: Mapping[str, np.ndarray[Any, Any]] | None = None,
        threads: int = 1,
    ) -> bool:
        """Quantise a file; False where llama.cpp refuses (`messages` says why)."""
        parameters = self._functions.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = threads, file_type
        self.messages.clear()
        if matrix is not None:
            rows = [_Importance(name.encode(), row.ctypes.data, row.size) for name, row in matrix.items()]
            array = (_Importance * (len(rows) + 1))(*rows)
            parameters.imatrix = ctypes.addressof(array)
        call = self._functions.llama_model_quantize
        call.restype = ctypes.c_uint32
        return call(bytes(source), bytes(target), ctypes.byref(parameters)) == 0


# --- the record ------------------------------------------------------------------------------------------


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of_file(digests: Mapping[str, str]) -> str:
    """One digest for the tensors of a file, from theirs."""
    return digest("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode())


def pack(types: Mapping[str, str]) -> dict[str, str]:
    """Types by tensor name as types by role: `Q6_K*2 Q4_K` for the layers from 0, roles that agree together."""
    roles: dict[str, list[str]] = {}
    for name in sorted(types, key=lambda name: (_layer(name), name)):
        roles.setdefault(_role(name), []).append(types[name])
    packed: dict[str, str] = {}
    for role, kinds in roles.items():
        runs = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
        text = " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)
        packed[text] = f"{packed[text]} {role}" if text in packed else role
    return packed


def unpack(packed: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """`pack` undone."""
    roles: dict[str, list[str]] = {}
    for text, together in packed.items():
        runs = [run.partition("*") for run in text.split()]
        kinds = [kind for kind, _, count in runs for _ in range(int(count or 1))]
        roles |= dict.fromkeys(together.split(), kinds)
    return {name: roles[_role(name)][max(_layer(name), 0)] for name in names}


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _role(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def read_quantised(path: Path) -> Iterator[tuple[str, GGMLQuantizationType, bytes]]:
    """Name, type and data of every tensor."""
    for name, tensor in read_header(path).tensors.items():
        with path.open("rb") as file:
            file.seek(tensor.offset)
            yield name, tensor.type, file.read(tensor.nbytes)


def _record_model(model: ReferenceModel, quantise: Quantiser, folder: Path) -> dict[str, Any]:
    source = folder / "source.gguf"
    write_model(model, source)
    record = {"plain": _record_runs(model, quantise, source, None)}
    record["weighted"] = _record_runs(model, quantise, source, matrix(model))
    _leave_out_repeated(record["plain"], record["weighted"])
    return record


def _record_runs(
    model: ReferenceModel, quantise: Quantiser, source: Path, matrix: Mapping[str, np.ndarray[Any, Any]] | None
) -> dict[str, Any]:
    """`types`: by scheme, packed, None where llama.cpp refuses; `files`: a digest by scheme; `tensors`: digests by
    type and name, of those outside the layers and in the first."""
    target = source.with_name("target.gguf")
    record: dict[str, Any] = {"types": {}, "files": {}, "tensors": {}}
    for scheme, file_type in FILE_TYPES.items():
        record["types"][scheme] = record["files"][scheme] = None
        if not quantise(source, target, file_type, matrix):
            continue
        if read_header(target).metadata["general.file_type"] != file_type:
            raise SystemExit(f"{scheme}: another general.file_type than {file_type}")
        types, digests = {}, {}
        for name, kind, data in read_quantised(target):
            types[name], digests[name] = kind.name, digest(data)
            if kind.name != "F32" and model.digests and _layer(name) < 1:
                record["tensors"].setdefault(kind.name, {})[name] = digests[name]
        record["types"][scheme], record["files"][scheme] = pack(types), digest_of_file(digests)
    return record


def _leave_out_repeated(plain: dict[str, Any], weighted: dict[str, Any]) -> None:
    """What an importance matrix does not change is in the record once."""
    weighted["types"] = {s: types for s, types in weighted["types"].items() if plain["types"][s] != types}
    weighted["tensors"] = {
        kind: {name: d for name, d in digests.items() if plain["tensors"].get(kind, {}).get(name) != d}
        for kind, digests in weighted["tensors"].items()
    }


@dataclass(frozen=True)
class Run:
    """One file that llama.cpp made: of a model, under a scheme, with an importance matrix or without."""

    model: ReferenceModel
    scheme: str
    weighted: bool
    types: dict[str, str] | None  # by tensor; None: refused
    digest: str | None


def read_record(path: Path = RECORD) -> Iterator[Run]:
    """The record, run by run."""
    record = json.loads(path.read_text(encoding="utf-8"))["models"]
    for model in MODELS:
        names = list(model.shapes())
        plain, weighted = record[model.name]["plain"], record[model.name]["weighted"]
        for scheme in FILE_TYPES:
            for runs in (plain, weighted):
                packed = runs["types"].get(scheme, plain["types"][scheme])
                types = None if packed is None else unpack(packed, names)
                yield Run(model, scheme, runs is weighted, types, runs["files"][scheme])


def read_digests(path: Path = RECORD) -> Iterator[tuple[ReferenceModel, bool, str, str, str]]:
    """The digests of single tensors: model, weighted, type, tensor, digest."""
    record = json.loads(path.read_text(encoding="utf-8"))["models"]
    for model in MODELS:
        for key in ("plain", "weighted"):
            for kind, digests in record[model.name][key]["tensors"].items():
                for name, value in digests.items():
                    yield model, key == "weighted", kind, name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="folder with libllama and libggml")
    parser.add_argument("--version", required=True, help="what library it is, for the record")
    parser.add_argument("--output", type=Path, default=RECORD, help="where the record goes")
    arguments = parser.parse_args()
    quantise = Quantiser(arguments.library)
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            models[model.name] = _record_model(model, quantise, Path(folder))
            print(model.name, len(json.dumps(models[model.name])), flush=True)
    record = {"library": arguments.version, "models": models}
    arguments.output.write_text(json.dumps(record, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
