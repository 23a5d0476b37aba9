# SPDX-License-Identifier: Apache-2.0
"""What a manifest says of the model an artifact was made from, so that it can be known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lrconvert.checkpoint.base import Model
from lrconvert.errors import InputError

COPY_BYTES = 8 * 2**20
_MOST = 100 * 2**20  # the longest header that safetensors allows


def describe_source(model: Model) -> dict[str, Any]:
    """What the manifest says of the model: its name, family, and a digest of every input.

    Weights are described by size and header digest, not hashed whole: a hard link costs no reading, and the
    artifact's own digests are completed when `verify` reads its files anyway.
    """
    checkpoint = model.checkpoint
    inputs: dict[str, Any] = {}
    for path in checkpoint.weight_files():
        inputs[path.name] = {"size": path.stat().st_size, "head_sha256": _head_digest(path)}
    config = json.dumps({**checkpoint.config, **checkpoint.outdated}, sort_keys=True, ensure_ascii=False)
    return {
        "model": model.reference,
        "format": checkpoint.format,
        "family": model.family.name,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "weights": inputs,
        **({"quantised": model.quantised} if checkpoint.quantised_with else {}),
        **({} if checkpoint.part_of is None else {"part_of": dict(checkpoint.part_of)}),
    }


def snapshot(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change of files that are about to be read."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def check_unchanged(before: Mapping[Path, tuple[int, int]]) -> None:
    """`InputError` when one of the files is another than when `before` was taken."""
    try:
        changed = [path for path, stamp in snapshot(before).items() if stamp != before[path]]
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: vanished while it was read", remedy="Convert again") from error
    if changed:
        names = ", ".join(str(path) for path in changed)
        raise InputError(f"{names}: changed while it was read", remedy="Wait until nothing writes to it; convert again")


def _head_digest(path: Path) -> str:
    """Digest of a safetensors header, or of another file's first MiB: names, types, shapes and offsets."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 2**20
        return hashlib.sha256(file.read(min(size, _MOST))).hexdigest()


def sha256_of(path: Path, done: Callable[[int], None] | None = None) -> str:
    """The digest of a file, read in parts. `done` counts its bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(COPY_BYTES):
            digest.update(part)
            if done is not None:
                done(len(part))
    return digest.hexdigest()
