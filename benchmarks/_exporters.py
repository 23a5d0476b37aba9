# SPDX-License-Identifier: Apache-2.0
"""The other ways to ONNX that `onnx_baseline.py` compares with: their command lines, in environments of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Command = Callable[[Path, Path, str], list[str | Path]]  # source, output, dtype → command line

# torch.onnx.export has no command line; this is what its page shows for a model with a dynamic length.
_DYNAMO = """
import sys, torch, transformers
source, output, dtype = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()

class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits

ids = torch.arange(100)[None]
length = {"input_ids": {1: torch.export.Dim("length", min=2, max=2**20)}}
made = torch.onnx.export(Logits(), (ids,), dynamo=True, opset_version=23, dynamic_shapes=length,
                         input_names=["input_ids"], output_names=["logits"], verbose=False)
made.save(output, external_data=True)
"""
# transformers 5 exports by itself; its page shows this.
_TRANSFORMERS = """
import sys, torch, transformers
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
source, output, dtype = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
ids = torch.arange(100)[None]
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True)).save_pretrained(output)
"""
_LONG_NAMES = {"f32": "float32", "f16": "float16"}
_NUMBERED = {"f32": "fp32", "f16": "fp16"}


def tools(genai: Path, optimum: Path) -> dict[str, Command]:
    """The baselines: an environment with transformers 5, and that of optimum, which needs 4.57."""

    def builder(source: Path, output: Path, dtype: str) -> list[str | Path]:
        options = ("-i", source, "-o", output, "-p", _NUMBERED[dtype], "-e", "cpu", "-c", output.parent / "cache")
        return [genai, "-m", "onnxruntime_genai.models.builder", *options]

    def dynamo(source: Path, output: Path, dtype: str) -> list[str | Path]:
        output.mkdir()
        return [genai, "-c", _DYNAMO, source, output / "model.onnx", _LONG_NAMES[dtype]]

    def traced(source: Path, output: Path, dtype: str) -> list[str | Path]:
        options = ("--task", "text-generation-with-past", "--dtype", _NUMBERED[dtype], "--no-post-process")
        return [optimum.with_name("optimum-cli"), "export", "onnx", "--model", source, *options, output]

    def mobius(source: Path, output: Path, dtype: str) -> list[str | Path]:
        return [genai.with_name("mobius"), "build", "--config", source, "--dtype", dtype, output]

    def own(source: Path, output: Path, dtype: str) -> list[str | Path]:
        return [genai, "-c", _TRANSFORMERS, source, output, _LONG_NAMES[dtype]]

    return {
        "genai builder": builder,
        "optimum": traced,
        "torch dynamo": dynamo,
        "transformers' exporter": own,
        "mobius": mobius,
    }
