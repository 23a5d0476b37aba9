# SPDX-License-Identifier: Apache-2.0
"""`lrconvert eval` on the embedded model, in transformers and in llama.cpp."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result
from matplotlib.text import Text

from lrconvert.artifact.bake import bake as bake_plan
from lrconvert.checkpoint import locate, open_model
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.data import DATA
from lrconvert.evals.passkey import PasskeyFormat
from lrconvert.recipe import derive_recipe
from lrconvert.targets import gguf

Run = Callable[..., Result]
HELDOUT = locate("demo") / "heldout.txt"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a GGUF."""
    model, output = open_model("demo"), tmp_path_factory.mktemp("gguf") / "demo.gguf"
    recipe = derive_recipe("yarn", 8, family="llama", rotary_dim=64, theta=1e4, original_window=4096, uniform=True)
    bake_plan(gguf.plan(model, recipe, output, gguf.Options(type="f32")))
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
    (text,) = kept["texts"]
    assert (text["name"], text["sha256"]) == ("heldout.txt", hashlib.sha256(HELDOUT.read_bytes()).hexdigest())
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
        kept = json.loads((tmp_path / "k.json").read_text())
        rows = kept["rows"]
        assert kept["form"]["sha256"] == hashlib.sha256((locate("demo") / "passkey.json").read_bytes()).hexdigest()
        assert [(total["length"], total["hits"], total["trials"]) for total in kept["lengths"]] == [
            (512, 3, 3),
            (1024, 3, 3),
        ]
        assert kept["seed"] == 0 and "greedy" in kept["protocol"]
        assert all(0 < part["share"]["low"] < part["share"]["high"] == 1.0 for part in [*rows, *kept["lengths"]])
        assert [row["depth"] for row in rows] == [0.0, 0.5, 1.0] * 2
        assert all(row["hits"] == row["trials"] == 1 for row in rows)
        assert (tmp_path / "k.png").is_file()


def test_protocols_texts_and_a_recipe_that_is_tried(cli: Run, tmp_path: Path) -> None:
    """A row of a data set and token ids, whole and sliding, under a recipe, by the reference: all of it is in the
    report."""
    words = HELDOUT.read_text(encoding="utf-8").split(" ")
    books = tmp_path / "books"
    books.mkdir()
    rows = [" ".join(words[:20]), " ".join(words[20:900])]
    (books / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    np.save(tmp_path / "ids.npy", tokenizer_of(locate("demo"))(" ".join(words[900:1800])))
    result = cli(
        *("eval", "perplexity", "demo", "--recipe", "demo-yarn-8x", "--code", "reference", "--windows", 2, "--json"),
        *("--text", f"hf:{books}#1", "--text", tmp_path / "ids.npy"),
        *("--lengths", "64,128", "--whole", "--sliding-window", "64", "--document-tokens", "192"),
    )
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["artifact"], told["recipe"], told["runtime"]["class"]) == ("demo", "demo-yarn-8x", "reference")
    assert [(row["length"], row["protocol"], row["tokens"], row["windows"]) for row in told["rows"]] == [
        (64, "whole", 126, 2),
        (128, "sliding window", 382, 2),
    ]
    assert told["texts"][0]["data_set"]["row"] == 1 and told["texts"][1]["name"] == "ids.npy"


def test_pictures_say_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Title, protocol, tokens that count, trials of every cell, intervals."""
    from matplotlib.figure import Figure as Picture

    from lrconvert.cli.demo import Measured
    from lrconvert.evals.figures import Figure
    from lrconvert.evals.passkey import PasskeyRow
    from lrconvert.evals.perplexity import PerplexityRow
    from lrconvert.evals.plotting import plot_before_after, plot_passkey, plot_perplexity

    found: list[str] = []

    def kept(self: Any, path: Path, **options: Any) -> None:
        found.append(" ".join(text.get_text() for text in self.findobj(Text)))

    monkeypatch.setattr(Picture, "savefig", kept)
    told = {"title": "demo: seed 7", "protocol": "some protocol"}
    plot_perplexity([PerplexityRow(64, Figure(3.0, 2.5, 3.5), 1234, 2, "whole")], tmp_path / "p.png", **told)
    plot_passkey([PasskeyRow(64, 1, 3, 0.0), PasskeyRow(64, 2, 3, 1.0)], tmp_path / "k.png", **told)
    assert all("demo: seed 7\nsome protocol" in text for text in found)
    rows = {"before": [Measured(64, 9.0, 5), Measured(4096, 90.0, 0)], "after": [Measured(64, 8.0, 5)]}
    plot_before_after(rows, tmp_path / "both.png", title="some model")
    assert all(word in found[2] for word in ("some model", "before", "after", "4,096", "keys found", "perplexity"))
    assert "64\n(1,234)" in found[0] and "95 % interval" in found[0]
    assert "1/3" in found[1] and "2/3" in found[1] and "64\n19% … 81%" in found[1]


def test_bad_input(cli: Run, tmp_path: Path) -> None:
    """A text that is too short says by how much; what is missing is named."""
    short = tmp_path / "short.txt"
    short.write_text("In the beginning.")
    (tmp_path / "p.json").mkdir()
    said = cli("eval", "perplexity", "demo", "--text", short, "--lengths", "4k")
    assert said.code == 3 and "tokens; 4096 are needed" in said.err
    assert cli("eval", "perplexity", "demo", "--text", tmp_path / "none", "--lengths", "4k").code == 3
    assert cli("eval", "perplexity", "demo", "--text", short, "--lengths", "much").code == 2
    assert cli("eval", "passkey", "demo", "--lengths", "1k", "--code", "custom").code == 2
    for wrong, code, words in (
        (("--whole", "--judged", 64), 2, "--judged can't be combined with"),
        (("--sliding-window", "8k"), 2, "longer than the contexts of 4096 tokens"),
        (("--recipe", "nowhere"), 3, "no such recipe"),
        (("--text", "hf:a/b#none"), 2, "does not name a data set"),
        (("--text", "hf:a/b"), 6, "can't be reached"),
        (("--seed", "-1"), 2, "'--seed'"),
        (("--output", "."), 2, "does not name a file"),
        (("--output", short / "p"), 2, "short.txt is not a folder"),
        (("--output", tmp_path / "p"), 2, "p.json is a folder"),
        (("--code", "reference", "--device", "much"), 2, "--device much"),
        (("--code", "reference", "--device", "meta"), 2, "runs on cpu or cuda"),
        (("--code", "reference", "--device", "cuda:99"), 6, "GPU"),
        (("--device", "cuda:99"), 6, "GPU"),
    ):
        said = cli("eval", "perplexity", "demo", "--text", HELDOUT, "--lengths", "4k", *wrong)
        assert said.code == code and words in said.err and said.err.count("\n") == 1, said.err
    for command in (("eval", "perplexity", "demo", "--lengths", "4k"), ("eval", "retrieval", "demo", "--lengths", "4k"),
                    ("extend", "demo", "-o", tmp_path / "r")):  # fmt: skip
        said = cli(*command)
        assert said.code == 2 and "Missing option '--text'" in said.err, said.err
    assert cli("eval", "passkey", tmp_path / "nothing", "--lengths", "1k").code == 3


def test_documents_beyond_a_fixed_window_are_refused(cli: Run, file: Path) -> None:
    """A GGUF has its window, 32768 tokens; a folder may be tried beyond its own."""
    for command in (("passkey",), ("perplexity", "--text", HELDOUT), ("retrieval", "--text", HELDOUT)):
        said = cli("eval", *command[:1], file, "--lengths", "1k,40000", *command[1:])
        assert said.code == 2 and "serves 32768 tokens; documents of 40000 are beyond that" in said.err, said.err
    said = cli("eval", "perplexity", "demo", "--lengths", "64m", "--text", HELDOUT)
    assert said.code == 3 and "beyond" not in said.err  # the text is too short


def test_an_option_that_means_nothing_is_said(cli: Run, file: Path) -> None:
    """A GGUF has its types; a folder computes in the one that is named, in either spelling."""
    asked = ("--lengths", "512", "--depths", 1, "--threads", 1)
    said = cli("eval", "passkey", file, *asked, "--dtype", "bf16")
    assert said.code == 0 and "--dtype bf16 means nothing here: llama.cpp computes in the types of" in said.err
    assert "means nothing" not in cli("eval", "passkey", file, *asked).err
    for name in ("bf16", "bfloat16"):
        said = cli("eval", "passkey", "demo", *asked, "--dtype", name)
        assert said.code == 0 and " in bfloat16 on cpu" in said.out and "means" not in said.err, said.err


def test_a_gpu_that_is_missing_is_the_machine_s_fault(cli: Run, file: Path) -> None:
    """In every runtime, in `eval` and in `verify`: exit code 6."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for subject in ("demo", file):
        said = cli("eval", "passkey", subject, "--lengths", 512, "--device", "cuda")
        assert said.code == 6 and "GPU" in said.err, said.err
    said = cli("verify", file, "--device", "cuda")
    assert said.code == 6 and "GPU" in said.err, said.err


def test_without_what_draws_pictures_it_says_so_first(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = cli("eval", "passkey", "demo", "--lengths", "512", "-o", tmp_path / "k")
    assert said.code == 6 and "pip install 'lrconvert[plot]'" in said.err and not (tmp_path / "k.json").exists()


def test_the_plain_form_is_a_form() -> None:
    form = PasskeyFormat.read(DATA / "passkey.json")
    assert form.digits == 5 and "{key}" in form.needle and len(form.filler) >= 5
