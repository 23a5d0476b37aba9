# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: native config keys, custom modeling code beside them, weights as they were."""

from lrconvert.checkpoint.rope_config import FoundRope, read_rope
from lrconvert.targets.hf.write import Plan, plan, write

__all__ = ["FoundRope", "Plan", "plan", "read_rope", "write"]
