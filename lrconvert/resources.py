# SPDX-License-Identifier: Apache-2.0
"""Where the package's own files lie. (importlib.resources would cost a short command a tenth of its time.)"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
DATA = PACKAGE / "data"
