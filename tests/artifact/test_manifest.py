# SPDX-License-Identifier: Apache-2.0
"""A manifest is input from strangers: what it names stays in its folder, and no damage to it is a bug of ours."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, recipe_for
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.artifact.card import refreshed
from lrconvert.artifact.manifest import MANIFEST, FileRecord, Manifest
from lrconvert.artifact.redaction import public_manifest
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.links import is_inside, is_own, own_file
from lrconvert.checkpoint.source import sha256_of
from lrconvert.errors import InputError, LrconvertError
from lrconvert.evals.subject import Subject
from lrconvert.hub.content import check_files
from lrconvert.parity import Options
from lrconvert.targets import hf

QUICK = Options(threads=1, backends=())  # what is read off the files, no runtime


@pytest.fixture
def artifact(pico: Callable[..., Model], tmp_path: Path) -> Path:
    model = pico("llama")
    bake(hf.plan(model, recipe_for(model, even=True), tmp_path / "a"))
    return tmp_path / "a"


def edit(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((artifact / MANIFEST).read_text())
    change(manifest)
    (artifact / MANIFEST).write_text(json.dumps(manifest))


# --- names -----------------------------------------------------------------------------------------------

OUTSIDE = ["../x", "/etc/hostname", "a/../../x", "..", ".", "", "a\\b", "C:x", "a\0b", "a\nb", "a//b", "./a", "\x1b[2J"]


@pytest.mark.parametrize("name", [*OUTSIDE, "n" * 2000], ids=lambda name: ascii(name)[:20])
def test_a_name_outside_the_folder_is_bad_input(artifact: Path, name: str) -> None:
    """It was hashed, wherever it lay, and `verify` passed."""
    (artifact.parent / "x").write_text("secret")
    digest = sha256_of(artifact.parent / "x")
    edit(artifact, lambda manifest: manifest["files"].update({name: {"size": 6, "sha256": digest, "linked": False}}))
    assert not is_inside(name)
    for action in (verify, Manifest.read, lambda path: Subject.of(str(path))):
        with pytest.raises(InputError, match="is not a name inside the folder"):
            action(artifact)


def test_a_link_that_leads_out_fails_and_is_not_read(artifact: Path) -> None:
    outside = artifact.parent / "secret"
    outside.write_text("secret")
    (artifact / "LICENSE").symlink_to(outside)
    record = vars(FileRecord(6, sha256_of(outside)))
    edit(artifact, lambda manifest: manifest["files"].update({"LICENSE": record}))
    outside.chmod(0)
    report = verify(artifact, options=QUICK)
    reasons = [row.reason for row in report.failed]
    assert reasons[0] == "LICENSE is a link that leads out of the folder"
    assert all("LICENSE" in reason and "leads out of the folder" in reason for reason in reasons)


def test_links_inside_and_those_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--me--m" / "blobs", tmp_path / "models--me--m" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    (blobs / "1").write_text("blob")
    (snapshot / "a").symlink_to("../../blobs/1")
    (snapshot / "sub" / "b").symlink_to("../../../blobs/1")
    (snapshot / "c").symlink_to("a")
    (tmp_path / "models--me--m" / "refs").write_text("x")
    (snapshot / "out").symlink_to("../../refs")
    (snapshot / "loop").symlink_to("loop")
    (snapshot / "gone").symlink_to("nothing")
    assert [own_file(snapshot, name) is not None for name in ("a", "sub/b", "c")] == [True] * 3
    assert own_file(snapshot / "sub", "b") is not None
    assert [own_file(snapshot, name) for name in ("out", "loop", "gone", "sub")] == [None] * 4
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a").symlink_to(blobs / "1")  # the same, in a folder that is no snapshot
    assert not is_own(plain, plain / "a")


# --- types -----------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any]] = [
    ("source.weights", None), ("source.model", 3), ("source.revision", 3), ("source.adapter", "x"),
    ("source.adapter", {}), ("recipe.name", None), ("recipe", []), ("parity", "yes"), ("parity", {"passed": "yes"}),
    ("parity", {"rows": [3]}), ("parity", {"rows": {}}), ("parity", {"engines": []}),
    ("parity", {"runtimes": {"a": 1}}),
    ("parity", {"losses": 3}), ("parity", {"engines": {"vllm": {"rows": 1}}}), ("files.config.json.size", -1),
    ("files.config.json.size", "12"), ("files.config.json.sha256", "abc"), ("files.config.json.sha256", "A" * 64),
    ("files.config.json.size", 1.5), ("losses", "x"), ("notes", [1]), ("options", None), ("target", 1),
    ("source.model", "a\0b"), ("parity", {"summary": "\0"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}={value!a}"[:40] for key, value in WRONG])
def test_a_value_of_another_type_is_bad_input(artifact: Path, key: str, value: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        path = key.split(".")
        if path[0] == "files":
            path = ["files", "config.json", path[-1]]
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    edit(artifact, change)
    with pytest.raises(InputError, match="not a manifest"):
        Manifest.read(artifact)


def test_numbers_that_are_none_and_halves_of_characters(artifact: Path) -> None:
    text = (artifact / MANIFEST).read_text()
    for old, new in (('"size": ', '"size": NaN, "x": '), ('"pico"', '"\\ud800"'), ('"losses": []', '"losses": [NaN]')):
        assert old in text
        (artifact / MANIFEST).write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match="not a manifest"):
            Manifest.read(artifact)


# --- any damage ------------------------------------------------------------------------------------------

JUNK: list[Any] = [
    None, True, -1, 0, 1e308, 10**30, "", "x", "\0", "\x1b[31m", "../x", "/dev/zero", "me/x", "~", "demo", "a" * 3000,
    [], {}, [None], {"": None}, {"reference": "x"}, [{"a": []}], "%s{0}", "中\u202e",
]  # fmt: skip


def damaged(whole: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """Up to three places replaced, removed, renamed or added."""
    result = copy.deepcopy(whole)
    for _ in range(dice.randint(1, 3)):
        place: Any = result
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and dice.random() < 0.8:
                place = place[key]
                continue
            kind = dice.choice(["replace", "replace", "remove", "add"])
            if kind == "replace":
                place[key] = dice.choice(JUNK)
            elif kind == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[str(dice.choice(JUNK))] = dice.choice([place[key], *JUNK])
            break
    return result


def test_no_damage_to_a_manifest_is_a_bug_of_ours(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Hundreds of damaged ones through `verify`, `push` (up to the Hub) and what `eval` reads: worked, or refused."""
    monkeypatch.chdir(tmp_path)
    verify(artifact, options=QUICK)
    whole = json.loads((artifact / MANIFEST).read_text())
    whole["source"] |= {"revision": None, "adapter": None}
    whole["parity"] |= {"engines": {"vllm": copy.deepcopy(whole["parity"])}}
    card, text, dice = (artifact / "README.md").read_text(), hf.TARGET.card, random.Random(18)
    assert text is not None
    worked = 0

    def all_of_it() -> None:
        manifest = Manifest.read(artifact)
        check_files(artifact, manifest)
        public = public_manifest(manifest)
        json.loads(public.to_json().encode())
        refreshed(card, public, text, "me/x").encode()

    for _ in range(250):
        text_of = json.dumps(damaged(whole, dice))
        for action in (all_of_it, lambda: Subject.of(str(artifact)), lambda: verify(artifact, options=QUICK)):
            (artifact / MANIFEST).write_text(text_of)
            try:
                action()
                worked += 1
            except LrconvertError as error:
                assert 2 <= error.exit_code <= 6 and str(error).strip(), text_of
    assert worked > 60  # damage that means nothing is read


def test_the_command_line_says_what_is_wrong(artifact: Path, cli: Callable[..., Result]) -> None:
    edit(artifact, lambda manifest: manifest["source"].update(weights=3))
    for command in (("verify", artifact), ("push", artifact, "me/x"), ("eval", "passkey", artifact, "--lengths", "64")):
        result = cli(*command)
        assert result.code == 3 and "source.weights" in result.err
