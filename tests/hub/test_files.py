# SPDX-License-Identifier: Apache-2.0
"""Publishing GGUF files: one, many, one after the other; names that programs find, one card, and back again."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from conftest import recipe_for
from support.hub_server import Hub
from support.hub_user import User, ok, published, refused
from support.pico import write_pico

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import open_model
from lrconvert.targets import gguf, onnx

ID = "me/pico-gguf"


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    """Two quantisations of one model, one with a Modelfile."""
    source = write_pico(tmp_path / "pico", max_position_embeddings=256)
    model = open_model(source)
    recipe = recipe_for(model, even=True)
    files = {"q8_0": tmp_path / "m.gguf", "f16": tmp_path / "pico-F16.gguf"}
    for kind, path in files.items():
        bake(gguf.plan(model, recipe, path, gguf.Options(type=kind, modelfile=kind == "q8_0")))
    return files


def front_matter(card: bytes) -> dict[str, object]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_two_quantisations_share_a_repository(hub: Hub, user: User, made: dict[str, Path]) -> None:
    """Names with the tag of the type, manifests beside them, one card that names both."""
    ok(user("push", made["q8_0"], made["f16"], ID))
    there = published(hub, ID)
    assert set(there) == {
        "README.md", "pico-gguf-Q8_0.gguf", "pico-gguf-Q8_0.Modelfile", "pico-gguf-Q8_0.lrconvert.json",
        "pico-F16.gguf", "pico-F16.lrconvert.json",
    }  # fmt: skip
    assert there["pico-gguf-Q8_0.gguf"] == made["q8_0"].read_bytes()
    assert b"FROM ./pico-gguf-Q8_0.gguf" in there["pico-gguf-Q8_0.Modelfile"]
    manifest = json.loads(there["pico-gguf-Q8_0.lrconvert.json"])
    for name, record in manifest["files"].items():
        assert record["sha256"] == sha256(there[name]).hexdigest()
    assert str(made["q8_0"].parent) not in json.dumps(manifest)
    card = there["README.md"].decode()
    assert front_matter(there["README.md"])["library_name"] == "gguf"
    assert card.split("---\n", 2)[2].lstrip().startswith("# pico-gguf\n")
    for words in ("llama-cli -hf me/pico-gguf:", "ollama run hf.co/me/pico-gguf:", "lms get", "### Q8_0", "### F16"):
        assert words in card, words
    assert str(made["q8_0"].parent) not in card and "[{" not in card and "{'" not in card


def test_one_after_the_other_is_the_same(hub: Hub, user: User, made: dict[str, Path]) -> None:
    """The second push finds the first one's manifest: the card has both, and what the owner wrote stays."""
    ok(user("push", made["q8_0"], ID))
    repo = hub.repos[ID]
    tree = dict(repo.head)
    tree["README.md"] = tree["README.md"].replace(b"# pico-gguf", b"# My own title")
    repo.commit(tree, "edited there")
    ok(user("push", made["f16"], ID))
    card = published(hub, ID)["README.md"].decode()
    assert "### Q8_0" in card and "### F16" in card and "# My own title" in card
    again = ok(user("push", made["f16"], ID))
    assert "already up to date" in again.out


def test_what_is_no_quantisation_of_it_is_foreign(hub: Hub, user: User, made: dict[str, Path]) -> None:
    """Another recipe's file, and files of somebody else: exit code 2, and nothing changes."""
    hub.add(ID, {"weights.bin": b"x", "README.md": b"mine"})
    before = published(hub, ID)
    refused(user("push", made["f16"], ID), 2, "README.md", "weights.bin", "--force")
    assert published(hub, ID) == before
    ok(user("push", made["f16"], "me/other-gguf"))
    model = open_model(made["q8_0"].with_name("pico"))
    other = made["q8_0"].with_name("other.gguf")
    bake(gguf.plan(model, recipe_for(model, tiers=1), other, gguf.Options(type="q8_0")))
    refused(user("push", other, "me/other-gguf"), 2, "made with the recipe")


def test_a_dry_run_shows_what_would_leave_without_a_token(user: User, made: dict[str, Path]) -> None:
    user.token = None
    shown = ok(user("push", made["q8_0"], ID, "--dry-run", HF_HUB_OFFLINE="1"))
    assert "pico-gguf-Q8_0.gguf" in shown.out and "+# pico-gguf" in shown.out
    assert "+FROM ./pico-gguf-Q8_0.gguf" in shown.out


def test_two_files_of_one_name_and_mixtures_are_refused(user: User, made: dict[str, Path]) -> None:
    """Before the Hub is asked."""
    twin = made["q8_0"].with_name("twin.gguf")
    for suffix in (".gguf", ".Modelfile", ".lrconvert.json"):
        text = made["q8_0"].with_suffix(suffix).read_bytes() if suffix != ".lrconvert.json" else b""
        twin.with_suffix(suffix).write_bytes(text)
    manifest = made["q8_0"].with_name("m.lrconvert.json").read_text()
    twin.with_name("twin.lrconvert.json").write_text(re.sub(r'"m\.(gguf|Modelfile)"', r'"twin.\1"', manifest))
    refused(user("push", made["q8_0"], twin, ID), 2, "pico-gguf-Q8_0.gguf")
    refused(user("push", made["q8_0"], made["q8_0"].parent, ID), 3)


def test_a_changed_file_is_not_published(hub: Hub, user: User, made: dict[str, Path]) -> None:
    with made["f16"].open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    refused(user("push", made["f16"], ID), 3, "has changed since it was written")
    assert ID not in hub.repos


def test_a_hub_id_is_read_back_by_every_command(hub: Hub, user: User, made: dict[str, Path], tmp_path: Path) -> None:
    """One file of several by its tag; without one the files are listed. A manifest there stays as it is."""
    ok(user("push", made["q8_0"], made["f16"], ID))
    refused(user("inspect", ID), 3, "several GGUF files", "pico-F16.gguf", f"{ID}:Q4_K_M")
    refused(user("inspect", f"{ID}:Q2_K"), 3, "no GGUF")
    shown = ok(user("inspect", f"{ID}:Q8_0", "--json"))
    assert '"longrope"' in shown.out or "longrope" in shown.out
    source = str(made["q8_0"].with_name("pico"))
    verified = ok(user("verify", f"{ID}:q8_0", "--against", source, "--files-only"))
    assert "verified, files only" in verified.out
    ok(user("gguf", f"{ID}:F16", "-o", tmp_path / "again.gguf"))
    manifest = json.loads((tmp_path / "again.lrconvert.json").read_text())
    assert manifest["source"]["model"] == f"{ID}:F16" and len(manifest["source"]["revision"]) == 40
    ok(user("verify", tmp_path / "again.gguf", "--files-only"))
    ok(user("verify", f"{ID}:F16", "--against", source, "--files-only", HF_HUB_OFFLINE="1"))


def test_an_onnx_folder_is_published_and_read_back(hub: Hub, user: User, made: dict[str, Path], tmp_path: Path) -> None:
    """A folder with a card of its own; its id is one that inspect, verify and onnx take."""
    model = open_model(made["q8_0"].with_name("pico"))
    bake(onnx.plan(model, recipe_for(model, even=True), tmp_path / "o"))
    ok(user("push", tmp_path / "o", "me/pico-onnx"))
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "genai_config.json"} <= set(published(hub, "me/pico-onnx"))
    card = published(hub, "me/pico-onnx")["README.md"].decode()
    assert "from_pretrained(name)" in card and '"me/pico-onnx"' in card
    assert "a function in the graph" in ok(user("inspect", "me/pico-onnx")).out
    source = str(made["q8_0"].with_name("pico"))
    checked = user("verify", "me/pico-onnx", "--against", source, "--files-only")
    assert "verified, files only" in checked.out, checked.out
    ok(user("hf", "me/pico-onnx", "-o", tmp_path / "back"))
