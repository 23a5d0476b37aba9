# SPDX-License-Identifier: Apache-2.0
"""`lrconvert.search` as a function: what it returns, writes and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lrconvert.data import DATA
from lrconvert.errors import InputError, UsageError
from lrconvert.recipe import load_recipe
from lrconvert.searching.api import Note, search
from lrconvert.searching.plan import costs, plan_search
from lrconvert.searching.request import SearchRequest, tier_lengths
from lrconvert.searching.run import Progress

ASKED: dict[str, Any] = {"target": 128, "original_window": 32, "tiers": ["long"], "budget": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DATA / "demo" / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def test_a_recipe_is_returned_and_written(text: Path, tmp_path: Path) -> None:
    """The file is the recipe; the journal lies beside it and goes on; progress is watched."""
    seen: list[Progress | Note] = []
    found = search("demo", texts=[text], output=tmp_path / "r", watch=seen.append, **ASKED)
    assert found.path == tmp_path / "r" / "recipe.json"
    assert load_recipe(tmp_path / "r") == found.recipe
    assert found.journal == tmp_path / "r.journal.jsonl" and found.notes == ()
    assert (tmp_path / "r.journal.jsonl").is_file()
    last = seen[-1]
    assert isinstance(last, Progress) and (last.length, last.evaluations, last.budget) == (128, 3, 3)
    with pytest.raises(UsageError, match="exists"):  # another search
        search("demo", texts=[text], output=tmp_path / "r", **{**ASKED, "seed": 9})
    again = search("demo", texts=[text], output=tmp_path / "r", force=True, **ASKED)
    assert again.recipe == found.recipe
    assert [(note.text.partition(": ")[2], note.warning) for note in again.notes] == [
        ("continuing after 3 evaluations", False)
    ]


def test_without_an_output_nothing_is_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's name is the model's and the target's."""
    monkeypatch.chdir(tmp_path)
    found = search("demo", texts=[str(text)], **ASKED)
    assert (found.path, found.journal, found.recipe.name) == (None, None, "demo-128")
    assert list(tmp_path.iterdir()) == []


def test_a_search_computes_with_the_threads_that_it_is_given(text: Path) -> None:
    """While it runs; the process has its own number again afterwards."""
    before, seen = torch.get_num_threads(), []

    def watch(event: Any) -> None:
        seen.append(torch.get_num_threads())

    for threads in (1, 3):
        search("demo", texts=[text], watch=watch, threads=threads, **ASKED)
        assert set(seen) == {threads} and torch.get_num_threads() == before
        seen.clear()


def test_what_is_no_recipe_is_never_replaced(text: Path, tmp_path: Path) -> None:
    """Refused before anything is computed."""
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(InputError, match=r"mine\.json"):
        search("demo", texts=[text], output=tmp_path / "mine.json", force=True, **ASKED)


def test_a_plan_knows_its_cost(text: Path) -> None:
    """Without a model in memory: as many tokens for the short set as for the long one, a quarter of the budget."""
    request = SearchRequest("demo", 128, [text], original_window=32, budget=40, documents=2)
    short, long = costs(plan_search(request))
    assert (short.length, short.evaluations, short.documents, short.tokens) == (32, 10, 8, 256)
    assert (long.length, long.evaluations, long.documents, long.tokens) == (128, 40, 2, 256)
    assert 0 < short.operations < long.operations  # attention grows with the length


def test_lengths_to_search_for() -> None:
    assert tier_lengths((), (), 32, 128) == [32, 128]
    assert tier_lengths(("long", 64, "long"), (64,), 32, 128) == [64, 128]
