# SPDX-License-Identifier: Apache-2.0
"""A whole extension on a pico model: what it leaves, and how it goes on after an interruption."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from support.extending import PLAN, prose, write_wordy
from support.forks import ForkedCommands
from support.staging import linux_only

import lrconvert
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.errors import InputError, UsageError
from lrconvert.evals.in_memory import LoadedSession
from lrconvert.evals.perplexity import same_token_perplexity
from lrconvert.extending import estimate, run, stages
from lrconvert.extending.api import ExtendResult, estimate_extension, extend
from lrconvert.extending.plan import Evaluate, Tune, load_plan, parse_plan
from lrconvert.recipe import load_recipe
from lrconvert.rope import Tier, longrope_attention_factor
from lrconvert.searching.journal import read_journal
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.tuning import Tuning

Run = Callable[..., Result]
NAMES = ["1-search", "2-tune", "3-search", "4-recover", "5-evaluate"]


@dataclass(frozen=True)
class Case:
    """A model, a text, and the extension of the one by the other."""

    model: Path
    text: Path
    result: ExtendResult

    def again(self, output: Path, plan: str = PLAN, **options: Any) -> ExtendResult:
        parsed = parse_plan(plan, "plan.toml")
        return extend(self.model, texts=[self.text], output=output, plan=parsed, device="cpu", **options)

    def copy(self, folder: Path) -> Path:
        """The work of the extension as if it had been interrupted before the recipe was written: its output's name."""
        shutil.copytree(self.result.work, folder / "copy.work")
        return folder / "copy"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("extension")
    write_wordy(folder / "wordy")
    (folder / "text.txt").write_text(prose(8000), encoding="utf-8")
    empty = Case(folder / "wordy", folder / "text.txt", None)  # type: ignore[arg-type]
    return Case(empty.model, empty.text, empty.again(folder / "tiny"))


@pytest.fixture
def carried_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are carried out."""
    seen: list[str] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def stage(given: Any, task: Any) -> Any:
            seen.append(task.name)
            return real(given, task)

        return stage

    monkeypatch.setattr(run, "STAGES", {kind: counted(real) for kind, real in stages.STAGES.items()})
    return seen


def folder_of(work: Path, name: str) -> Path:
    (found,) = work.glob(f"{name}-*")
    return found


def log_of(folder: Path) -> list[str]:
    """Lines of a fine-tuning stage's log, without the time that steps took."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in line.items() if key != "seconds"}) for line in lines]


def same_recipe(one: Path, other: Path) -> bool:
    """But for the time that stages took, and the name."""

    def read(folder: Path) -> dict[str, Any]:
        values = json.loads((folder / "recipe.json").read_text())
        for stage in values["provenance"]["stages"]:
            stage.pop("seconds")
            stage.get("facts", {}).pop("seconds_per_step", None)
        return {key: value for key, value in values.items() if key != "name"}

    weights = "adapter/adapter_model.safetensors"
    return read(one) == read(other) and (one / weights).read_bytes() == (other / weights).read_bytes()


# --- what it leaves ------------------------------------------------------------------------------------------


def test_a_recipe_with_its_adapter(case: Case) -> None:
    """A folder with nothing but both: three tiers, LongRoPE's attention factors, what each stage did and measured."""
    assert case.result.path is not None
    folder = case.result.path.parent
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "recipe.json"]
    recipe = load_recipe(folder)
    assert recipe == case.result.recipe and recipe.adapter == "adapter" and recipe.base_model == "wordy"
    assert [tier.max_length for tier in recipe.tiers] == [64, 256, 1024]
    for tier in recipe.tiers[1:]:
        wanted = longrope_attention_factor(tier.max_length / 64, 64)
        assert tier.attention_factor == pytest.approx(wanted, rel=2e-3)  # candidates have three digits
    told = recipe.provenance.stages
    assert told is not None and [stage["name"] for stage in told] == NAMES
    assert recipe.provenance.kind == "extended" and recipe.name == "tiny"
    measured = (recipe.evaluation or {})["measured"]
    assert list(measured) == ["base perplexity@64", "perplexity@64", "passkey@256", "retrieval@256", "perplexity@1024"]
    assert measured["retrieval@256"]["trials"] == 2 and measured["passkey@256"]["trials"] == 2
    for path in (folder / "recipe.json", folder / "adapter" / "adapter_config.json"):
        assert str(folder.parent) not in path.read_text()
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "wordy"


def test_each_stage_works_on_what_the_one_before_left(case: Case) -> None:
    """The second search keeps the first one's set and stands on it; only the short set changes afterwards."""
    recipes = [load_recipe(folder_of(case.result.work, name)) for name in NAMES]
    first, tuned, second, recovered, evaluated = recipes
    assert first.adapter is None and all(recipe.adapter for recipe in recipes[1:])
    assert tuned.tiers == first.tiers and second.tiers[:2] == first.tiers
    assert recovered.tiers[1:] == second.tiers[1:] and recovered.tiers[0].max_length == 64
    assert evaluated.tiers == recovered.tiers == case.result.recipe.tiers
    head = read_journal(folder_of(case.result.work, "3-search") / "journal.jsonl").head
    own = head["identity"]["tiers"][0]["own"]
    assert tuple(own["factors"]) == first.tiers[1].factors and own["attention_factor"] > 1
    factors = np.array([second.tiers[2].factors, first.tiers[1].factors])
    assert (factors[0] >= factors[1] - 1e-9).all()  # λ_own · λ_new, and λ_new ≥ 1


def test_figures_are_the_trained_models(case: Case) -> None:
    """Perplexity of the held-out tokens with the adapter merged and the recipe's tiers; of the base, as it came. The
    losses that decided on the last set are those of the trained model too."""
    measured = (case.result.recipe.evaluation or {})["measured"]
    base = open_model(case.model)
    assert case.result.path is not None
    trained = merged(base, open_adapter(case.result.path.parent / "adapter"))
    tokens = np.asarray(tokenizer_of(case.model)(case.text.read_text()))
    held_out = tokens[-(len(tokens) // 10) :]
    tiers = case.result.recipe.tiers
    for model, key, own in (
        (base, "base perplexity@64", (Tier(64, (1.0,) * 8),)),
        (trained, "perplexity@64", tiers),
        (trained, "perplexity@1024", tiers),
    ):
        session = LoadedSession(LoadedModel(model, device="cpu"), own)
        length = int(key.partition("@")[2])
        wanted = same_token_perplexity(session, held_out, length, judged=32)
        assert measured[key]["perplexity"]["value"] == pytest.approx(wanted, rel=1e-5), key
    facts = json.loads((folder_of(case.result.work, "3-search") / "result.json").read_text())["facts"]["decided"]
    assert facts["tokens"] == 512 and len(facts["sets"]) >= 2
    assert min(one["whole"] for one in facts["sets"][:2]) == facts["sets"][facts["chosen"]]["whole"]


def test_the_recipe_is_baked_and_verified(case: Case, tmp_path: Path) -> None:
    """`hf` merges the adapter that the recipe names; the code with all three tiers computes what the recipe says."""
    assert case.result.path is not None
    out = tmp_path / "wordy-1k"
    lrconvert.hf(case.model, case.result.path.parent, out)
    baked, wanted = open_model(out), merged(open_model(case.model), open_adapter(case.result.path.parent / "adapter"))
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(baked.checkpoint.read(name), wanted.checkpoint.read(name))
    assert not np.array_equal(baked.checkpoint.read(name), open_model(case.model).checkpoint.read(name))
    report = lrconvert.verify(out, codes=["custom"], threads=1)
    assert report.passed, report


# --- going on ------------------------------------------------------------------------------------------------


def test_the_same_call_repeats_no_finished_stage(case: Case, tmp_path: Path, carried_out: list[str]) -> None:
    """It writes the same recipe from what is there."""
    output = case.copy(tmp_path)
    found = case.again(output)
    assert carried_out == [] and found.path == output / "recipe.json"
    assert case.result.path is not None and same_recipe(output, case.result.path.parent)


class Stop(Exception):
    """An interruption."""


@pytest.mark.parametrize("name", ["1-search", "2-tune", "3-search", "5-evaluate"])
def test_an_interrupted_stage_goes_on_where_it_was(
    name: str, case: Case, tmp_path: Path, carried_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of a stage; then the rest alone is computed, and all of it is the same."""
    output = case.copy(tmp_path)
    for later in NAMES[NAMES.index(name) :]:
        shutil.rmtree(folder_of(output.with_name("copy.work"), later))
    monkeypatch.setattr(Tuning.__init__, "__kwdefaults__", {"every": 0.0})
    steps: list[str] = []

    def interrupt(step: Any) -> None:
        if step.task == name and step.what != "starting":
            steps.append(step.what)
            if len(steps) == (2 if name == NAMES[0] else 4):
                raise Stop

    with pytest.raises(Stop):
        case.again(output, progress=interrupt)
    assert carried_out == [name] and not output.exists()
    folder = folder_of(output.with_name("copy.work"), name)
    left = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    again: list[Any] = []
    case.again(output, progress=lambda step: again.append(step) if step.task == name else None)
    assert carried_out == [name, *NAMES[NAMES.index(name) :]]
    assert case.result.path is not None and same_recipe(output, case.result.path.parent)
    if name.endswith("search"):  # what was evaluated stands in the journal as it stood
        assert (folder / "journal.jsonl").read_bytes().startswith(left["journal.jsonl"])
    if name.endswith("tune"):  # loading, then three steps, of which the last was not saved
        assert [step.done for step in again if step.what.startswith("text")] == [3, 4, 5]
    if name.endswith("evaluate"):
        measured = json.loads((folder / "measured.json").read_text())
        kept = json.loads(left["measured.json"])
        assert len(kept) == 3 and kept.items() <= measured.items()
        assert [step.what for step in again if step.what != "starting"] == list(measured)[3:]


KILLED = """
import sys, time
from pathlib import Path
from lrconvert.extending.api import extend
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.tuning import Tuning

Tuning.__init__.__kwdefaults__["every"] = 0.0
real = Tuning._train

def train(self, given):
    if self.step == 3:
        (Path(sys.argv[4]) / "there").touch()
        time.sleep(600)
    return real(self, given)

Tuning._train = train
extend(sys.argv[1], texts=[sys.argv[2]], plan=sys.argv[3], output=Path(sys.argv[4]) / "killed", device="cpu")
"""


@linux_only
def test_killed_in_fine_tuning_it_goes_on_at_the_step(
    case: Case, tmp_path: Path, training: ForkedCommands, carried_out: list[str]
) -> None:
    """kill -9 of a real process: steps that were saved keep their lines in the log, time included, the stage before is
    not repeated, and the recipe is that of an extension without a break."""
    (tmp_path / "plan.toml").write_text(PLAN)
    process = training.start(KILLED, case.model, case.text, tmp_path / "plan.toml", tmp_path)
    deadline = time.monotonic() + 600  # a busy machine gets there too
    while time.monotonic() < deadline and not (tmp_path / "there").exists():
        time.sleep(0.01)
    process.kill()
    said = process.communicate()
    assert process.wait() == -signal.SIGKILL, said
    folder = folder_of(tmp_path / "killed.work", "2-tune")
    before = (folder / "log.jsonl").read_text().splitlines()
    assert len(before) == 3 and not (folder / "result.json").exists()
    case.again(tmp_path / "killed")
    assert carried_out == NAMES[1:]
    assert (folder / "log.jsonl").read_text().splitlines()[:3] == before
    assert log_of(folder) == log_of(folder_of(case.result.work, "2-tune"))
    assert case.result.path is not None and same_recipe(tmp_path / "killed", case.result.path.parent)


def test_until_stops_and_from_starts_again(case: Case, tmp_path: Path, carried_out: list[str]) -> None:
    """Up to a stage, without a recipe; the same call without it goes on. From a stage, all later ones are carried out
    anew; the ones before stay."""
    output = case.copy(tmp_path)
    found = case.again(output, until="2-tune")
    assert (found.path, [stage.name for stage in found.stages], carried_out) == (None, NAMES[:2], [])
    assert not output.exists()
    work = output.with_name("copy.work")
    kept = (folder_of(work, "2-tune") / "result.json").read_bytes()
    case.again(output, again="3-search")
    assert carried_out == NAMES[2:] and (folder_of(work, "2-tune") / "result.json").read_bytes() == kept
    assert case.result.path is not None and same_recipe(output, case.result.path.parent)


@pytest.mark.parametrize("file", ["recipe.json", "adapter/adapter_model.safetensors", "result.json"])
def test_a_file_that_changed_after_its_stage_is_an_error(
    file: str, case: Case, tmp_path: Path, carried_out: list[str]
) -> None:
    """Later stages stand on it: it is named, with the way out, and nothing is computed. The way out works."""
    output = case.copy(tmp_path)
    folder = folder_of(output.with_name("copy.work"), "2-tune")
    content = bytearray((folder / file).read_bytes())
    content[-3] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(InputError) as found:
        case.again(output)
    assert folder.name in str(found.value) and file in str(found.value) and carried_out == []
    assert "Delete the folder: the stage runs again" in str(found.value)
    shutil.rmtree(folder)
    case.again(output)
    assert carried_out == ["2-tune"] and case.result.path is not None
    assert same_recipe(output, case.result.path.parent)


def test_a_result_of_another_stage_is_not_taken(case: Case, tmp_path: Path) -> None:
    """One that was copied into a folder of this name, or edited."""
    output = case.copy(tmp_path)
    path = folder_of(output.with_name("copy.work"), "2-tune") / "result.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "digest": "0" * 64}))
    with pytest.raises(InputError, match=r"result\.json changed since the stage was finished"):
        case.again(output)


def test_a_file_that_is_gone_is_one_that_changed(case: Case, tmp_path: Path) -> None:
    output = case.copy(tmp_path)
    (folder_of(output.with_name("copy.work"), "2-tune") / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter/adapter_config\.json changed since the stage was finished"):
        case.again(output)


def test_a_changed_plan_keeps_what_it_does_not_change(case: Case, tmp_path: Path, carried_out: list[str]) -> None:
    """Stages before the change are taken as they are; the changed one and those after it get folders of their own, and
    the old ones stay: the old plan finds them."""
    output = case.copy(tmp_path)
    work = output.with_name("copy.work")
    old = {path.name for path in work.iterdir()}
    changed = PLAN.replace('window = "1k"', "window = 512").replace("[64, 1024]", "[64, 512]")
    case.again(output, changed, until="4-recover")
    assert carried_out == ["3-search", "4-recover"]
    assert len({path.name for path in work.iterdir()} - old) == 2 and old <= {path.name for path in work.iterdir()}
    case.again(output)
    assert carried_out == ["3-search", "4-recover"]


@pytest.mark.parametrize("what", ["seed", "text", "model"])
def test_another_seed_text_or_model_is_another_extension(
    what: str, case: Case, tmp_path: Path, carried_out: list[str]
) -> None:
    """Nothing that exists is taken for it."""
    work = case.copy(tmp_path).with_name("copy.work")
    model, text, seed = case.model, case.text, 0
    if what == "seed":
        seed = 1
    if what == "text":
        text = tmp_path / "other.txt"
        text.write_text(prose(8000, seed=1))
    if what == "model":
        model = write_wordy(tmp_path / "wordy", rope_theta=20000.0)
    plan = parse_plan(PLAN, "plan.toml")
    extend(model, texts=[text], output=tmp_path / "r", plan=plan, work=work, seed=seed, until="1-search", device="cpu")
    assert carried_out == ["1-search"]


def test_a_recipe_is_not_replaced_without_force(case: Case, tmp_path: Path) -> None:
    output = case.copy(tmp_path)
    case.again(output)
    with pytest.raises(lrconvert.errors.UsageError, match="force"):
        case.again(output, name="other")
    with pytest.raises(lrconvert.errors.UsageError, match="force"):
        case.again(output, seed=1)
    case.again(output, force=True, name="other")
    assert load_recipe(output).name == "other" and (output / "adapter" / "adapter_config.json").is_file()
    assert not list(tmp_path.glob(".*"))  # nothing is left of the exchange


def test_the_same_call_after_its_end_says_the_same(case: Case, tmp_path: Path, carried_out: list[str]) -> None:
    """A kill may come after the recipe was written: nothing is repeated, nothing is refused, nothing changes."""
    output = case.copy(tmp_path)
    first = case.again(output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    again = case.again(output)
    assert carried_out == [] and again.recipe == first.recipe and again.path == first.path
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    shutil.rmtree(folder_of(again.work, "5-evaluate"))  # then it would not be the same: somebody's recipe is replaced
    with pytest.raises(UsageError, match="force"):
        case.again(output)


def test_what_a_stage_took_survives_a_kill(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written while the stage runs: a kill leaves no time to."""
    monkeypatch.setattr(run, "KEPT_EVERY", 0.0)
    output, seen = case.copy(tmp_path), []
    shutil.rmtree(folder_of(output.with_name("copy.work"), "5-evaluate"))

    def watch(step: Any) -> None:
        if step.task == "5-evaluate":
            kept = folder_of(output.with_name("copy.work"), "5-evaluate") / "spent.json"
            seen.append(json.loads(kept.read_text())["seconds"])

    case.again(output, progress=watch)
    assert len(seen) > 2 and seen == sorted(seen)


def test_a_first_stage_behind_the_last_one_is_refused(case: Case, tmp_path: Path) -> None:
    for call in (case.again, estimated):
        with pytest.raises(UsageError, match="--from 4-recover is behind --until 2-tune"):
            call(tmp_path / "out", until="2-tune", again="4-recover")
        with pytest.raises(UsageError, match="--until 9-nothing: no such stage"):
            call(tmp_path / "out", until="9-nothing")


def estimated(output: Path, **options: Any) -> Any:
    """Before anything is read: the model need not be there."""
    plan = parse_plan(PLAN, "plan.toml")
    return estimate_extension("none", texts=["none"], output=output, plan=plan, **options)


def test_whole_weights_are_carried_too(case: Case, tmp_path: Path) -> None:
    """After full fine-tuning the second search, the evaluation and a bake have the trained weights."""
    plan = "".join(f"[[stage]]{part}" for part in PLAN.split("[[stage]]")[1:4]).replace("rank = 4", 'method = "full"')
    found = case.again(tmp_path / "full", plan)
    assert found.path is not None
    lrconvert.hf(case.model, tmp_path / "full", tmp_path / "baked")
    baked, base = open_model(tmp_path / "baked"), open_model(case.model)
    for name in base.checkpoint.tensors:
        frozen = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert np.array_equal(baked.checkpoint.read(name), base.checkpoint.read(name)) == frozen, name


def test_progress_names_its_stage(case: Case, tmp_path: Path) -> None:
    """Every stage says that it starts, and a long one how far it is."""
    output = case.copy(tmp_path)
    shutil.rmtree(folder_of(output.with_name("copy.work"), "2-tune"))
    seen: list[Any] = []
    case.again(output, progress=seen.append, until="2-tune")
    assert {step.task for step in seen} == {"2-tune"} and seen[0].what == "starting"
    assert [(step.done, step.total) for step in seen if step.what.startswith("text")] == [(n, 5) for n in range(1, 6)]
    assert any("answers" in step.what for step in seen)


def test_somebody_else_s_folder_stays(case: Case, tmp_path: Path) -> None:
    """A folder `adapter` that no recipe names is not the extension's to replace; the recipe names another."""
    output = case.copy(tmp_path)
    (output / "adapter").mkdir(parents=True)
    (output / "adapter" / "mine.txt").write_text("mine")
    result = case.again(output)
    assert (output / "adapter" / "mine.txt").read_text() == "mine"
    assert result.recipe.adapter is not None and result.recipe.adapter.startswith("adapter-")
    assert (output / result.recipe.adapter / "adapter_model.safetensors").is_file()


def test_a_replaced_recipe_leaves_no_adapter_behind(case: Case, tmp_path: Path) -> None:
    """With `force`: the new recipe's adapter alone, and nothing copied where it is the same."""
    output = case.copy(tmp_path)
    first = case.again(output).recipe.adapter
    assert case.again(output, force=True).recipe.adapter == first == "adapter"
    weights = output / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    again = case.again(output, force=True).recipe.adapter
    assert again is not None and again != "adapter"
    assert [path.name for path in sorted(output.iterdir())] == [again, "recipe.json"]
    assert (output / again / "adapter_model.safetensors").read_bytes() == whole


DISTILLED = """
[[stage]]
kind = "derive"
window = 256

[[stage]]
kind = "tune"
window = 256
length = 160
steps = 5
keys = 1
rank = 4
rate = 3e-2

[[stage]]
kind = "tune"
window = 256
length = 160
steps = 4
mixed_every = 2
mixed_rows = 2
keys = 0
rank = 4
distil = 64
"""


def test_the_teacher_is_the_model_as_the_stage_finds_it(case: Case, tmp_path: Path) -> None:
    """With the adapter so far, under the sets that there are. At its first step the model says of short rows what it
    says itself, once it has learned a little nearly so; of long rows something else."""
    plan = parse_plan(DISTILLED.replace("mixed_every = 2", "mixed_every = 1", 1), "plan.toml")
    short = extend(case.model, texts=[case.text], output=tmp_path / "short", plan=plan, device="cpu")
    steps = [json.loads(line) for line in log_of(folder_of(short.work, "3-tune"))]
    assert steps[0]["kind"] == "short" and steps[0]["text"] < 1e-5
    plan = parse_plan(DISTILLED, "plan.toml")
    mixed = extend(case.model, texts=[case.text], output=tmp_path / "mixed", plan=plan, device="cpu")
    steps = [json.loads(line) for line in log_of(folder_of(mixed.work, "3-tune"))]
    assert steps[0]["kind"] == "long" and steps[0]["text"] > 1e-2


def test_a_team_can_t_be_taught(case: Case, tmp_path: Path) -> None:
    """Its processes have parts of rows, and a teacher reads whole ones: refused before anything is loaded."""
    plan = parse_plan(DISTILLED, "plan.toml")
    with pytest.raises(UsageError, match="--context-parallel"):
        extend(case.model, texts=[case.text], output=tmp_path / "out", plan=plan, context_parallel=2)
    assert not (tmp_path / "out.work").exists()


def test_an_estimate_counts_the_teacher() -> None:
    """Of two long rows three windows each, of four short ones one."""
    _, plain, taught = (stage for stage in parse_plan(DISTILLED, "plan.toml").stage)
    assert isinstance(plain, Tune) and isinstance(taught, Tune)
    around = estimate.Around(64, (), 64, cached=True)
    steps = [(160, 2), (64, 4)]
    assert estimate.WORK[Tune](taught, around) == estimate.Work([(64, 6), (64, 4)], steps)
    assert estimate.WORK[Tune](plain, around).forward == []


def test_an_estimate_counts_what_a_team_reads_again() -> None:
    """Without a cache the text is read for every key."""
    stage = Evaluate("evaluate", retrieval=(512,), texts=3, keys=20)
    alone, team = (estimate.Around(64, (), 64, cached) for cached in (True, False))
    assert estimate.WORK[Evaluate](stage, alone) == estimate.Work([(512, 3)], cached=512)
    assert estimate.WORK[Evaluate](stage, team) == estimate.Work([(512, 60)], cached=0)


def test_an_estimate_counts_the_windows_in_between() -> None:
    """Which mixed steps keep in turns with the original one: 40 of 120 steps, half of them on rows of 256k."""
    (stage, *_) = (stage for stage in load_plan("small-far").stage if isinstance(stage, Tune))
    assert (stage.steps, stage.mixed_every, stage.length) == (120, 3, 65536)
    work = estimate.WORK[Tune](stage, estimate.Around(8192, (262144, 2097152), 262144, cached=True))
    assert work.steps == [(65536, 80), (8192, 20 * stage.mixed_rows), (65536, 20)]


def test_an_evaluation_may_stay_below_the_original_window(case: Case, tmp_path: Path) -> None:
    """The model before is measured at its own window all the same."""
    plan = 'stage = [{kind = "derive", window = 256}, {kind = "evaluate", perplexity = [32], judged = 16}]'
    found = case.again(tmp_path / "out", plan).recipe.evaluation
    assert found is not None and sorted(found["measured"]) == ["base perplexity@64", "perplexity@32"]
