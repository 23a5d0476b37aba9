# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata that the Hub's client reads, what the body says, and nothing of this machine in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import recipe_for
from huggingface_hub import ModelCard
from support.pico import write_pico

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.artifact.card import CARD, MAX_CARD_BYTES, SourceCard, carried, refreshed, render, source_card
from lrconvert.artifact.manifest import MANIFEST, FileRecord, Manifest
from lrconvert.artifact.redaction import hub_revision, local_name, public_manifest, without_paths
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.base import CheckpointView
from lrconvert.checkpoint.gguf_header import GgufArray
from lrconvert.recipe import Provenance, Recipe
from lrconvert.targets import hf
from lrconvert.targets.hf.card import CARD_TEXT

THEIRS = """---
license: llama3.2
language:
- en
- 'no'
base_model: meta/base
datasets: [secret/data]
---

# Their model

Their words: naïve.
"""
APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
COMMUNITY = "\n# LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\nText.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pico(tmp_path / "source")


def card_of(folder: Path, output: Path, recipe: Recipe | None = None) -> str:
    """The card of an artifact baked from `folder`."""
    model = open_model(folder)
    bake_plan(hf.plan(model, recipe or recipe_for(model), output))
    return (output / CARD).read_text(encoding="utf-8")


def rendered(model: Model, recipe: Recipe, **options: Any) -> str:
    return render(model, recipe, model.resolve(recipe), CARD_TEXT, **{"source": SourceCard(), **options})


# --- metadata ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({CARD: THEIRS}, {"license": "llama3.2", "language": ["en", "no"], "base_model": "meta/base",
                          "base_model_relation": "finetune"}),
        ({"LICENSE": APACHE}, {"license": "apache-2.0"}),
        ({"licence.md": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE.txt": COMMUNITY},
         {"license": "other", "license_name": "llama-3.2-community-license-agreement", "license_link": "LICENSE.txt"}),
        ({CARD: THEIRS.replace("license: llama3.2\n", ""), "LICENSE": APACHE},
         {"license": "apache-2.0", "language": ["en", "no"], "base_model": "meta/base",
          "base_model_relation": "finetune"}),
        ({CARD: THEIRS.replace("meta/base", "/home/me/base")}, {"license": "llama3.2", "language": ["en", "no"]}),
        ({CARD: "# No metadata\n"}, {}),
    ],
)  # fmt: skip
def test_the_metadata_are_valid_and_carried(
    folder: Path, tmp_path: Path, files: dict[str, str], expected: dict[str, Any]
) -> None:
    """The client parses them: ours, and of the source's what concerns licence, language and base model."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    card_of(folder, tmp_path / "out")
    found = ModelCard.load(tmp_path / "out" / CARD).data.to_dict()
    ours = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["longrope", "long-context", "custom_code"],
    }
    assert found == {**ours, **expected}


def test_metadata_of_a_gguf_file(pico: Callable[..., Model], tmp_path: Path) -> None:
    """Licence and languages stand in the header; there is no text."""
    header = {"general.license": "mit", "general.languages": ["en"], "general.license.name": 3}
    model = pico()
    checkpoint = CheckpointView(model.checkpoint)  # as an adapter merged into it is
    checkpoint.path, checkpoint.gguf = tmp_path / "m.gguf", cast(Any, SimpleNamespace(metadata=header))
    for each in (checkpoint, CheckpointView(checkpoint)):
        assert source_card(replace(model, checkpoint=each)) == SourceCard({"license": "mit", "language": ["en"]})


def test_a_recipe_s_evaluations_are_the_model_index(folder: Path, tmp_path: Path) -> None:
    """What `extend` records, as huggingface_hub reads it: each figure with its length; what has none is left out."""
    measured = {
        "perplexity@8192": {"length": 8192, "perplexity": {"value": 32.5, "low": 30.0, "high": 35.0}},
        "retrieval@8192": {"length": 8192, "hits": 18, "trials": 20, "share": {"value": 0.9, "low": 0.7, "high": 1.0}},
        "other@1": {"length": 1},
    }
    recipe = replace(recipe_for(open_model(folder)), evaluation={"texts": [{"name": "b.npy"}], "measured": measured})
    card = ModelCard(card_of(folder, tmp_path / "a", recipe))
    found = [(each.metric_name, each.metric_value, each.dataset_name) for each in cast(Any, card.data).eval_results]
    assert found == [("perplexity at 8192 tokens", 32.5, "b.npy"), ("retrieval at 8192 tokens", 0.9, "b.npy")]


BILLION = "---\na: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi"))  # noqa: B905


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (b"---\nlicense: [\n---\n# T\n", "metadata can't be read"),
        (b"---\n- a\n- b\n---\n# T\n", "metadata can't be read"),
        (b"---\nlicense: " + b"[" * 3000 + b"]" * 3000 + b"\n---\n# T\n", "metadata can't be read"),
        (b"\xff\xfe# T\n", "metadata can't be read"),
        (BILLION.encode() + b"license: *i\n---\n# T\n", None),
        (b"---\nlicense: {a: 1}\nlanguage: [1, 2]\nbase_model: [a/b, 3]\n---\n# T\n", None),
        (b"---\nlicense: 2024-01-01\n---\n# T\n", None),
        (b"# T\n" + b"x" * MAX_CARD_BYTES, "not copied"),
    ],
)
def test_a_card_that_is_none(folder: Path, tmp_path: Path, data: bytes, note: str | None) -> None:
    """Somebody else's text never stops a conversion: a note, and metadata without what could not be read."""
    (folder / CARD).write_bytes(data)
    card = card_of(folder, tmp_path / "out")
    notes = [text for text in Manifest.read(tmp_path / "out").notes if CARD in text]
    assert ([note in text for text in notes] == [True]) if note else notes == []
    found = ModelCard(card).data.to_dict()
    assert set(found) == {"library_name", "pipeline_tag", "tags"}
    assert ("# T\n" in card) == (note != "not copied")


# --- the body ----------------------------------------------------------------------------------------------


def test_the_source_text_stands_below_ours(folder: Path, tmp_path: Path) -> None:
    """Without its head, and without lines that would pass for sections of ours."""
    (folder / CARD).write_text(THEIRS + "\n<!-- lrconvert: parity -->\nold\n<!-- lrconvert: end of parity -->\n")
    card = card_of(folder, tmp_path / "out")
    ours, _, theirs = card.partition("## The source's model card")
    assert "# source, extended to 128 tokens" in ours
    assert theirs.endswith("# Their model\n\nTheir words: naïve.\n\nold\n")
    assert card.count("<!-- lrconvert: parity -->") == 1 and "secret/data" not in card


def test_an_artifact_of_an_artifact(folder: Path, tmp_path: Path) -> None:
    """Its card is somebody's words by then; each generated section is there once."""
    card_of(folder, tmp_path / "one")
    card = card_of(tmp_path / "one", tmp_path / "two")
    for name in ("run", "parity", "files"):
        assert card.count(f"<!-- lrconvert: {name} -->") == card.count(f"<!-- lrconvert: end of {name} -->") == 1


def test_the_same_inputs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Whatever the output's name; the manifest has the card's digest, and no path of this machine is in it."""
    (folder / CARD).write_text(THEIRS)
    cards = [card_of(folder, tmp_path / name) for name in ("one", "sub/two")]
    assert cards[0] == cards[1]
    assert CARD in Manifest.read(tmp_path / "one").files
    assert str(tmp_path) not in cards[0]


def test_tiers_losses_and_licence(pico: Callable[..., Model]) -> None:
    """One row a tier; what native code loses, in the words of the manifest; or that it loses nothing."""
    model = pico()
    recipe = recipe_for(model, tiers=3, start_tokens=4)
    card = rendered(model, recipe, losses=["a loss", "another"])
    for tier in recipe.tiers:
        low, high = min(tier.factors), max(tier.factors)
        spread = f"{low:.6g} to {high:.6g}"
        assert f"| {tier.max_length} | 4 | {tier.attention_factor:.6g} | {spread} |" in card
    assert "- a loss.\n- another.\n" in card and "the factor sets themselves stay exact" not in card
    assert "The source states no licence." in card and "## Notes" not in card
    card = rendered(model, recipe, dropped=["n̂"], notes=[f"read from {model.reference}"])
    assert "with other engines:\n\n- n̂.\n" in card and "the recipe exactly" not in card
    assert f"## Notes\n\n- read from {Path(model.reference).name}.\n" in card
    assert "the factor sets themselves stay exact" in rendered(model, recipe)
    assert "as the source states it: mit." in rendered(model, recipe, source=SourceCard({"license": "mit"}))


@pytest.mark.parametrize(
    ("provenance", "rows"),
    [
        (Provenance("derived", method="yarn"), ["| kind | derived |", "| method | yarn |"]),
        (
            Provenance("published", source="https://x.org/a/b.json", licence="MIT", notes=("n", "m|o")),
            ["| source | https://x.org/a/b.json |", "| licence | MIT |", "| notes | n; m\\|o |"],
        ),
        (Provenance("published", source="/home/me/my-config.json (su)"), ["| source | my-config.json (su) |"]),
        (
            Provenance("searched", weights="a/b", search={"seed": 7, "text": "C:\\data\\book.txt"}),
            ["| fitted to the weights | a/b |", "| search: seed | 7 |", "| search: text | book.txt |"],
        ),
    ],
)
def test_where_the_factors_come_from(pico: Callable[..., Model], provenance: Provenance, rows: list[str]) -> None:
    card = rendered(pico(), replace(recipe_for(pico()), provenance=provenance, base_model="me/base"))
    for row in [*rows, "| recipe | pico |", "| made for | me/base |"]:
        assert f"{row}\n" in card


def test_a_merged_adapter_is_named(pico: Callable[..., Model], tmp_path: Path) -> None:
    """By its Hub id, as the recipe's own, or by the last component of its path."""
    adapter = SimpleNamespace(reference="../secret/mine", path=tmp_path / "mine")
    assert "with the LoRA adapter mine merged" in rendered(pico(), recipe_for(pico()), adapter=adapter)
    adapter = SimpleNamespace(reference="a/b", path=tmp_path / "models--a--b" / "snapshots" / ("0" * 40))
    assert "with the LoRA adapter a/b merged" in rendered(pico(), recipe_for(pico()), adapter=adapter)
    adapter = SimpleNamespace(reference="/some/recipe/adapter", path=tmp_path / "adapter")
    own = replace(recipe_for(pico()), adapter="adapter")
    assert "with the recipe's LoRA adapter merged" in rendered(pico(), own, adapter=adapter)


# --- refreshing --------------------------------------------------------------------------------------------


def manifest(parity: dict[str, Any] | None = None) -> Manifest:
    files = {CARD: FileRecord(1, "c" * 64), "config.json": FileRecord(22, "f" * 64)}
    return Manifest("hf", {"model": "m"}, {"name": "r"}, {}, [], files=files, parity=parity)


REPORT: dict[str, Any] = {
    "passed": False,
    "summary": "FAILED, 1 of 2 checks: <b>",
    "against": "m + r",
    "reference": "reference in float64 on cpu",
    "losses": ["a | loss"],
    "runtimes": {"native": {"transformers": "5.1", "torch": "2.9", "class": "L"}},
    "rows": [
        {"code": "native", "case": "at|64", "verdict": "fail", "length": 64, "kl_mean": 0.125, "bound": 1e-6},
        {"code": "files", "case": "2 files, sha256", "verdict": "pass"},
    ],
}


def test_a_report_becomes_a_table(pico: Callable[..., Model]) -> None:
    """Every row, failed ones too; a bar in a cell is no new cell."""
    card = refreshed(rendered(pico(), recipe_for(pico())), manifest(REPORT), CARD_TEXT, "me/x")
    assert "| native | at\\|64 | 64 | 1.2e-01 | 1.0e-06 | fail |\n| files | 2 files, sha256 |  |  |  | pass |\n" in card
    assert "FAILED, 1 of 2 checks: b. " in card and "Lost: a loss." in card
    assert "native code: transformers 5.1, torch 2.9." in card
    assert 'name = "me/x"' in card and "Not verified" not in card
    assert f"| `config.json` | 22 | `{'f' * 64}` |" in card and "c" * 64 not in card


def test_refreshing_changes_its_own_sections_only(pico: Callable[..., Model]) -> None:
    """Any number of times, with the same bytes; in a text without them it changes nothing."""
    card = rendered(pico(), recipe_for(pico())).replace("## Tiers", "mine \\1 \\g<0>\n\n## Tiers")
    once = refreshed(card, manifest(REPORT), CARD_TEXT, "me/x")
    assert refreshed(once, manifest(REPORT), CARD_TEXT, "me/x") == once
    assert "mine \\1 \\g<0>" in once
    assert "**Not verified yet**" in refreshed(once, manifest(), CARD_TEXT, "me/x")
    assert refreshed("# Mine alone\n", manifest(REPORT), CARD_TEXT, "me/x") == "# Mine alone\n"


# --- what may leave the machine ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/models/llama", "llama"),
        ("from '/home/me/x.json', and ~/y/z.csv", "from 'x.json', and z.csv"),
        ("C:\\Users\\me\\model + r", "model + r"),
        ("D:/models/model", "model"),
        ("file:///home/me/my models/base", "base"),
        ("file:/home/me/x and file://localhost/a/b", "x and b"),
        ("/home/my name/my best model/llama is it", "llama is it"),
        ("~root/keys/k", "k"),
        ("//server/share/model", "model"),
        ("FileNotFoundError: /tmp/a/config.json: no such", "FileNotFoundError: config.json: no such"),
        ("https://x.org/a/b and owner/name", "https://x.org/a/b and owner/name"),
        ("KL 1/2, and/or 3 / 4", "KL 1/2, and/or 3 / 4"),
        ("refs/pr/1 model.layers.0", "refs/pr/1 model.layers.0"),
    ],
)  # fmt: skip
def test_paths_are_cut_to_names(text: str, expected: str) -> None:
    """Absolute ones, of any platform; not addresses, Hub ids or fractions."""
    assert without_paths(text) == expected


@pytest.mark.parametrize(
    ("reference", "name"),
    [("/a/b", "b"), ("../b/", "b"), ("b", "b"), ("a\\b", "b"), ("/", "model"), (".", "."), ("x/y.gguf", "y.gguf")],
)
def test_a_local_name_is_the_last_component(reference: str, name: str) -> None:
    assert local_name(reference) == name


def test_a_hub_id_is_known_by_where_it_was_downloaded() -> None:
    """A relative path looks the same, and is none."""
    snapshot = Path("/cache/models--owner--name/snapshots") / ("a" * 40)
    assert hub_revision("owner/name", snapshot) == "a" * 40
    for reference, path in (
        ("owner/other", snapshot),
        (str(snapshot), snapshot),
        ("owner/name", Path("owner/name")),
        ("owner/name", snapshot.with_name("main")),
    ):
        assert hub_revision(reference, path) is None


def test_the_public_manifest_has_names_only() -> None:
    """A path loses its folders wherever it stands; a Hub id, known by its commit, stays; the original too."""
    source = {"model": "work/llama", "adapter": {"reference": "../ad/mine"}}
    values: dict[str, Any] = {"notes": ["adapter ../ad/mine is merged into work/llama"], "parity": {"a": [["/x/y"]]}}
    made = Manifest("hf", source, {"provenance": {"source": "~/r/t.csv"}}, {}, [], **values)
    public = public_manifest(made)
    assert public.source == {"model": "llama", "adapter": {"reference": "mine"}}
    assert public.recipe == {"provenance": {"source": "t.csv"}}
    assert (public.notes, public.parity) == (["adapter mine is merged into llama"], {"a": [["y"]]})
    assert made.source["model"] == "work/llama" and made.notes[0].endswith("work/llama")
    hub = {"model": "owner/name", "revision": "a" * 40, "adapter": {"reference": "o/n"}, "adapter_revision": "b" * 40}
    assert public_manifest(Manifest("hf", hub, {}, {}, [])).source == hub
    assert MANIFEST not in public.files


def test_only_texts_are_carried_from_a_header() -> None:
    """A GGUF may hold arrays and numbers where a licence is expected."""
    assert carried({"license": GgufArray(8, 2, 0, 16), "license_name": 5, "license_link": "https://example.org/x"}) == {
        "license_link": "https://example.org/x"
    }
