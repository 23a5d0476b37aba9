# SPDX-License-Identifier: Apache-2.0
"""An adapter that a model has already: to merge it twice would double what was trained, and no later check would see
it, since the reference merges what the manifest names."""

from __future__ import annotations

from typing import Any

from lrconvert.artifact.manifest import Manifest, manifest_path
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import Adapter
from lrconvert.errors import InputError, LrconvertError


def check_not_merged(model: Model, adapter: Adapter, *, of_recipe: bool) -> None:
    """Raises `InputError` where the model's manifest names this adapter, or, for the adapter of a recipe (`of_recipe`),
    any: that was trained on the model alone."""
    source = _source(model)
    before = source.get("adapter")
    if before is None:
        return
    same = before.get("weights_sha256") == adapter.description["weights_sha256"]
    if same or of_recipe:
        named = adapter.reference if same else before.get("reference")
        trained = "" if same else f", and {adapter.reference} was trained without it"
        raise InputError(
            f"{model.reference}: adapter {named} is merged into it already "
            f"({manifest_path(model.checkpoint.path).name}){trained}",
            remedy=f"Name the model that it was made from: {source.get('model')}",
        )


def _source(model: Model) -> dict[str, Any]:
    """What the manifest beside the model says that it was made from."""
    if not manifest_path(model.checkpoint.path).is_file():
        return {}
    try:
        return Manifest.read(model.checkpoint.path).source
    except LrconvertError:  # `verify` says what is wrong with it
        return {}
