# SPDX-License-Identifier: Apache-2.0
"""Publishing an artifact on the Hugging Face Hub: plan what would change there, then one commit.

    planned = plan(artifact, name)   looks at both sides, uploads nothing
    upload(planned)                  one commit on top of the one that was looked at, or none
    push(artifact, name)             both

What is published are the files that the manifest names, and nothing else in the folder. README.md
and lrconvert.json are made for the occasion: the card with the last parity report and the digests, the
manifest without local paths. So are JSON files with paths of the machine that wrote them; `Plan.changes` has every
difference from the artifact, which stays as it is. What looks like a token is refused. A file is deleted on the Hub
only where an lrconvert.json there says that lrconvert wrote it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.artifact.card import CARD, refreshed
from lrconvert.artifact.manifest import MANIFEST, FileRecord, Manifest
from lrconvert.artifact.redaction import (
    MAX_TEXT_BYTES,
    is_text,
    public_json,
    public_manifest,
    secrets_in,
    without_paths,
)
from lrconvert.checkpoint.links import is_own
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import EnvironmentFailure, InputError, ParityError, UsageError
from lrconvert.hub import files
from lrconvert.hub.access import Account, client, hub_errors, sign_in
from lrconvert.progress import BYTES, Progress, Step, silent
from lrconvert.targets import get_target

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

GIT_FILES = {".gitattributes"}  # the Hub's own
# Files that loaders would use instead of the artifact's, or on top of them.
SHADOWING = ("model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Plan:
    """What a push would do. `foreign`: what is on the Hub under that name and isn't this artifact's. `changes`: of each
    file that is published otherwise than it lies there, a unified diff. `account` is None where the Hub was not asked.
    """

    repo: str
    account: Account | None
    revision: str | None
    head: str | None  # the commit that was looked at; None where the repository doesn't exist yet
    private: bool
    manifest: Manifest  # as it would be published
    additions: list[CommitOperationAdd] = field(repr=False)
    deleted: list[str]
    foreign: list[str]
    shadowing: list[str]
    warnings: list[str]
    changes: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        return {item.path_in_repo: item.upload_info.size for item in self.additions}

    def check(self, *, force: bool = False) -> None:
        """Refuse what would mix with something else (exit code 2)."""
        if self.shadowing:
            raise UsageError(
                f"{self.repo} holds {' and '.join(self.shadowing)}, which loaders would use instead of the artifact",
                remedy="Delete that on the Hub first, or choose another name",
            )
        if self.foreign and not force:
            raise UsageError(
                f"{self.repo} exists with other content: {'; '.join(self.foreign)}",
                remedy="Choose another name, or write into it with `lrconvert push --force`",
            )


@dataclass(frozen=True)
class Pushed:
    """Where it is now. `changed`: False when the Hub had exactly that already."""

    url: str
    commit: str
    changed: bool


def push(
    artifact: Path | Sequence[Path],
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> str:
    """Publish `artifact`, a folder or one or several GGUF files, as `name`, a Hub id; the URL of the commit.

    Raises what `plan` and `upload` raise.
    """
    planned = plan(artifact, name, private=private, revision=revision, force=force, progress=progress)
    return upload(planned, force=force, message=message, progress=progress).url


def plan(
    artifact: Path | Sequence[Path],
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    force: bool = False,
    dry: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """What pushing `artifact` to `name` would upload, delete and meet there.

    `dry`: nothing will be uploaded, so without a token or a network the plan is one without a look at the Hub.

    Raises `InputError` for an artifact that isn't whole, `ParityError` (unless `force`) for one that failed its
    last verification, and what `sign_in` raises.
    """
    progress = progress or silent
    artifacts = [artifact] if isinstance(artifact, Path) else list(artifact)
    if any(path.is_file() for path in artifacts):
        return _plan_files(artifacts, name, private=private, revision=revision, force=force, dry=dry, progress=progress)
    if len(artifacts) != 1:
        raise UsageError("several artifacts in one repository have to be GGUF files")
    artifact = artifacts[0]
    local = Manifest.read(artifact)
    _check_parity(artifact, local, force=force)
    _check_files(artifact, local)
    progress(Step("contacting the Hub"))
    try:
        api, account, repo = sign_in(name)
        head, is_private, remote = _look(api, account, repo, revision)
    except EnvironmentFailure as error:
        if not dry:
            raise
        return _unseen(artifact, local, name, error, progress)
    _check_private(repo, head, private=private, is_private=is_private)
    manifest, additions = _operations(artifact, local, repo, progress)
    names = {item.path_in_repo for item in additions}
    with hub_errors(f"reading {repo}", account):
        theirs = _remote_manifest(api, repo, head) if head and MANIFEST in remote else None
        foreign = _foreign(api, repo, head, remote, theirs, manifest, names) if head else []
    written = set(theirs.files) if theirs else set()
    return Plan(
        repo=repo,
        account=account,
        revision=revision,
        head=head,
        private=private if head is None else is_private,
        manifest=manifest,
        additions=additions,
        deleted=sorted((written & set(remote)) - names),
        foreign=foreign,
        shadowing=[path for path in SHADOWING if path in set(remote) - names - written],
        warnings=_warnings(artifact, local, names),
        changes=_changes(artifact, additions),
    )


def _plan_files(
    artifacts: Sequence[Path],
    name: str,
    *,
    private: bool,
    revision: str | None,
    force: bool,
    dry: bool,
    progress: Progress,
) -> Plan:
    """`plan` for GGUF files: quantisations of one model, beside those that are in the repository already."""
    if others := [path for path in artifacts if not path.is_file()]:
        raise InputError(f"{others[0]}: no such file; a folder is published by itself")
    local = files.opened(artifacts, name)
    for item in local:
        _check_parity(item.path, item.manifest, force=force)
        _check_files(item.path.parent, item.manifest)
    progress(Step("contacting the Hub"))
    account, repo, head, is_private = None, name, None, False
    remote: dict[str, RepoFile] = {}
    theirs: dict[str, Manifest] = {}
    card, warnings = None, []
    try:
        api, account, repo = sign_in(name)
        head, is_private, remote = _look(api, account, repo, revision)
        if head is not None:
            with hub_errors(f"reading {repo}", account):
                theirs = files.remote_manifests(api, repo, head, remote)
                card = files.remote_card(api, repo, head, remote)
    except EnvironmentFailure as error:
        if not dry:
            raise
        warnings.append(f"the Hub was not asked what it has already: {error.message}")
    _check_private(repo, head, private=private, is_private=is_private)
    manifest, additions = files.operations(local, theirs, card, repo, progress)
    for item in local:
        verified = item.manifest.parity
        if verified is None or not verified.get("passed"):
            what = "never verified" if verified is None else "failed its last verification"
            warnings.append(f"{item.path.name}: {what}, and the card says so: lrconvert verify {item.path}")
    return Plan(
        repo=repo,
        account=account,
        revision=revision,
        head=head,
        private=private if head is None else is_private,
        manifest=manifest,
        additions=additions,
        deleted=files.replaced(theirs, local, remote),
        foreign=files.foreign(remote, theirs, local, card=card, git_files=GIT_FILES),
        shadowing=[],
        warnings=warnings,
        changes=_changes(artifacts[0].parent, additions),
    )


def _check_parity(artifact: Path, local: Manifest, *, force: bool) -> None:
    if local.parity and not local.parity.get("passed") and not force:
        summary = without_paths(str(local.parity.get("summary")))
        raise ParityError(
            f"{artifact} failed its last verification ({summary})",
            remedy="Convert and verify again; --force publishes it anyway, with that report",
        )


def _check_private(repo: str, head: str | None, *, private: bool, is_private: bool) -> None:
    if head is not None and private and not is_private:
        raise UsageError(
            f"{repo} exists and is public; --private applies only to new repositories",
            remedy="Change it in its settings on the Hub, or choose another name",
        )


def _unseen(artifact: Path, local: Manifest, name: str, error: EnvironmentFailure, progress: Progress) -> Plan:
    """The plan of a dry run that could not ask the Hub."""
    manifest, additions = _operations(artifact, local, name, progress)
    names = {item.path_in_repo for item in additions}
    warnings = [f"the Hub was not asked what it has already: {error.message}", *_warnings(artifact, local, names)]
    return Plan(
        repo=name,
        account=None,
        revision=None,
        head=None,
        private=False,
        manifest=manifest,
        additions=additions,
        deleted=[],
        foreign=[],
        shadowing=[],
        warnings=warnings,
        changes=_changes(artifact, additions),
    )


def upload(
    planned: Plan, *, force: bool = False, message: str | None = None, progress: Progress | None = None
) -> Pushed:
    """Carry the plan out, in one commit: a failure before it leaves the Hub's revision unchanged."""
    from huggingface_hub import CommitOperationDelete

    planned.check(force=force)
    progress = progress or silent
    api, head = client(), planned.head
    default = f"{planned.manifest.recipe.get('name')}, by lrconvert {planned.manifest.lrconvert}"
    assert planned.account is not None  # only a dry run has a plan without a look at the Hub
    with hub_errors(f"publishing {planned.repo}", planned.account):
        if head is None:
            progress(Step(f"creating {planned.repo}"))
            api.create_repo(planned.repo, private=True if planned.private else None)
            head = api.model_info(planned.repo).sha
        progress(Step(f"uploading {sum(planned.sizes.values()) / 1e6:,.1f} MB to {planned.repo}"))
        deletions = [CommitOperationDelete(path, is_folder=False) for path in planned.deleted]
        done = api.create_commit(
            planned.repo,
            [*planned.additions, *deletions],
            commit_message=message or default,
            revision=planned.revision,
            parent_commit=head,
        )
    return Pushed(str(done.commit_url), done.oid, changed=done.oid != head)


# --- the artifact ----------------------------------------------------------------------------------------


def _check_files(artifact: Path, manifest: Manifest) -> None:
    """Every file that the manifest names is a file of this folder, as long as it was."""
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


def _operations(
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
    """A JSON file as it is published, where that is not as it lies there; tokens and keys in a text are `problems`."""
    if not is_text(name) or path.stat().st_size > MAX_TEXT_BYTES:
        return None
    data = path.read_bytes()
    problems += [f"{name} holds what looks like {what}" for what in secrets_in(data)]
    public = public_json(data) if name.endswith(".json") and name != "tokenizer.json" else data
    return None if public == data else public


def _changes(artifact: Path, additions: list[CommitOperationAdd]) -> dict[str, str]:
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


def _warnings(artifact: Path, local: Manifest, names: set[str]) -> list[str]:
    found = []
    if local.parity is None:
        found.append(f"never verified, and its card says so: lrconvert verify {artifact}")
    elif not local.parity.get("passed"):
        found.append("failed its last verification, and its card says so")
    if CARD not in local.files:
        found.append(f"no {CARD} in it, so no model card: convert again to get one")
    present = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    if extra := sorted(present - names):
        found.append(f"not published, since lrconvert did not write them: {', '.join(extra)}")
    return found


# --- the Hub ---------------------------------------------------------------------------------------------


def _look(
    api: HfApi, account: Account, repo: str, revision: str | None
) -> tuple[str | None, bool, dict[str, RepoFile]]:
    """The repository's newest commit, whether it is private, and its files; None, … where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(f"reading {repo}", account):
        try:
            info = api.model_info(repo, revision=revision)
            tree = api.list_repo_tree(repo, recursive=True, revision=info.sha)
            return info.sha, bool(info.private), {file.path: file for file in tree if isinstance(file, RepoFile)}
        except RevisionNotFoundError as error:
            raise UsageError(f"{repo} has no branch {revision!r}", remedy="Create it on the Hub first") from error
        except RepositoryNotFoundError as error:
            if revision is not None:
                raise UsageError(f"{repo} does not exist, so it has no branch {revision!r}") from error
            return None, False, {}


def _remote_manifest(api: HfApi, repo: str, head: str) -> Manifest | None:
    """The manifest of what is on the Hub; None where that isn't one."""
    with tempfile.TemporaryDirectory() as folder:
        api.hf_hub_download(repo, MANIFEST, revision=head, local_dir=folder)
        with contextlib.suppress(InputError):
            return Manifest.read(Path(folder))
    return None


def _foreign(
    api: HfApi,
    repo: str,
    head: str,
    remote: dict[str, RepoFile],
    theirs: Manifest | None,
    ours: Manifest,
    names: set[str],
) -> list[str]:
    """What is on the Hub and not from a push of this artifact, in words."""
    if theirs is None:
        return sorted(set(remote) - GIT_FILES)
    found = sorted(set(remote) - GIT_FILES - {MANIFEST} - set(theirs.files))
    origins = [(m.target, m.source.get("model"), m.source.get("family")) for m in (theirs, ours)]
    if origins[0] != origins[1]:
        found.append(f"an artifact made from {origins[0][1]} ({origins[0][0]}), not from {origins[1][1]}")
    for name in sorted(names & set(theirs.files) & set(remote)):
        record, file = theirs.files[name], remote[name]
        digest = file.lfs.sha256 if file.lfs else record.sha256
        if name == CARD:  # what people edit there
            with tempfile.TemporaryDirectory() as folder:
                path = Path(api.hf_hub_download(repo, CARD, revision=head, local_dir=folder))
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if file.size != record.size or digest != record.sha256:
            found.append(f"{name}, changed there since lrconvert wrote it")
    return found
