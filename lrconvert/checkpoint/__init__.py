# SPDX-License-Identifier: Apache-2.0
"""Lazy reading of checkpoints: a folder, a GGUF file, a Hub id, or the embedded model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrconvert.checkpoint.base import Checkpoint, Model, TensorInfo, read_json
from lrconvert.checkpoint.folder import CONFIG, FolderCheckpoint
from lrconvert.checkpoint.language_part import language_part
from lrconvert.checkpoint.matching import build_model
from lrconvert.checkpoint.source import describe_source
from lrconvert.data import DATA
from lrconvert.errors import EnvironmentFailure, InputError

__all__ = [
    "GGUF_MAGIC",
    "Checkpoint",
    "Model",
    "TensorInfo",
    "build_model",
    "describe_source",
    "first_bytes",
    "language_part",
    "locate",
    "locate_config",
    "names_hub_id",
    "open_checkpoint",
    "open_model",
    "read_json",
]

DEMO = "demo"
GGUF_MAGIC = b"GGUF"
# OWNER/NAME, and of a repository with several GGUF files the tag of one: OWNER/NAME:Q4_K_M, as llama.cpp spells it.
_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<tag>[\w.-]+))?")
# Everything of a repository but what is never read: pickles, and copies of the weights for other programs.
_NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "onnx/*",
                   "original/*", "consolidated*"]  # fmt: skip


def open_model(
    reference: str | Path, *, revision: str | None = None, tolerant: bool = False, text_only: bool | None = False
) -> Model:
    """Open the model that `reference` names (`locate`). `tolerant`: also a GGUF file whose rope
    scaling is broken, as an unscaled model with `rope_problems`. `text_only`: the language model of a larger one;
    None: where it is one (`language_part`)."""
    found = open_checkpoint(reference, revision=revision, tolerant=tolerant)
    checkpoint, notes = language_part(found, text_only)
    model = build_model(str(reference), checkpoint)
    return replace(model, notes=(*notes, *model.notes)) if notes else model


def open_checkpoint(reference: str | Path, *, revision: str | None = None, tolerant: bool = False) -> Checkpoint:
    """Open the checkpoint that `reference` names, without a look at its tensors."""
    path = locate(reference, revision=revision)
    if path.is_dir():
        if (path / "onnx" / "model.onnx").is_file() and not any(path.glob("*.safetensors")):
            from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint

            return OnnxCheckpoint(path)
        return FolderCheckpoint(path)
    start = first_bytes(path)
    if start == GGUF_MAGIC:
        from lrconvert.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(path, tolerant=tolerant)
    raise InputError(
        f"{path}: neither a folder nor a GGUF file (it starts with {start!r})",
        remedy="Give the model's folder, a .gguf file or a Hub id",
    )


def first_bytes(path: Path) -> bytes:
    """The first bytes of a file."""
    if not path.is_file():
        return b""  # a pipe would wait for ever
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error


def locate(reference: str | Path, *, revision: str | None = None) -> Path:
    """The folder or file of a model: a path, `demo` for the embedded model, or a Hub id (downloaded).

    Raises `InputError` when there is no such thing and `EnvironmentFailure` when the Hub can't be reached.
    """
    path = Path(reference)
    if reference == DEMO:  # whatever folder stands there: `./demo` names one
        return DATA / DEMO
    with contextlib.suppress(OSError):  # a name that no file can have names none
        if path.exists():
            return path
    if not names_hub_id(reference):
        raise InputError(f"{reference}: no such folder or file", remedy=f"`{DEMO}` names the embedded model")
    return _download(str(reference), revision)


def locate_config(reference: str | Path, *, revision: str | None = None) -> Path:
    """As `locate`, for who reads nothing but the config: of a Hub id that one file is downloaded. The model's folder or
    file."""
    if names_hub_id(reference):
        return _download(str(reference), revision, only=CONFIG)
    return locate(reference, revision=revision)


def names_hub_id(reference: str | Path) -> bool:
    """Whether something has the form of a Hub id, and is no path on this machine."""
    with contextlib.suppress(OSError):  # a name that no file can have names none
        if reference == DEMO or Path(reference).exists():
            return False
    return bool(_HUB_ID.fullmatch(str(reference)))


def _download(reference: str, revision: str | None, *, only: str | None = None) -> Path:
    """What a Hub id names, downloaded: the folder of a checkpoint or of an ONNX folder, or a GGUF file; `only`: the
    folder with that file alone.

    A repository without safetensors is asked for its ONNX folder, else for the GGUF that the tag of the id names.
    """
    match = _HUB_ID.fullmatch(reference)
    assert match is not None
    repository, tag = match["repository"], match["tag"]
    folder = _snapshot(repository, revision, allow_patterns=only, ignore_patterns=_NOT_DOWNLOADED)
    if only is not None or (tag is None and any(folder.glob("*.safetensors"))):
        return folder
    commit = folder.name
    if tag is None and (folder / "genai_config.json").is_file():
        return _snapshot(repository, commit, allow_patterns=["onnx/*", "*.json"])
    names = _ggufs(repository, commit, folder)
    if not names:
        if tag is not None:
            raise InputError(f"{reference}: the repository has no GGUF files")
        return folder
    chosen = [name for name in names if tag is None or _has_tag(name, tag)]
    firsts = [name for name in chosen if not _LATER_PART.search(name)]
    if len(firsts) != 1:
        listed = ", ".join(name for name in names if not _LATER_PART.search(name))[:300]
        found = "no GGUF" if not firsts else "several GGUF files"
        raise InputError(
            f"{reference}: {found} of that name; there are {listed}",
            remedy=f"Name one by the tag of its type: {repository}:Q4_K_M",
        )
    return _snapshot(repository, commit, allow_patterns=[*chosen, "*.json", "*.Modelfile"]) / firsts[0]


_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def _has_tag(name: str, tag: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9])", name, re.IGNORECASE) is not None


def _ggufs(repository: str, commit: str, folder: Path) -> list[str]:
    """The GGUF files of a repository; of what is in the cache where the Hub can't be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return sorted(path.name for path in folder.glob("*.gguf"))
    with _answers_of_the_hub(repository, commit):
        found = HfApi().list_repo_files(repository, revision=commit)
    return sorted(name for name in found if name.endswith(".gguf"))


def _snapshot(repository: str, revision: str | None, **patterns: Any) -> Path:
    from huggingface_hub import snapshot_download

    with _answers_of_the_hub(repository, revision):
        return Path(snapshot_download(repository, revision=revision, **patterns))


@contextlib.contextmanager
def _answers_of_the_hub(repository: str, revision: str | None) -> Iterator[None]:
    """What the Hub refuses, in our words."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The bases are those of its HTTP library, whichever that is: a download may break off in the middle.
    network: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError)
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{repository}: no such folder, and not a valid Hub id") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository}: has no revision {revision!r} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repository}: no such folder, and no model on the Hub that you can read",
            remedy="For a private or gated model log in first: `hf auth login`",
        ) from error
    except network as error:
        reason = str(error).partition("\n")[0]
        raise EnvironmentFailure(
            f"{repository}: no such folder, and the Hub did not answer ({type(error).__name__}: {reason})",
            remedy="Check the network, or give a local folder",
        ) from error
