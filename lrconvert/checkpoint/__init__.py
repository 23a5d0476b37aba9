# SPDX-License-Identifier: Apache-2.0
"""Lazy reading of checkpoints: a folder, a GGUF file, a Hub id, or the embedded model."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from lrconvert.checkpoint.base import Checkpoint, Model, TensorInfo, read_json
from lrconvert.checkpoint.folder import CONFIG, FolderCheckpoint
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
    "locate",
    "locate_config",
    "names_hub_id",
    "open_checkpoint",
    "open_model",
    "read_json",
]

DEMO = "demo"
GGUF_MAGIC = b"GGUF"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Everything of a repository but what is never read: pickles, and copies of the weights for other programs.
_NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "onnx/*",
                   "original/*", "consolidated*"]  # fmt: skip


def open_model(reference: str | Path, *, revision: str | None = None, tolerant: bool = False) -> Model:
    """Open the model that `reference` names (`locate`). `tolerant`: also a GGUF file whose rope
    scaling is broken, as an unscaled model with `rope_problems`."""
    return build_model(str(reference), open_checkpoint(reference, revision=revision, tolerant=tolerant))


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


def _download(repository: str, revision: str | None, *, only: str | None = None) -> Path:
    """The folder of a repository's files: all that are read, or `only` one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The bases are those of its HTTP library, whichever that is: a download may break off in the middle.
    network: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError)
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=only, ignore_patterns=_NOT_DOWNLOADED)
        )
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
