# SPDX-License-Identifier: Apache-2.0
"""ONNX folders for ONNX Runtime, onnxruntime-genai, optimum and transformers.js."""

from lrconvert.artifact.target import Target
from lrconvert.targets.onnx.card import CARD_TEXT
from lrconvert.targets.onnx.checks import checks
from lrconvert.targets.onnx.plan import DTYPES, OPSETS, Options, plan
from lrconvert.targets.onnx.read import explain, foreign, open_artifact, recognises

TARGET = Target(
    name="onnx",
    title="an ONNX folder",
    recognises=recognises,
    plan=plan,
    open=open_artifact,
    checks=checks,
    runtime="onnxruntime",
    stored=True,
    card=CARD_TEXT,
    explain=explain,
    foreign=foreign,
    needs=(("onnx", "onnx"), ("onnxruntime", "onnx")),
    reads_with=(("onnx", "onnx"),),
)

__all__ = ["DTYPES", "OPSETS", "TARGET", "Options", "plan"]
