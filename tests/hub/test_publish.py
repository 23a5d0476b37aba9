# SPDX-License-Identifier: Apache-2.0
"""Publishing, and reading back what was published, with the unmodified client and a Hub of ours on loopback.

Commands run in processes of their own: the client reads HF_ENDPOINT when it is imported, and the suite is
offline (conftest.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import recipe_for
from safetensors.numpy import load_file, save_file
from support.hub_server import Hub
from support.hub_user import MAIN_HURRIED, User, ok, published, refused
from support.pico import write_pico

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.card import CARD
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.source import sha256_of
from lrconvert.recipe import write_recipe
from lrconvert.targets import hf

ID = "me/artifact"
MADE_ANEW = {CARD, MANIFEST}  # what is published otherwise than it lies in the artifact


def bake(folder: Path, shards: int = 1, *, tiers: int = 2, **changes: object) -> Path:
    """An artifact in `folder`, from a source beside it."""
    source = folder.with_name(f"source-of-{folder.name}")
    write_pico(source, shards=shards, **changes)  # type: ignore[arg-type]
    (source / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    model = open_model(source)
    bake_plan(hf.plan(model, recipe_for(model, tiers=tiers), folder))
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return bake(tmp_path / "artifact", 2)


def set_parity(artifact: Path, passed: bool) -> None:
    """As `verify` leaves it, with a source that it could not open."""
    manifest = Manifest.read(artifact)
    manifest.parity = {
        "passed": passed,
        "summary": "verified: 9 cases" if passed else f"FAILED, 1 of 9 checks: native code: {artifact}/config.json",
        "against": f"{manifest.source['model']} + pico",
        "reference": "reference in float64 on cpu",
        "notes": [f"the source, {manifest.source['model']}, can't be opened"],
        "runtimes": {"native": {"transformers": "5.0.0", "torch": "2.9.0"}},
        "rows": [{"code": "native", "case": "at 64", "verdict": "pass", "length": 64, "kl_mean": 1e-9, "bound": 1e-6}],
    }
    (artifact / MANIFEST).write_text(manifest.to_json())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- there and back --------------------------------------------------------------------------------------


def test_what_is_pushed_comes_back(hub: Hub, user: User, artifact: Path, tmp_path: Path) -> None:
    """One commit with every file, byte for byte; listed with sizes; `inspect` and `hf` take the id."""
    local = files_of(artifact)
    result = ok(user("push", artifact, ID))
    assert list(hub.repos) == [ID] and len(hub.repos[ID].commits) == 2 and not hub.repos[ID].private
    remote = published(hub)
    assert set(remote) == set(local)
    assert {name for name in local if remote[name] != local[name]} == MADE_ANEW
    assert files_of(artifact) == local
    for name in local:
        assert f"  {name}: " in result.out
    assert result.out.splitlines()[-1] == f"{hub.url}/{ID}/commit/{hub.repos[ID].refs['main']}"

    facts = json.loads(ok(user("inspect", ID, "--json")).out)
    assert (facts["family"], facts["manifest"]["model"]) == ("llama", "source-of-artifact")
    code = "import sys; from lrconvert.checkpoint import open_model; print(open_model(sys.argv[1]).checkpoint.path)"
    folder = Path(ok(user.python(code, ID)).out.strip())
    assert published(hub) == {name: data for name, data in files_of(folder).items() if name != ".gitattributes"}


def test_an_onnx_folder_is_published_whole(hub: Hub, user: User, source: tuple[Path, Path], tmp_path: Path) -> None:
    """The graph, its data and the configs of the programs around it, byte for byte; the card says how to run it."""
    pytest.importorskip("onnx")
    folder, recipe = source
    artifact = tmp_path / "onnx-artifact"
    ok(user("onnx", folder, "--recipe", recipe, "-o", artifact))
    ok(user("push", artifact, ID))
    local, remote = files_of(artifact), published(hub)
    assert set(remote) == set(local) >= {"onnx/model.onnx", "onnx/model.onnx_data", "genai_config.json"}
    assert {name for name in local if remote[name] != local[name]} == MADE_ANEW
    card = remote[CARD].decode()
    assert f'ORTModelForCausalLM\nfrom transformers import AutoTokenizer\n\nname = "{ID}"' in card
    assert 'library_name: "onnx"' in card and "trust_remote_code" not in card


def test_the_published_manifest_is_consistent(hub: Hub, user: User, artifact: Path, tmp_path: Path) -> None:
    """Every digest is there and right, the card's too; nothing is a hard link any more."""
    set_parity(artifact, True)
    ok(user("push", artifact, ID))
    remote = published(hub)
    copy = tmp_path / "copy"
    for name, data in remote.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    manifest = Manifest.read(copy)
    assert set(manifest.files) == set(remote) - {MANIFEST}
    for name, record in manifest.files.items():
        assert (record.size, record.sha256, record.linked) == (len(remote[name]), sha256_of(copy / name), False)
    card = remote[CARD].decode()
    for name, record in manifest.files.items():
        assert name == CARD or f"| `{name}` | {record.size} | `{record.sha256}` |" in card
    assert "Not verified" not in card and "verified: 9 cases" in card
    assert "| native | at 64 | 64 | 1.0e-09 | 1.0e-06 | pass |" in card
    assert f'name = "{ID}"' in card


def test_a_revision_is_what_it_names(hub: Hub, user: User, artifact: Path, tmp_path: Path) -> None:
    """Branch, tag or commit: `hf` converts that one, and its manifest says which commit."""
    ok(user("push", artifact, ID))
    old = hub.repos[ID].refs["v1"] = hub.repos[ID].refs["main"]
    config = json.loads(hub.repos[ID].head["config.json"]) | {"note": "new"}
    hub.repos[ID].commit({**hub.repos[ID].head, "config.json": json.dumps(config).encode()}, "later")
    new = hub.repos[ID].refs["main"]
    model = open_model(artifact)
    recipe = write_recipe(recipe_for(model), tmp_path / "recipe")
    for revision, commit, note in (("v1", old, None), (old, old, None), ("main", new, "new")):
        output = tmp_path / f"again-{revision}"
        ok(user("hf", ID, "--recipe", recipe, "-o", output, "--revision", revision))
        assert Manifest.read(output).source["revision"] == commit
        assert json.loads((output / "config.json").read_text()).get("note") == note
        assert f'base_model: "{ID}"' in (output / CARD).read_text()
    assert json.loads(ok(user("inspect", ID, "--revision", "v1", "--json")).out)["family"] == "llama"


def test_no_local_path_leaves_the_machine(hub: Hub, user: User, artifact: Path, tmp_path: Path) -> None:
    """Not in a body, not in an address, not in the message: only names."""
    set_parity(artifact, False)
    ok(user("push", artifact, ID, "--force"))
    assert str(tmp_path) in (artifact / MANIFEST).read_text()
    everything = b"\n".join([*hub.received, *published(hub).values(), *(m.encode() for m in hub.repos[ID].messages)])
    for path in (tmp_path, tmp_path.parent, Path.home(), Path.cwd()):
        assert str(path).encode() not in everything
    manifest = json.loads(published(hub)[MANIFEST])
    assert manifest["source"]["model"] == "source-of-artifact"
    assert manifest["parity"]["against"] == "source-of-artifact + pico"
    assert "source-of-artifact, can't be opened" in manifest["parity"]["notes"][0]
    assert manifest["parity"]["summary"].endswith("native code: config.json")


def test_the_same_content_makes_no_commit(hub: Hub, user: User, artifact: Path) -> None:
    ok(user("push", artifact, ID))
    commits, puts = dict(hub.repos[ID].commits), hub.puts
    result = ok(user("push", artifact, ID))
    assert (hub.repos[ID].commits, hub.puts) == (commits, puts)
    assert f"{ID} is already up to date" in result.out


def test_a_changed_artifact_replaces_the_old_one(hub: Hub, user: User, tmp_path: Path) -> None:
    """In one commit; files that only the old one had are deleted, and said so before."""
    ok(user("push", bake(tmp_path / "one" / "artifact", 2), ID))
    before = published(hub)
    result = ok(user("push", bake(tmp_path / "two" / "artifact", 1, tiers=3), ID))
    after = published(hub)
    gone = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert set(before) - set(after) == gone and set(after) - set(before) == {"model.safetensors"}
    assert len(hub.repos[ID].commits) == 3
    for name in gone:
        assert f"  {name}: deleted on the Hub" in result.out


def test_what_the_owner_wrote_into_the_card_stays(hub: Hub, user: User, artifact: Path) -> None:
    """Outside the generated sections, and a section that was taken out."""
    text = (artifact / CARD).read_text().replace("## Tiers", "Hand-written ünder the head.\n\n## Tiers")
    start, end = "<!-- lrconvert: files -->", "<!-- lrconvert: end of files -->"
    text = text[: text.index(start)] + text[text.index(end) + len(end) :]
    (artifact / CARD).write_text(text)
    set_parity(artifact, True)
    ok(user("push", artifact, ID))
    card = published(hub)[CARD].decode()
    assert "Hand-written ünder the head." in card and "verified: 9 cases" in card and "## Files" not in card


# --- failures leave the old revision ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [({"fail_put": 2}, "Error while uploading"), ({"fail_commit": 403}, "may not do that"),
     ({"fail_commit": 412}, "try again"), ({"fail_commit": 400}, "400")],
)  # fmt: skip
def test_a_failed_upload_leaves_the_old_revision_whole(
    hub: Hub, user: User, tmp_path: Path, fault: dict[str, int], words: str
) -> None:
    """Exit code 6, the branch where it was; the next try sends what is missing and succeeds."""
    ok(user("push", bake(tmp_path / "one" / "artifact", 2), ID))
    refs, tree = dict(hub.repos[ID].refs), dict(hub.repos[ID].head)
    new = bake(tmp_path / "two" / "artifact", 3, seed=8)
    hub.puts = 0
    for name, value in fault.items():
        setattr(hub, name, value)
    refused(user("push", new, ID), 6, words)
    assert (hub.repos[ID].refs, hub.repos[ID].head) == (refs, tree)
    hub.fail_put = hub.fail_commit = 0
    ok(user("push", new, ID))
    assert set(published(hub)) == set(files_of(new))
    assert len(hub.repos[ID].commits) == 3


def test_a_failed_first_upload_leaves_an_empty_repository(hub: Hub, user: User, artifact: Path) -> None:
    """Which the next push takes, since only the Hub's own file is in it."""
    hub.fail_commit = 400
    refused(user("push", artifact, ID), 6)
    assert published(hub) == {}
    hub.fail_commit = 0
    ok(user("push", artifact, ID))


MEANWHILE = """
import sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
from lrconvert import errors
from lrconvert.hub import publish as hub
planned = hub.plan(Path(sys.argv[1]), sys.argv[2])
HfApi().create_commit(sys.argv[2], [CommitOperationAdd("notes.txt", b"theirs")], commit_message="meanwhile")
try:
    hub.upload(planned)
except errors.EnvironmentFailure as error:
    print(error)
"""


def test_a_commit_that_came_in_between_is_not_built_upon(hub: Hub, user: User, artifact: Path, tmp_path: Path) -> None:
    """What was looked at and shown is what the commit stands on, or there is none."""
    ok(user("push", artifact, ID))
    new = bake(tmp_path / "two" / "artifact", 1)
    said = ok(user.python(MEANWHILE, new, ID)).out
    assert "A commit has happened since" in said and "Somebody else changed the repository" in said
    assert "notes.txt" in published(hub) and "model.safetensors" not in published(hub)


def test_a_branch_is_written_to_where_it_exists(hub: Hub, user: User, artifact: Path) -> None:
    ok(user("push", artifact, ID))
    repo = hub.repos[ID]
    repo.refs["dev"] = main = repo.refs["main"]
    set_parity(artifact, True)
    code = (
        "import sys; from pathlib import Path; from lrconvert import errors; from lrconvert.hub import publish as hub\n"
    )
    code += "try: print(hub.push(Path(sys.argv[1]), sys.argv[2], revision=sys.argv[3], message='mine'))\n"
    code += "except errors.UsageError as error: print(error)"
    assert repo.refs["dev"] in [ok(user.python(code, artifact, ID, "dev")).out.strip()[-40:], main]
    assert repo.refs["main"] == main != repo.refs["dev"] and repo.messages[-1] == "mine"
    assert "has no branch 'new'" in ok(user.python(code, artifact, ID, "new")).out


# --- who may -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, ID, ["there is none", "hf auth login"]),
        ("read", ID, ["token 'read-token' of me can't write", "role is 'read'", "hf auth login"]),
        ("chosen-read", ID, ["token 'fineGrained-token' of me can't write"]),
        ("nonsense", ID, ["does not accept the token", "hf auth login"]),
        ("write", "other/artifact", ["token 'write-token' of me", "'other'"]),
    ],
)
def test_a_token_that_can_not_write(
    hub: Hub, user: User, artifact: Path, token: str | None, name: str, words: list[str]
) -> None:
    """Exit code 6, which token of whom, and the way out; nothing was uploaded, and no token is printed."""
    user.token = token
    result = user("push", artifact, name)
    refused(result, 6, *words)
    assert hub.repos == {} and hub.puts == 0
    if token == "nonsense":
        assert token not in result.err + result.out


def test_somebody_elses_repository(hub: Hub, user: User, artifact: Path) -> None:
    """One that can be read, with --force too; and a private one, which looks like none."""
    before = hub.add("other/artifact", {"config.json": b"{}"}).head
    hub.add("other/hidden", {"config.json": b"{}"}, private=True)
    refused(user("push", artifact, "other/artifact"), 2, "exists with other content: config.json")
    refused(user("push", artifact, "other/artifact", "--force"), 6, "token 'write-token' of me")
    refused(user("push", artifact, "other/hidden"), 6, "token 'write-token' of me")
    assert hub.repos["other/artifact"].head == before and hub.puts == 0


def test_a_token_with_chosen_permissions_and_a_name_without_owner(hub: Hub, user: User, artifact: Path) -> None:
    user.token = "chosen"
    ok(user("push", artifact, "artifact"))
    assert list(hub.repos) == [ID]


def test_private_stays_private(hub: Hub, user: User, artifact: Path) -> None:
    """Made private, updated without saying so again, seen by nobody else; a public one is not made private."""
    ok(user("push", artifact, ID, "--private"))
    set_parity(artifact, True)
    assert "(private)" in ok(user("push", artifact, ID)).out
    assert hub.repos[ID].private and len(hub.repos[ID].commits) == 3
    ok(user("inspect", ID))
    other = replace(user, home=user.home.with_name("other"), token="other")
    refused(other("inspect", ID), 3, "no model on the Hub that you can read")
    hub.repos[ID].private = False
    refused(user("push", artifact, ID, "--private"), 2, "exists and is public")


@pytest.mark.parametrize("name", ["a/b/c", "me/", "me/na me", "me/-x", "https://hub/me/x", "me/x..y", ""])
def test_a_name_that_the_hub_does_not_allow(hub: Hub, user: User, artifact: Path, name: str) -> None:
    refused(user("push", artifact, name), 2, "not a valid Hub name")
    assert hub.requests == []


# --- other content -----------------------------------------------------------------------------------------


def test_other_content_is_shown_and_refused(hub: Hub, user: User, artifact: Path) -> None:
    """Before anything is uploaded, all of it; with --force ours comes on top and theirs stays."""
    hub.add(ID, {"config.json": b"{}", "notes.txt": b"theirs", "extra/data.csv": b"1"})
    before = dict(hub.repos[ID].head)
    result = user("push", artifact, ID)
    refused(result, 2, "exists with other content: config.json; extra/data.csv; notes.txt", "--force")
    for name in ("config.json", "extra/data.csv", "notes.txt"):
        assert f"warning: {ID} holds other content: {name}" in result.err
    assert hub.repos[ID].head == before and hub.puts == 0
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)
    ok(user("push", artifact, ID, "--force"))
    assert set(published(hub)) == set(files_of(artifact)) | {"notes.txt", "extra/data.csv"}
    refused(user("push", artifact, ID), 2, "other content: extra/data.csv; notes.txt")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json"])
def test_what_loaders_would_take_instead_is_never_left_beside(hub: Hub, user: User, artifact: Path, name: str) -> None:
    """A single weight file wins over our shards, an adapter comes on top: not even with --force."""
    hub.add(ID, {name: b"{}"})
    refused(user("push", artifact, ID, "--force"), 2, name, "instead of the artifact")
    assert hub.puts == 0


def test_what_was_changed_there_is_other_content(hub: Hub, user: User, artifact: Path) -> None:
    """A card that was edited on the Hub, at the same length too, and weights that were replaced."""
    ok(user("push", artifact, ID))
    shard = "model-00001-of-00002.safetensors"
    tree = dict(hub.repos[ID].head)
    edited = tree[CARD].replace(b"Licence", b"License")
    hub.repos[ID].commit({**tree, CARD: edited, shard: bytes(len(tree[shard]))}, "by hand")
    refused(user("push", artifact, ID), 2, f"{CARD}, changed there", f"{shard}, changed there")
    ok(user("push", artifact, ID, "--force"))
    assert hub.repos[ID].head == tree


def test_another_artifact_is_other_content(hub: Hub, user: User, artifact: Path, tmp_path: Path) -> None:
    """An lrconvert artifact of another model; with --force its files go."""
    ok(user("push", artifact, ID))
    other = bake(tmp_path / "other")
    refused(user("push", other, ID), 2, "an artifact made from source-of-artifact (hf), not from source-of-other")
    ok(user("push", other, ID, "--force"))
    assert set(published(hub)) == set(files_of(other))


def test_a_manifest_on_the_hub_that_is_none(hub: Hub, user: User, artifact: Path) -> None:
    """Then nothing is known to be ours, and nothing is deleted."""
    hub.add(ID, {MANIFEST: b"{}", "old.txt": b"old"})
    refused(user("push", artifact, ID), 2, MANIFEST, "old.txt")
    ok(user("push", artifact, ID, "--force"))
    assert "old.txt" in published(hub)


# --- the artifact ------------------------------------------------------------------------------------------


def test_a_dry_run_only_reads(hub: Hub, user: User, artifact: Path) -> None:
    result = ok(user("push", artifact, ID, "--dry-run"))
    assert hub.repos == {} and {request.split()[0] for request in hub.requests} == {"GET"}
    assert "(new, public)" in result.out and f"  {MANIFEST}: " in result.out


def test_an_artifact_that_failed_is_refused(hub: Hub, user: User, artifact: Path) -> None:
    """Exit code 5; --force publishes it with that report; one that was never verified is published with a warning."""
    assert "warning: never verified" in ok(user("push", artifact, "me/unverified")).err
    assert "**Not verified yet**" in published(hub, "me/unverified")[CARD].decode()
    set_parity(artifact, False)
    refused(user("push", artifact, ID), 5, "failed its last verification", "--force")
    assert ID not in hub.repos
    ok(user("push", artifact, ID, "--force"))
    assert "FAILED, 1 of 9 checks" in published(hub)[CARD].decode()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), [MANIFEST]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json is missing"]),
        (lambda folder: (folder / "config.json").write_text("{}"), ["config.json has 2 bytes"]),
        (lambda folder: (folder / "LICENSE").write_bytes(b"x" * (folder / "LICENSE").stat().st_size),
         ["LICENSE has changed since"]),
    ],
)  # fmt: skip
def test_an_artifact_that_is_not_whole_is_bad_input(
    hub: Hub, user: User, artifact: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(artifact)
    refused(user("push", artifact, ID), 3, *words)
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["../secret", "link", "/etc/hostname", "sub/../../secret"])
def test_a_manifest_can_not_name_what_lies_outside(
    hub: Hub, user: User, artifact: Path, tmp_path: Path, name: str
) -> None:
    """An artifact of somebody else does not publish the files of whoever pushes it."""
    (tmp_path / "secret").write_text("secret")
    (artifact / "link").symlink_to(tmp_path / "secret")
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["files"][name] = {"size": 6, "sha256": None, "linked": False}
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    refused(user("push", artifact, ID), 3, "is not a name inside the folder")
    assert hub.requests == []


def test_what_lrconvert_did_not_write_is_not_published(hub: Hub, user: User, artifact: Path) -> None:
    (artifact / ".env").write_text("secret")
    assert "not published, since lrconvert did not write them: .env" in ok(user("push", artifact, ID)).err
    assert ".env" not in published(hub)


def test_local_paths_in_the_source_s_files_stay_here(hub: Hub, user: User, tmp_path: Path) -> None:
    """Programs left them there. A dry run shows every difference; the artifact keeps its bytes, and what is
    published agrees with its own digests."""
    new = bake(tmp_path / "new", _name_or_path="file:///home/me/my models/base", tokenizer_file="/home/me/t.json")
    local = (new / "config.json").read_bytes()
    shown = ok(user("push", new, ID, "--dry-run")).out
    assert '-  "_name_or_path": "file:///home/me/my models/base"' in shown and '+  "_name_or_path": "base"' in shown
    ok(user("push", new, ID))
    remote = published(hub)
    assert b"/home/me" not in b"".join(remote.values()) and b"tokenizer_file" not in remote["config.json"]
    assert (new / "config.json").read_bytes() == local
    record = json.loads(remote[MANIFEST])["files"]["config.json"]
    assert record["sha256"] == hashlib.sha256(remote["config.json"]).hexdigest()
    plain = bake(tmp_path / "plain", _name_or_path="meta/base")
    assert "local/config.json" not in ok(user("push", plain, "me/plain", "--dry-run")).out


def test_a_dry_run_needs_neither_token_nor_network(hub: Hub, user: User, artifact: Path) -> None:
    shown = ok(user("push", artifact, ID, "--dry-run", HF_HUB_OFFLINE="1"))
    assert "the Hub was not asked" in shown.out and f"  {MANIFEST}: " in shown.out and "+++ published/" in shown.out
    user.token = None
    assert "needs a token, and there is none" in ok(user("push", artifact, ID, "--dry-run")).err
    assert hub.requests == []
    refused(user("push", artifact, ID), 6, "needs a token")


TOKENS = ["hf_" + "a" * 34, "ghp_" + "b" * 36, "AKIA" + "C" * 16, "sk-" + "d" * 40, "-----BEGIN RSA PRIVATE KEY-----"]


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:6])
def test_what_looks_like_a_token_is_refused(hub: Hub, user: User, artifact: Path, token: str) -> None:
    """Wherever it stands; the message does not repeat it."""
    (artifact / CARD).write_text((artifact / CARD).read_text() + token)
    result = user("push", artifact, ID, "--dry-run", HF_HUB_OFFLINE="1")
    refused(result, 3, "README.md holds what looks like a")
    assert token not in result.err + result.out


def test_a_path_under_a_key_that_nobody_knows_is_said(hub: Hub, user: User, tmp_path: Path) -> None:
    """It may mean something there, so it stays; whoever publishes it should know."""
    new = bake(tmp_path / "new", notes={"data": ["/home/me/corpus"]}, card="https://host/home/x")
    assert "config.json says /home/me/corpus, and is published with it" in ok(user("push", new, ID, "--dry-run")).err
    assert "is published with it" not in ok(user("push", bake(tmp_path / "plain"), "me/plain", "--dry-run")).err


def test_a_token_in_the_header_of_weights_is_refused(hub: Hub, user: User, artifact: Path) -> None:
    """Trainers write their settings there."""
    weights, *_ = sorted(artifact.glob("*.safetensors"))
    tensors = load_file(weights)
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt", "settings": json.dumps({"key": TOKENS[0]})})
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["files"][weights.name] = {"size": weights.stat().st_size, "sha256": None}
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    refused(user("push", artifact, ID, "--dry-run"), 3, f"{weights.name} holds what looks like a Hugging Face token")


def test_metadata_that_the_hub_refuses(hub: Hub, user: User, artifact: Path) -> None:
    """Before anything is sent; the card is the owner's to mend."""
    text = (artifact / CARD).read_text()
    (artifact / CARD).write_text(text.replace('license: "apache-2.0"', "license: My Licence"))
    refused(user("push", artifact, ID), 3, "Invalid metadata in README.md", "not My Licence", "Fix the metadata")
    assert hub.puts == 0
    (artifact / CARD).write_text(text.replace('license: "apache-2.0"', "license: mit"))
    ok(user("push", artifact, ID))


# --- hf --push-to-hub --------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Path]:
    folder = write_pico(tmp_path / "source")
    return folder, write_recipe(recipe_for(open_model(folder)), tmp_path / "recipe")


def test_baking_and_pushing_in_one(hub: Hub, user: User, source: tuple[Path, Path], tmp_path: Path) -> None:
    model, recipe = source
    arguments = ("hf", model, "--recipe", recipe, "-o", tmp_path / "out")
    assert f"nothing was published as {ID}" in ok(user(*arguments, "--push-to-hub", ID, "--dry-run")).err
    assert hub.requests == []
    ok(user(*arguments, "--push-to-hub", ID, "--private"))
    assert hub.repos[ID].private and set(published(hub)) == set(files_of(tmp_path / "out"))
    refused(user(*arguments, "--force", "--private"), 2, "--push-to-hub")


def test_who_can_not_publish_learns_it_before_the_work(
    hub: Hub, user: User, source: tuple[Path, Path], tmp_path: Path
) -> None:
    model, recipe = source
    user.token = "read"
    refused(user("hf", model, "--recipe", recipe, "-o", tmp_path / "out", "--push-to-hub", ID), 6, "can't write")
    assert not (tmp_path / "out").exists()


def test_verified_and_pushed(
    hub: Hub, user: User, source: tuple[Path, Path], tmp_path: Path, main_forking: str
) -> None:
    """The real report is on the card and in the manifest, with the versions that answered."""
    pytest.importorskip("torch", reason="needs lrconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
    model, recipe = source
    arguments = ("hf", model, "--recipe", recipe, "-o", tmp_path / "out", "--verify", "--push-to-hub", ID)
    ok(user.python(main_forking, *arguments, HF_MODULES_CACHE=str(tmp_path / "modules")))
    card, manifest = published(hub)[CARD].decode(), json.loads(published(hub)[MANIFEST])
    assert manifest["parity"]["passed"] and manifest["parity"]["summary"] in card
    assert f"transformers {transformers.__version__}" in card
    for row in manifest["parity"]["rows"]:
        assert f"| {row['code']} | {row['case']} |" in card
    assert str(tmp_path).encode() not in b"\n".join(hub.received)


# --- reading from the Hub ----------------------------------------------------------------------------------


def test_ids_and_revisions_that_are_none(hub: Hub, user: User, artifact: Path) -> None:
    ok(user("push", artifact, ID))
    refused(user("inspect", "me/nothing"), 3, "me/nothing: no such folder, and no model on the Hub")
    refused(user("inspect", ID, "--revision", "v9"), 3, f"{ID}: has no revision 'v9' on the Hub")
    user.token = None
    ok(user("inspect", ID))
    hub.repos[ID].private = True
    user.home = user.home.with_name("fresh")
    refused(user("inspect", ID), 3, "hf auth login")


def test_offline_means_the_cache(hub: Hub, user: User, artifact: Path) -> None:
    """What was downloaded before still opens; what was not is exit code 6. Pushing needs the network."""
    ok(user("push", artifact, ID))
    refused(user("inspect", ID, HF_HUB_OFFLINE="1"), 6, "the Hub did not answer", "local folder")
    ok(user("inspect", ID))
    asked = len(hub.requests)
    ok(user("inspect", ID, HF_HUB_OFFLINE="1"))
    refused(user("push", artifact, ID, HF_HUB_OFFLINE="1"), 6, "offline")
    assert len(hub.requests) == asked


def test_a_hub_that_nobody_answers_for(hub: Hub, user: User, artifact: Path) -> None:
    """Exit code 6, for reading and for writing."""
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    refused(user("inspect", ID, **nobody), 6, "the Hub did not answer")
    refused(user("push", artifact, ID, **nobody), 6, "signing in", "Check the network")


def test_a_download_that_breaks_off_is_no_model(hub: Hub, user: User, artifact: Path) -> None:
    """Exit code 6; nothing that looks whole is left in the cache, and the next try succeeds."""
    ok(user("push", artifact, ID))
    hub.cut = 1000
    refused(user.python(MAIN_HURRIED, "inspect", ID), 6, "the Hub did not answer")
    hub.cut = None
    ok(user("inspect", ID))
