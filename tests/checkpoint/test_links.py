# SPDX-License-Identifier: Apache-2.0
"""Links out of a model's folder are not followed: what they name would be copied into artifacts and published."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import recipe_for
from support.pico import write_pico

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.folder import side_files_of
from lrconvert.errors import InputError
from lrconvert.targets import gguf, hf, onnx

NAMES = ["LICENSE", "NOTICE", "USE_POLICY.md", "chat_template.jinja", "tokenizer.model", "tokenizer_config.json",
         "additional_chat_templates", "README.md", "generation_config.json"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_link_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    """By every target that takes the file, before anything is written; a relative link is no better."""
    folder, secret = write_pico(tmp_path / "m"), tmp_path / "secret"
    secret.mkdir() if name == "additional_chat_templates" else secret.write_text("{}")
    if secret.is_dir():
        (secret / "private.jinja").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    model = open_model(folder)
    targets = {"out": hf, "out-onnx": onnx} | ({} if name == "README.md" else {"out.gguf": gguf})
    for output, target in targets.items():
        with pytest.raises(InputError, match=f"{name}.* leads out of the folder"):
            bake(target.plan(model, recipe_for(model, even=True), tmp_path / output))
    assert not list(tmp_path.glob("out*"))


def test_a_file_in_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = write_pico(tmp_path / "m")
    (tmp_path / "elsewhere").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"additional_chat_templates/tool\.jinja leads out"):
        side_files_of(folder)


def test_a_link_to_nothing_is_no_file_that_is_lost_in_silence(tmp_path: Path) -> None:
    folder = write_pico(tmp_path / "m")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to("/nowhere/tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json leads out"):
        side_files_of(folder)


def test_links_inside_the_folder_and_a_linked_folder_work(tmp_path: Path) -> None:
    folder = write_pico(tmp_path / "m")
    (folder / "words").write_text("Apache License, Version 2.0")
    (folder / "LICENSE").symlink_to("words")
    (tmp_path / "again").symlink_to(folder)
    for place in (folder, tmp_path / "again"):
        model = open_model(place)
        output = tmp_path / f"of-{place.name}"
        bake(hf.plan(model, recipe_for(model), output))
        assert (output / "LICENSE").read_text() == "Apache License, Version 2.0"
        assert not (output / "LICENSE").is_symlink()


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    """Nothing waits for one."""
    folder = write_pico(tmp_path / "m")
    os.mkfifo(folder / "NOTICE")
    (folder / "LICENSE.d").mkdir()
    assert not {"NOTICE", "LICENSE.d"} & set(side_files_of(folder))
    os.mkfifo(folder / "README.md")
    model = open_model(folder)
    bake(hf.plan(model, recipe_for(model), tmp_path / "out"))
