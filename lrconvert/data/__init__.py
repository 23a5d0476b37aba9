# SPDX-License-Identifier: Apache-2.0
"""Where the package's own files lie. (importlib.resources would cost a short command a tenth of its time.)"""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent
# A wheel carries the recipes inside the package (hatch_build.py); a checkout has them at its top.
_INSIDE = DATA / "recipes"
RECIPES = _INSIDE if any(_INSIDE.glob("*/recipe.json")) else DATA.parents[1] / "recipes"
