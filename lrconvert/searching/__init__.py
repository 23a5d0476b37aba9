# SPDX-License-Identifier: Apache-2.0
"""Searching factor sets: the paper's evolution and a guided search that needs fewer evaluations (docs/search.md)."""
