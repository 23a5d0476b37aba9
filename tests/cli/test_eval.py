# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval` on the embedded model, in transformers and in llama.cpp."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

from lrconvert.checkpoint import locate, open_model
from lrconvert.evals.passkey import PasskeyFormat
from lrconvert.recipe import derive_recipe
from lrconvert.resources import DATA
from lrconvert.targets import gguf

Run = Callable[..., Result]
HELDOUT = locate("demo") / "heldout.txt"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a GGUF."""
    model, output = open_model("demo"), tmp_path_factory.mktemp("gguf") / "demo.gguf"
    recipe = derive_recipe("yarn", 8, family="llama", rotary_dim=64, theta=1e4, original_window=4096, uniform=True)
    gguf.write(gguf.plan(model, recipe, output, gguf.Options(type="f32")))
    return output


def test_perplexity_in_both_runtimes(cli: Run, file: Path, tmp_path: Path) -> None:
    """The GGUF, within its window, has the perplexity of the model it was made of, but for an attention factor that
    the uniform recipe has there; JSON and picture are written, and say how they came to be."""
    asked = ("--text", HELDOUT, "--lengths", "512,1k", "--judged", 256, "--windows", 2, "--threads", 1)
    plain = json.loads(cli("eval", "perplexity", "demo", *asked, "--json").out)
    result = cli("eval", "perplexity", file, *asked, "-o", tmp_path / "out" / "p")
    assert result.code == 0 and "perplexity (95 %)" in result.out and "llama.cpp" in result.out
    kept = json.loads((tmp_path / "out" / "p.json").read_text())
    assert (tmp_path / "out" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert kept["seed"] == 0 and "last 256 tokens" in kept["protocol"]
    assert kept["texts"] == [{"name": "heldout.txt", "sha256": hashlib.sha256(HELDOUT.read_bytes()).hexdigest()}]
    for ours, theirs in zip(kept["rows"], plain["rows"], strict=True):
        assert (ours["length"], ours["tokens"], ours["windows"]) == (theirs["length"], 512, 2)
        assert ours["perplexity"]["low"] < ours["perplexity"]["value"] < ours["perplexity"]["high"]
        assert ours["perplexity"]["value"] == pytest.approx(theirs["perplexity"]["value"], rel=0.1)


def test_passkey_in_both_runtimes(cli: Run, file: Path, tmp_path: Path) -> None:
    """Inside the window the embedded model finds every key, whoever runs it."""
    asked = ("--lengths", "512,1k", "--depths", 3, "--threads", 1)
    for subject in ("demo", file):
        extra = () if subject == "demo" else ("--form", locate("demo") / "passkey.json")
        result = cli("eval", "passkey", subject, *asked, *extra, "-o", tmp_path / "k")
        assert result.code == 0 and "3 of 3" in result.out, result.err
        rows = json.loads((tmp_path / "k.json").read_text())["rows"]
        assert [row["depth"] for row in rows] == [0.0, 0.5, 1.0] * 2
        assert all(row["hits"] == row["trials"] == 1 for row in rows)
        assert (tmp_path / "k.png").is_file()


def test_bad_input(cli: Run, tmp_path: Path) -> None:
    """A text that is too short says by how much; what is missing is named."""
    short = tmp_path / "short.txt"
    short.write_text("In the beginning.")
    said = cli("eval", "perplexity", "demo", "--text", short, "--lengths", "4k")
    assert said.code == 3 and "tokens; 4096 are asked for" in said.err
    assert cli("eval", "perplexity", "demo", "--text", tmp_path / "none", "--lengths", "4k").code == 3
    assert cli("eval", "perplexity", "demo", "--text", short, "--lengths", "much").code == 2
    assert cli("eval", "passkey", "demo", "--lengths", "1k", "--code", "custom").code == 2
    assert cli("eval", "passkey", tmp_path / "nothing", "--lengths", "1k").code == 3


def test_the_plain_form_is_a_form() -> None:
    form = PasskeyFormat.read(DATA / "passkey.json")
    assert form.digits == 5 and "{key}" in form.needle and len(form.filler) >= 5
