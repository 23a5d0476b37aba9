# SPDX-License-Identifier: Apache-2.0
"""A search from end to end on a landscape: tiers, journal, recipe, what goes wrong."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.search_helpers import NOTHING, Landscape, planted

from lrconvert.checkpoint import Model
from lrconvert.data import DATA
from lrconvert.errors import EnvironmentFailure, InputError
from lrconvert.evals.texts import Text
from lrconvert.recipe import Recipe, parse_recipe
from lrconvert.rope import Tier
from lrconvert.searching.journal import Journal, journal_path, read_journal
from lrconvert.searching.plan import SearchPlan, TierPlan, default_budget
from lrconvert.searching.protocol import Answer, Question
from lrconvert.searching.run import Progress, Search
from lrconvert.searching.space import space_for

ALGORITHMS = ("guided", "evolution")


@pytest.fixture
def plan(pico: Callable[..., Model]) -> SearchPlan:
    """A pico Llama, 64 to 512: both sets."""
    model = pico("llama")
    spaces = [space_for(16, 10000.0, 64, length) for length in (64, 512)]
    budgets = (24, 60)
    return SearchPlan(
        model=model,
        original_window=64,
        algorithm="guided",
        seed=3,
        tiers=tuple(TierPlan(space, NOTHING, budget) for space, budget in zip(spaces, budgets, strict=True)),
        texts=(Text("book.txt", "ab" * 32, np.arange(600)),),
        dtype="float32",
        name="pico-512",
        base_model="pico",
    )


def landscape(plan: SearchPlan, **changes: Any) -> Landscape:
    """Each tier has an optimum of its own; they are told apart by the attention factors' ranges."""
    short, long = (planted(tier.space)[1] for tier in plan.tiers)
    fixed = plan.tiers[1].space.attention[0]
    return Landscape(lambda one: (long if one.attention_factor == fixed else short)(one), **changes)


def run(plan: SearchPlan, evaluator: Landscape, path: Path, watch: Callable[[Progress], None] | None = None) -> Recipe:
    with Journal.open(path, plan.identity) as journal:
        return Search(plan, evaluator, journal, watch or (lambda progress: None)).run()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_search_makes_a_whole_recipe(algorithm: Any, plan: SearchPlan, tmp_path: Path) -> None:
    """Both sets, how they were found, and what they cost at each length; a recipe that is read strictly."""
    plan = replace(plan, algorithm=algorithm)
    seen: list[Progress] = []
    recipe = run(plan, landscape(plan), tmp_path / "j.jsonl", seen.append)
    assert parse_recipe(recipe.to_json()) == recipe
    assert [tier.max_length for tier in recipe.tiers] == [64, 512]
    search = recipe.provenance.search
    assert search is not None and recipe.provenance.method == algorithm
    assert search["texts"] == [{"name": "book.txt", "sha256": "ab" * 32, "tokens": 600}]
    for tier, planned in zip(search["tiers"], plan.tiers, strict=True):
        assert planned.budget - 3.4 < tier["forward_equivalents"] <= planned.budget
        assert tier["failed"] == 0
    records = read_journal(tmp_path / "j.jsonl").records
    assert len(records) == sum(tier["evaluations"] for tier in search["tiers"])
    assert recipe.evaluation is not None
    for found in recipe.evaluation["tiers"]:
        best = min(record.answer.loss for record in records if record.tier == found["max_length"])
        assert found["loss"] == best == found["losses"]["text@8"]
    assert list(recipe.evaluation["tiers"][1]["starts"])[:3] == ["pi", "ntk", "yarn"]
    assert seen[-1].length == 64 and seen[-1].best == min(r.answer.loss for r in records if r.tier == 64)
    assert [progress.length for progress in seen[:1]] == [512]  # the long set first


class Kill(BaseException):
    """What no code catches."""


@dataclass
class Dying(Landscape):
    """Ends the process after so many evaluations."""

    left: int = 0

    def answer(self, objective: Any, questions: Sequence[Question]) -> list[Answer]:
        if not self.left:
            raise Kill
        self.left -= 1
        return super().answer(objective, questions)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_anywhere_it_ends_in_the_same_recipe(algorithm: Any, plan: SearchPlan, tmp_path: Path) -> None:
    """Killed again and again, no evaluation is lost or made twice."""
    plan = replace(plan, algorithm=algorithm)
    whole = run(plan, landscape(plan), tmp_path / "whole.jsonl")
    path, asked, ended = tmp_path / "killed.jsonl", [], None
    for life in (0, 1, 7, 20, 20, 1000):
        evaluator = Dying(landscape(plan).loss, left=life)
        with contextlib.suppress(Kill):
            ended = run(plan, evaluator, path)
        asked += evaluator.asked
    assert ended == whole
    journals = [read_journal(each).records for each in (path, tmp_path / "whole.jsonl")]
    assert journals[0] == journals[1]
    assert len(asked) == len(journals[1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("width", [3, 8])
def test_the_journal_does_not_depend_on_the_number_of_processes(
    algorithm: Any, width: int, plan: SearchPlan, tmp_path: Path
) -> None:
    plan = replace(plan, algorithm=algorithm)
    recipes = [run(plan, landscape(plan, width=n), tmp_path / f"{n}.jsonl") for n in (1, width)]
    assert recipes[0] == recipes[1]
    assert read_journal(tmp_path / "1.jsonl").records == read_journal(tmp_path / f"{width}.jsonl").records


def test_a_larger_budget_goes_on(plan: SearchPlan, tmp_path: Path) -> None:
    """The journal of a smaller search is the beginning of a larger one's, tier by tier."""
    larger = replace(plan, tiers=tuple(replace(tier, budget=tier.budget + 20) for tier in plan.tiers))
    run(plan, landscape(plan), tmp_path / "j")
    evaluator = landscape(plan)
    recipe = run(larger, evaluator, tmp_path / "j")
    assert recipe == run(larger, landscape(plan), tmp_path / "other")
    assert 20 <= len(evaluator.asked) <= 48


def test_a_set_that_was_not_searched_is_the_unmodified_model_s(plan: SearchPlan, tmp_path: Path) -> None:
    plan = replace(plan, tiers=plan.tiers[1:])
    recipe = run(plan, Landscape(planted(plan.tiers[0].space)[1]), tmp_path / "j")
    assert recipe.tiers[0] == Tier(64, (1.0,) * 8)


def test_failures_are_counted_and_never_best(plan: SearchPlan, tmp_path: Path) -> None:
    fail = dict.fromkeys(range(2, 400, 2), "the loss is not a number")
    recipe = run(plan, landscape(plan, fail=fail), tmp_path / "j")
    assert recipe.provenance.search is not None and recipe.evaluation is not None
    assert all(tier["failed"] >= tier["evaluations"] // 2 - 1 for tier in recipe.provenance.search["tiers"])
    assert all(math.isfinite(tier["loss"]) for tier in recipe.evaluation["tiers"])


def test_no_loss_at_all_is_an_error(plan: SearchPlan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no candidate for 512 tokens has a loss: the loss is not a number"):
        run(plan, landscape(plan, fail={0: "the loss is not a number"}), tmp_path / "j")


def test_documents_that_do_not_fit_end_the_search(plan: SearchPlan, tmp_path: Path) -> None:
    """Exit code 6, with the largest length that fits; nothing is recorded that a larger machine would be bound to."""
    evaluator = landscape(plan, fail={0: "out of memory: tried to allocate"}, fits=6)
    with pytest.raises(EnvironmentFailure, match="the largest that fits has about 6") as error:
        run(plan, evaluator, tmp_path / "j")
    assert error.value.exit_code == 6 and "--target of at most 6" in str(error.value)
    assert read_journal(tmp_path / "j").records == []
    later = landscape(plan, fail={9: "out of memory: somebody else's"})
    recipe = run(plan, later, tmp_path / "j")  # one candidate alone
    assert recipe.provenance.search is not None
    assert [tier["failed"] for tier in recipe.provenance.search["tiers"]] == [0, 1]


def test_all_go_on_when_the_journal_is_whole(plan: SearchPlan, tmp_path: Path) -> None:
    """A stage of an extension reads it next, in every process: they meet once more behind the last answer."""
    written: list[int] = []

    class Meeting(Landscape):
        def agree(self, value: Any) -> Any:
            written.append(len(read_journal(tmp_path / "j").records))
            return value

    run(plan, Meeting(landscape(plan).loss), tmp_path / "j")
    assert written[-1] == len(read_journal(tmp_path / "j").records) > 0


def test_another_code_s_journal_is_refused(plan: SearchPlan, tmp_path: Path) -> None:
    """The head is the same, but the questions are not."""
    run(plan, landscape(plan), tmp_path / "j")
    lines = (tmp_path / "j").read_text().splitlines(keepends=True)
    plain = [json.loads(line) for line in lines]
    plain[5]["candidate"]["factors"][-1] += 0.01
    for line in plain:  # as an earlier version wrote it: without digests, which would tell first
        line.pop("chain")
    (tmp_path / "j").write_text("".join(json.dumps(line) + "\n" for line in plain))
    with pytest.raises(InputError, match="evaluation 5 for 512 tokens in the journal differs"):
        run(plan, landscape(plan), tmp_path / "j")


def test_the_identity_names_what_matters(plan: SearchPlan) -> None:
    """And no path of this machine."""
    for change in ({"seed": 4}, {"algorithm": "evolution"}, {"dtype": "bfloat16"}, {"texts": ()}, {"tiers": ()}):
        assert replace(plan, **change).identity != plan.identity
    assert replace(plan, name="other", base_model="elsewhere").identity == plan.identity
    assert "/" not in json.dumps(plan.identity)


def test_one_attention_factor_for_all(plan: SearchPlan, tmp_path: Path) -> None:
    """`uniform`: the short set is searched under the long one's."""
    plan = replace(plan, uniform=True)
    recipe = run(plan, Landscape(planted(plan.tiers[1].space)[1]), tmp_path / "j")
    assert recipe.tiers[0].attention_factor == recipe.tiers[1].attention_factor != 1.0


def test_tiers_that_were_not_searched_are_kept(plan: SearchPlan, tmp_path: Path) -> None:
    kept = (Tier(64, (1.0,) * 8, attention_factor=1.02), Tier(512, (9.0,) * 8))
    plan = replace(plan, tiers=plan.tiers[1:], kept=kept)
    recipe = run(plan, Landscape(planted(plan.tiers[0].space)[1]), tmp_path / "j")
    assert recipe.tiers[0] == kept[0]
    assert recipe.tiers[1].factors != kept[1].factors


def test_budgets_and_names(tmp_path: Path) -> None:
    assert default_budget("evolution", 65536, 8192) == 1344
    assert default_budget("evolution", 2**20, 8192) == 672
    assert default_budget("guided", 8192, 8192) == default_budget("guided", 65536, 8192) // 4
    assert journal_path(tmp_path / "r") == tmp_path / "r.journal.jsonl"
    assert journal_path(tmp_path / "r.json") == tmp_path / "r.journal.jsonl"


def test_importing_the_search_is_light() -> None:
    """Neither torch nor scikit-learn: only an evaluator and a running guided search need them."""
    modules = "api, evolution, guided, journal, objective, plan, protocol, run, space"
    imports = f"from lrconvert.searching import {modules}; from lrconvert.evals import texts; import sys; "
    code = imports + "print([m for m in HEAVY if m in sys.modules])"
    heavy = "HEAVY = ('torch', 'transformers', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'datasets'); "
    environment = {**os.environ, "PYTHONPATH": str(DATA.parents[1])}
    done = subprocess.run([sys.executable, "-c", heavy + code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
