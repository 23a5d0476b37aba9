# SPDX-License-Identifier: Apache-2.0
"""Writes the JSON Schema of the recipe file, generated from `recipe.Recipe`: `python -m lrconvert.schema`."""

from __future__ import annotations

import json
from pathlib import Path

from lrconvert.recipe import json_schema

PATH = Path(__file__).parent / "data" / "recipe.schema.json"

if __name__ == "__main__":
    PATH.write_text(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
