# SPDX-License-Identifier: Apache-2.0
"""lrconvert: bake LongRoPE recipes into checkpoints, and prove that the result computes what they say.

    artifact = lrconvert.hf("demo", "demo-8x", "demo-32k")
    assert lrconvert.verify(artifact.path).passed

The command line's verbs, one function each (docs/python.md). A verb is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrconvert.api.baking import Artifact, gguf, hf, onnx
    from lrconvert.api.inspecting import Inspection, inspect
    from lrconvert.api.verifying import verify
    from lrconvert.evals import api as evaluate
    from lrconvert.extending.api import ExtendResult, extend
    from lrconvert.hub.publish import push
    from lrconvert.parity.report import Report
    from lrconvert.searching.api import SearchResult, search

__version__ = "0.1.0"
# Name: the module that has it; for `evaluate`, which is a group of verbs, the module itself.
_API = {
    "Artifact": "lrconvert.api.baking",
    "ExtendResult": "lrconvert.extending.api",
    "Inspection": "lrconvert.api.inspecting",
    "Report": "lrconvert.parity.report",
    "SearchResult": "lrconvert.searching.api",
    "evaluate": "lrconvert.evals.api",
    "extend": "lrconvert.extending.api",
    "gguf": "lrconvert.api.baking",
    "hf": "lrconvert.api.baking",
    "inspect": "lrconvert.api.inspecting",
    "onnx": "lrconvert.api.baking",
    "push": "lrconvert.hub.publish",
    "search": "lrconvert.searching.api",
    "verify": "lrconvert.api.verifying",
}
__all__ = ["Artifact", "ExtendResult", "Inspection", "Report", "SearchResult", "evaluate", "extend", "gguf", "hf",
           "inspect", "onnx", "push", "search", "verify"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_API[name])
    return module if name == "evaluate" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
