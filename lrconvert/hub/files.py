# SPDX-License-Identifier: Apache-2.0
"""Publishing GGUF files: one or many quantisations of a model in one repository, with one card for all of them.

llama.cpp, Ollama and LM Studio find a quantisation by its tag in the name of a file (`-hf OWNER/NAME:Q4_K_M`), so files
get names with the tag of their type where they lack it: NAME-Q4_K_M.gguf. Beside each lies its manifest. The card has
what its owner wrote, and sections that are made again with every push, from all manifests that are there then.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.artifact.card import CARD
from lrconvert.artifact.files_card import Quantised, refreshed_files, rendered_files
from lrconvert.artifact.manifest import MANIFEST, FileRecord, Manifest, manifest_path
from lrconvert.artifact.redaction import public_manifest, secrets_beside, secrets_in
from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import InputError, UsageError
from lrconvert.progress import BYTES, Progress, Step
from lrconvert.temporary import temporary_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

SUFFIX = f".{MANIFEST}"
_PART = re.compile(r"(?P<stem>.+?)(?P<part>-\d{5}-of-\d{5})?(?P<suffix>\.gguf|\.Modelfile)")


@dataclass(frozen=True)
class Local:
    """A GGUF on this machine: its manifest, and the name that each of its files gets on the Hub."""

    path: Path
    manifest: Manifest
    tag: str
    names: Mapping[str, str]
    stem: str  # of the published names


def opened(artifacts: Sequence[Path], repo: str) -> list[Local]:
    """The files to publish. `UsageError` for two of the same type, `InputError` for damaged ones."""
    found = [_local(path, repo) for path in artifacts]
    stems = [local.stem for local in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UsageError(f"two files would be {twice[0]}.gguf on the Hub", remedy="Give them names of their own")
    return found


def _local(path: Path, repo: str) -> Local:
    manifest, tag = Manifest.read(path), tag_of(path)
    match = _PART.fullmatch(path.name)
    stem = match["stem"] if match else path.stem
    tagged = re.search(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9])", stem, re.IGNORECASE)
    published = stem if tagged else f"{repo.partition('/')[2] or stem}-{tag}"
    names = {}
    for name in manifest.files:
        own = _PART.fullmatch(name)
        names[name] = f"{published}{own['part'] or ''}{own['suffix']}" if own and own["stem"] == stem else name
    return Local(path, manifest, tag, names, published)


def tag_of(path: Path) -> str:
    """The type of a file as programs name it: Q4_K_M, F16."""
    from gguf import LlamaFileType

    value = read_header(path).metadata.get("general.file_type")
    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    return names.get(value, "GGUF") if isinstance(value, int) else "GGUF"


# --- what is uploaded ------------------------------------------------------------------------------------


def operations(
    local: Sequence[Local], theirs: Mapping[str, Manifest], card: str | None, repo: str, progress: Progress
) -> tuple[Manifest, list[CommitOperationAdd]]:
    """Every file of the commit, hashed. `theirs`: the manifests on the Hub by the stem of their files; `card`: the
    README there. The first manifest speaks for all in the commit's message."""
    from huggingface_hub import CommitOperationAdd

    problems: list[str] = []
    additions: dict[str, CommitOperationAdd] = {}
    every = dict(theirs)
    done, total = 0, sum(record.size for item in local for record in item.manifest.files.values())
    for item in local:
        manifest, files = public_manifest(item.manifest), {}
        for name, record in sorted(item.manifest.files.items()):
            progress(Step("checksums", name, done, total, BYTES))
            path, published = item.path.parent / name, item.names[name]
            done += record.size
            if name.endswith(".Modelfile"):
                data = _renamed(path.read_bytes(), item.names)
                problems += [f"{name} holds what looks like {what}" for what in secrets_in(data)]
                if record.sha256 not in (None, sha256_of(path)):
                    problems.append(f"{name} has changed since it was written")
                additions[published] = CommitOperationAdd(published, data)
                files[published] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
                continue
            problems += [f"{name} holds what looks like {what}" for what in secrets_beside(path)]
            additions[published] = CommitOperationAdd(published, path)
            digest = additions[published].upload_info.sha256.hex()
            if record.sha256 not in (None, digest):
                problems.append(f"{name} has changed since it was written")
            files[published] = FileRecord(record.size, digest)
        manifest.files = files
        every[item.stem] = manifest
        written = manifest.to_json().encode()
        problems += [f"{MANIFEST} holds what looks like {what}" for what in secrets_in(written)]
        additions[item.stem + SUFFIX] = CommitOperationAdd(item.stem + SUFFIX, written)
    sections = [Quantised(stem, _tag(stem, local), manifest) for stem, manifest in sorted(every.items())]
    made = rendered_files(sections, read_header(local[0].path).metadata, repo) if card is None else card
    data = refreshed_files(made, sections, repo).encode()
    problems += [f"{CARD} holds what looks like {what}" for what in secrets_in(data)]
    if problems:
        raise InputError.collect(local[0].path, problems)
    additions[CARD] = CommitOperationAdd(CARD, data)
    return every[local[0].stem], [additions[name] for name in sorted(additions)]


def _renamed(data: bytes, names: Mapping[str, str]) -> bytes:
    """A Modelfile that names the published file."""
    text = data.decode("utf-8", errors="replace")
    for old, new in names.items():
        text = text.replace(f"FROM ./{old}", f"FROM ./{new}")
    return text.encode()


def _tag(stem: str, local: Sequence[Local]) -> str:
    """The tag in a published name."""
    own = next((item.tag for item in local if item.stem == stem), None)
    return own or stem.rpartition("-")[2]


# --- what is there ---------------------------------------------------------------------------------------


def remote_manifests(api: HfApi, repo: str, head: str, remote: Mapping[str, RepoFile]) -> dict[str, Manifest]:
    """The manifests of the files in a repository, by the stem of their names; what isn't one is left out."""
    found = {}
    for name in sorted(name for name in remote if name.endswith(SUFFIX)):
        with temporary_folder() as folder:
            api.hf_hub_download(repo, name, revision=head, local_dir=folder)
            try:
                manifest = Manifest.read(folder / f"{name.removesuffix(SUFFIX)}.gguf")
            except InputError:
                continue
            if manifest.target == "gguf":
                found[name.removesuffix(SUFFIX)] = manifest
    return found


def remote_card(api: HfApi, repo: str, head: str, remote: Mapping[str, RepoFile]) -> str | None:
    """The README of a repository, where it is one of ours."""
    if CARD not in remote:
        return None
    with temporary_folder() as folder:
        text = Path(api.hf_hub_download(repo, CARD, revision=head, local_dir=folder)).read_bytes()
    decoded = text.decode("utf-8", errors="replace")
    return decoded if "<!-- lrconvert: " in decoded else None


def foreign(
    remote: Mapping[str, RepoFile],
    theirs: Mapping[str, Manifest],
    local: Sequence[Local],
    *,
    card: str | None,
    git_files: set[str],
) -> list[str]:
    """What is on the Hub and no quantisation of this model, in words."""
    own = {name for manifest in theirs.values() for name in manifest.files} | {stem + SUFFIX for stem in theirs}
    found = sorted(set(remote) - git_files - own - ({CARD} if card is not None else set()))
    source, recipe = local[0].manifest.source.get("family"), local[0].manifest.recipe
    for stem, manifest in sorted(theirs.items()):
        tiers = [manifest.recipe.get("tiers"), recipe.get("tiers")]
        if manifest.source.get("family") != source or tiers[0] != tiers[1]:
            found.append(f"{stem}, made with the recipe {manifest.recipe.get('name')}, not {recipe.get('name')}")
        for name, record in sorted(manifest.files.items()):
            file = remote.get(name)
            if file is not None and file.lfs is not None and file.lfs.sha256 != record.sha256:
                found.append(f"{name}, changed there since lrconvert wrote it")
    return found


def replaced(theirs: Mapping[str, Manifest], local: Sequence[Local], remote: Mapping[str, RepoFile]) -> list[str]:
    """Files of what is published again under the same name that it has no longer (parts of a split one)."""
    new = {name for item in local for name in item.names.values()}
    old = {name for item in local if item.stem in theirs for name in theirs[item.stem].files}
    return sorted((old - new) & set(remote))


def whole(item: Local) -> Path:
    """The folder that an item's files lie in."""
    return manifest_path(item.path).parent


__all__ = ["Local", "foreign", "opened", "operations", "remote_card", "remote_manifests", "replaced", "whole"]
