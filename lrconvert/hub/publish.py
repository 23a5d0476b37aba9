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

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.artifact.manifest import Manifest
from lrconvert.errors import InputError, UsageError
from lrconvert.hub import files
from lrconvert.hub.access import Account, client, hub_errors
from lrconvert.hub.content import changes, check_files, check_parity, operations, warnings
from lrconvert.hub.remote import GIT_FILES, Remote, look
from lrconvert.progress import Progress, Step, silent

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

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
    last verification, and what `look` raises.
    """
    progress = progress or silent
    artifacts = [artifact] if isinstance(artifact, Path) else list(artifact)
    of_files = any(path.is_file() for path in artifacts)
    if not of_files and len(artifacts) != 1:
        raise UsageError("several artifacts in one repository have to be GGUF files")
    source = _Files.of(artifacts, name) if of_files else _Folder(artifacts[0], Manifest.read(artifacts[0]))
    source.check(force=force)
    remote = look(name, revision, private=private, dry=dry, progress=progress)
    made = source.commit(remote, progress)
    return Plan(
        repo=remote.repo,
        account=remote.account,
        revision=revision if remote.account is not None else None,
        head=remote.head,
        private=private and remote.account is not None if remote.head is None else remote.private,
        manifest=made.manifest,
        additions=made.additions,
        deleted=made.deleted,
        foreign=made.foreign,
        shadowing=made.shadowing,
        warnings=[*([remote.unasked] if remote.unasked else []), *made.warnings],
        changes=changes(source.folder, made.additions),
    )


@dataclass(frozen=True)
class _Commit:
    """What a push of an artifact puts into a repository, takes out of it, and meets there (see `Plan`)."""

    manifest: Manifest
    additions: list[CommitOperationAdd]
    deleted: list[str]
    foreign: list[str]
    warnings: list[str]
    shadowing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Folder:
    """A folder: the repository is it."""

    folder: Path
    manifest: Manifest

    def check(self, *, force: bool) -> None:
        check_parity(self.folder, self.manifest, force=force)
        check_files(self.folder, self.manifest)

    def commit(self, remote: Remote, progress: Progress) -> _Commit:
        manifest, additions = operations(self.folder, self.manifest, remote.repo, progress)
        names, there = {item.path_in_repo for item in additions}, set(remote.files)
        theirs = remote.manifest()
        written = set(theirs.files) if theirs else set()
        return _Commit(
            manifest,
            additions,
            deleted=sorted((written & there) - names),
            foreign=remote.foreign(theirs, manifest, names),
            warnings=warnings(self.folder, self.manifest, names),
            shadowing=[path for path in SHADOWING if path in there - names - written],
        )


@dataclass(frozen=True)
class _Files:
    """GGUF files: quantisations of one model, beside those that are in the repository already."""

    local: Sequence[files.Local]

    @classmethod
    def of(cls, artifacts: Sequence[Path], name: str) -> _Files:
        if others := [path for path in artifacts if not path.is_file()]:
            raise InputError(f"{others[0]}: no such file; a folder is published by itself")
        return cls(files.opened(artifacts, name))

    @property
    def folder(self) -> Path:
        return self.local[0].path.parent

    def check(self, *, force: bool) -> None:
        for item in self.local:
            check_parity(item.path, item.manifest, force=force)
            check_files(item.path.parent, item.manifest)

    def commit(self, remote: Remote, progress: Progress) -> _Commit:
        theirs: dict[str, Manifest] = {}
        card = None
        if remote.api is not None and remote.head is not None:
            with hub_errors(f"reading {remote.repo}", remote.account):
                theirs = files.remote_manifests(remote.api, remote.repo, remote.head, remote.files)
                card = files.remote_card(remote.api, remote.repo, remote.head, remote.files)
        manifest, additions = files.operations(self.local, theirs, card, remote.repo, progress)
        return _Commit(
            manifest,
            additions,
            deleted=files.replaced(theirs, self.local, remote.files),
            foreign=files.foreign(remote.files, theirs, self.local, card=card, git_files=GIT_FILES),
            warnings=[said for item in self.local if (said := _unverified(item)) is not None],
        )


def _unverified(item: files.Local) -> str | None:
    verified = item.manifest.parity
    if verified is not None and verified.get("passed"):
        return None
    what = "never verified" if verified is None else "failed its last verification"
    return f"{item.path.name}: {what}, and the card says so: lrconvert verify {item.path}"


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
