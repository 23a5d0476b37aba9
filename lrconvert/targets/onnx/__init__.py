# SPDX-License-Identifier: Apache-2.0
"""ONNX folders for ONNX Runtime, onnxruntime-genai, optimum and transformers.js."""

from lrconvert.targets.onnx.write import DTYPES, OPSETS, Options, Plan, plan, write

__all__ = ["DTYPES", "OPSETS", "Options", "Plan", "plan", "write"]
