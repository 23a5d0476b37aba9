# SPDX-License-Identifier: Apache-2.0
"""What is on the Hub under a name already."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.artifact.card import CARD
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.errors import EnvironmentFailure, InputError, UsageError
from lrconvert.hub.access import Account, hub_errors, sign_in
from lrconvert.progress import Progress, Step
from lrconvert.temporary import temporary_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

GIT_FILES = {".gitattributes"}  # the Hub's own


@dataclass(frozen=True)
class Remote:
    """A repository as it was looked at. `head` is its newest commit, None where there is no repository yet; `account`
    is None where the Hub was not asked, and `unasked` says why."""

    repo: str
    account: Account | None = None
    api: HfApi | None = None
    head: str | None = None
    private: bool = False
    files: dict[str, RepoFile] = field(default_factory=dict)
    unasked: str | None = None

    def manifest(self) -> Manifest | None:
        """The manifest of the folder that is there; None where that isn't one."""
        if self.api is None or self.head is None or MANIFEST not in self.files:
            return None
        with hub_errors(f"reading {self.repo}", self.account), temporary_folder() as folder:
            self.api.hf_hub_download(self.repo, MANIFEST, revision=self.head, local_dir=folder)
            with contextlib.suppress(InputError):
                return Manifest.read(folder)
        return None

    def foreign(self, theirs: Manifest | None, ours: Manifest, names: set[str]) -> list[str]:
        """What is there and not from a push of this artifact, in words. `theirs`: the manifest there; `names`: the
        files of ours."""
        if self.head is None:
            return []
        if theirs is None:
            return sorted(set(self.files) - GIT_FILES)
        found = sorted(set(self.files) - GIT_FILES - {MANIFEST} - set(theirs.files))
        origins = [(m.target, m.source.get("model"), m.source.get("family")) for m in (theirs, ours)]
        if origins[0] != origins[1]:
            found.append(f"an artifact made from {origins[0][1]} ({origins[0][0]}), not from {origins[1][1]}")
        for name in sorted(names & set(theirs.files) & set(self.files)):
            record, file = theirs.files[name], self.files[name]
            digest = file.lfs.sha256 if file.lfs else record.sha256
            if name == CARD:  # what people edit there
                digest = self._digest_of_card()
            if file.size != record.size or digest != record.sha256:
                found.append(f"{name}, changed there since lrconvert wrote it")
        return found

    def _digest_of_card(self) -> str:
        assert self.api is not None
        with hub_errors(f"reading {self.repo}", self.account), temporary_folder() as folder:
            path = Path(self.api.hf_hub_download(self.repo, CARD, revision=self.head, local_dir=folder))
            return hashlib.sha256(path.read_bytes()).hexdigest()


def look(name: str, revision: str | None, *, private: bool, dry: bool, progress: Progress) -> Remote:
    """The repository that `name` means, as it is now. `dry`: one that can't be asked is none, with the reason.

    Raises what `sign_in` raises, and `UsageError` for a branch that is not there, and for a repository that is public
    where a private one is wanted.
    """
    progress(Step("contacting the Hub"))
    try:
        api, account, repo = sign_in(name)
        found = _looked_at(api, account, repo, revision)
    except EnvironmentFailure as error:
        if not dry:
            raise
        return Remote(name, unasked=f"the Hub was not asked what it has already: {error.message}")
    if found.head is not None and private and not found.private:
        raise UsageError(
            f"{repo} exists and is public; --private applies only to new repositories",
            remedy="Change it in its settings on the Hub, or choose another name",
        )
    return found


def _looked_at(api: HfApi, account: Account, repo: str, revision: str | None) -> Remote:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(f"reading {repo}", account):
        try:
            info = api.model_info(repo, revision=revision)
            tree = api.list_repo_tree(repo, recursive=True, revision=info.sha)
            files = {file.path: file for file in tree if isinstance(file, RepoFile)}
            return Remote(repo, account, api, info.sha, bool(info.private), files)
        except RevisionNotFoundError as error:
            raise UsageError(f"{repo} has no branch {revision!r}", remedy="Create it on the Hub first") from error
        except RepositoryNotFoundError as error:
            if revision is not None:
                raise UsageError(f"{repo} does not exist, so it has no branch {revision!r}") from error
            return Remote(repo, account, api)
