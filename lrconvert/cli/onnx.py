# SPDX-License-Identifier: Apache-2.0
"""`lrconvert onnx`: bake a recipe into an ONNX folder."""

from __future__ import annotations

from typing import Any

import click

from lrconvert.cli import _bake
from lrconvert.cli._common import Precision


@click.command(name="onnx", short_help="Bake a recipe into an ONNX folder.")
@_bake.shared_options
@_bake.output_option("DIR", "Output folder.")
@click.option("--dtype", type=Precision("f32", "bf16", "f16", "int8", "int4"), default="f32", show_default=True,
              help="int8 and int4 quantise the weights of matrix products; the rotation stays exact.")  # fmt: skip
@click.option("--attention", type=click.Choice(["gqa", "standard"]), default="gqa", show_default=True,
              help="ONNX Runtime's fused operator, or the standard one: slower, for left-padded batches and "
              "other runtimes.")  # fmt: skip
@click.option("--opset", type=int, default=23, show_default=True, help="Version of the standard operators.")
@click.option("--no-double", "no_double", is_flag=True, help="Angles from float32 tables, for execution providers "
              "without float64.")  # fmt: skip
@click.option("--genai-rewind", is_flag=True, help="Make onnxruntime-genai recompute the sequence where it crosses "
              "the original window (4096 or 8192 tokens).")  # fmt: skip
def command(dtype: str, attention: str, opset: int, no_double: bool, genai_rewind: bool, **shared: Any) -> int | None:
    """Bake RECIPE into MODEL: an ONNX folder that ONNX Runtime, onnxruntime-genai, optimum and transformers.js run.

    The rotation is a function of standard operators inside the graph: no library has to be installed for it.

    \b
    lrconvert recipe derive demo --method yarn --factor 8 -o demo-8x
    lrconvert onnx demo --recipe demo-8x -o demo-onnx
    """
    from lrconvert.targets.onnx import Options

    options = Options(
        shared["window"], dtype, attention, opset, not no_double, genai_rewind, shared["lift"], shared["pad"]
    )
    return _bake.run("onnx", options, shared)
