# SPDX-License-Identifier: Apache-2.0
"""What may leave the machine: names instead of local paths, in cards and in published manifests."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lrconvert.artifact.manifest import Manifest
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import describe
from lrconvert.checkpoint.gguf_header import read_header

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = r"[^\s\\/:*?\"'<>|,;()\[\]{}`]+"
# An absolute path, one from a home folder, or the URL of a file, that isn't part of another URL or a word. Names of
# folders may have spaces: three words at most, or whatever stands between two paths would be part of one.
_FOLDER = rf"{_NAME}(?: {_NAME}){{0,2}}[\\/]+"
_LOCAL_PATH = re.compile(
    rf"(?<![\w:/\\.~-])(?:file:(?://(?:localhost)?)?|~\w*|[A-Za-z]:)?[\\/]+(?:{_FOLDER})*(?P<last>{_NAME})"
)


def hub_revision(reference: str, path: Path) -> str | None:
    """The commit of a Hub id that was downloaded to `path`; None where `reference` names something local."""
    folder = path.parent if path.is_file() else path  # a GGUF is a file of its repository
    cached = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    repository = reference.partition(":")[0]
    return folder.name if cached and folder.parent.parent.name == f"models--{repository.replace('/', '--')}" else None


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


# Keys that programs leave in a source's JSON files: those that name files of the machine that wrote them or say nothing
# to anybody else are dropped, those that name a model are cut to its name.
_DROPPED = frozenset({"special_tokens_map_file", "tokenizer_file", "_from_model_config"})
_NAMES = frozenset({"_name_or_path", "name_or_path", "base_model_name_or_path", "_commit_hash"})
MAX_TEXT_BYTES = 64 * 2**20  # of a file that is looked through
_BINARY = (".safetensors", ".data", ".onnx", ".gguf", ".model")
_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abprs]-[\w-]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\bhttps?://[^\s/:@]+:[^\s/@]+@",
}
_SECRET = {what: re.compile(pattern.encode()) for what, pattern in _SECRETS.items()}
_SECRET_INSIDE = {what: re.compile(pattern.removeprefix(r"\b").encode()) for what, pattern in _SECRETS.items()}
_ESCAPED = re.compile(rb"\\(?:u(?P<code>[0-9a-fA-F]{4})|(?P<slash>/)|[bfnrt])")  # in a text of JSON


def is_text(name: str) -> bool:
    """Whether a file of an artifact is one that people read, and whose text may say too much."""
    return not name.endswith(_BINARY)


def secrets_in(data: bytes) -> list[str]:
    """What in a text looks like a token or a key: the kinds, never the thing itself."""
    read = _ESCAPED.sub(_unescaped, data)
    return list(dict.fromkeys([*_found_in(data, _SECRET), *_found_in(read, _SECRET)]))


def _unescaped(found: re.Match[bytes]) -> bytes:
    """The character of an escape where tokens have such, else a space, which ends a word as well."""
    code = int(found["code"] or b"20", 16)
    return found["slash"] or bytes([code if code < 128 else 32])


def _found_in(data: bytes, patterns: Mapping[str, re.Pattern[bytes]]) -> list[str]:
    return [what for what, pattern in patterns.items() if pattern.search(data)]


def secrets_beside(path: Path) -> list[str]:
    """The same of what a binary file says beside its numbers: the header of weights, a graph. `InputError` for a GGUF
    that is damaged."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(file.read(8), "little")
        elif path.suffix == ".gguf":
            end = max((stop for _, stop in read_header(path).spans.values()), default=0)
        else:
            end = path.stat().st_size
        file.seek(0)
        # The length of a text stands before it, and may look like a letter.
        return _found_in(file.read(min(end, MAX_TEXT_BYTES)), _SECRET_INSIDE)


_HOME = re.compile(rb"(?<![\w.:/])(?:file://)?(?:/home|/Users|/root|[A-Za-z]:\\{1,2}Users)[/\\][^\s\"',]+")


def home_in(data: bytes) -> str | None:
    """A path of somebody's home in a text, which stays where no key is known to hold one."""
    found = _HOME.search(data) or _HOME.search(_ESCAPED.sub(_unescaped, data))
    return found[0].decode(errors="replace")[:80] if found else None


def public_json(data: bytes) -> bytes:
    """A JSON file without what only the machine that wrote it can use; the same bytes where there is nothing of it."""
    try:
        found = json.loads(data)
    except ValueError:
        return data
    cleaned = public_value(found)
    return data if cleaned == found else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def public_value(value: Any) -> Any:
    """The same of a value of JSON."""
    if isinstance(value, list):
        return [public_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: public_value(item) for key, item in value.items() if key not in _DROPPED}
    named = {key: without_paths(item) for key, item in kept.items() if key in _NAMES and isinstance(item, str)}
    return {**kept, **named}


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
