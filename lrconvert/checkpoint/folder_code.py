# SPDX-License-Identifier: Apache-2.0
"""Code in a model's folder: which of it is ours, byte for byte.

Some programs run what a folder brings: transformers what `auto_map` names and `custom_generate`, mlx-lm what
`model_file` names, transformers' kernels what an attention implementation with a slash names. A folder is input from
strangers, so only a modeling_longrope.py that lrconvert once wrote is run; `data/modeling_code.json` has the digest of
each. For all other code the user has to vouch (`--trust-code`).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lrconvert.checkpoint.base import read_json
from lrconvert.data import DATA
from lrconvert.errors import UnsupportedError

MODELING_FILE = "modeling_longrope.py"
AUTO_MAP = {"AutoModelForCausalLM": "modeling_longrope.LongRopeForCausalLM"}
KNOWN = DATA / "modeling_code.json"
OPTION = "--trust-code"

_CONFIG = "config.json"
_MOST_CODE = 2**20  # bytes; ours has some 18,000
# What transformers loads without a word of config.json: with its code, and always.
_GENERATE, _ADAPTER = "custom_generate", "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "generation_config.json")


@cache
def known_digests() -> frozenset[str]:
    """sha256 of every modeling_longrope.py that lrconvert ever wrote."""
    return frozenset(row["sha256"] for row in json.loads(KNOWN.read_text(encoding="utf-8")))


def refuses_custom(folder: Path) -> str | None:
    """Why the code that this folder brings for transformers is not run; None where all of it is ours.

    Raises `InputError` for a config.json that can't be read.
    """
    config = read_json(folder / _CONFIG)
    named = config.get("auto_map")
    values = list(named.values()) if isinstance(named, Mapping) else [named]
    if any(value not in AUTO_MAP.values() for value in values):
        other = next(value for value in values if value not in AUTO_MAP.values())
        return f"auto_map names {_quoted(other)}, which is not code of lrconvert"
    if os.path.lexists(folder / _GENERATE):
        return f"{_GENERATE} is in the folder: transformers runs its generate.py"
    if not (folder / MODELING_FILE).exists():  # nothing is there to run, and loading says so
        return refuses_native(folder)
    if (code := _code(folder / MODELING_FILE)) is None:
        return f"{MODELING_FILE} is no plain file of at most {_MOST_CODE} bytes"
    if hashlib.sha256(code).hexdigest() not in known_digests():
        return f"{MODELING_FILE} is not, byte for byte, one that lrconvert wrote"
    return refuses_native(folder)


def refuses_native(folder: Path) -> str | None:
    """The same of what transformers does without `trust_remote_code`: it runs kernels that a config names, and loads
    another model in place of this one."""
    if os.path.lexists(folder / _ADAPTER):
        return f"{_ADAPTER} is in the folder: transformers loads the model that it names"
    config = read_json(folder / _CONFIG)
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in (value := str(config.get(key) or "")):
            return f"{key} names {_quoted(value)}, code of a repository of kernels"
    return None


def refuses_mlx(folder: Path) -> str | None:
    """The same of mlx-lm, which runs what `model_file` names."""
    named = read_json(folder / _CONFIG).get("model_file")
    return None if named is None else f"model_file names {_quoted(named)}, which mlx-lm would run"


def check_trusted(folder: Path, refuses: Callable[[Path], str | None], *, trust_code: bool) -> None:
    """`UnsupportedError` (exit code 4) for code of strangers, unless the user vouches for it."""
    if not trust_code and (reason := refuses(folder)) is not None:
        raise UnsupportedError(f"{folder}: its code is not run: {reason}", remedy=remedy())


def remedy() -> str:
    """What to do about code that is not run."""
    return f"Name other code with --code, or, if you wrote this code or have read it, vouch for it with {OPTION}"


def stage(folder: Path, into: Path) -> Path:
    """A folder with our code as it was read and judged, the config and the weights (links), and nothing else.

    What is written is what was compared, so nothing can be put in its place before it runs. Raises `UnsupportedError`
    as `check_trusted`. `into` is an empty folder.
    """
    for name in (_CONFIG, MODELING_FILE):
        if (content := _code(folder / name)) is not None:
            (into / name).write_bytes(content)
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        (into / path.name).symlink_to(path.resolve())
    check_trusted(into, refuses_custom, trust_code=False)
    return into


def _code(path: Path) -> bytes | None:
    """The bytes of a small plain file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_CODE * (1 if path.suffix == ".py" else 64):
            return None
        return path.read_bytes()
    except OSError:
        return None


def _quoted(value: Any) -> str:
    return repr(value)[:80]
