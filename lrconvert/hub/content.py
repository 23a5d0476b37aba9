# SPDX-License-Identifier: Apache-2.0
"""What is published of an artifact: its files, with a card and a manifest made for the occasion, and every difference.

Only the files that the manifest names, each as it was when it was written. JSON files lose the paths of the machine
that wrote them; what looks like a token is refused.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.artifact.card import CARD, refreshed
from lrconvert.artifact.manifest import MANIFEST, FileRecord, Manifest
from lrconvert.artifact.redaction import (
    MAX_TEXT_BYTES,
    home_in,
    is_text,
    public_json,
    public_manifest,
    secrets_beside,
    secrets_in,
    without_paths,
)
from lrconvert.checkpoint.links import is_own
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import InputError, ParityError
from lrconvert.progress import BYTES, Progress, Step
from lrconvert.targets import get_target

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


def check_parity(artifact: Path, local: Manifest, *, force: bool) -> None:
    """`ParityError` for an artifact that failed its last verification, unless `force`."""
    if local.parity and not local.parity.get("passed") and not force:
        summary = without_paths(str(local.parity.get("summary")))
        raise ParityError(
            f"{artifact} failed its last verification ({summary})",
            remedy="Convert and verify again; --force publishes it anyway, with that report",
        )


def check_files(artifact: Path, manifest: Manifest) -> None:
    """Every file that the manifest names is a file of this folder, as long as it was; `InputError` otherwise."""
    problems = []
    for name, record in sorted(manifest.files.items()):
        path = artifact / name
        if not is_own(artifact, path):
            problems.append(f"{name!r} is not a name inside the folder")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif name != CARD and path.stat().st_size != record.size:
            problems.append(f"{name} has {path.stat().st_size} bytes; the manifest says {record.size}")
    if problems:
        raise InputError.collect(artifact, problems)


def operations(
    artifact: Path, local: Manifest, repo: str, progress: Progress
) -> tuple[Manifest, list[CommitOperationAdd]]:
    """The manifest as it is published, and every file of the commit, hashed."""
    from huggingface_hub import CommitOperationAdd

    manifest, problems = public_manifest(local), []
    additions: dict[str, CommitOperationAdd] = {}
    done, total = 0, sum(record.size for record in local.files.values())
    for name, record in sorted(local.files.items()):
        if name == CARD:
            continue
        progress(Step("checksums", name, done, total, BYTES))
        data = _public_data(artifact / name, name, problems)
        if data is not None and record.sha256 in (None, sha256_of(artifact / name)):
            additions[name] = CommitOperationAdd(name, data)
            manifest.files[name] = FileRecord(len(data), additions[name].upload_info.sha256.hex())
            done += record.size
            continue
        additions[name] = CommitOperationAdd(name, artifact / name)
        done += record.size
        digest = additions[name].upload_info.sha256.hex()
        if record.sha256 not in (None, digest):
            problems.append(f"{name} has changed since it was written")
        manifest.files[name] = FileRecord(record.size, digest)
    if problems:
        raise InputError.collect(artifact, problems)
    card = get_target(local.target).card
    if CARD in local.files and card is not None:
        text = (artifact / CARD).read_bytes().decode("utf-8", errors="replace")
        data = refreshed(text, manifest, card, repo).encode()
        manifest.files[CARD] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
        additions[CARD] = CommitOperationAdd(CARD, data)
        problems += [f"{CARD} holds what looks like {what}" for what in secrets_in(data)]
    written = manifest.to_json().encode()
    problems += [f"{MANIFEST} holds what looks like {what}" for what in secrets_in(written)]
    if problems:
        raise InputError.collect(artifact, problems)
    additions[MANIFEST] = CommitOperationAdd(MANIFEST, written)
    return manifest, [additions[name] for name in sorted(additions)]


def _public_data(path: Path, name: str, problems: list[str]) -> bytes | None:
    """A JSON file as it is published, where that is not as it lies there; tokens and keys in a file are `problems`."""
    if not is_text(name):
        problems += [f"{name} holds what looks like {what}" for what in secrets_beside(path)]
        return None
    if path.stat().st_size > MAX_TEXT_BYTES:
        return None
    data = path.read_bytes()
    problems += [f"{name} holds what looks like {what}" for what in secrets_in(data)]
    public = public_json(data) if name.endswith(".json") and name != "tokenizer.json" else data
    return None if public == data else public


def changes(artifact: Path, additions: list[CommitOperationAdd]) -> dict[str, str]:
    """A unified diff of every file that is made for the occasion, from the artifact's to what leaves the machine."""
    found = {}
    for item in additions:
        if isinstance(item.path_or_fileobj, bytes):
            path = artifact / item.path_in_repo
            sides = [path.read_bytes() if path.is_file() else b"", item.path_or_fileobj]
            before, after = (side.decode("utf-8", errors="replace").splitlines() for side in sides)
            names = (f"local/{item.path_in_repo}", f"published/{item.path_in_repo}")
            if diff := "\n".join(difflib.unified_diff(before, after, *names, lineterm="", n=1)):
                found[item.path_in_repo] = diff
    return found


def warnings(artifact: Path, local: Manifest, names: set[str]) -> list[str]:
    """What whoever publishes a folder should know; `names`: what is published."""
    found = []
    if local.parity is None:
        found.append(f"never verified, and its card says so: lrconvert verify {artifact}")
    elif not local.parity.get("passed"):
        found.append("failed its last verification, and its card says so")
    if CARD not in local.files:
        found.append(f"no {CARD} in it, so no model card: convert again to get one")
    for name in sorted(name for name in names - {CARD, MANIFEST} if name.endswith(".json")):
        path = artifact / name
        small = path.is_file() and path.stat().st_size <= MAX_TEXT_BYTES
        # Few files hold such a path; only those are parsed.
        if small and home_in(data := path.read_bytes()) and (home := home_in(public_json(data))):
            found.append(f"{name} says {home}, and is published with it")
    present = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    if extra := sorted(present - names):
        found.append(f"not published, since lrconvert did not write them: {', '.join(extra)}")
    return found
