# SPDX-License-Identifier: Apache-2.0
"""Perplexity, passkey retrieval and short benchmarks of models and artifacts (docs/evaluations.md)."""
