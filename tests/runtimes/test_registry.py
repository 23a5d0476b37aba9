# SPDX-License-Identifier: Apache-2.0
"""The registry of runtimes: its rows are complete, and one file with one row is all that another runtime takes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from conftest import Result, own_name, recipe_for
from support import toy_runtime
from support.engine_suite import bake

import lrconvert.runtimes as registry
from lrconvert.artifact.manifest import MANIFEST
from lrconvert.checkpoint import Model
from lrconvert.cli.eval import perplexity
from lrconvert.cli.verify import command as verify
from lrconvert.errors import UnsupportedError, UsageError
from lrconvert.parity.asking import ASKED, CHECKS
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.recipe import write_recipe
from lrconvert.runtimes import RUNTIMES, backend_choices, get_runtime, register, runtime_for, runtimes_of
from lrconvert.runtimes.answers import PROTOCOLS
from lrconvert.runtimes.backend import Runtime
from lrconvert.runtimes.llama_cpp import LlamaSession
from lrconvert.runtimes.onnxruntime import ANSWERS, OnnxSession
from lrconvert.runtimes.transformers import TransformersSession
from lrconvert.targets import all_targets, target_names

SHIPPED = tuple(RUNTIMES)
TARGETS = target_names()


@pytest.fixture
def toy() -> Iterator[Runtime]:
    register(toy_runtime.RUNTIME)
    yield toy_runtime.RUNTIME
    del RUNTIMES["toy"]


def choices(command: click.Command, name: str) -> list[str]:
    (option,) = (param for param in command.params if param.name == name)
    assert isinstance(option.type, click.Choice)
    return list(option.type.choices)


# --- the rows --------------------------------------------------------------------------------------------


def test_every_row_is_complete(pico: Callable[..., Model]) -> None:
    """A name of its own, something to run, backends with bounds; what it needs is an extra of ours."""
    for name in RUNTIMES:
        runtime = get_runtime(name)
        assert runtime.name == name
        assert runtime.runs and set(runtime.runs) <= set(TARGETS), name
        assert runtime.backends, name
        assert all(extra in ("hf", "onnx", "llama") for _, extra in runtime.needs), name
        for backend in runtime.backends:
            assert backend.capability(pico("llama")).name, backend.name
            assert backend.tolerances, backend.name
            assert set(backend.exact_types or ()) <= {row.dtype for row in backend.tolerances}, backend.name
    names = [backend.name for name in RUNTIMES for backend in get_runtime(name).backends]
    assert len(names) == len(set(names))  # a report tells rows by them


def test_every_file_is_a_row() -> None:
    """A module with a RUNTIME is in the table."""
    folder = Path(registry.__file__).parent
    with_rows = {path.stem for path in folder.glob("*.py") if "\nRUNTIME = " in path.read_text(encoding="utf-8")}
    assert with_rows == set(RUNTIMES.values())


def test_every_target_has_a_runtime_of_its_own() -> None:
    """Its row names the one that is asked by default."""
    assert {target.name: target.runtime for target in all_targets()} == {
        name: runtime_for(name).name for name in TARGETS
    }
    assert [runtime.name for runtime in runtimes_of("hf")] == ["transformers", "mlx", "vllm"]
    assert runtime_for("hf", "vllm").name == "vllm"
    with pytest.raises(UsageError, match=r"vllm does not run gguf artifacts\. Runtimes that do: llama\.cpp"):
        runtime_for("gguf", "vllm")
    with pytest.raises(UsageError, match=r"no runtime is named nobody\. Runtimes: transformers, mlx"):
        get_runtime("nobody")
    with pytest.raises(UnsupportedError, match=r"no runtime runs abacus artifacts"):
        runtime_for("abacus")


def test_the_choices_are_the_registry(toy: Runtime) -> None:
    """Of --runtime and --code, in both commands; one that is registered later is among them."""
    assert choices(verify, "runtime") == list(RUNTIMES) == [*SHIPPED, "toy"]
    assert choices(verify, "codes") == backend_choices() == ["native", "custom"]
    assert choices(perplexity, "code") == ["native", "custom", "reference"]


def test_a_name_is_taken_once(toy: Runtime) -> None:
    with pytest.raises(ValueError, match="toy is already registered"):
        register(toy)


def test_names_cost_no_imports() -> None:
    """Neither the names nor a row import what the runtime runs in."""
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "gguf")
    code = (
        "import sys; from lrconvert.cli import verify, _evals; from lrconvert import runtimes\n"
        "assert 'numpy' not in sys.modules and list(runtimes.RUNTIMES)\n"
        "for name in runtimes.RUNTIMES: runtimes.get_runtime(name)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what sessions answer --------------------------------------------------------------------------------


def test_sessions_have_what_they_answer() -> None:
    """Each answer is a protocol, whose methods the session has; whatever is checked by it is an answer."""
    protocols: dict[str, type] = {**PROTOCOLS}
    answers = {
        LlamaSession: LlamaSession.answers,
        OnnxSession: ANSWERS | {"placements"},
        TransformersSession: TransformersSession.answers,
    }
    for session, named in answers.items():
        assert named <= set(PROTOCOLS)
        for answer in named:
            assert issubclass(session, protocols[answer]), (session, answer)
    assert set(CHECKS) < set(PROTOCOLS)
    assert {"contexts", "cached", "shift", "behind"} == set(PROTOCOLS) - set(CHECKS)
    assert "shift" in ASKED


def test_parity_knows_no_session_class() -> None:
    """Nothing above the runtimes asks which one a session is of."""
    for package in ("parity", "evals"):
        for path in Path(importlib.import_module(f"lrconvert.{package}").__path__[0]).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "isinstance(session" not in text, path.name
            for name in ("LlamaSession", "OnnxSession", "TransformersSession"):
                assert name not in text, (path.name, name)


# --- another runtime -------------------------------------------------------------------------------------


def test_a_runtime_is_one_file_and_one_row(
    toy: Runtime, cli: Callable[..., Result], pico: Callable[..., Model], tmp_path: Path
) -> None:
    """The toy passes on every case, and its report stands beside the artifact's own."""
    model = pico("llama")
    artifact = bake(model, recipe_for(model, even=True), own_name(tmp_path / "a"))
    result = cli("verify", artifact, "--runtime", "toy", "--json")
    assert result.code == 0, result.err
    rows = [row for row in json.loads(result.out)["rows"] if row["code"] == "toy"]
    assert {row["verdict"] for row in rows} == {"pass"}
    assert {"below 64", "at 64", "one past 64", "far end", "decode across 64", "batch across the boundary"} <= {
        row["case"] for row in rows
    }
    assert json.loads((artifact / MANIFEST).read_text())["parity"]["engines"]["toy"]["passed"] is True
    refused = cli("verify", tmp_path / "m.gguf", "--runtime", "toy")
    assert refused.code == 2 and "toy does not run gguf artifacts" in refused.err
    refused = cli("verify", artifact, "--runtime", "toy", "--code", "native")
    assert refused.code == 2 and "--runtime toy has only one" in refused.err


@pytest.mark.parametrize("mutant", sorted(set(RECIPE_MUTANTS) - {"no start tokens"}))  # of which it knows none
def test_it_catches_mutants(
    mutant: str, toy: Runtime, cli: Callable[..., Result], pico: Callable[..., Model], tmp_path: Path
) -> None:
    """A mistake in the recipe that was baked fails against the right one, in the toy's own rows."""
    model = pico("llama")
    right = recipe_for(model, even=True)
    wrong = RECIPE_MUTANTS[mutant](right)
    assert wrong is not None
    artifact = bake(model, wrong, own_name(tmp_path / "a"))
    recipe = write_recipe(right, tmp_path / "recipe")
    result = cli("verify", artifact, "--against", model.reference, "--recipe", recipe, "--runtime", "toy", "--json")
    assert result.code == 5
    failed = [row for row in json.loads(result.out)["rows"] if row["code"] == "toy" and row["verdict"] == "fail"]
    assert failed and max(row["kl_mean"] / row["bound"] for row in failed if "bound" in row) > 100
