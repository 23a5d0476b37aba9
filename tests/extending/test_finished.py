# SPDX-License-Identifier: Apache-2.0
"""A stage's result is read as it was written, or refused: it may have been edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import InputError
from lrconvert.extending.run import RESULT, Finished

DIGEST = "0" * 64
WHOLE: dict[str, Any] = {
    "name": "1-derive", "digest": DIGEST, "facts": {"a": 1.0}, "seconds": 1.0, "memory": None, "files": {}
}  # fmt: skip
ODD: dict[str, str] = {
    "files in a list": json.dumps({**WHOLE, "files": ["recipe.json"]}),
    "a number for a digest": json.dumps({**WHOLE, "files": {"recipe.json": 3}}),
    "a key more": json.dumps({**WHOLE, "more": 1}),
    "facts without end": json.dumps({**WHOLE, "facts": {"loss": float("inf")}}),
    "no list at all": "[]",
    "nested without end": "[" * 9999,
    "another digest": json.dumps({**WHOLE, "digest": "1" * 64}),
}


def write(folder: Path, text: str) -> Path:
    (folder / RESULT).write_text(text)
    return folder


def test_a_result_is_what_was_written(tmp_path: Path) -> None:
    assert Finished.read(tmp_path, DIGEST) is None
    assert Finished.read(write(tmp_path, json.dumps(WHOLE)), DIGEST) == Finished(**WHOLE)


@pytest.mark.parametrize("name", ODD)
def test_what_no_stage_writes_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="Delete the folder"):
        Finished.read(write(tmp_path, ODD[name]), DIGEST)


def test_a_file_outside_of_the_folder_is_none_of_its(tmp_path: Path) -> None:
    """Even one with the right digest: nothing outside is read."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "secret").write_text("x")
    files = {"../secret": sha256_of(tmp_path / "secret")}
    with pytest.raises(InputError, match=r"\.\./secret changed"):
        Finished.read(write(tmp_path / "stage", json.dumps({**WHOLE, "files": files})), DIGEST)
