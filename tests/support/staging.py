# SPDX-License-Identifier: Apache-2.0
"""What the tests of staging and publication share: what lies in a folder, processes with few rights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lrconvert.artifact.file_staging import FileStaging
from lrconvert.artifact.manifest import Manifest
from lrconvert.artifact.record import BakeRecord

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 and rlimits are Linux's")


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Root may write anywhere: the child gives up the capability that lets it (bit 1, CAP_DAC_OVERRIDE).
RUN_AS_USER = """
import ctypes, sys
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc = ctypes.CDLL(None)
assert libc.capget(header, sets) == 0
sets[0], sets[1] = sets[0] & ~2, sets[1] & ~2
assert libc.capset(header, sets) == 0
from lrconvert.cli import run
sys.exit(run(sys.argv[1:]))
"""


RUN_WITH_SMALL_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from lrconvert.cli import run
sys.exit(run(sys.argv[2:]))
"""


BAKED = BakeRecord(window=64)
Files = dict[str, bytes]  # of an artifact, by name, in the order of `FileStaging.names`


MANIFEST = "m.lrconvert.json"


def file_manifest(label: str = "m") -> Manifest:
    return Manifest("gguf", {"model": label}, {"name": "r"}, options={}, losses=[], bake=BAKED)


def publish_files(output: Path, files: Files, *, force: bool = False, label: str = "m") -> None:
    with FileStaging(output, list(files), force=force) as staging:
        for name, data in files.items():
            staging.write_bytes(name, data)
        staging.publish(file_manifest(label))


ONE: Files = {"m.gguf": b"one"}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
