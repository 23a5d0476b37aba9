# SPDX-License-Identifier: Apache-2.0
"""Progressive extension: from a model and a plan to a recipe for a window many times the model's own."""
