# SPDX-License-Identifier: Apache-2.0
"""What the rows of the table share: how a fact is known, and kinds of programs."""

from __future__ import annotations

from typing import Literal

from lrconvert.engines.capability import Capability

# How a fact is known. What no test can ask where they run was seen once.
TESTED, MEASURED, READ = "tested", "measured 2026-11-25", "read 2026-11-25"
PICO = "KL against a float64 reference on pico models"


def config_reader(name: str, attention: Literal["one", "formula"] = "formula") -> Capability:
    """A program that reads the native keys: two sets, no start tokens."""
    return Capability(name, 2, False, attention, False, False)


def own_factors(name: str) -> Capability:
    """Code with an attention factor for each set, in keys of its own."""
    return Capability(name, 2, False, "per tier", False, False)


def families(*names: str) -> frozenset[str]:
    return frozenset(names)


# Those that were looked at when a program's row was made; whether it runs later ones so, nobody has asked.
FIRST = families("llama", "mistral", "qwen2", "qwen3", "phi3")
