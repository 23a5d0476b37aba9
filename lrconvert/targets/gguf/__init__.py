# SPDX-License-Identifier: Apache-2.0
"""GGUF files for llama.cpp and what is built on it."""

from lrconvert.artifact.target import Target
from lrconvert.targets.gguf.card import CARD_TEXT
from lrconvert.targets.gguf.checks import checks
from lrconvert.targets.gguf.plan import Options, plan
from lrconvert.targets.gguf.read import explain, open_artifact, recognises, refuses

TARGET = Target(
    name="gguf",
    title="a GGUF",
    recognises=recognises,
    plan=plan,
    open=open_artifact,
    checks=checks,
    runtime="llama.cpp",
    stored=True,
    capability="llama.cpp",
    card=CARD_TEXT,
    refuses=refuses,
    explain=explain,
    repairs=True,
)

__all__ = ["TARGET", "Options", "plan"]
