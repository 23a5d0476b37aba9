# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: native config keys, custom modeling code beside them, weights as they were."""

from lrconvert.artifact.target import Target
from lrconvert.targets.hf.card import CARD_TEXT
from lrconvert.targets.hf.checks import checks
from lrconvert.targets.hf.plan import Options, plan
from lrconvert.targets.hf.read import open_artifact, recognises

TARGET = Target(
    name="hf",
    title="a Hugging Face folder",
    recognises=recognises,
    plan=plan,
    open=open_artifact,
    checks=checks,
    runtime="transformers",
    card=CARD_TEXT,
)

__all__ = ["TARGET", "Options", "plan"]
