# SPDX-License-Identifier: Apache-2.0
"""`lrconvert search` on the embedded model at small lengths: real processes, real kills."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from support.forks import MAIN, ForkedCommands, Process
from support.onnx_files import write_adapter
from support.processes import torchrun
from support.staging import linux_only

from lrconvert.checkpoint import open_model
from lrconvert.data import DATA
from lrconvert.searching.journal import read_journal

Run = Callable[..., Result]
OPTIONS = ["--original-window", "32", "--target", "128", "--device", "cpu", "--budget", "40"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short held-out text of the embedded model's kind."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DATA / "demo" / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def arguments(text: Path, output: Path, *more: str) -> list[str]:
    return ["search", "demo", "--text", str(text), "-o", str(output), *OPTIONS, *more]


def environment(**more: str) -> dict[str, str]:
    root = str(DATA.parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


def ranks(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes that it starts; nothing to one alone."""
    if count == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def evaluations(path: Path) -> list[Any]:
    """What a journal says but for the time it took."""
    values = [record.to_json() for record in read_journal(path).records]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in values]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted search: its recipe's folder, named as all others' are."""
    from lrconvert.cli import run

    output = tmp_path_factory.mktemp("whole") / "found"
    assert run(arguments(text, output)) == 0
    return output


@linux_only
def test_killed_and_started_again_it_ends_in_the_same_recipe(
    text: Path, whole: Path, tmp_path: Path, training: ForkedCommands
) -> None:
    """kill -9 in the middle of the long set; the second run says that it goes on."""
    output = tmp_path / "found"
    journal = tmp_path / "found.journal.jsonl"
    process = training.start(MAIN, *arguments(text, output), environment=environment())
    deadline = time.monotonic() + 600  # a busy machine gets there too
    while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < 9):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.wait() == -signal.SIGKILL
    before = len(read_journal(journal).records)
    assert 7 <= before < len(evaluations(whole.with_name("found.journal.jsonl"))) and not output.exists()
    done = training.run(MAIN, *arguments(text, output), environment=environment())
    assert done.returncode == 0, done.stderr
    assert f"continuing after {before} evaluations" in done.stderr
    assert (output / "recipe.json").read_bytes() == (whole / "recipe.json").read_bytes()
    assert evaluations(journal) == evaluations(whole.with_name("found.journal.jsonl"))


def test_two_processes_keep_the_same_journal(text: Path, whole: Path, tmp_path: Path, training: ForkedCommands) -> None:
    """torchrun on CPUs: every process answers its share, all see all answers, one writes."""
    output = tmp_path / "found"
    given = arguments(text, output)
    command = [*torchrun(training.program(tmp_path / "lrconvert", MAIN)), *given]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (output / "recipe.json").read_bytes() == (whole / "recipe.json").read_bytes()
    assert evaluations(tmp_path / "found.journal.jsonl") == evaluations(whole.with_name("found.journal.jsonl"))
    assert done.stdout.count("2 tiers") == 1


SHARDED = """
import json, os, sys
import numpy as np
from lrconvert.checkpoint import open_model
from lrconvert.searching.evaluator import TransformersEvaluator
from lrconvert.searching.objective import Document, Objective
from lrconvert.searching.protocol import Question
from lrconvert.searching.space import space_for

model = open_model("demo")
tokens = np.arange(1, 129)
objective = Objective("perplexity", (Document("text", tokens, ((128, 0, 127),)),), {128: 1.0})
space = space_for(model.shape.rotary_dim, model.shape.theta, 32, 128)
sets = [candidate for _, candidate in space.seeds()][:3]
evaluator = TransformersEvaluator(model, device="cpu", sharded="RANK" in os.environ)
asked = [Question(sets[0]), Question(sets[1]), Question(sets[2]), Question(sets[0], gradient=True)]
rounds = [asked[:2], asked[2:3], asked[3:]] if evaluator.width == 2 else [[question] for question in asked]
answers, shares = [], set()
for questions in rounds:
    answers += evaluator.answer(objective, questions)
    layer = evaluator.model.network.model.layers[0].mlp.up_proj.weight
    shares.add((layer.to_local() if hasattr(layer, "to_local") else layer).numel() / layer.numel())
if evaluator.leading:
    print(json.dumps([list(shares), [answer.loss for answer in answers], answers[-1].gradient]))
"""


@linux_only
def test_shared_weights_give_the_same_losses(training: ForkedCommands) -> None:
    """FSDP on CPUs: each process holds half of every layer. One without a question of its own does as the other does,
    or the other would wait for ever; gradients come through too."""
    found = []
    for count in (1, 2):
        started = [training.start(SHARDED, environment=environment(**each)) for each in ranks(count)]
        with ThreadPoolExecutor(count) as readers:
            said = list(readers.map(Process.communicate, started))
        assert [process.wait() for process in started] == [0] * count, said[-1][1][-2000:]
        found.append(json.loads(said[0][0].strip().splitlines()[-1]))
    (whole, losses, gradient), (part, shared_losses, shared_gradient) = found
    assert (whole, part) == ([1.0], [0.5])  # between evaluations, with gradient and without
    assert shared_losses == pytest.approx(losses, abs=1e-6)
    assert shared_gradient == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context-parallel", "2"], "torchrun --nproc-per-node 2"),
        (["--shard-weights"], "there is only one"),
    ],
)
def test_torchrun_options_need_torchrun(options: list[str], said: str, text: Path, cli: Run, tmp_path: Path) -> None:
    found = cli(*arguments(text, tmp_path / "r", *options))
    assert found.code == 2 and said in found.err


def test_an_adapter_is_merged_and_named(text: Path, cli: Run, tmp_path: Path) -> None:
    """In the recipe relative to its folder, so that a bake merges it too; without it the search is another."""
    shape = open_model("demo").shape
    rows = shape.heads * shape.head_dim
    adapter = write_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (rows, shape.hidden)})
    output = tmp_path / "recipes" / "found"
    given = [*arguments(text, output), "--tier", "long", "--budget", "3"]
    assert cli(*given, "--adapter", adapter).code == 0
    assert json.loads((output / "recipe.json").read_text())["adapter"] == "../../adapter"
    baked = cli("hf", "demo", "--recipe", output, "-o", tmp_path / "baked")
    assert baked.code == 0
    assert json.loads((tmp_path / "baked" / "lrconvert.json").read_text())["source"]["adapter"]["weights_sha256"]
    found = cli(*given, "--force")
    assert found.code == 3 and "adapter" in found.err


def test_the_recipe_tells_its_story(whole: Path, cli: Run) -> None:
    recipe = json.loads((whole / "recipe.json").read_text())
    assert [tier["max_length"] for tier in recipe["tiers"]] == [32, 128]
    assert recipe["provenance"]["kind"] == "searched" and recipe["base_model"] == "demo"
    losses = recipe["evaluation"]["tiers"][1]
    assert set(losses["losses"]) == {"text@32", "text@64", "text@128"}
    assert losses["loss"] <= min(start["text@128"] for start in losses["starts"].values())
    shown = cli("recipe", "show", whole)
    assert shown.code == 0 and "searched: guided" in shown.out


def test_its_journal_is_drawn(whole: Path, cli: Run, tmp_path: Path) -> None:
    """In words, and as pictures of loss and factors."""
    journal = whole.with_name("found.journal.jsonl")
    found = cli("recipe", "plot", whole, "--journal", journal, "-o", tmp_path / "p")
    assert found.code == 0
    assert "set for 128 tokens: " in found.out and " forward equivalents" in found.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-search.png", "p-search.svg", "p.png", "p.svg"]
    best = json.loads((whole / "recipe.json").read_text())["evaluation"]["tiers"][1]["loss"]
    assert f" {best:.4f} " in found.out
    assert cli("recipe", "plot", whole, "--journal", whole / "recipe.json").code == 3


def test_evaluating_on_the_search_s_text_warns(text: Path, whole: Path, cli: Run, tmp_path: Path) -> None:
    """Known again by its digest: from an artifact's manifest, and from a recipe that is tried on a model."""
    asked = ("--lengths", "64,128", "--judged", "64", "--windows", "1", "--code", "reference")
    assert cli("hf", "demo", "--recipe", whole, "-o", tmp_path / "baked").code == 0
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8") + "!")
    for subject in (("demo", "--recipe", whole), (tmp_path / "baked",)):
        told = cli("eval", "perplexity", *subject, "--text", text, "--text", other, *asked)
        assert told.code == 0 and "text.txt: the recipe was searched on this text" in told.err
        assert told.err.count("searched on this text") == 1


def test_rows_of_a_data_set_are_recorded(text: Path, cli: Run, tmp_path: Path) -> None:
    """In the recipe and in the journal: which row of what, and its digest; the row that is too short is none."""
    (tmp_path / "books").mkdir()
    rows = [{"text": "short"}, {"text": text.read_text(encoding="utf-8")}]
    (tmp_path / "books" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--original-window", 32, "--target", 128, "--device", "cpu", "--budget", 4)
    found = cli("search", "demo", "--text", f"hf:{tmp_path}/books#1", "-o", tmp_path / "r", *options)
    assert found.code == 0, found.err
    (told,) = json.loads((tmp_path / "r" / "recipe.json").read_text())["provenance"]["search"]["texts"]
    assert told["name"] == "books, test row 1" and told["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert told["data_set"]["row"] == 1
    journal = read_journal(tmp_path / "r.journal.jsonl")
    assert journal.runs[0]["data_sets"] == [told["data_set"]]
    assert journal.head["identity"]["texts"] == [{key: told[key] for key in ("name", "sha256", "tokens")}]


def test_a_journal_of_another_search_is_refused(text: Path, whole: Path, cli: Run, tmp_path: Path) -> None:
    journal = whole.with_name("found.journal.jsonl")
    found = cli(*arguments(text, tmp_path / "r", "--journal", str(journal), "--seed", "7"))
    assert found.code == 3
    assert "is the journal of another search: seed was 0, is 7" in found.err


def test_a_torn_line_is_reported_and_repeated(text: Path, whole: Path, cli: Run, tmp_path: Path) -> None:
    journal = tmp_path / "found.journal.jsonl"
    journal.write_bytes(whole.with_name("found.journal.jsonl").read_bytes()[:-30])
    found = cli(*arguments(text, tmp_path / "found"))
    assert found.code == 0 and "is incomplete and is dropped" in found.err
    assert (tmp_path / "found" / "recipe.json").read_bytes() == (whole / "recipe.json").read_bytes()


def test_an_interruption_says_how_to_go_on(
    text: Path, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrconvert.searching.evaluator import TransformersEvaluator

    real, calls = TransformersEvaluator.answer, []

    def interrupted(self: Any, *given: Any) -> Any:
        calls.append(given)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(TransformersEvaluator, "answer", interrupted)
    found = cli(*arguments(text, tmp_path / "found"))
    assert found.code == 130
    assert "every evaluation so far is in" in found.err and "run the same command again:" in found.err
    assert len(read_journal(tmp_path / "found.journal.jsonl").records) == 3


def test_a_document_that_does_not_fit(text: Path, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 6 and the largest length that does."""
    import torch

    from lrconvert.training.loaded import LoadedModel

    real = LoadedModel.losses

    def small(self: Any, tokens: Any, *given: Any) -> Any:
        if tokens.shape[1] > 66:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, *given)

    monkeypatch.setattr(LoadedModel, "losses", small)
    found = cli(*arguments(text, tmp_path / "found"))
    assert found.code == 6
    assert "the largest that fits has about 64" in found.err


def test_dry_run_says_what_it_costs(text: Path, cli: Run, tmp_path: Path) -> None:
    found = cli(*arguments(text, tmp_path / "r", "--dry-run"))
    assert found.code == 0
    assert "set for 128 tokens: 40 evaluations of 1 document, 128 tokens" in found.out
    assert "set for 32 tokens: 10 evaluations of 4 documents" in found.out
    assert re.search(r"in total [\d.e-]+ PFLOP: about \d+ s on this CPU with \d+ thread", found.out)
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_is_of_the_device_at_hand(
    text: Path, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that takes twice as long for a row takes twice as long for the search; one that isn't there
    is said to be missing."""
    estimates = []
    for seconds in (16.0, 32.0):
        clock = itertools.count(step=seconds)
        monkeypatch.setattr("lrconvert.training.costs.time.process_time", lambda clock=clock: next(clock))
        found = cli(*arguments(text, tmp_path / "r", "--dry-run", "--threads", "1"))
        (line,) = [line for line in found.out.splitlines() if "in total" in line]
        estimates.append(float(line.split("about ")[1].split()[0]))
        assert "with 1 thread," in line
    assert estimates[1] == pytest.approx(2 * estimates[0], rel=0.05)
    torch = pytest.importorskip("torch", reason="needs lrconvert[search]")
    if not torch.cuda.is_available():
        missing = cli(*arguments(text, tmp_path / "r", "--dry-run", "--device", "cuda"))
        assert missing.code == 6 and "sees no GPU" in missing.err


NEEDLE = ["--objective", "mixed", "--lengths", "64:1,128:3", "--tier", "long", "--budget", "4"]


def test_needles_and_several_lengths(text: Path, cli: Run, tmp_path: Path) -> None:
    assert cli(*arguments(text, tmp_path / "r", *NEEDLE)).code == 0
    recipe = json.loads((tmp_path / "r" / "recipe.json").read_text())
    (tier,) = recipe["evaluation"]["tiers"]
    parts = {name: tier["losses"][name] for name in ("text@64", "text@128", "needle@64", "needle@128")}
    expected = 0.125 * (parts["text@64"] + parts["needle@64"]) + 0.375 * (parts["text@128"] + parts["needle@128"])
    assert tier["loss"] == pytest.approx(expected)
    assert recipe["tiers"][0]["factors"] == [1.0] * 32  # not searched: the unmodified model


def test_a_search_starts_from_a_recipe(text: Path, whole: Path, cli: Run, tmp_path: Path) -> None:
    """Its set is the first candidate, and the result can't be worse."""
    more = ["--start-from", str(whole), "--tier", "long", "--budget", "1"]
    assert cli(*arguments(text, tmp_path / "r", *more)).code == 0
    old, new = (json.loads((folder / "recipe.json").read_text()) for folder in (whole, tmp_path / "r"))
    assert new["tiers"] == old["tiers"]


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        (["--target", "32"], 2, "--target 32 is within the window of 32 tokens that the model serves with no scaling"),
        (["--target", "64k"], 3, "fewer than the 65536 of the target"),
        (["--tier", "2k"], 2, "--tier 2048 is not between"),
        (["--lengths", "8k:x"], 2, "'8k:x' is not a length with a weight"),
        (["--lengths", "64k"], 2, "--lengths 65536 is beyond the target, 128"),
        (["--lengths", "64:0"], 2, "is not a length with a weight"),
        (["--lengths", "64:" + "9" * 400], 2, "is not a length with a weight"),
        (["--lengths", "1,128"], 2, "no token to predict"),
        (["--original-window", "1"], 2, "nothing to extend"),
        (["--seed", "-1"], 2, "'--seed'"),
        (["--start-from", "smollm2-135m-64k"], 3, "is for another model: rope_theta"),
        (["--output", "."], 2, "does not name a file"),
        (["--output", str(DATA / "passkey.json" / "r")], 2, "is not a folder"),
        (["--output", str(DATA / "demo" / "heldout.txt")], 2, "is a file"),
        (["--text", "/nowhere.txt"], 3, "/nowhere.txt: can't be read (No such file or directory)"),
        (["--start-from", "/nowhere"], 3, "no such recipe"),
        (["--device", "meta"], 2, "a search runs on cpu or cuda"),
        (["--space", "longrope3"], 2, "longrope3"),
    ],
)
def test_bad_input_is_named(changes: list[str], code: int, expected: str, text: Path, cli: Run, tmp_path: Path) -> None:
    found = cli(*arguments(text, tmp_path / "r", *changes))
    assert (found.code, expected in found.err) == (code, True), found.err
    assert not (tmp_path / "r").exists()


def test_what_comes_next_is_not_into_the_recipe(
    text: Path, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is a command as it stands, whatever the names have in them."""
    monkeypatch.chdir(tmp_path)
    for output, baked in (("my set", "'my set-model'"), ("sets/my set", "'my set'")):
        found = cli(*arguments(text, Path(output), "--budget", "1", "--tier", "long"))
        assert found.err.strip().endswith(f"next: lrconvert hf demo --recipe '{output}' -o {baked}"), found.err


def test_no_text_and_an_output_that_exists(text: Path, whole: Path, cli: Run, tmp_path: Path) -> None:
    found = cli("search", "demo", "--target", "256", "-o", tmp_path / "r")
    assert found.code == 2 and "no text to read" in found.err
    (tmp_path / "short.txt").write_text("In the beginning")
    found = cli(*arguments(tmp_path / "short.txt", tmp_path / "r"))
    assert found.code == 3 and "fewer than the 128 of the target" in found.err  # not than the short set's 32
    found = cli(*arguments(text, whole), "--seed", "9")
    assert found.code == 2 and "exists" in found.err


def test_killed_after_the_recipe_was_written_the_same_command_ends_well(
    text: Path, whole: Path, cli: Run, tmp_path: Path
) -> None:
    """It says so and computes nothing. A recipe that was edited, or whose journal is gone, is not replaced."""
    shutil.copytree(whole, tmp_path / "found")
    journal = tmp_path / "found.journal.jsonl"
    shutil.copy(whole.with_name(journal.name), journal)
    before = {path: path.read_bytes() for path in (journal, tmp_path / "found" / "recipe.json")}
    found = cli(*arguments(text, tmp_path / "found"))
    assert found.code == 0 and "is what this search found already" in found.err
    assert {path: path.read_bytes() for path in before} == before
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))  # the recipe is of more evaluations
    assert cli(*arguments(text, tmp_path / "found")).code == 2
    journal.unlink()
    assert cli(*arguments(text, tmp_path / "found")).code == 2
