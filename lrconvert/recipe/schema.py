# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of the recipe file, generated from `recipe.Recipe`.

`python -m lrconvert.recipe.schema` writes it, `--check` only says whether it is what would be written.
"""

from __future__ import annotations

import json
import sys

from lrconvert.data import DATA
from lrconvert.recipe import json_schema

PATH = DATA / "recipe.schema.json"


def main(arguments: list[str]) -> int:
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if arguments == ["--check"]:
        return 0 if PATH.read_text(encoding="utf-8") == text else 1
    PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
