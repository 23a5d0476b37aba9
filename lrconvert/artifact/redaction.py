# SPDX-License-Identifier: Apache-2.0
"""What may leave the machine: names instead of local paths, in cards and in published manifests."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import Model, read_json
from lrconvert.checkpoint.adapter import describe

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = r"[^\s\\/:*?\"'<>|,;()\[\]{}`]+"
# An absolute path, or one from a home folder, that isn't part of a URL or a word.
_LOCAL_PATH = re.compile(rf"(?<![\w:/\\.~-])(?:~|[A-Za-z]:)?[\\/]+(?:{_NAME}[\\/]+)*(?P<last>{_NAME})")


def hub_revision(reference: str, path: Path) -> str | None:
    """The commit of a Hub id that was downloaded to `path`; None where `reference` names something local."""
    cached = path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name)
    return path.name if cached and path.parent.parent.name == f"models--{reference.replace('/', '--')}" else None


def source_record(model: Model) -> dict[str, Any]:
    """What a manifest says of the model and its adapter, with the commits of what came from the Hub."""
    source, checkpoint = describe(model), model.checkpoint
    commits = {"revision": hub_revision(model.reference, checkpoint.path)}
    if (adapter := checkpoint.adapter) is not None:
        commits["adapter_revision"] = hub_revision(adapter.reference, adapter.path)
    return source | {key: commit for key, commit in commits.items() if commit}


def local_name(reference: str) -> str:
    """The last component of a path, of either platform."""
    return re.split(r"[\\/]", reference.rstrip("\\/"))[-1] or "model"


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """A text with its local paths, `known` ones and whatever looks absolute, cut to their last component."""
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, local_name(path))
    return _LOCAL_PATH.sub(lambda found: found["last"], text)


def leaks(folder: Path) -> list[str]:
    """Local paths that the programs which wrote the source left in its configs; they are published as they are."""
    found = []
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        value = read_json(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(value, str) and without_paths(value) != value:
            found.append(f"{name}: {key} is {value}")
    return found


def public_manifest(manifest: Manifest) -> Manifest:
    """A copy without local paths: inputs that aren't on the Hub keep the last component of their name."""
    known = []
    if "revision" not in manifest.source:
        known.append(str(manifest.source.get("model", "")))
    if (adapter := manifest.source.get("adapter")) and "adapter_revision" not in manifest.source:
        known.append(str(adapter.get("reference", "")))
    paths = [path for path in known if local_name(path) != path and len(path) > 1]

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return without_paths(value, paths)
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return {key: clean(item) for key, item in value.items()} if isinstance(value, dict) else value

    public = copy.deepcopy(manifest)
    for key in ("source", "recipe", "options", "losses", "notes", "parity"):
        setattr(public, key, clean(getattr(public, key)))
    return public
