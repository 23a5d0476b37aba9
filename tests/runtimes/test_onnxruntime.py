# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime runtime: both policies of a cache, prompts in one call and in parts, batches, refusals."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_for
from support.onnx_files import DATA, GRAPH, Array, export, recipe_with

from lrconvert.checkpoint import Model, open_model
from lrconvert.errors import EnvironmentFailure, InputError
from lrconvert.parity.measures import compare
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.onnxruntime import WORKER, OnnxSession, open_session

EXACT = 1e-9  # KL, float32 weights
ATTENTIONS = ("gqa", "standard")
Pico = Callable[..., Model]
Open = Callable[..., OnnxSession]
LENGTHS = (64, 128, 256)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter(WORKER)
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="module")
def folder(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An exported pico Llama (or another) with three tiers and start tokens; made once for each set of arguments."""
    made: dict[object, Path] = {}

    def get(family: str = "llama", **options: Any) -> Path:
        key = (family, tuple(sorted(options.items())))
        if key not in made:
            model = pico(family)
            recipe = recipe_for(model, tiers=3, start_tokens=12)
            made[key] = export(model, recipe, tmp_path_factory.mktemp("onnx") / "a", **options)
        return made[key]

    return get


@pytest.fixture(scope="module")
def opened(folder: Callable[..., Path], interpreter: Interpreter) -> Open:
    """A folder in the shared interpreter, which holds one at a time."""

    def get(family: str = "llama", **options: Any) -> OnnxSession:
        fused = options.get("attention", "gqa") == "gqa"
        return open_session(
            folder(family, **options), boundaries=LENGTHS[:-1], heads=4, fused=fused, threads=1, interpreter=interpreter
        )

    return get


def spec_of(model: Model, recipe: Recipe | None = None) -> RopeSpec:
    return model.resolve(recipe or recipe_for(model, tiers=3, start_tokens=12))


def tokens(count: int, seed: int = 5) -> list[int]:
    return np.random.default_rng(seed).integers(0, 101, size=count).tolist()


# --- policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_exact_generation_is_a_fresh_pass_at_every_step(family: str, attention: str, opened: Open) -> None:
    """Across both boundaries in one go: each step's logits are those of the whole sequence read anew."""
    with opened(family, attention=attention) as session:
        prompt = tokens(61)
        made, answers = session.generate(prompt, 72)
        assert len(made) == 72 and answers.shape == (72, 101)
        assert made == answers.argmax(axis=-1).tolist()
        for step in [*range(8), 63, *range(64, 72)]:
            (fresh,) = session.logits([prompt + made[:step]], keep=[-1])
            assert compare(fresh, answers[step : step + 1]).kl_mean < EXACT, step


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_cached_generation_keeps_the_keys_that_it_has(family: str, attention: str, opened: Open, pico: Pico) -> None:
    """Equal to the reference with cached keys, equal to exact up to the boundary, and another answer after it."""
    model = pico(family)
    reference, spec, prompt = ReferenceRunner(model), spec_of(model), tokens(61)
    with opened(family, attention=attention) as session:
        made, answers = session.generate(prompt, 72, policy="cached")
        other, exact = session.generate(prompt, 72, policy="exact")
    assert made == answers.argmax(axis=-1).tolist()
    kept = reference.decoded(spec, np.array(prompt), made, cached=True)
    assert compare(kept, answers).kl_max < 100 * EXACT
    assert compare(kept, answers).kl_mean < EXACT
    assert made[:3] == other[:3]
    assert compare(exact[:4], answers[:4]).kl_mean < EXACT  # lengths 61 to 64
    fresh = reference.decoded(spec, np.array(prompt), made)
    assert compare(fresh[:4], answers[:4]).kl_mean < EXACT
    assert compare(fresh[4:], answers[4:]).kl_mean > 1e-3


@pytest.mark.parametrize("start", [64, 65, 128, 200])
def test_a_prompt_that_ends_at_a_boundary_is_read_anew_once_it_grows(start: int, opened: Open) -> None:
    """Prompts of exactly a tier's length, one more, and in the last tier."""
    with opened() as session:
        prompt = tokens(start)
        made, answers = session.generate(prompt, 4)
        for step in range(4):
            (fresh,) = session.logits([prompt + made[:step]], keep=[-1])
            assert compare(fresh, answers[step : step + 1]).kl_mean < EXACT, step
        _, cached = session.generate(prompt, 4, policy="cached")
        differs = compare(answers, cached).kl_mean
        assert differs < EXACT if start in (65, 200) else differs > 1e-4


def test_one_token_is_generated_without_a_second_call(opened: Open) -> None:
    with opened() as session:
        made, answers = session.generate(tokens(10), 1)
        (fresh,) = session.logits([tokens(10)], keep=[-1])
        assert made == [int(fresh.argmax())] and answers.shape == (1, 101)


# --- calls -----------------------------------------------------------------------------------------------


def test_kept_indices_and_positions_are_the_requested_ones(opened: Open, pico: Pico) -> None:
    """From either end, in any order; positions far apart count as they are."""
    model = pico("llama")
    reference, spec = ReferenceRunner(model), spec_of(model)
    row = tokens(100)
    whole = reference.answer(spec, row, 100, np.arange(100))
    with opened() as session:
        (found,) = session.logits([row], keep=[5, -1, 0, 99, -100])
        assert compare(whole[[5, 99, 0, 99, 0]], found).kl_max < 100 * EXACT
        assert found.dtype == np.float64
        places = [0, 3, 90, 91, 129]
        (found,) = session.logits([row[:5]], positions=places, keep=range(5))
    reference._rotate_like(spec)
    wanted = reference._reference.logits(row[:5], positions=places)
    assert compare(wanted, found).kl_mean < EXACT


def test_rows_of_a_batch_are_what_they_are_alone(opened: Open) -> None:
    """Left-padded rows in three tiers with the standard operator; with the fused one such a batch is an error, and rows
    of one length are served."""
    rows = [tokens(130, 1), tokens(65, 2), tokens(64, 3), tokens(1, 4)]
    with opened(attention="standard") as session:
        together = session.logits(rows, keep=[-1])
        for row, answer in zip(rows, together, strict=True):
            (alone,) = session.logits([row], keep=[-1])
            assert compare(alone, answer).kl_mean < EXACT, len(row)
    with opened(attention="gqa") as session:
        with pytest.raises(InputError, match="left-padded batches need an export with --attention standard"):
            session.logits(rows, keep=[-1])
        even = [tokens(70, seed) for seed in (1, 2)]
        for row, answer in zip(even, session.logits(even, keep=[-1, 0]), strict=True):
            (alone,) = session.logits([row], keep=[-1, 0])
            assert compare(alone, answer).kl_mean < EXACT


@pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
def test_the_rotary_function_runs_alone(double: bool, opened: Open, pico: Pico) -> None:
    """By ONNX Runtime and by onnx.reference, at places of any tier, in float32 whatever the graph's dtype is."""
    spec = spec_of(pico("llama"))
    for dtype in ("f32", "f16"):
        with opened(double=double, dtype=dtype) as session:
            for end in (64, 65, 256):
                tier = spec.tier_for(end)
                wanted = tier.cos_sin(np.arange(end), spec.base)
                for evaluator in (False, True):
                    found = session.cos_sin(range(end), evaluator=evaluator)
                    for ours, theirs in zip(found, wanted, strict=True):
                        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def test_the_report_names_what_answered(opened: Open) -> None:
    """Versions and device, for reports."""
    with opened() as session:
        assert session.info["device"] == "cpu" and session.info["class"] == "InferenceSession"
        assert session.info["onnxruntime"].count(".") >= 2


# --- prompts in parts ------------------------------------------------------------------------------------


def load_worker(name: str = "onnxruntime_worker") -> Any:
    """The worker's module, in this process: its limits can be changed here."""
    spec = importlib.util.spec_from_file_location(name, WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class InProcess:
    """A worker's answers as arrays, with a record of its calls."""

    def __init__(self, artifact: Path, folder: Path, *, fused: bool, most: int | None, part: int) -> None:
        module = load_worker()
        if most is not None:
            module.MOST_BYTES = most
        module.PART = part
        folder.mkdir()
        request = {"artifact": str(artifact), "folder": str(folder), "device": "cpu", "dtype": "F32", "heads": 4}
        self.folder, self.calls = folder, []
        self.worker = module.Worker({**request, "fused": fused, "threads": 1})
        call = self.worker.call

        def recorded(ids: Any, *arguments: Any, **more: Any) -> Any:
            self.calls.append(len(ids[0]))
            return call(ids, *arguments, **more)

        self.worker.call = recorded

    def logits(self, row: Sequence[int], keep: Sequence[int], positions: Sequence[int] | None = None) -> Array:
        answer = self.worker.logits({"rows": [row], "positions": positions, "keep": list(keep)})
        return np.load(self.folder / answer["logits"])[0].astype(np.float64)

    def generate(self, prompt: Sequence[int], count: int, boundaries: Sequence[int]) -> tuple[list[int], Array]:
        answer = self.worker.generate({"prompt": prompt, "new_tokens": count, "boundaries": boundaries})
        return answer["tokens"], np.load(self.folder / answer["logits"]).astype(np.float64)


@pytest.mark.parametrize("double", [True, False], ids=["double", "tables"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_prompt_in_parts_is_what_it_is_in_one_call(
    attention: str, double: bool, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Every part knows how long the sequence gets: keys of early parts are rotated with the tier of the whole. Lengths
    on both sides of the boundaries and of the parts."""
    artifact, fused = folder(attention=attention, double=double), attention == "gqa"
    whole = InProcess(artifact, tmp_path / "whole", fused=fused, most=None, part=32)
    parts = InProcess(artifact, tmp_path / "parts", fused=fused, most=0, part=32)
    for count in (1, 31, 32, 33, 64, 65, 129, 200, 256):
        row, keep = tokens(count), sorted({0, count // 3, count // 2, count - 2, count - 1} - {-1})
        asked, given = whole.logits(row, keep), parts.logits(row, keep)
        assert asked.shape == given.shape == (len(keep), 101)
        assert compare(asked, given).kl_max < EXACT, count
    assert max(whole.calls) == 256 and max(parts.calls) == 32
    row = tokens(200)
    backwards = [199, 3, 100]
    assert compare(whole.logits(row, backwards), parts.logits(row, backwards)).kl_max < EXACT
    places = [*range(40), *range(100, 140)]
    assert compare(whole.logits(row[:80], [79], places), parts.logits(row[:80], [79], places)).kl_max < EXACT


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_after_a_prompt_in_parts_goes_on_with_its_caches(
    attention: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The same tokens and logits, with and without a boundary in between, read anew in parts too."""
    artifact, fused = folder(attention=attention), attention == "gqa"
    whole = InProcess(artifact, tmp_path / "whole", fused=fused, most=None, part=16)
    parts = InProcess(artifact, tmp_path / "parts", fused=fused, most=0, part=16)
    for start, boundaries in ((61, (64, 128)), (61, ()), (126, (64, 128)), (70, (64, 128))):
        ours, answers = whole.generate(tokens(start), 6, boundaries)
        theirs, others = parts.generate(tokens(start), 6, boundaries)
        assert ours == theirs
        assert compare(answers, others).kl_mean < EXACT


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("prompt", "readings"), [(40, 1), (57, 2), (64, 1), (121, 2), (200, 1)])
def test_rows_behind_a_prompt_score_as_whole_rows(attention: str, prompt: int, readings: int, opened: Open) -> None:
    """Rows of one tier, and on both sides of a boundary; a prompt at a boundary, whose rows have the next tier."""
    start, rows = tokens(prompt), [tokens(size, size) for size in (9, 5, 7, 12)]
    judged = [3, 1, 6, 11]
    with opened(attention=attention) as session:
        wanted = session.score([start + row for row in rows], judged)
        asked: list[str] = []
        ask = session._interpreter.ask

        def noted(request: dict[str, Any]) -> dict[str, Any]:
            asked.append(request["do"])
            return ask(request)

        session._interpreter.ask = noted  # type: ignore[method-assign]
        try:
            found = session.score_behind(start, rows, judged)
        finally:
            del session._interpreter.ask
    assert asked == ["behind"] * readings
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.losses, theirs.losses, atol=1e-4)
        assert ours.preferred.tolist() == theirs.preferred.tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_prompt_is_read_once_in_the_tier_of_the_whole(
    attention: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Calls with the prompt's tokens once, in one call or in parts, then each row's. In the tier that it has alone, the
    same prompt gives its rows other logits: that would be the mistake."""
    once = InProcess(folder(attention=attention), tmp_path / "a", fused=attention == "gqa", most=None, part=32)
    request = {"prompt": tokens(60), "rows": [tokens(8, 1), tokens(5, 2), tokens(6, 3)], "judged": [7, 2, 1]}
    answers = {}
    for length, calls in ((None, [60, 8, 5, 6]), (68, [32, 28, 8, 5, 6])):
        once.calls.clear()
        answers[length] = np.load(once.folder / once.worker.behind({**request, "length": length})["logits"])
        assert once.calls == calls
    assert compare(answers[None][:7], answers[68][:7]).kl_mean > 1e-4
    whole = once.logits(tokens(60) + tokens(8, 1), range(60, 67))
    assert compare(whole, answers[68][:7].astype(np.float64)).kl_max < 1e-6


def test_scores_decide_where_attention_keeps_them(folder: Callable[..., Path], tmp_path: Path) -> None:
    """The standard operator's scores grow with the square of the prompt; the fused one's don't exist."""
    limit = 4 * 150 * 101  # bytes of the logits of 150 tokens
    fused = InProcess(folder(), tmp_path / "fused", fused=True, most=limit, part=64)
    fused.logits(tokens(150), [149])
    assert fused.calls == [150]
    fused.logits(tokens(151), [150])
    assert fused.calls[1:] == [64, 64, 23]
    standard = InProcess(folder(attention="standard"), tmp_path / "standard", fused=False, most=limit, part=64)
    standard.logits(tokens(150), [149])
    assert standard.calls == [64, 64, 22]
    standard.logits(tokens(60), [59])
    assert standard.calls[3:] == [60]


# --- refusals --------------------------------------------------------------------------------------------


def test_a_runtime_that_is_missing_is_the_environment(folder: Callable[..., Path], tmp_path: Path) -> None:
    """In the interpreter that was named: exit code 6, with what to install."""
    code = "import sys, runpy; sys.modules['onnxruntime'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -c "{code}" "$2"\n')
    script.chmod(0o755)
    with pytest.raises(EnvironmentFailure, match=r"needs onnxruntime.*pip install 'lrconvert\[onnx\]'") as caught:
        open_session(folder(), boundaries=(), heads=4, fused=True, python=str(script))
    assert caught.value.exit_code == 6


def test_a_missing_device_is_an_error(folder: Callable[..., Path]) -> None:
    with pytest.raises(EnvironmentFailure, match="no CUDA provider; onnxruntime-gpu has one"):
        open_session(folder(), boundaries=(), heads=4, fused=True, device="cuda")


@pytest.mark.parametrize("what", ["graph", "data", "empty graph"])
def test_a_folder_that_does_not_load_is_bad_input(what: str, folder: Callable[..., Path], tmp_path: Path) -> None:
    """ONNX Runtime's own words in one line."""
    broken = tmp_path / "broken"
    shutil.copytree(folder(), broken)
    if what == "data":
        (broken / DATA).unlink()
    else:
        data = (broken / GRAPH).read_bytes()
        (broken / GRAPH).write_bytes(data[: len(data) // 2] if what == "graph" else b"")
    with pytest.raises(InputError, match="the runtime refuses the artifact: ") as caught:
        open_session(broken, boundaries=(), heads=4, fused=True)
    assert "\n" not in str(caught.value)


def test_reference_evaluator_refuses_what_is_not_standard(opened: Open) -> None:
    """GroupQueryAttention is Microsoft's: the second evaluator refuses it, the first does not."""
    with opened(attention="gqa") as session:
        with pytest.raises(InputError):
            session.evaluated(tokens(8), [7])
        assert len(session.logits([tokens(8)], keep=[-1])) == 1


def test_the_whole_graph_in_both_implementations(opened: Open, pico: Pico) -> None:
    """onnx.reference, which shares no code with ONNX Runtime, and the reference decoder agree."""
    for family in ("llama", "phi3"):
        model = pico(family)
        with opened(family, attention="standard") as session:
            row = tokens(70)
            (fast,) = session.logits([row], keep=range(70))
            slow = session.evaluated(row, range(70))
        wanted = ReferenceRunner(model).answer(spec_of(model), row, 70, np.arange(70))
        assert compare(wanted, fast).kl_mean < EXACT and compare(wanted, slow).kl_mean < EXACT


def test_the_tier_is_chosen_by_the_graph_not_by_the_session(
    tmp_path: Path, pico_folder: Callable[..., Path], interpreter: Interpreter
) -> None:
    """Boundaries given to a session only say when to read anew: forward passes don't depend on them."""
    model = open_model(pico_folder("llama"))
    recipe = recipe_with(model, (64, 256))
    artifact = export(model, recipe, tmp_path / "a")
    spec, reference = spec_of(model, recipe), ReferenceRunner(model)
    with open_session(artifact, boundaries=(7,), heads=4, fused=True, threads=1, interpreter=interpreter) as session:
        for count in (64, 65):
            (found,) = session.logits([tokens(count)], keep=[-1])
            wanted = reference.answer(spec, tokens(count), count, np.array([count - 1]))
            assert compare(wanted, found).kl_mean < EXACT
