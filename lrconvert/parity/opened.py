# SPDX-License-Identifier: Apache-2.0
"""An artifact that a backend has loaded, with what its answers are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.parity.readings import Readings
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.backend import Backend, Rounding
from lrconvert.runtimes.base import Session


@dataclass(frozen=True)
class Opened:
    """`spec` is what the backend can express of the recipe; `dtype` is what its products are computed in, as its
    tolerances call it; `rounding` is what else it rounds; `readings` are prompts that it has answered."""

    artifact: Path
    backend: Backend
    session: Session
    spec: RopeSpec
    reference: ReferenceRunner
    dtype: str
    rounding: Rounding
    readings: Readings

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def vocabulary(self) -> int:
        return self.reference.model.shape.vocab

    @property
    def routed(self) -> bool:
        """Whether rounding may choose other experts for a token than the reference does."""
        return self.reference.model.shape.experts is not None and self.dtype not in ("float32", "F32")

    def answering(self, what: str) -> Any:
        """The session as the protocol that an answer stands for (`runtimes.answers`)."""
        assert what in self.session.answers, f"{self.name} answers no {what}"
        return self.session
