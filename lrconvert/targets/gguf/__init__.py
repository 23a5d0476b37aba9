# SPDX-License-Identifier: Apache-2.0
"""The GGUF target: a file for llama.cpp and what is built on it."""

from lrconvert.targets.gguf.write import Options, Plan, plan, write

__all__ = ["Options", "Plan", "plan", "write"]
