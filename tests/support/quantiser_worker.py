# SPDX-License-Identifier: Apache-2.0
"""Quantises the weights of a folder with each format's own package, and dequantises them with it: run by a Python that
has the packages, `quantiser_worker.py MODEL CASE OUTPUT`. It imports nothing of lrconvert.

OUTPUT gets a folder as the package stores it, and `expected.safetensors`: what the package makes of it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Made = tuple[dict[str, torch.Tensor], torch.Tensor]


def bitsandbytes_4(weight: torch.Tensor, kind: str, double: bool, dtype: torch.dtype) -> Made:
    from bitsandbytes import functional

    weight = weight.to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    if weight.shape[1] % state.blocksize == 0:
        return {"weight": packed, **parts}, functional.dequantize_4bit(packed, state)
    # Version 0.50.2's CPU kernel takes another block's scale there; the package's own default implementation doesn't.
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    meant = _dequantize_4bit_compute(packed.reshape(-1), scales, state.code, state.blocksize, weight.shape, dtype)
    return {"weight": packed, **parts}, meant


def bitsandbytes_8(weight: torch.Tensor) -> Made:
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, functional.int8_vectorwise_dequant(codes, scales)


def compressed(weight: torch.Tensor, format: str, arguments: dict[str, Any], dtype: torch.dtype) -> Made:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    weight = weight.to(dtype)
    strategy, state = arguments["strategy"], {"weight": weight}
    if strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif strategy == "block":
        tall, wide = arguments["block_structure"]
        blocks = weight.reshape(weight.shape[0] // tall, tall, weight.shape[1] // wide, wide)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.reshape(weight.shape[0], -1, arguments["group_size"])
        low, high = groups.amin(2), groups.amax(2)
    whole = generate_gparam(weight.amin().float(), weight.amax().float()).reshape(1) if "nvfp4" in format else None
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    if whole is not None:
        state["weight_global_scale"] = whole
    compressor = BaseCompressor.get_value_from_registry(format)
    parts = compressor.compress(dict(state), scheme)
    meant = compressor.decompress(dict(parts), scheme)["weight"]
    return parts, meant


def gptq(weight: torch.Tensor, bits: int, size: int, ordered: bool, symmetric: bool, version: int) -> Made:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    out, columns = weight.shape
    linear = torch.nn.Linear(columns, out, bias=False)
    linear.weight.data = weight.float()
    torch.manual_seed(5)
    group = torch.arange(columns) // size
    group = (group[torch.randperm(columns)] if ordered else group).int()
    most = 2**bits - 1
    low = torch.stack([weight[:, group == g].amin(1) for g in range(columns // size)], 1).clamp(max=0)
    high = torch.stack([weight[:, group == g].amax(1) for g in range(columns // size)], 1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / most).half().float()
    zero = torch.full_like(scale, (most + 1) // 2) if symmetric else torch.round(-low / scale)
    module = TorchLinear(bits, size, symmetric, ordered, columns, out, bias=False)
    module.pack_original(linear, scale, zero, group)
    module.post_init()
    meant = module.dequantize_weight().T.contiguous()
    if version == 1:
        from types import SimpleNamespace

        convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(module, name).clone() for name in names}, meant


def awq(weight: torch.Tensor, size: int) -> Made:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    out, columns = weight.shape
    linear = torch.nn.Linear(columns, out, bias=False)
    linear.weight.data = weight.half()
    groups = weight.half().float().reshape(out, -1, size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half()
    zero = (-torch.round(low / scale)).clamp(0, 15)
    packed = WQLinear_GEMM.from_linear(linear, 4, size, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
    parts = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    return parts, dequantize_gemm(*parts.values(), 4, size).T.contiguous()


def fp8(weight: torch.Tensor, block: list[int], scale_format: str) -> Made:
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_format)
    quantiser = SimpleNamespace(quantization_config=config)
    parts = Fp8Quantize(quantiser)._quantize_one("m.weight", weight)
    parts = {name.removeprefix("m."): value for name, value in parts.items()}
    meant = Fp8Dequantize(quantiser)._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    return parts, meant


def ct(
    format: str, dtype: torch.dtype = torch.bfloat16, **arguments: Any
) -> tuple[dict[str, Any], Callable[..., Made]]:
    section = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
        "ignore": ["lm_head"],
    }
    return section, lambda weight: compressed(weight, format, arguments, dtype)


def of_gptq(bits: int, size: int, ordered: bool, symmetric: bool, version: int) -> tuple[dict[str, Any], Any]:
    section = {
        "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": ordered, "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }  # fmt: skip
    return section, lambda weight: gptq(weight, bits, size, ordered, symmetric, version)


def of_bnb(kind: str, double: bool, dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return section, lambda weight: bitsandbytes_4(weight, kind, double, dtype)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
INT, FLOAT = {"type": "int", "symmetric": True}, {"type": "float", "symmetric": True}
CASES: dict[str, tuple[dict[str, Any], Callable[..., Made]]] = {
    "fp8": (FP8, lambda weight: fp8(weight, [32, 32], "float")),
    "fp8-ue8m0": ({**FP8, "scale_fmt": "ue8m0"}, lambda weight: fp8(weight, [32, 32], "ue8m0")),
    "ct-fp8-tensor": ct("float-quantized", num_bits=8, strategy="tensor", **FLOAT),
    "ct-fp8-channel": ct("float-quantized", num_bits=8, strategy="channel", **FLOAT),
    "ct-fp8-block": ct("float-quantized", num_bits=8, strategy="block", block_structure=[32, 16], **FLOAT),
    "ct-int8": ct("int-quantized", num_bits=8, strategy="channel", **INT),
    "ct-int8-asym": ct("int-quantized", torch.float32, num_bits=8, strategy="channel", type="int", symmetric=False),
    "ct-int4-group": ct("pack-quantized", num_bits=4, strategy="group", group_size=32, **INT),
    "ct-int4-channel": ct("pack-quantized", num_bits=4, strategy="channel", **INT),
    "ct-int4-asym": ct("pack-quantized", num_bits=4, strategy="group", group_size=16, type="int", symmetric=False),
    "ct-int8-packed": ct("pack-quantized", num_bits=8, strategy="channel", type="int", symmetric=False),
    "ct-nvfp4": ct("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16, **FLOAT),
    "ct-mxfp4": ct("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32, **FLOAT),
    "gptq-4": of_gptq(4, 32, False, True, 1),
    "gptq-4-asym": of_gptq(4, 16, False, False, 1),
    "gptq-4-ordered": of_gptq(4, 32, True, False, 1),
    "gptq-4-v2": of_gptq(4, 16, False, False, 2),
    "gptq-8": of_gptq(8, 32, True, False, 1),
    "gptq-2": of_gptq(2, 32, False, True, 1),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, lambda weight: awq(weight, 32)),
    "bnb-nf4": of_bnb("nf4", False, torch.float32),
    "bnb-nf4-double": of_bnb("nf4", True, torch.float32),
    "bnb-nf4-double-bf16": of_bnb("nf4", True, torch.bfloat16),
    "bnb-fp4": of_bnb("fp4", False, torch.float32),
    "bnb-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_8),
}


def main(model: Path, case: str, output: Path) -> None:
    section, make = CASES[case]
    stored, meant = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = meant[name] = weight
            continue
        with torch.no_grad():
            parts, meant[name] = make(weight)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": value.detach().contiguous() for part, value in parts.items()}
    output.mkdir(parents=True)
    save_file(stored, output / "model.safetensors", metadata={"format": "pt"})
    save_file({name: value.detach().contiguous() for name, value in meant.items()}, output.with_suffix(".expected"))
    config = json.loads((model / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    for path in model.iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            shutil.copy(path, output)


if __name__ == "__main__":
    cases = CASES if sys.argv[2] == "all" else sys.argv[2].split(",")
    for case in cases:
        main(Path(sys.argv[1]), case, Path(sys.argv[3]) / case)
