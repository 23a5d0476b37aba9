# SPDX-License-Identifier: Apache-2.0
"""What code can express of a recipe, and what other programs do with one."""
