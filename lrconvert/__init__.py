# SPDX-License-Identifier: Apache-2.0
"""lrconvert: bake LongRoPE recipes into checkpoints, and prove that the result computes what they say."""

__version__ = "0.1.0"
