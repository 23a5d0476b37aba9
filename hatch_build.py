# SPDX-License-Identifier: Apache-2.0
"""The wheel carries the recipes inside the package; an editable install reads those of the checkout."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RecipesHook(BuildHookInterface):
    """`force-include` in pyproject.toml would copy them into site-packages on an editable install too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["recipes"] = "lrconvert/data/recipes"
