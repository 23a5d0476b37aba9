# SPDX-License-Identifier: Apache-2.0
"""`lrconvert gguf`: bake a recipe into a GGUF for llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import _bake

_UNITS = {"m": 10**6, "g": 10**9}


class Bytes(click.ParamType):
    """A size: 2G or 500M (powers of ten, as llama.cpp's gguf-split counts)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        matched = re.fullmatch(r"(\d{1,6})([mg])", str(value).strip().lower())
        if not matched or int(matched[1]) == 0:
            self.fail(f"{value!r} is not a size; examples: 2G, 500M", param, ctx)
        return int(matched[1]) * _UNITS[matched[2]]


@click.command(name="gguf", short_help="Bake a recipe into a GGUF for llama.cpp.")
@_bake.shared_options
@_bake.output_option("FILE", "Output file.")
@click.option("--type", "kind", metavar="TYPE", help="f32, f16, bf16, q8_0, q4_k_m and llama.cpp's other types; "
              "default: as stored.")  # fmt: skip
@click.option("--tokenizer-pre", "pre", metavar="NAME", help="llama.cpp's name for the tokenizer's pre-tokenizer.")
@click.option("--split-max-size", "split", type=Bytes(), help="Write several files of at most this size: 2G, 500M.")
@click.option("--fold-attention-factor", "fold", is_flag=True, help="Fold the attention factor into q and k: exact, "
              "also after context shifts.")  # fmt: skip
@click.option("--static-long", "static", is_flag=True, help="Use the long factors only, at every length.")
@click.option("--architecture", metavar="NAME", help="Write as another architecture of llama.cpp; for Qwen3, "
              "step35 takes any two sets.")  # fmt: skip
@click.option("--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="Importance matrix (GGUF format).")
@click.option(
    "--llama-library", "library", metavar="PATH", help="libllama to quantise with; default: an installed one."
)
@click.option("--modelfile", is_flag=True, help="Also write an Ollama Modelfile with the right num_ctx.")
@click.option("--allow-lossy", "lossy", is_flag=True, help="Drop what llama.cpp can't express, and record it.")
def command(
    kind: str | None,
    pre: str | None,
    split: int | None,
    fold: bool,
    static: bool,
    architecture: str | None,
    imatrix: Path | None,
    library: str | None,
    modelfile: bool,
    lossy: bool,
    **shared: Any,
) -> int | None:
    """Bake RECIPE into MODEL: a GGUF that llama.cpp, Ollama and LM Studio run with the recipe's factors.

    A GGUF as MODEL is re-baked: it gets factors and metadata, and no byte of its weights changes. That also repairs
    files whose rope scaling is incomplete.

    \b
    lrconvert recipe derive demo --method yarn --factor 8 --uniform -o demo-8x
    lrconvert gguf demo --recipe demo-8x --type q8_0 -o demo-32k.gguf
    """
    from lrconvert.targets.gguf import Options

    options = Options(
        window=shared["window"],
        type=kind,
        static=static,
        fold=fold,
        lossy=lossy,
        tokenizer_pre=pre,
        split=split,
        imatrix=imatrix,
        modelfile=modelfile,
        library=library,
        lift=shared["lift"],
        architecture=architecture,
        pad=shared["pad"],
    )
    return _bake.run("gguf", options, shared)
