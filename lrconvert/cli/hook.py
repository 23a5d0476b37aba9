# SPDX-License-Identifier: Apache-2.0
"""The pre-commit hook: `verify --files-only` for every artifact that has one of the changed files.

python -m lrconvert.cli.hook my-model/config.json model.Modelfile
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from lrconvert.artifact.manifest import FILES, MANIFEST, manifest_path


def artifacts_of(names: Iterable[str]) -> list[Path]:
    """The artifacts that files belong to: a folder with a manifest above them, or the GGUF that is named like them."""
    found: dict[Path, None] = {}
    for path in map(Path, names):
        stem = path.name.removesuffix(f".{MANIFEST}") if path.name.endswith(f".{MANIFEST}") else path.stem
        files = [path.with_name(f"{stem}{suffix}") for suffix in FILES]
        beside = [file for file in files if manifest_path(file).is_file()]
        above = [folder for folder in path.parents if (folder / MANIFEST).is_file()][:1]
        found |= dict.fromkeys(beside or above)
    return sorted(found)


def main(names: list[str]) -> int:
    """The highest exit code of all."""
    from lrconvert.cli import run

    return max((run(["verify", "--files-only", str(artifact)]) for artifact in artifacts_of(names)), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
